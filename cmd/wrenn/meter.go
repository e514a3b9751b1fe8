package main

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/internal/client"
)

// meter shows on a terminal how far a copy has come, once its content moves.
type meter struct {
	began chan int64 // the total in bytes; -1: not known
	done  atomic.Int64
	note  chan string
	end   chan struct{}
	gone  chan struct{}
	tty   bool
}

// startMeter returns a meter that runs until stop.
func startMeter() *meter {
	p := &meter{
		began: make(chan int64), note: make(chan string), end: make(chan struct{}), gone: make(chan struct{}),
		tty: term.IsTerminal(int(os.Stderr.Fd())),
	}
	go p.run()
	return p
}

// tell makes the meter show a copy.
func (p *meter) tell(x *client.Copy) {
	x.Begin = func(total int64) { give(p, p.began, total) }
	x.Moved = func(n int) { p.done.Add(int64(n)) }
	x.Note = func(text string) { give(p, p.note, text) }
}

// give sends to a meter that may have stopped.
func give[T any](p *meter, to chan T, v T) {
	select {
	case to <- v:
	case <-p.gone:
	}
}

func (p *meter) run() {
	defer close(p.gone)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var total int64
	var began time.Time
	for {
		select {
		case <-p.end:
			p.show("\r\x1b[K")
			return
		case total = <-p.began:
			began = time.Now()
		case text := <-p.note:
			p.show("\r\x1b[K")
			complain("%s", text)
		case <-tick.C:
			if !began.IsZero() {
				p.show(copyLine(p.done.Load(), total, time.Since(began)))
			}
		}
	}
}

func (p *meter) show(text string) {
	if p.tty {
		fmt.Fprint(os.Stderr, text)
	}
}

func (p *meter) stop() { close(p.end); <-p.gone }

// copyLine is what a terminal shows of a copy.
func copyLine(done, total int64, took time.Duration) string {
	rate := fmt.Sprintf("%s, %s/s", bytesText(done), bytesText(int64(float64(done)/max(took.Seconds(), 0.001))))
	if total <= 0 {
		return "\r\x1b[K" + rate
	}
	const width = 24
	part := min(done, total)
	full := int(part * width / total)
	return fmt.Sprintf("\r\x1b[K[%s%s] %3d%%  %s", strings.Repeat("#", full), strings.Repeat("-", width-full), part*100/total, rate)
}

// bytesText is a number of bytes as people read it.
func bytesText(n int64) string {
	value, unit := float64(n), "B"
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if value < 1024 {
			break
		}
		value, unit = value/1024, next
	}
	if unit == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}
