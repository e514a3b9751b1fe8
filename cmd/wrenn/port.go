package main

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/client"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

func newPort(c *cli) *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "port ID [PORT]",
		Short: "Say how to reach a port of a sandbox, or forward one",
		Long: `Print the URL of a port of a running sandbox for HTTP, and the headers that name the
port to the agent if the host name does not. Without PORT, print the ports that were
published with 'create --publish'.

With --listen, forward TCP connections to the port until Ctrl-C, for HTTP and any
other protocol. The server in the sandbox may listen on 127.0.0.1. Port 49983, the
sandbox's daemon, is reached by HTTP only and is not forwarded.`,
		Example: "  wrenn port 3fa 8000\n  wrenn port 3fa 5432 --listen 127.0.0.1:5432\n  wrenn port 3fa 5432 --listen :0",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return c.printPublished(cmd, args[0])
			}
			number, err := strconv.ParseUint(args[1], 10, 16)
			if err != nil || number == 0 {
				return fmt.Errorf("port %q is not a number from 1 to 65535", args[1])
			}
			port := uint16(number)
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if listen != "" && port == guestapi.Port {
				return fmt.Errorf("port %d is the sandbox's daemon, which is not forwarded; without --listen its URL is printed", port)
			}
			if err := s.Reachable(cmd.Context()); err != nil {
				return err
			}
			if listen != "" {
				return forward(cmd, s, port, listen)
			}
			return c.printPort(cmd, s, port)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "forward from this address (HOST:PORT; port 0 picks one); without a host it is 127.0.0.1")
	return cmd
}

// publishedPorts reads flags of the form [HOSTPORT:]PORT.
func publishedPorts(flags []string) (ports []*hostagentv1.PublishedPort, err error) {
	for _, flag := range flags {
		host, inside, two := strings.Cut(flag, ":")
		if !two {
			host, inside = "0", host
		}
		port, err := strconv.ParseUint(inside, 10, 16)
		at, herr := strconv.ParseUint(host, 10, 16)
		if err != nil || herr != nil || port == 0 || two && at == 0 {
			return nil, fmt.Errorf("--publish %q: want PORT, or HOSTPORT:PORT", flag)
		}
		ports = append(ports, &hostagentv1.PublishedPort{Port: int32(port), HostPort: int32(at)})
	}
	return ports, nil
}

func publishedText(p *hostagentv1.PublishedPort) string {
	return fmt.Sprintf("127.0.0.1:%d of the host is port %d of the sandbox", p.HostPort, p.Port)
}

// printPublished prints the published ports of a sandbox.
func (c *cli) printPublished(cmd *cobra.Command, ref string) error {
	s, err := c.find(cmd.Context(), ref)
	if err != nil {
		return err
	}
	info, err := s.Info(cmd.Context())
	if err != nil {
		return err
	}
	for _, p := range info.GetPublish() {
		fmt.Fprintf(cmd.OutOrStdout(), "%d -> 127.0.0.1:%d\n", p.Port, p.HostPort)
	}
	return nil
}

// printPort prints how HTTP reaches a port of a sandbox.
func (c *cli) printPort(cmd *cobra.Command, s *client.Sandbox, port uint16) error {
	url, err := s.PortURL(cmd.Context(), port)
	if err != nil {
		return err
	}
	at, err := c.host.Address(cmd.Context())
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s/ with the headers\n  %s: %s\n  %s: %d\n", url, at.URL,
		guestapi.HeaderSandboxID, s.ID, guestapi.HeaderSandboxPort, port)
	return nil
}

// forward carries TCP connections to a port of a sandbox until Ctrl-C or the
// end of the sandbox, and prints where it listens.
func forward(cmd *cobra.Command, s *client.Sandbox, port uint16, listen string) error {
	if strings.HasPrefix(listen, ":") {
		listen = "127.0.0.1" + listen
	} else if !strings.Contains(listen, ":") {
		listen = "127.0.0.1:" + listen
	}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout(), listener.Addr())
	return s.Forward(cmd.Context(), listener, port, func(from net.Addr, err error) {
		complain("%s: %s", from, explain(err))
	})
}
