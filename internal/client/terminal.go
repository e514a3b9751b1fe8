package client

import (
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"connectrpc.com/connect"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/api/process"
)

// rawTerminal hands every key on as it is, until restored. A second call of
// restore does nothing.
func rawTerminal(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	before, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("prepare the terminal: %w", err)
	}
	return sync.OnceFunc(func() { _ = term.Restore(fd, before) }), nil
}

func terminalSize(f *os.File) *process.PTY_Size {
	cols, rows, err := term.GetSize(int(f.Fd()))
	if err != nil || cols <= 0 || rows <= 0 {
		cols, rows = 80, 24
	}
	return &process.PTY_Size{Cols: uint32(cols), Rows: uint32(rows)}
}

// followSize keeps the command's terminal as large as ours until the connection
// ends.
func (x *execution) followSize() {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	for {
		// The first time, too: it may have changed while the command started.
		_, _ = x.guest.Update(x.life, connect.NewRequest(&process.UpdateRequest{
			Process: x.self, Pty: &process.PTY{Size: terminalSize(x.Terminal)},
		}))
		select {
		case <-x.life.Done():
			return
		case <-changed:
		}
	}
}
