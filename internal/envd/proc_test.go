package envd

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// held reads what is held of a process's output, which must not wait for its end.
func held(t *testing.T, c processconnect.ProcessClient, pid uint32) (out string, end *processv1.ProcessEvent_EndEvent) {
	t.Helper()
	req := connect.NewRequest(&processv1.ConnectRequest{
		Process: &processv1.ProcessSelector{Selector: &processv1.ProcessSelector_Pid{Pid: pid}},
	})
	req.Header().Set(guestapi.HeaderOffset, "stdout=0")
	req.Header().Set(guestapi.HeaderFollow, guestapi.FollowNot)
	stream, err := c.Connect(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		out += string(stream.Msg().GetEvent().GetData().GetStdout())
		if e := stream.Msg().GetEvent().GetEnd(); e != nil {
			end = e
		}
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	return out, end
}

func listed(t *testing.T, url string) map[int]guestapi.Process {
	t.Helper()
	resp, err := http.Get(url + guestapi.PathProcesses)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var list guestapi.Processes
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		t.Fatal(err)
	}
	byPID := map[int]guestapi.Process{}
	for _, p := range list.Processes {
		byPID[p.PID] = p
	}
	return byPID
}

// What a detached command has written, and how it ended, can be had after its client has
// left and after its end.
func TestDetached(t *testing.T) {
	_, url := serve(t, Config{})
	c := processconnect.NewProcessClient(http.DefaultClient, url)
	events, pid := start(t, c, bySh("echo before; read line; echo after $line; exit 3"), guestapi.HeaderLifetime, guestapi.LifetimeDetached)
	events.Close()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if out, end := held(t, c, pid); out == "before\n" && end == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%q, %v", out, end)
		}
	}
	if p := listed(t, url)[int(pid)]; !p.Command || p.Ended != "" || p.User == "" || len(p.Args) != 3 || p.Started < time.Now().Unix()-60 {
		t.Errorf("listed as %+v", p)
	}
	if _, err := c.SendInput(t.Context(), connect.NewRequest(&processv1.SendInputRequest{
		Process: &processv1.ProcessSelector{Selector: &processv1.ProcessSelector_Pid{Pid: pid}},
		Input:   &processv1.ProcessInput{Input: &processv1.ProcessInput_Stdin{Stdin: []byte("x\n")}},
	})); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		out, end := held(t, c, pid)
		if out == "before\nafter x\n" && end.GetExitCode() == 3 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%q, %v", out, end)
		}
	}
	if p := listed(t, url)[int(pid)]; p.Ended != "exit status 3" || p.Args[0] != "sh" {
		t.Errorf("listed as %+v", p)
	}
}

// The ends of detached commands that are kept are bounded.
func TestDetachedAreBounded(t *testing.T) {
	s, url := serve(t, Config{})
	c := processconnect.NewProcessClient(http.DefaultClient, url)
	var pids []uint32
	for range guestapi.KeptDetached + 2 {
		events, pid := start(t, c, bySh("true"), guestapi.HeaderLifetime, guestapi.LifetimeDetached)
		all(t, events)
		pids = append(pids, pid)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if n := len(s.processes.endedDetached()); n == guestapi.KeptDetached {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d are kept", n)
		}
	}
	_, end := held(t, c, pids[len(pids)-1])
	if end == nil {
		t.Error("the last one has no end")
	}
}

// Processes that no client has started are listed, too.
func TestBackgroundIsListed(t *testing.T) {
	_, url := serve(t, Config{})
	c := processconnect.NewProcessClient(http.DefaultClient, url)
	mark := fmt.Sprintf("9%d.5", os.Getpid())
	events, pid := start(t, c, bySh("sleep "+mark+" & echo started; wait"))
	defer func() {
		_, _ = c.SendSignal(t.Context(), connect.NewRequest(&processv1.SendSignalRequest{
			Process: &processv1.ProcessSelector{Selector: &processv1.ProcessSelector_Pid{Pid: pid}}, Signal: processv1.Signal_SIGNAL_SIGKILL,
		}))
	}()
	events.Receive()
	found := false
	for deadline := time.Now().Add(10 * time.Second); !found && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		for _, p := range listed(t, url) {
			if strings.Join(p.Args, " ") == "sleep "+mark && p.PPID == int(pid) && !p.Command {
				found = true
				if own, err := os.FindProcess(p.PID); err == nil {
					_ = own.Kill()
				}
			}
		}
	}
	if !found {
		t.Errorf("no sleep %s in %v", mark, listed(t, url))
	}
}

func TestCutArgs(t *testing.T) {
	long := strings.Repeat("x", maxArgsTold)
	for _, c := range []struct{ args, want []string }{
		{[]string{"a", "b"}, []string{"a", "b"}},
		{[]string{long}, []string{long}},
		{[]string{"a", long, "b"}, []string{"a", long[:len(long)-2] + "…"}},
		{[]string{"a\xff"}, []string{"a\ufffd"}},
	} {
		if got := cutArgs(c.args); strings.Join(got, " ") != strings.Join(c.want, " ") {
			t.Errorf("%d arguments became %d", len(c.args), len(got))
		}
	}
}
