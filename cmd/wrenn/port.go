package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

func newPort(c *client) *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "port ID PORT",
		Short: "Say how to reach a port of a sandbox, or forward one",
		Long: `Print the URL under which a port of a running sandbox answers HTTP, and the
headers that name it to the agent where the host name cannot.

With --listen, forward TCP connections to the port instead, until Ctrl-C: HTTP
or anything else. The agent carries them; a server that listens on 127.0.0.1 in
the sandbox is reached, too. Port 49983, the sandbox's daemon, is served as HTTP
alone and not forwarded.`,
		Example: "  wrenn port 3fa 8000\n  wrenn port 3fa 5432 --listen 127.0.0.1:5432\n  wrenn port 3fa 5432 --listen :0",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := strconv.ParseUint(args[1], 10, 16)
			if err != nil || port == 0 {
				return fmt.Errorf("port %q is not a number from 1 to 65535", args[1])
			}
			id, err := c.resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			base, err := url.Parse(c.host)
			if err != nil {
				return fmt.Errorf("--host: %w", err)
			}
			name := fmt.Sprintf("%d-%s.localhost", port, id)
			if p := base.Port(); p != "" {
				name += ":" + p
			}
			if listen != "" && port == guestapi.Port {
				return fmt.Errorf("port %d is the sandbox's daemon, which is not forwarded; it is served as HTTP at %s://%s/", port, base.Scheme, name)
			}
			if err := c.mustRun(cmd.Context(), id); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if listen != "" {
				return c.forward(cmd.Context(), id, port, listen, out)
			}
			fmt.Fprintf(out, "%s://%s/\n", base.Scheme, name)
			fmt.Fprintf(out, "%s/ with the headers\n  E2b-Sandbox-Id: %s\n  E2b-Sandbox-Port: %d\n", c.host, id, port)
			return nil
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "forward from this address (HOST:PORT; port 0 picks one); without a host it is 127.0.0.1")
	return cmd
}

// errEnded is that a sandbox is there no more.
var errEnded = errors.New("its ports are gone with it")

// mustRun says why the ports of a sandbox cannot be reached, if they cannot.
func (c *client) mustRun(ctx context.Context, id string) error {
	resp, err := c.agent().GetSandbox(ctx, connect.NewRequest(&hostagentv1.GetSandboxRequest{SandboxId: id}))
	switch {
	case connect.CodeOf(err) == connect.CodeNotFound:
		return fmt.Errorf("%w; %w", err, errEnded)
	case err != nil:
		return err
	case resp.Msg.Sandbox.GetStatus() == "stopped":
		return fmt.Errorf("sandbox %s is %s; %w", id, statusText(resp.Msg.Sandbox), errEnded)
	case resp.Msg.Sandbox.GetStatus() != "running":
		return fmt.Errorf("sandbox %s is %s; its ports need it running", id, statusText(resp.Msg.Sandbox))
	}
	return nil
}

// forward carries TCP connections to a port of a sandbox until ctx or the
// sandbox ends, and prints where it listens.
func (c *client) forward(ctx context.Context, id string, port uint64, listen string, out io.Writer) error {
	if strings.HasPrefix(listen, ":") {
		listen = "127.0.0.1" + listen
	} else if !strings.Contains(listen, ":") {
		listen = "127.0.0.1:" + listen
	}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	fmt.Fprintln(out, listener.Addr())
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := listener.Accept()
		if err != nil {
			if cause := context.Cause(ctx); errors.Is(cause, errEnded) {
				return cause
			} else if cause != nil {
				return nil // Ctrl-C is how one leaves
			}
			return err
		}
		open.Go(func() {
			defer conn.Close()
			if err := c.carry(ctx, conn, id, port); err != nil && ctx.Err() == nil {
				complain("%s: %s", conn.RemoteAddr(), explain(err))
				if err := c.mustRun(ctx, id); errors.Is(err, errEnded) {
					end(err)
				}
			}
		})
	}
}

// carry makes conn one to a port of a sandbox, until one side has ended.
func (c *client) carry(ctx context.Context, conn net.Conn, id string, port uint64) error {
	agent, rest, err := c.connectTunnel(ctx, id, port)
	if err != nil {
		return err
	}
	defer agent.Close()
	defer context.AfterFunc(ctx, func() { conn.Close(); agent.Close() })()
	var up sync.WaitGroup
	up.Go(func() {
		_, _ = io.Copy(agent, conn)
		_ = agent.CloseWrite()
	})
	_, _ = io.Copy(conn, rest)
	_ = conn.(*net.TCPConn).CloseWrite()
	up.Wait()
	return nil
}

// connectTunnel opens a connection to a port of a sandbox through the agent;
// the guest's bytes are read from r.
func (c *client) connectTunnel(ctx context.Context, id string, port uint64) (_ *net.TCPConn, r io.Reader, err error) {
	base, err := url.Parse(c.host)
	if err != nil {
		return nil, nil, fmt.Errorf("--host: %w", err)
	}
	if base.Scheme != "http" {
		return nil, nil, errors.New("ports are forwarded over an http:// agent only")
	}
	raw, err := c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			raw.Close()
		}
	}()
	// The target is of the form by which the agent knows a sandbox.
	if _, err := fmt.Fprintf(raw, "CONNECT %d-%s.localhost:%d HTTP/1.1\r\nHost: %[1]d-%[2]s.localhost\r\n\r\n", port, id, port); err != nil {
		return nil, nil, err
	}
	header := &io.LimitedReader{R: raw, N: maxAnswerHeader}
	buffer := bufio.NewReader(header)
	resp, err := http.ReadResponse(buffer, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode == http.StatusOK {
		header.N = math.MaxInt64
		return raw.(*net.TCPConn), buffer, nil
	}
	defer resp.Body.Close()
	var refusal struct{ Message string }
	if json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&refusal) != nil || refusal.Message == "" {
		refusal.Message = "the host answered " + resp.Status
	}
	return nil, nil, errors.New(errdefs.Foreign(refusal.Message))
}
