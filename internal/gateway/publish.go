package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/splice"
)

// ServePort carries each connection that l accepts to a port of a sandbox, until l is
// closed, and returns when all connections are closed; ctx closes them. While the sandbox
// does not run, and where nothing listens, connections are closed at once.
func (g *Gateway) ServePort(ctx context.Context, l net.Listener, id sandbox.ID, port uint16) {
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptor is free
			select {
			case <-time.After(acceptPause):
				continue
			case <-ctx.Done():
				return
			}
		}
		open.Go(func() {
			defer conn.Close()
			if err := g.carry(ctx, conn, id, port); err != nil {
				g.log.Debug("connection to a published port failed", "sandbox", id, "port", port, "err", err)
			}
		})
	}
}

// acceptPause is how long an accept that failed for want of descriptors is not tried again.
const acceptPause = 50 * time.Millisecond

// carry connects conn to a port of a sandbox until both directions have ended.
func (g *Gateway) carry(ctx context.Context, conn net.Conn, id sandbox.ID, port uint16) error {
	this := load{id, toPort}
	if !g.enter(this) {
		return errdefs.Exhausted.Errorf("sandbox %s has %d requests of this kind under way, which is the most", id, maxPerSandbox)
	}
	defer g.leave(this)
	info, err := g.sandboxes.Get(id)
	if err == nil && !runs(info) && wakes(info) {
		err = g.sandboxes.Wake(ctx, id)
	}
	if err != nil {
		return err
	}
	lease, err := g.sandboxes.Lease(ctx, id)
	if err != nil {
		return err
	}
	defer lease.Release()
	ctx, cancel := lease.Context(ctx)
	defer cancel()
	guest, err := g.links.of(lease).dial(ctx, netip.AddrPortFrom(lease.Addr, port).String())
	if err != nil {
		return err
	}
	defer guest.Close()
	defer context.AfterFunc(ctx, func() { conn.Close(); guest.Close() })()
	splice.Run(conn, guest, conn, guest)
	return nil
}
