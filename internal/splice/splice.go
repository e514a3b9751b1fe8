// Package splice joins two connections.
package splice

import (
	"io"
	"net"
	"sync"
)

// Run carries to b what comes from a, and to a what comes from b. It passes on
// the end of each direction, and returns when both have ended. What a sends is
// read from fromA, and what b sends from fromB: the first bytes may have been read
// already. Whoever wants an earlier end closes both connections.
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
