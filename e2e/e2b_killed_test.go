package e2e_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// onlooker is a program of E2B's Python client that goes on while the agent dies.
type onlooker struct {
	t       *testing.T
	stdin   io.Writer
	answers *bufio.Scanner
}

func startOnlooker(t *testing.T, c clients, h *e2bHost) *onlooker {
	t.Helper()
	cmd := c.python("testdata/e2b/onlooker.py")
	cmd.Env, cmd.Stderr = append(cmd.Env, h.env()...), os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("onlooker: %v", err)
		}
	})
	return &onlooker{t, in, bufio.NewScanner(out)}
}

// begin has the onlooker begin a call.
func (o *onlooker) begin(call ...string) {
	o.t.Helper()
	if _, err := fmt.Fprintln(o.stdin, strings.Join(call, " ")); err != nil {
		o.t.Fatal(err)
	}
}

// answer waits for what came of the call.
func (o *onlooker) answer() any {
	o.t.Helper()
	var a struct {
		Answer any
		Error  string
	}
	if !o.answers.Scan() || json.Unmarshal(o.answers.Bytes(), &a) != nil || a.Error != "" {
		o.t.Fatalf("the onlooker says %q, %v", o.answers.Text(), o.answers.Err())
	}
	return a.Answer
}

func (o *onlooker) calls(call ...string) any {
	o.t.Helper()
	o.begin(call...)
	return o.answer()
}

// restart kills the agent and starts it again.
func (h *e2bHost) restart(t *testing.T) {
	t.Helper()
	if err := h.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := h.agent.start("--on-shutdown=destroy", "--rate", "1000", "--create-rate", "1000"); err != nil {
		t.Fatal(err)
	}
}

// killedDuring has the onlooker call, kills the agent after a part of the time that
// such a call takes, starts it again, and returns what the onlooker heard in the end.
func (o *onlooker) killedDuring(h *e2bHost, after time.Duration, call ...string) any {
	o.t.Helper()
	o.begin(call...)
	time.Sleep(after)
	h.restart(o.t)
	return o.answer()
}

// The agent is killed in the middle of a create, a pause and a connect by the published
// client, which asks again: nothing is lost, and nothing is there twice.
func TestE2BAgentIsKilled(t *testing.T) {
	c := installClients(t)
	h := startE2B(t, "--rate", "1000", "--create-rate", "1000")
	o := startOnlooker(t, c, h)
	get := func(id string) reply {
		t.Helper()
		a, err := h.want("GET", "/sandboxes/"+id, "", 200)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	began := time.Now()
	id := o.calls("create", "undisturbed").(string)
	took := time.Since(began)
	token := get(id).str("envdAccessToken")
	for i, part := range []float64{0.2, 0.6, 0.95} {
		key := fmt.Sprint("create-", i)
		made := o.killedDuring(h, time.Duration(part*float64(took)), "create", key).(string)
		listed, err := h.want("GET", "/v2/sandboxes?metadata="+url.QueryEscape("key="+key), "", 200)
		if err != nil || strings.Count(listed.text, "sandboxID") != 1 || !strings.Contains(listed.text, made) {
			t.Errorf("create: the client has %s, listed is %s, %v", made, listed.text, err)
		}
		if got := o.calls("run", made, "echo", "$KEY"); got != key+"\n" {
			t.Errorf("create: its variable is %q", got)
		}
		if err := h.kill(made); err != nil {
			t.Error(err)
		}
	}

	// A program whose pid and memory say that it is the same one all the time.
	pid := o.calls("run", id, "sleep", "100000", ">/dev/null", "2>&1", "&", "echo", "$!").(string)
	same := func(when string) {
		t.Helper()
		if a := get(id); a.str("envdAccessToken") != token || a.str("sandboxID") != id {
			t.Errorf("%s: it is now %s", when, a.text)
		}
		if got := o.calls("run", id, "cat", "/proc/"+strings.TrimSpace(pid)+"/comm"); got != "sleep\n" {
			t.Errorf("%s: its program is %q", when, got)
		}
	}
	same("before")
	for _, part := range []float64{0.1, 0.5, 0.9} {
		endAt := get(id).str("endAt")
		o.begin("pause", id)
		time.Sleep(time.Duration(part * float64(took)))
		h.restart(t)
		if a := get(id); a.str("state") == "running" && a.str("endAt") != endAt {
			t.Errorf("its end was %s, it is %s", endAt, a.str("endAt"))
		}
		o.answer() // paused now, or before
		if a := get(id); a.str("state") != "paused" {
			t.Errorf("it is %s", a.text)
		}
		if got := o.killedDuring(h, time.Duration(part*float64(took)), "connect", id); got != token {
			t.Error("connect: it has another token")
		}
		same(fmt.Sprint("killed after ", part))
	}
	if err := h.kill(id); err != nil {
		t.Error(err)
	}
}
