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
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
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
the sandbox is reached, too.`,
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
			if listen != "" {
				return c.forward(cmd.Context(), id, port, listen)
			}
			base, err := url.Parse(c.host)
			if err != nil {
				return fmt.Errorf("--host: %w", err)
			}
			name := fmt.Sprintf("%d-%s.localhost", port, id)
			if p := base.Port(); p != "" {
				name += ":" + p
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "%s://%s/\n", base.Scheme, name)
			fmt.Fprintf(out, "%s/ with the headers\n  E2b-Sandbox-Id: %s\n  E2b-Sandbox-Port: %d\n", c.host, id, port)
			return nil
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "forward from this address (HOST:PORT; port 0 picks one); without a host it is 127.0.0.1")
	return cmd
}

// forward carries TCP connections to a port of a sandbox until ctx ends.
func (c *client) forward(ctx context.Context, id string, port uint64, listen string) error {
	if strings.HasPrefix(listen, ":") {
		listen = "127.0.0.1" + listen
	} else if !strings.Contains(listen, ":") {
		listen = "127.0.0.1:" + listen
	}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	fmt.Printf("%s\n", listener.Addr())
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil // Ctrl-C is how one leaves
			}
			return err
		}
		open.Go(func() {
			defer conn.Close()
			if err := c.carry(ctx, conn, id, port); err != nil && ctx.Err() == nil {
				fmt.Fprintf(os.Stderr, "wrenn: %s: %v\n", conn.RemoteAddr(), err)
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
