package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/splice"
)

// ErrEnded says that a sandbox does not exist any more.
var ErrEnded = errors.New("its ports are gone with it")

// Reachable says why the ports of the sandbox cannot be reached, if they cannot.
// The error is ErrEnded where they never will be.
func (s *Sandbox) Reachable(ctx context.Context) error {
	info, err := s.Info(ctx)
	switch {
	case connect.CodeOf(err) == connect.CodeNotFound:
		return fmt.Errorf("%w; %w", err, ErrEnded)
	case err != nil:
		return err
	case info.GetStatus() == "stopped":
		return fmt.Errorf("sandbox %s is %s; %w", s.ID, StatusText(info), ErrEnded)
	case info.GetAutoResume() && !info.GetFilesOnly() && (info.GetStatus() == "paused" || info.GetStatus() == "hibernated"):
		// A connection resumes it.
	case info.GetStatus() != "running":
		return fmt.Errorf("sandbox %s is %s; its ports need it running", s.ID, StatusText(info))
	}
	return nil
}

// PortURL is the URL under which a port of the sandbox answers HTTP where the agent's
// domain leads to it; every name below localhost is the machine itself.
func (s *Sandbox) PortURL(ctx context.Context, port uint16) (string, error) {
	at, err := s.host.Address(ctx)
	if err != nil {
		return "", err
	}
	scheme, _, _ := strings.Cut(at.URL, "://")
	return fmt.Sprintf("%s://%d-%s.%s/", scheme, port, s.ID, at.Domain), nil
}

// portName is a host name by which the agent knows a port of a sandbox.
func portName(id string, port uint16) string { return fmt.Sprintf("%d-%s.localhost", port, id) }

// Forward carries each connection that listener accepts to a port of the
// sandbox, until ctx ends, which is no error, or the sandbox does: ErrEnded. It
// closes the listener and returns when all connections are closed. failed is
// told of each connection that could not be carried, and may be called from
// several goroutines.
func (s *Sandbox) Forward(ctx context.Context, listener net.Listener, port uint16, failed func(from net.Addr, err error)) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer listener.Close()
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := listener.Accept()
		if err != nil {
			if cause := context.Cause(ctx); errors.Is(cause, ErrEnded) {
				return cause
			} else if cause != nil {
				return nil
			}
			return err
		}
		open.Go(func() {
			defer conn.Close()
			if err := s.carry(ctx, conn, port); err != nil && ctx.Err() == nil {
				failed(conn.RemoteAddr(), err)
				if err := s.Reachable(ctx); errors.Is(err, ErrEnded) {
					end(err)
				}
			}
		})
	}
}

// carry connects conn to a port of the sandbox until both directions have ended.
func (s *Sandbox) carry(ctx context.Context, conn net.Conn, port uint16) error {
	agent, rest, err := s.tunnel(ctx, port)
	if err != nil {
		return err
	}
	defer agent.Close()
	defer context.AfterFunc(ctx, func() { conn.Close(); agent.Close() })()
	splice.Run(conn, agent, conn, rest)
	return nil
}

// tunnel opens a connection to a port of the sandbox through the agent; the
// guest's bytes are read from r.
func (s *Sandbox) tunnel(ctx context.Context, port uint16) (_ net.Conn, r io.Reader, err error) {
	secrets, err := s.tokens(ctx)
	if err != nil {
		return nil, nil, err
	}
	conn, err := s.host.dialHTTP1(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	name := portName(s.ID, port)
	private := ""
	if secrets.traffic != "" {
		private = guestapi.HeaderTraffic + ": " + secrets.traffic + "\r\n"
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %[1]s:%[2]d HTTP/1.1\r\nHost: %[1]s\r\n%[3]s\r\n", name, port, private); err != nil {
		return nil, nil, err
	}
	header := &io.LimitedReader{R: conn, N: maxAnswerHeader}
	buffer := bufio.NewReader(header)
	resp, err := http.ReadResponse(buffer, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode == http.StatusOK {
		header.N = math.MaxInt64
		return conn, buffer, nil
	}
	defer resp.Body.Close()
	return nil, nil, s.refusal(ctx, resp)
}
