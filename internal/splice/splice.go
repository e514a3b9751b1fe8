// Package splice joins two connections.
package splice

import (
	"io"
	"net"
	"sync"
)

// Run carries to b what comes from a, and to a what comes from b. It passes on
// the end of each direction, and returns when both have ended. It reads a's bytes
// from fromA and b's from fromB, because the first ones may have been read already.
// To end it earlier, close both connections.
func Run(a, b net.Conn, fromA, fromB io.Reader) {
	var up sync.WaitGroup
	up.Go(func() { carry(b, fromA) })
	carry(a, fromB)
	up.Wait()
}

func carry(to net.Conn, from io.Reader) {
	// An error ends the direction as its end does.
	_, _ = io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}
