// Package e2e_test runs real host agents with real microVMs and talks to them
// as their users do.
package e2e_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

const (
	// startLimit and stopLimit bound an agent's start and end, patience any
	// other wait.
	startLimit = 60 * time.Second
	stopLimit  = 60 * time.Second
	patience   = 30 * time.Second
	pollEvery  = 5 * time.Millisecond
	// ranges is how many pairs of address ranges the agents share.
	ranges = 32
)

// agent is one `wrenn serve` with a state directory and address ranges of its
// own.
type agent struct {
	bin      string // directory of the programs
	stateDir string
	addr     string // host:port
	url      string
	ranges   int // its number in the address plan of these tests
	log      safeBuffer

	hostagentv1connect.HostAgentServiceClient

	mu   sync.Mutex
	cmd  *exec.Cmd
	gone chan struct{} // closed when the process has ended
	err  error         // how it ended
}

// instance is the prefix of everything that the agent makes outside its state
// directory.
func (a *agent) instance() string {
	return fmt.Sprintf("wrenn%x", sha256.Sum256([]byte(a.stateDir)))[:len("wrenn")+4]
}

// hostRange and linkRange are the agent's address ranges.
func (a *agent) hostRange() string { return fmt.Sprintf("10.%d.0.0/16", 181+2*a.ranges) }
func (a *agent) linkRange() string { return fmt.Sprintf("10.%d.0.0/16", 182+2*a.ranges) }

// markers are in every line of an inventory that is about the agent.
func (a *agent) markers() []string {
	return []string{a.instance(), a.stateDir, a.hostRange(), a.linkRange()}
}

// binDir returns the directory of the built programs.
func binDir(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv("WRENN_BIN"); dir != "" {
		return dir
	}
	dir, err := filepath.Abs("../bin")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

var agents atomic.Int32

// newAgent names an agent's directory, address and ranges; nothing is there yet.
func newAgent(prepared, bin string) (*agent, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	n := agents.Add(1)
	a := &agent{
		bin: bin, ranges: int(n) % ranges, addr: fmt.Sprintf("127.0.0.1:%d", port),
		stateDir: filepath.Join(filepath.Dir(prepared), "wrenn-e2e-"+strings.ToLower(rand.Text()[:12])),
	}
	// Other agents on this machine may have chosen the same ranges.
	for range ranges {
		hosts, herr := testenv.Take(a.hostRange())
		links, lerr := testenv.Take(a.linkRange())
		if err := errors.Join(herr, lerr); err != nil {
			return nil, err
		}
		if len(hosts)+len(links) == 0 {
			break
		}
		a.ranges = int(agents.Add(1)) % ranges
	}
	a.url = "http://" + a.addr
	a.setKey("")
	return a, nil
}

// setKey has calls show an API key, unless it is empty.
func (a *agent) setKey(key string) {
	var options []connect.ClientOption
	if key != "" {
		options = append(options, connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
			return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
				r.Header().Set("X-API-KEY", key)
				return next(ctx, r)
			}
		})))
	}
	a.HostAgentServiceClient = hostagentv1connect.NewHostAgentServiceClient(&http.Client{Transport: &http.Transport{}}, a.url, options...)
}

// prepare makes the state directory: what setup has made, linked, and the templates in
// more directories.
func (a *agent) prepare(prepared string, more ...string) error {
	if err := os.Mkdir(a.stateDir, 0o700); err != nil { // ours alone
		return err
	}
	for _, part := range []string{"kernels", "templates", "seeds"} {
		if err := linkTree(filepath.Join(prepared, part), filepath.Join(a.stateDir, part)); err != nil {
			return errors.Join(fmt.Errorf("link %s: %w", part, err), os.RemoveAll(a.stateDir))
		}
	}
	for _, dir := range more {
		if err := linkTree(dir, filepath.Join(a.stateDir, "templates")); err != nil {
			return errors.Join(fmt.Errorf("link %s: %w", dir, err), os.RemoveAll(a.stateDir))
		}
	}
	return nil
}

// buildDir is where the build of a template or snapshot of the host's is to which its
// tag "default" leads.
func (a *agent) buildDir(t testing.TB, name string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(a.stateDir, "templates", "*", "template.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		var info struct {
			Names []string
			Tags  []struct{ Name, Build string }
		}
		data, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(data, &info)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, tag := range info.Tags {
			if slices.Contains(info.Names, name) && tag.Name == "default" {
				return filepath.Join(filepath.Dir(path), tag.Build)
			}
		}
	}
	t.Fatalf("there is no template %s", name)
	return ""
}

// linkTree makes hard links of the files below from, but of its lock files:
// each agent has its own.
func linkTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(path, from))
		switch {
		case e.IsDir():
			return os.MkdirAll(target, 0o700)
		case e.Name() == "lock", e.Name() == "index.lock", e.Name() == "spawned":
			return nil
		case e.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		default:
			return os.Link(path, target)
		}
	})
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// serveCommand is the command that serves on the agent's state directory.
func (a *agent) serveCommand(args ...string) *exec.Cmd {
	// No pool and no waiting guests, unless args have them: they come and go in the inventories.
	args = append([]string{
		"serve", "--state-dir", a.stateDir, "--listen", a.addr, "--vmm", testVMM(),
		"--host-range", a.hostRange(), "--link-range", a.linkRange(), "--pool=0", "--warm=0",
	}, args...)
	return exec.Command(filepath.Join(a.bin, "wrenn"), args...)
}

// testVMM is the driver of the agents of all tests that name none. What most of them want
// is a machine: its disk can be kept without its memory, and its kernel can be looked at.
func testVMM() string { return cmp.Or(os.Getenv("WRENN_TEST_VMM"), "qemu") }

// start starts the process and returns when it serves.
func (a *agent) start(args ...string) error {
	cmd := a.serveCommand(args...)
	cmd.Stdout, cmd.Stderr = &a.log, &a.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's ^C is for the tests
	if err := cmd.Start(); err != nil {
		return err
	}
	gone := make(chan struct{})
	a.mu.Lock()
	a.cmd, a.gone = cmd, gone
	a.mu.Unlock()
	go func() {
		err := cmd.Wait()
		a.mu.Lock()
		a.err = err
		a.mu.Unlock()
		close(gone)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	for {
		// Its listener is open before it serves: what counts is an answer.
		if _, err := a.GetVersion(ctx, connect.NewRequest(&hostagentv1.GetVersionRequest{})); err == nil {
			return nil
		}
		select {
		case <-gone:
			return fmt.Errorf("the agent ended at its start: %v\n%s", a.err, a.log.String())
		case <-ctx.Done():
			return errors.Join(errors.New("the agent does not serve"), a.signal(syscall.SIGKILL))
		case <-time.After(pollEvery):
		}
	}
}

func (a *agent) running() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.gone == nil {
		return false
	}
	select {
	case <-a.gone:
		return false
	default:
		return true
	}
}

// signal ends the process with a signal and returns when it is gone, with an
// error if it complained.
func (a *agent) signal(sig syscall.Signal) error {
	if err := a.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-a.gone:
	case <-time.After(stopLimit):
		return errors.Join(fmt.Errorf("the agent does not end at %v", sig), a.cmd.Process.Kill())
	}
	if sig == syscall.SIGKILL {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// close ends the agent and all its sandboxes, and removes its state directory.
func (a *agent) close() error {
	var errs []error
	if a.running() && !slices.Contains(a.cmd.Args, "--on-shutdown=destroy") {
		errs = append(errs, a.signal(syscall.SIGTERM))
	}
	if !a.running() {
		errs = append(errs, a.start("--on-shutdown=destroy"))
	}
	if a.running() {
		errs = append(errs, a.signal(syscall.SIGTERM))
	}
	return errors.Join(append(errs, os.RemoveAll(a.stateDir))...)
}

// startAgent starts an agent for one test, which must leave nothing of it.
func startAgent(t testing.TB, args ...string) *agent {
	t.Helper()
	return startAgentWith(t, nil, args...)
}

// startAgentWith is startAgent with the templates in more directories.
func startAgentWith(t testing.TB, more []string, args ...string) *agent {
	t.Helper()
	prepared := testenv.StateDir(t)
	a, err := newAgent(prepared, binDir(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, marker := range a.markers() {
		testenv.NoLeaks(t, marker)
	}
	if err := a.prepare(prepared, more...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.close(); err != nil {
			t.Errorf("close agent: %v", err)
		}
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.log.String())
		}
	})
	has := func(flag string) bool {
		return slices.ContainsFunc(args, func(s string) bool { return strings.HasPrefix(s, flag) })
	}
	if !has("--on-shutdown") {
		args = append(args, "--on-shutdown=destroy")
	}
	if err := a.start(args...); err != nil {
		t.Fatal(err)
	}
	return a
}

// shared is the agent of all tests that neither end it nor count what it has.
var shared struct {
	once  sync.Once
	agent *agent
	err   error

	box    sync.Once
	boxID  string
	boxErr error
}

func sharedAgent(t testing.TB) *agent {
	t.Helper()
	prepared, bin := testenv.StateDir(t), binDir(t)
	shared.once.Do(func() {
		if shared.agent, shared.err = newAgent(prepared, bin); shared.err != nil {
			return
		}
		if shared.err = shared.agent.prepare(prepared); shared.err == nil {
			shared.err = shared.agent.start("--on-shutdown=destroy")
		}
	})
	if shared.err != nil {
		t.Fatalf("start agent: %v", shared.err)
	}
	from := shared.agent.log.Len()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the agent's log during the test:\n%s", shared.agent.log.String()[from:])
		}
	})
	return shared.agent
}

// sharedBox is a sandbox of the shared agent for tests that run commands in
// one and leave it as it was.
func sharedBox(t testing.TB) *sandbox {
	t.Helper()
	a := sharedAgent(t)
	shared.box.Do(func() {
		var resp *connect.Response[hostagentv1.CreateSandboxResponse]
		if resp, shared.boxErr = a.CreateSandbox(context.Background(),
			connect.NewRequest(&hostagentv1.CreateSandboxRequest{})); shared.boxErr == nil {
			shared.boxID = resp.Msg.SandboxId
		}
	})
	if shared.boxErr != nil {
		t.Fatalf("create sandbox: %v", shared.boxErr)
	}
	return &sandbox{t, a, shared.boxID}
}

func TestMain(m *testing.M) {
	code := m.Run()
	printMeasured(os.Stdout)
	if a := shared.agent; a != nil {
		if err := a.close(); err != nil {
			fmt.Fprintf(os.Stderr, "close the shared agent: %v\n%s", err, a.log.String())
			code = max(code, 1)
		}
		for _, marker := range a.markers() {
			left, err := testenv.Take(marker)
			if err != nil || len(left) > 0 {
				fmt.Fprintf(os.Stderr, "left by the shared agent: %q, %v\n", left.Lines(), err)
				code = max(code, 1)
			}
		}
	}
	os.Exit(code)
}

// sandbox is one and the test that uses it.
type sandbox struct {
	t  testing.TB
	a  *agent
	id string
}

// create makes a sandbox that ends with the test.
func (a *agent) create(t testing.TB, req *hostagentv1.CreateSandboxRequest) *sandbox {
	t.Helper()
	if req == nil {
		req = &hostagentv1.CreateSandboxRequest{}
	}
	resp, err := a.CreateSandbox(t.Context(), connect.NewRequest(req))
	if err != nil {
		t.Fatalf("create sandbox: %v", err)
	}
	b := &sandbox{t, a, resp.Msg.SandboxId}
	t.Cleanup(func() {
		if !a.running() {
			return // closing it destroys them
		}
		if err := b.destroy(); err != nil && connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("destroy sandbox: %v", err)
		}
	})
	return b
}

func (b *sandbox) destroy() error {
	_, err := b.a.DestroySandbox(context.Background(), connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: b.id}))
	return err
}

func (b *sandbox) pause() error {
	_, err := b.a.PauseSandbox(b.t.Context(), connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: b.id}))
	return err
}

func (b *sandbox) resume() error {
	_, err := b.a.ResumeSandbox(b.t.Context(), connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: b.id}))
	return err
}

// exec runs one command.
func (b *sandbox) exec(cmd string, args ...string) (*hostagentv1.ExecResponse, error) {
	resp, err := b.a.Exec(b.t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: b.id, Cmd: cmd, Args: args}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// sh runs a script that must succeed, and returns its output without the white
// space around it.
func (b *sandbox) sh(script string) string {
	b.t.Helper()
	resp, err := b.exec("sh", "-c", script)
	if err != nil {
		b.t.Fatalf("%s: %v", script, err)
	}
	if resp.ExitCode != 0 {
		b.t.Fatalf("%s: exit status %d: %s", script, resp.ExitCode, resp.Stderr)
	}
	return strings.TrimSpace(string(resp.Stdout))
}

// info is the sandbox in the list of all; nil if it is not there.
// token is what the sandbox's envd demands; empty if there is no such sandbox.
func (b *sandbox) token() string {
	b.t.Helper()
	resp, err := b.a.GetSandbox(b.t.Context(), connect.NewRequest(&hostagentv1.GetSandboxRequest{SandboxId: b.id}))
	if err != nil {
		return ""
	}
	return resp.Msg.AccessToken
}

// address names the sandbox, and shows its token, in the headers of a request to
// its envd.
func (b *sandbox) address(h http.Header) {
	b.t.Helper()
	h.Set(guestapi.HeaderSandboxID, b.id)
	h.Set(guestapi.HeaderToken, b.token())
}

func (b *sandbox) info() *hostagentv1.SandboxInfo {
	b.t.Helper()
	resp, err := b.a.ListSandboxes(b.t.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{All: true}))
	if err != nil {
		b.t.Fatalf("list sandboxes: %v", err)
	}
	for _, s := range resp.Msg.Sandboxes {
		if s.SandboxId == b.id {
			return s
		}
	}
	return nil
}

// waitStopped waits until the sandbox is stopped for a reason, and returns how
// long that took.
func (b *sandbox) waitStopped(reason string) time.Duration {
	b.t.Helper()
	began := time.Now()
	waitFor(b.t, "the sandbox to be stopped ("+reason+")", func() bool {
		s := b.info()
		return s != nil && s.Status == "stopped" && s.Reason == reason
	})
	return time.Since(began)
}

// waitFor polls until ok.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(pollEvery) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s in vain for %s", patience, what)
		}
	}
}

// wantCode fails the test unless err has the code and its text all the words.
func wantCode(t testing.TB, err error, code connect.Code, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %v", code)
		return
	}
	if got := connect.CodeOf(err); got != code {
		t.Errorf("%v: want %v", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

// safeBuffer is a buffer that is written and read at once.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *safeBuffer) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Len()
}
