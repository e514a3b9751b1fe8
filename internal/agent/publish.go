package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/gateway"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// publisher listens on the host's loopback for ports of sandboxes, for as long as a
// sandbox has not ended. It is safe for concurrent use.
type publisher struct {
	manager *sandbox.Manager
	door    *gateway.Gateway
	log     *slog.Logger

	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup

	mu   sync.Mutex
	open map[sandbox.ID][]net.Listener
}

func newPublisher(m *sandbox.Manager, door *gateway.Gateway, log *slog.Logger) *publisher {
	p := &publisher{manager: m, door: door, log: log, open: map[sandbox.ID][]net.Listener{}}
	p.life, p.end = context.WithCancel(context.Background())
	return p
}

// listen opens listeners, as server.Config.Publish says.
func (p *publisher) listen(ports []sandbox.Publish) (opened []sandbox.Publish, keep func(sandbox.ID), drop func(), err error) {
	var listeners []net.Listener
	drop = func() {
		for _, l := range listeners {
			l.Close()
		}
	}
	for _, port := range ports {
		l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port.HostPort))
		if err != nil {
			drop()
			return nil, nil, nil, portError(port, err)
		}
		listeners = append(listeners, l)
		port.HostPort = uint16(l.Addr().(*net.TCPAddr).Port)
		opened = append(opened, port)
	}
	return opened, func(id sandbox.ID) {
		p.serve(id, opened, listeners)
		listeners = nil
	}, drop, nil
}

func portError(port sandbox.Publish, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return errdefs.AlreadyExists.Errorf("publish port %d: port %d of the host's 127.0.0.1 is in use", port.Port, port.HostPort)
	case errors.Is(err, syscall.EACCES):
		return errdefs.Denied.Errorf("publish port %d: port %d of the host takes a privilege", port.Port, port.HostPort)
	}
	return fmt.Errorf("publish port %d: %w", port.Port, err)
}

// serve carries what comes to the listeners to a sandbox until that has ended. It owns the
// listeners.
func (p *publisher) serve(id sandbox.ID, ports []sandbox.Publish, listeners []net.Listener) {
	p.mu.Lock()
	p.open[id] = append(p.open[id], listeners...)
	for i, l := range listeners {
		p.wg.Go(func() { p.door.ServePort(p.life, l, id, ports[i].Port) })
	}
	p.mu.Unlock()
	// It may have ended before it was known here.
	if info, err := p.manager.Get(id); err != nil || ended(info.State) {
		p.close(id)
	}
}

func ended(state sandbox.State) bool { return state == sandbox.Stopping || state == sandbox.Stopped }

// close ends the listeners of a sandbox.
func (p *publisher) close(id sandbox.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.open[id] {
		l.Close()
	}
	delete(p.open, id)
}

// run listens for the sandboxes that an earlier agent made, and listens no more for those
// that end, until ctx does. Then it ends all.
func (p *publisher) run(ctx context.Context) {
	for _, info := range p.manager.List(false) {
		for _, port := range info.Publish {
			opened, keep, _, err := p.listen([]sandbox.Publish{port})
			if err != nil {
				p.log.Warn("published port is not listened for", "sandbox", info.ID, "port", port.Port, "err", err)
				continue
			}
			p.log.Debug("published port", "sandbox", info.ID, "port", port.Port, "host_port", opened[0].HostPort)
			keep(info.ID)
		}
	}
	_ = p.manager.Events(ctx, 0, true, func(e sandbox.Event) error {
		if ended(e.To) {
			p.close(e.ID)
		}
		return nil
	})
	<-ctx.Done()
	p.end()
	p.mu.Lock()
	for id, listeners := range p.open {
		for _, l := range listeners {
			l.Close()
		}
		delete(p.open, id)
	}
	p.mu.Unlock()
	p.wg.Wait()
}
