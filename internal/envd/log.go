package envd

import (
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	logBurst = 64 << 10
	logRate  = 1 << 10 // bytes per second
)

// BoundedLog returns a writer that writes whole lines to w up to a rate, and
// counts the others: a console is slow, and the host keeps its output on a disk.
// Safe for concurrent use.
func BoundedLog(w io.Writer) io.Writer {
	return &boundedLog{w: w, left: logBurst, last: time.Now()}
}

type boundedLog struct {
	mu      sync.Mutex
	w       io.Writer
	left    float64
	last    time.Time
	dropped int
}

func (l *boundedLog) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.left = min(logBurst, l.left+now.Sub(l.last).Seconds()*logRate)
	l.last = now
	if float64(len(line)) > l.left {
		l.dropped++
		return len(line), nil
	}
	l.left -= float64(len(line))
	if l.dropped > 0 {
		fmt.Fprintf(l.w, "envd: %d log lines left out\n", l.dropped)
		l.dropped = 0
	}
	return l.w.Write(line)
}
