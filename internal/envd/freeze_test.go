package envd

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
)

// TestFreeze: the users' programs stand still from a freeze to the next /init,
// and none is started between.
func TestFreeze(t *testing.T) {
	dir := cgroupDir(t)
	_, url := serve(t, Config{CgroupRoot: dir})
	c := processClient(url)
	post := func(path, body string) int {
		t.Helper()
		resp, err := http.Post(url+path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	frozen := func() int { return (&cgroup{dir: dir}).event("cgroup.events", "frozen") }
	file := filepath.Join(t.TempDir(), "lines")
	lines := func() int64 {
		info, err := os.Stat(file)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	// It leaves its session, as daemons do.
	e, _ := start(t, c, bySh("setsid sh -c 'while :; do echo >>"+file+"; done' & sleep 100"))
	eventually(t, "the program to write", func() bool { return lines() > 0 })
	for range 2 { // again: it stays frozen
		if status := post("/freeze", ""); status != 204 || frozen() != 1 {
			t.Fatalf("freeze: %d, frozen %d", status, frozen())
		}
	}
	n := lines()
	began := make(chan told, 1)
	ask := func() { began <- wrote(c, bySh("echo begun")) }
	go ask()
	waits := func() bool {
		buf := make([]byte, 1<<18)
		return strings.Contains(string(buf[:runtime.Stack(buf, true)]), "(*cgroups).starting(")
	}
	eventually(t, "the start to wait", waits)
	if len(began) > 0 {
		t.Errorf("a program was started: %+v", <-began)
	}
	if lines() != n {
		t.Errorf("a frozen program wrote %d lines", lines()-n)
	}
	if status := post("/init", `{}`); status != 204 || frozen() != 0 {
		t.Errorf("init: %d, frozen %d", status, frozen())
	}
	eventually(t, "the program to go on", func() bool { return lines() > n })
	if a := <-began; a.err != nil || a.out != "begun\n" {
		t.Errorf("the program that waited: %+v", a)
	}

	// In a copy, who asked for a program before is gone.
	if status := post("/freeze", ""); status != 204 {
		t.Fatalf("freeze: %d", status)
	}
	go ask()
	eventually(t, "the start to wait", waits)
	if status := post("/init", `{"restored":true}`); status != 204 || frozen() != 0 {
		t.Errorf("init: %d, frozen %d", status, frozen())
	}
	if a := <-began; a.err == nil {
		t.Errorf("a program that was asked for before the copy began in it: %+v", a)
	}
	// A host whose clock was set back has nothing new to tell, but lets them go on.
	for _, year := range []string{"2030", "2029"} {
		if status := post("/freeze", ""); status != 204 || frozen() != 1 {
			t.Fatalf("freeze: %d, frozen %d", status, frozen())
		}
		if status := post("/init", `{"timestamp":"`+year+`-01-01T00:00:00Z"}`); status != 204 || frozen() != 0 {
			t.Errorf("init of %s: %d, frozen %d", year, status, frozen())
		}
	}
	e.Close()
}

type told struct {
	out string
	err error
}

// wrote is what a program wrote.
func wrote(c processconnect.ProcessClient, msg *processv1.StartRequest) told {
	stream, err := c.Start(context.Background(), connect.NewRequest(msg))
	if err != nil {
		return told{"", err}
	}
	defer stream.Close()
	var out strings.Builder
	for stream.Receive() {
		out.Write(stream.Msg().GetEvent().GetData().GetStdout())
	}
	return told{out.String(), stream.Err()}
}

// TestFreezeOfWhatCannotBe: after the bound, or when its caller has gone, all go
// on.
func TestFreezeOfWhatCannotBe(t *testing.T) {
	dir := t.TempDir() // what no kernel looks at never becomes frozen
	state := filepath.Join(dir, "cgroup.freeze")
	g := newCgroups(dir)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := g.freeze(ctx, false); !errors.Is(err, errNotFrozen) {
		t.Errorf("freeze: %v", err)
	}
	if text, err := os.ReadFile(state); err != nil || string(text) != "0" {
		t.Errorf("it was left at %q, %v", text, err)
	}
	done, err := g.starting()
	if err != nil {
		t.Fatal(err)
	}
	// One that is being started is waited for.
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := g.freeze(ctx, false); !errors.Is(err, errNotFrozen) {
		t.Errorf("freeze during a start: %v", err)
	}
	done()

	real := cgroupDir(t)
	s, _ := serve(t, Config{CgroupRoot: real})
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	gone := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.ServeHTTP(w, r.WithContext(ctx)) })
	w := request(t, gone, "POST", "/freeze", "")
	if n := (&cgroup{dir: real}).event("cgroup.events", "frozen"); w.Code != http.StatusConflict || n != 0 {
		t.Errorf("a freeze whose caller has gone: %d, frozen %d", w.Code, n)
	}
	if w := request(t, New(Config{Log: quiet()}), "POST", "/freeze", ""); w.Code != http.StatusConflict {
		body, _ := io.ReadAll(w.Body)
		t.Errorf("without cgroups: %d %s", w.Code, body)
	}
}

// TestKernelThreads: what the list has in it is not searched for programs, so it
// must be the kernel's. A host's process namespace has the threads, a container's
// has none.
func TestKernelThreads(t *testing.T) {
	threads := kernelThreads()
	for field := range threads {
		pid, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		if _, flags, ok := procStat(pid); ok && flags&kernelThread == 0 {
			t.Errorf("process %d is listed and is no thread of the kernel's", pid)
		}
	}
	for _, pid := range []int{1, os.Getpid()} {
		if threads[strconv.Itoa(pid)] || !ofUser(pid) {
			t.Errorf("process %d is taken for a thread of the kernel's", pid)
		}
	}
	if len(threads) == 0 {
		t.Log("there are no threads of the kernel's here")
	}
}
