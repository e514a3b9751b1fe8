package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/client"
)

// reach holds the flags that say what a sandbox may reach.
type reach struct {
	cmd             *cobra.Command
	internet        bool
	allow, deny     []string
	in, out         string
	inPkts, outPkts int64
	connections     int32
}

// reachFlags are the names of all of them.
var reachFlags = []string{"internet", "allow", "deny", "net-in", "net-out", "net-in-packets", "net-out-packets", "net-connections"}

func (r *reach) flags(cmd *cobra.Command) {
	r.cmd = cmd
	f := cmd.Flags()
	f.BoolVar(&r.internet, "internet", true, "whether the sandbox reaches what no list names; with --internet=false only what --allow names")
	f.StringSliceVar(&r.allow, "allow", nil,
		"address, range or domain that it reaches (192.0.2.0/24, example.com, *.example.com); a domain needs --internet=false")
	f.StringSliceVar(&r.deny, "deny", nil, "address, range or domain that it does not reach, except for what --allow says")
	f.StringVar(&r.in, "net-in", "", "most bytes a second into the sandbox: 500K, 10M, 64KiB")
	f.StringVar(&r.out, "net-out", "", "most bytes a second out of it")
	f.Int64Var(&r.inPkts, "net-in-packets", 0, "most packets a second into the sandbox")
	f.Int64Var(&r.outPkts, "net-out-packets", 0, "most packets a second out of it")
	f.Int32Var(&r.connections, "net-connections", 0, "most connections at a time that it has opened")
}

// given says whether any of the flags was.
func (r *reach) given() bool {
	for _, name := range reachFlags {
		if r.cmd.Flags().Changed(name) {
			return true
		}
	}
	return false
}

// idleName returns a domain of --allow that changes nothing, because the internet is
// open; "" if there is none.
func (r *reach) idleName() string {
	if !r.internet || slices.Contains(r.deny, "0.0.0.0/0") {
		return ""
	}
	for _, text := range r.allow {
		_, notAddr := netip.ParseAddr(text)
		_, notRange := netip.ParsePrefix(text)
		if notAddr != nil && notRange != nil {
			return text
		}
	}
	return ""
}

// policy is what the flags say; nil if none was given.
func (r *reach) policy() (*hostagentv1.NetworkPolicy, error) {
	if !r.given() {
		return nil, nil
	}
	if name := r.idleName(); name != "" {
		return nil, fmt.Errorf("--allow %s: a domain needs --internet=false, or it is reached anyway, with all others", name)
	}
	p := &hostagentv1.NetworkPolicy{
		AllowOut: r.allow, DenyOut: r.deny,
		InPacketsPerSec: r.inPkts, OutPacketsPerSec: r.outPkts, MaxConnections: r.connections,
	}
	if r.cmd.Flags().Changed("internet") {
		p.AllowInternet = &r.internet
	}
	for flag, rate := range map[string]struct {
		text string
		to   *int64
	}{"net-in": {r.in, &p.InBytesPerSec}, "net-out": {r.out, &p.OutBytesPerSec}} {
		n, err := parseRate(rate.text)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", flag, err)
		}
		*rate.to = n
	}
	return p, nil
}

func newNetwork(c *cli) *cobra.Command {
	var r reach
	var reset, denied, asJSON bool
	cmd := &cobra.Command{
		Use:   "network ID",
		Short: "Show or replace what a sandbox may reach",
		Long: `Show the policy of a sandbox: what it may reach. With flags, replace the policy, also
while the sandbox runs. A setting without a flag is the host's again. Connections
that the new policy refuses end.

A domain is compared with the server name of TLS, and with the Host of each HTTP
request. The host looks the name up itself and connects to the address that it
finds, whatever address the sandbox asked for. With a domain in a list, a sandbox
reaches the internet by TLS and HTTP only, except for the ranges in --allow.

What --allow says wins over what --deny says. --denied lists what the policy refused of
late, the last first.`,
		Example: `  wrenn network 3fa
  wrenn network 3fa --internet=false --allow pypi.org,*.pythonhosted.org
  wrenn network 3fa --deny 192.0.2.0/24 --net-out 1M
  wrenn network 3fa --reset
  wrenn network 3fa --denied`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := r.policy()
			if err != nil {
				return err
			}
			if reset && policy != nil {
				return errors.New("--reset goes with no other flag: it is the host's policy again")
			}
			if denied && (reset || policy != nil) {
				return errors.New("--denied only shows, and goes with no flag that changes the policy")
			}
			s, err := c.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if denied {
				return showDenied(cmd, s, asJSON)
			}
			if policy != nil || reset {
				if err := s.SetNetwork(cmd.Context(), policy); err != nil {
					return err
				}
			}
			info, err := s.Info(cmd.Context())
			if err != nil {
				return err
			}
			now := info.Network
			if now == nil {
				now = &hostagentv1.NetworkPolicy{}
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), now)
			}
			printPolicy(cmd.OutOrStdout(), now, info.Traffic)
			return nil
		},
	}
	r.flags(cmd)
	cmd.Flags().BoolVar(&reset, "reset", false, "go back to the host's policy")
	cmd.Flags().BoolVar(&denied, "denied", false, "list what the policy refused of late")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the policy, or with --denied the list, as JSON")
	return cmd
}

// showDenied prints what a sandbox's policy refused.
func showDenied(cmd *cobra.Command, s *client.Sandbox, asJSON bool) error {
	denials, err := s.Denials(cmd.Context())
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	if asJSON {
		return printJSON(out, &hostagentv1.ListDenialsResponse{Denials: denials})
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	defer w.Flush()
	row(w, "LAST", "KIND", "NAME OR ADDRESS", "PORT", "TIMES", "RULE")
	for _, d := range denials {
		what, port := d.Name, "-"
		if what == "" {
			what = d.Address
		}
		if d.Port != 0 {
			port = strconv.Itoa(int(d.Port))
		}
		at := time.UnixMilli(d.TimeUnixMs).Format("2006-01-02 15:04:05")
		row(w, at, d.Kind, what, port, strconv.FormatUint(d.Count, 10), d.Rule)
	}
	return nil
}

func printPolicy(out io.Writer, p *hostagentv1.NetworkPolicy, t *hostagentv1.NetworkTraffic) {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	defer w.Flush()
	internet := "as the host's"
	if p.AllowInternet != nil {
		internet = map[bool]string{true: "yes", false: "no"}[*p.AllowInternet]
	}
	list := func(l []string) string {
		if len(l) == 0 {
			return "-"
		}
		return strings.Join(l, ", ")
	}
	limit := func(n int64, unit string) string {
		if n == 0 {
			return "as the host's"
		}
		return fmt.Sprintf("%d %s", n, unit)
	}
	fmt.Fprintf(w, "internet\t%s\nallow\t%s\ndeny\t%s\n", internet, list(p.AllowOut), list(p.DenyOut))
	if p.NameServers != nil {
		fmt.Fprintf(w, "name servers\t%s\n", list(p.NameServers.Addresses))
	}
	fmt.Fprintf(w, "in\t%s\t%s\n", limit(p.InBytesPerSec, "bytes/s"), limit(p.InPacketsPerSec, "packets/s"))
	fmt.Fprintf(w, "out\t%s\t%s\n", limit(p.OutBytesPerSec, "bytes/s"), limit(p.OutPacketsPerSec, "packets/s"))
	fmt.Fprintf(w, "connections\t%s\n", limit(int64(p.MaxConnections), "at a time"))
	if t != nil {
		fmt.Fprintf(w, "came in\t%d bytes\t%d packets\nwent out\t%d bytes\t%d packets\n", t.InBytes, t.InPackets, t.OutBytes, t.OutPackets)
	}
}
