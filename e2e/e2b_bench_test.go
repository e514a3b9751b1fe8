package e2e_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"testing"
	"time"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// BenchmarkREST times E2B's published client for JavaScript, which creates a sandbox
// over REST and runs a command in it, beside the same over hostagent.v1. Each round of
// the one is followed by one of the other.
func BenchmarkREST(b *testing.B) {
	c := installClients(b)
	h := startE2B(b, "--rate", "100000", "--create-rate", "100000")
	cmd := c.node(b, "testdata/e2b/bench.mjs")
	cmd.Env, cmd.Stderr = append(cmd.Env, h.env()...), os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	}()
	lines := bufio.NewScanner(out)
	ready := row("create by E2B's client over REST", "create over hostagent.v1")
	exec := row("create and first command by E2B's client", "create and first exec over hostagent.v1")
	exec.goal = 1.1
	round := func(count bool) {
		fmt.Fprintln(in, "go")
		var ms struct{ Ready, Exec float64 }
		if !lines.Scan() || json.Unmarshal(lines.Bytes(), &ms) != nil {
			b.Fatalf("the client says %q, %v", lines.Text(), lines.Err())
		}
		// The client has every command run by a login shell.
		s, made, err := h.startTimed(b.Context(), &hostagentv1.CreateSandboxRequest{}, "/bin/bash", "-l", "-c", "true")
		if err == nil {
			err = (&sandbox{b, h.agent, made.SandboxId}).destroy()
		}
		if err != nil {
			b.Fatal(err)
		}
		if !count {
			return
		}
		ready.agent = append(ready.agent, time.Duration(ms.Ready*float64(time.Millisecond)))
		exec.agent = append(exec.agent, time.Duration(ms.Exec*float64(time.Millisecond)))
		ready.floor, exec.floor = append(ready.floor, s.ready), append(exec.floor, s.exec)
	}
	round(false) // the client's first call compiles the client
	repeat(b, 40, time.Minute, func() { round(true) })
	exec.report(b)
}
