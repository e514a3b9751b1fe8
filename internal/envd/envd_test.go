package envd

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

func TestMain(m *testing.M) {
	if os.Getenv("ENVD_TEST_ROLE") == "init" {
		os.Exit(initRole())
	}
	os.Exit(m.Run())
}

// quiet drops what a server logs.
func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// serve runs a server on a free port; its goroutines must be gone at the end.
func serve(t *testing.T, c Config) (*Server, string) {
	t.Helper()
	before := runtime.NumGoroutine()
	if c.Log == nil {
		c.Log = quiet()
	}
	s := New(c)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		s.Close()
		eventually(t, "goroutines to be gone", func() bool {
			// A connection may become idle late.
			http.DefaultClient.CloseIdleConnections()
			return runtime.NumGoroutine() <= before
		})
	})
	return s, "http://" + l.Addr().String()
}

func processClient(url string) processconnect.ProcessClient {
	return processconnect.NewProcessClient(http.DefaultClient, url)
}

// eventually waits for a condition that something else brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			t.Fatalf("waited in vain for %s\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

func request(t *testing.T, s http.Handler, method, target, body string, headers ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

func TestHealth(t *testing.T) {
	s, _ := serve(t, Config{})
	w := request(t, s, "GET", "/health", "")
	if w.Code != http.StatusNoContent || w.Header().Get("Cache-Control") != "no-store" || w.Body.Len() > 0 {
		t.Errorf("got %d %v %q", w.Code, w.Header(), w.Body)
	}
}

const list = "/process.Process/List"

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// step is a request with the status that answers it.
type step struct {
	name, method, path, header, body string
	code                             int
}

func TestInitTokens(t *testing.T) {
	runSteps(t, map[string][]step{
		"none is needed before one is set": {
			{"list", "POST", list, "", "{}", 200},
			{"init", "POST", "/init", "", "", 204},
			{"list", "POST", list, "", "{}", 200},
		},
		"one is set": {
			{"set", "POST", "/init", "", `{"accessToken":"a"}`, 204},
			{"without", "POST", list, "", "{}", 401},
			{"wrong", "POST", list, "b", "{}", 401},
			{"a part of it", "POST", list, "", "{}", 401},
			{"right", "POST", list, "a", "{}", 200},
			{"health is open", "GET", "/health", "", "", 204},
			{"again", "POST", "/init", "", `{"accessToken":"a"}`, 204},
			{"another", "POST", "/init", "", `{"accessToken":"b"}`, 401},
			{"none", "POST", "/init", "", `{}`, 401},
			{"another, with the header", "POST", "/init", "a", `{"accessToken":"b"}`, 204},
			{"old", "POST", list, "a", "{}", 401},
			{"new", "POST", list, "b", "{}", 200},
			{"cleared", "POST", "/init", "b", `{}`, 204},
			{"open again", "POST", list, "", "{}", 200},
		},
		"bad requests change nothing": {
			{"set", "POST", "/init", "", `{"accessToken":"a"}`, 204},
			{"no JSON", "POST", "/init", "a", `{"accessToken":`, 400},
			{"no such user", "POST", "/init", "a", `{"accessToken":"b","defaultUser":"no-such"}`, 400},
			{"no host name", "POST", "/init", "a", `{"accessToken":"b","hostname":"a b"}`, 400},
			{"no variable", "POST", "/init", "a", `{"accessToken":"b","envVars":{"A=B":""}}`, 400},
			{"still the first", "POST", list, "a", "{}", 200},
		},
		"what a newer host says besides is passed over": {
			{"set", "POST", "/init", "", `{"accessToken":"a","later":{"x":[1]}}`, 204},
			{"set it is", "POST", list, "a", "{}", 200},
		},
		"a clone's key opens what was restored, once": {
			{"set", "POST", "/init", "", `{"accessToken":"a","cloneKey":"` + digest("key") + `"}`, 204},
			{"as a token", "POST", list, "key", "{}", 401},
			{"not restored", "POST", "/init", "key", `{"accessToken":"b"}`, 401},
			{"in the body", "POST", "/init", "", `{"accessToken":"key","restored":true}`, 401},
			{"another", "POST", "/init", "other", `{"accessToken":"b","restored":true}`, 401},
			{"none", "POST", "/init", "", `{"accessToken":"b","restored":true}`, 401},
			{"restored", "POST", "/init", "key", `{"accessToken":"b","restored":true,"cloneKey":"` + digest("next") + `"}`, 204},
			{"the old token", "POST", list, "a", "{}", 401},
			{"the new token", "POST", list, "b", "{}", 200},
			{"again", "POST", "/init", "key", `{"accessToken":"c","restored":true}`, 401},
			{"no digest", "POST", "/init", "b", `{"accessToken":"b","cloneKey":"YQ=="}`, 400},
			{"kept", "POST", "/init", "", `{"accessToken":"b"}`, 204},
			{"the next", "POST", "/init", "next", `{"accessToken":"c","restored":true}`, 204},
		},
		"a guest without a clone's key": {
			{"set", "POST", "/init", "", `{"accessToken":"a"}`, 204},
			{"empty", "POST", "/init", "", `{"accessToken":"b","restored":true}`, 401},
		},
	})
}

func TestInitOfALateCopyAndOfAClone(t *testing.T) {
	runSteps(t, map[string][]step{
		"a late copy changes nothing": {
			{"set", "POST", "/init", "", `{"accessToken":"a","timestamp":"2030-01-01T00:00:02Z"}`, 204},
			{"late", "POST", "/init", "a", `{"accessToken":"b","timestamp":"2030-01-01T00:00:01Z"}`, 204},
			{"still the first", "POST", list, "a", "{}", 200},
			{"later", "POST", "/init", "a", `{"accessToken":"b","timestamp":"2030-01-01T00:00:03Z"}`, 204},
			{"the second", "POST", list, "b", "{}", 200},
		},
		"a clone of a host whose clock was set back": {
			{"set", "POST", "/init", "", `{"accessToken":"a","timestamp":"2030-01-01T00:00:02Z"}`, 204},
			{"restored", "POST", "/init", "a", `{"accessToken":"b","timestamp":"2030-01-01T00:00:01Z","restored":true}`, 204},
			{"the old token", "POST", list, "a", "{}", 401},
			{"the new token", "POST", list, "b", "{}", 200},
		},
	})
}

// runSteps sends the requests of each case to a new server.
func runSteps(t *testing.T, cases map[string][]step) {
	t.Helper()
	for name, steps := range cases {
		t.Run(name, func(t *testing.T) {
			s, _ := serve(t, Config{})
			for i, st := range steps {
				w := request(t, s, st.method, st.path, st.body, "Content-Type", "application/json", guestapi.HeaderToken, st.header)
				if w.Code != st.code {
					t.Fatalf("step %d, %s: %d %s, want %d", i, st.name, w.Code, w.Body, st.code)
				}
				if w.Code == 401 && st.path == list && !strings.Contains(w.Body.String(), `{"code":401,"message":"unauthorized access, please`) {
					t.Errorf("step %d: body %s", i, w.Body)
				}
			}
		})
	}
}

func TestNothingIsServedBeforeInit(t *testing.T) {
	s := New(Config{Log: quiet(), Body: machine{}})
	defer s.Close()
	for path, code := range map[string]int{"/health": 204, list: 503, "/files": 503} {
		method := "POST"
		if path == "/health" {
			method = "GET"
		}
		if w := request(t, s, method, path, "{}", "Content-Type", "application/json"); w.Code != code {
			t.Errorf("%s: %d, want %d", path, w.Code, code)
		}
	}
}

// initRole is a process that has PID 1's duty: it runs its first argument
// while it reaps orphans, then prints how many defunct children it has.
func initRole() int {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1
	}
	s := New(Config{Log: quiet()})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan struct{})
	go func() { s.ReapOrphans(ctx); close(done) }()
	for range 20 {
		// Its status must not be lost to the reaper.
		child, err := s.processes.children.start("/bin/sh", []string{"sh", "-c", os.Args[1]},
			&syscall.ProcAttr{Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{}})
		if err != nil {
			return 2
		}
		status, err := s.processes.children.wait(child)
		if err != nil || status.ExitStatus() != 42 {
			return 3
		}
		child.pidfd.Close()
	}
	for deadline := time.Now().Add(30 * time.Second); countChildren() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return 4
		}
	}
	cancel()
	<-done
	return 0
}

// countChildren counts this process's children, defunct ones included.
func countChildren() int {
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	n := 0
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		n += len(strings.Fields(string(text)))
	}
	return n
}

func TestReapsOrphansAndNoStatusOfItsOwn(t *testing.T) {
	// 50 orphans per round, some of which die before their parent's end is
	// noticed and some after.
	const script = `i=0; while [ $i -lt 25 ]; do (true &); (sleep 0.01 &); i=$((i+1)); done; exit 42`
	cmd := exec.Command(os.Args[0], script)
	cmd.Env = append(os.Environ(), "ENVD_TEST_ROLE=init")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestBoundedLog(t *testing.T) {
	var out strings.Builder
	w := BoundedLog(&out)
	line := strings.Repeat("x", 99) + "\n"
	for range 10000 {
		if n, err := io.WriteString(w, line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	if out.Len() > logBurst+2*logRate {
		t.Errorf("%s bytes got through", strconv.Itoa(out.Len()))
	}
}
