package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/client"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// cli is what the commands that speak to a host agent share.
type cli struct {
	addr     string       // --host; where connect found the agent
	key      string       // --api-key
	stateDir string       // --state-dir
	host     *client.Host // set by connect
}

// overTCP is where an agent listens of which nothing is said.
const overTCP = "http://127.0.0.1:50051"

// connect runs before each command that speaks to a host agent.
func (c *cli) connect(*cobra.Command, []string) (err error) {
	key := cmp.Or(c.key, os.Getenv("WRENN_API_KEY"))
	if c.addr == "" && key != "" {
		c.addr = overTCP // over the socket a key would count for nothing
	}
	if c.addr == "" {
		if c.addr, err = nearby(c.stateDir); err != nil {
			return err
		}
	}
	if c.host, err = client.New(c.addr, key); err != nil {
		return fmt.Errorf("--host: %w", err)
	}
	return nil
}

// nearby is the address of the agent of a state directory: its Unix socket, if there is
// one that this user may open.
func nearby(stateDir string) (string, error) {
	dir, err := filepath.Abs(stateDir)
	if err != nil {
		return "", fmt.Errorf("--state-dir: %w", err)
	}
	socket := agent.SocketPath(dir)
	if unix.Access(socket, unix.R_OK|unix.W_OK) != nil {
		return overTCP, nil
	}
	return "unix://" + socket, nil
}

// find returns the sandbox that an argument names.
func (c *cli) find(ctx context.Context, ref string) (*client.Sandbox, error) {
	s, err := c.host.Find(ctx, ref)
	if errdefs.ClassOf(err) == errdefs.NotFound {
		err = fmt.Errorf("%w; `wrenn ps` lists them", err)
	}
	return s, err
}

// each runs do for every sandbox named, prints the name of each that
// succeeded, and goes on after one that did not.
func (c *cli) each(cmd *cobra.Command, refs []string, do func(ctx context.Context, s *client.Sandbox) error) error {
	var errs []error
	for _, ref := range refs {
		s, err := c.find(cmd.Context(), ref)
		if err == nil {
			err = do(cmd.Context(), s)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(cmd.OutOrStdout(), ref)
	}
	return all(errs)
}

// printJSON prints an answer as scripts read it, as the RPC itself would.
func printJSON(w io.Writer, m proto.Message) error {
	data, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	// protojson varies its spacing on purpose.
	return printIndented(w, json.RawMessage(data))
}

// printIndented prints a value as JSON that people read, too.
func printIndented(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// spin shows on a terminal that something goes on, until stopped.
func spin(what string) (stop func()) {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return func() {}
	}
	done, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		start := time.Now()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-done:
				fmt.Fprint(os.Stderr, "\r\x1b[K")
				return
			case <-tick.C:
				fmt.Fprintf(os.Stderr, "\r%c %s… %.1fs", `|/-\`[i%4], what, time.Since(start).Seconds())
			}
		}
	}()
	return func() { close(done); <-gone }
}
