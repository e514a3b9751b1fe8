package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/network/networktest"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// rig is an agent on a machine without VMs and networks, which needs no root.
type rig struct {
	testing.TB
	dir string
	cfg Config
	vms *vmmtest.Host
	log *logged

	net   *networktest.Network
	agent *Agent
	wait  func() error // returns what Run did, when it has
	ended func() error // ends the agent first
}

// logged is a log that a test can read while it is written.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// quietGuest does what it is told and says nothing.
type quietGuest struct{}

func (quietGuest) WaitReady(context.Context) error                         { return nil }
func (quietGuest) Init(context.Context, guest.Init) (string, error)        { return "", nil }
func (quietGuest) Quiesce(context.Context, bool) error                     { return nil }
func (quietGuest) Freeze(context.Context) (time.Time, error)               { return time.Now(), nil }
func (quietGuest) Close()                                                  {}
func (quietGuest) Metrics(context.Context) (m guestapi.Metrics, err error) { return m, nil }
func (quietGuest) Start(context.Context, guest.Command, string) (<-chan guest.Ended, error) {
	ended := make(chan guest.Ended)
	close(ended)
	return ended, nil
}
func (quietGuest) Unpack(context.Context, string, string, io.Reader) error { return nil }
func (quietGuest) Pack(context.Context, string, io.Writer) error           { return nil }
func (quietGuest) Exec(_ context.Context, cmd guest.Command) (guest.Result, error) {
	return guest.Result{Stdout: []byte(cmd.Cmd)}, nil
}

func newRig(t testing.TB) *rig {
	r := &rig{TB: t, dir: t.TempDir(), vms: vmmtest.NewHost(), log: &logged{}}
	state := filepath.Join(r.dir, "state")
	fill(t, state)
	cfg := Defaults()
	cfg.StateDir, cfg.Version, cfg.Listen, cfg.OverlayMiB = state, "1.2.3", "127.0.0.1:0", 64
	cfg.Capacity.FreeDiskMiB, cfg.Capacity.MemMiB = 0, 1<<20
	cfg.Log = slog.New(slog.NewTextHandler(r.log, nil))
	driver := vmmtest.NewFake(r.vms)
	driver.Lenient = true
	cfg.parts = parts{
		drivers: []vmm.Driver{driver},
		network: func(plan network.Plan, o network.Options) Network {
			plan.Hosts, plan.Veths = network.DefaultPlan().Hosts, network.DefaultPlan().Veths
			r.net = networktest.New(plan, o)
			return r.net
		},
		guests: func(netip.Addr, string) sandbox.Guest { return quietGuest{} },
		killStrays: func(context.Context, string, string, func(string) bool) ([]string, error) {
			return nil, nil
		},
		netNSOf: func(string, string, []string) (string, error) { return "", nil },
		run:     filepath.Join(r.dir, "run"), claims: filepath.Join(r.dir, "claims"),
	}
	r.cfg = cfg
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(r.log.String())
		}
	})
	return r
}

// fill makes a state directory as setup leaves it, with files of a few bytes.
func fill(t testing.TB, state string) {
	t.Helper()
	for path, content := range map[string]string{
		"kernels/default/vmlinux":     "kernel",
		"kernels/default/initrd.img":  "initrd",
		"kernels/default/kernel.json": `{"format":1,"files":{"vmlinux":{"size":6},"initrd.img":{"size":6}},"source":"test"}`,
		"templates/minimal/base.ext4": "base",
		"templates/minimal/template.json": `{"format":1,"files":{"base.ext4":{"size":4,"sha256":"b"}},` +
			`"defaults":{"vcpus":1,"mem_mib":512,"overlay_mib":64}}`,
		"seeds/overlay-64.ext4": "",
	} {
		path = filepath.Join(state, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(filepath.Join(state, "seeds", "overlay-64.ext4"), 64<<20); err != nil {
		t.Fatal(err)
	}
}

// start runs an agent until the test or ended ends it.
func (r *rig) start() {
	r.Helper()
	a, err := New(r.Context(), r.cfg)
	if err != nil {
		r.Fatalf("New: %v", err)
	}
	r.agent = a
	ctx, end := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	r.wait = sync.OnceValue(func() error { return <-done })
	r.ended = func() error { end(); return r.wait() }
	r.Cleanup(func() {
		if err := r.ended(); err != nil {
			r.Errorf("Run: %v", err)
		}
	})
}

// get asks for a path of the agent.
func (r *rig) get(path string) (status int, body string) {
	r.Helper()
	resp, err := http.Get("http://" + r.agent.Addr().String() + path)
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		r.Fatal(err)
	}
	return resp.StatusCode, string(all)
}

// call makes a call of the control plane as curl does, and decodes its answer.
func (r *rig) call(rpc, request string) (status int, answer map[string]any) {
	r.Helper()
	resp, err := http.Post("http://"+r.agent.Addr().String()+"/hostagent.v1.HostAgentService/"+rpc,
		"application/json", strings.NewReader(request))
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		r.Fatal(err)
	}
	return resp.StatusCode, answer
}

// create makes a sandbox and returns its id.
func (r *rig) create() string {
	r.Helper()
	status, answer := r.call("CreateSandbox", `{}`)
	id, _ := answer["sandboxId"].(string)
	if status != http.StatusOK || id == "" {
		r.Fatalf("create: HTTP %d, %v", status, answer)
	}
	return id
}

// list returns the ids of the sandboxes.
func (r *rig) list() []string {
	r.Helper()
	status, answer := r.call("ListSandboxes", `{}`)
	if status != http.StatusOK {
		r.Fatalf("list: HTTP %d, %v", status, answer)
	}
	ids := []string{}
	boxes, _ := answer["sandboxes"].([]any)
	for _, b := range boxes {
		ids = append(ids, b.(map[string]any)["sandboxId"].(string))
	}
	slices.Sort(ids)
	return ids
}

// wantNothing checks that the agent has left nothing outside of its state
// directory, and no sandbox in it.
func (r *rig) wantNothing() {
	r.Helper()
	if live := r.vms.Live(); len(live) > 0 {
		r.Errorf("VMs that run: %v", live)
	}
	if !r.net.TornDown() {
		r.Error("the network is not torn down")
	}
	for _, path := range []string{r.cfg.parts.claims, filepath.Join(r.cfg.parts.run, instance(r.cfg.StateDir))} {
		if exists(path) {
			r.Errorf("%s is left", path)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(r.cfg.StateDir, "sandboxes", "sb-*")); len(left) > 0 {
		r.Errorf("sandboxes on disk: %v", left)
	}
}

func TestAgentServesAndLeavesNothing(t *testing.T) {
	r := newRig(t)
	r.start()
	if status, body := r.get("/readyz"); status != http.StatusOK || body != "ready\n" {
		t.Errorf("/readyz: HTTP %d, %q", status, body)
	}
	if status, body := r.get("/healthz"); status != http.StatusOK || body != "ok\n" {
		t.Errorf("/healthz: HTTP %d, %q", status, body)
	}
	if status, version := r.call("GetVersion", `{}`); status != http.StatusOK || version["version"] != "1.2.3" || version["vmm"] != "fake" {
		t.Errorf("version: HTTP %d, %v", status, version)
	}
	a, b := r.create(), r.create()
	want := []string{a, b}
	slices.Sort(want)
	if got := r.list(); !slices.Equal(got, want) {
		t.Errorf("list: %v, want %v", got, want)
	}
	if status, answer := r.call("Exec", `{"sandbox_id":"`+a+`","cmd":"hello"}`); status != http.StatusOK || answer["stdout"] != "aGVsbG8=" {
		t.Errorf("exec: HTTP %d, %v", status, answer)
	}
	_, numbers := r.get("/metrics")
	for _, line := range []string{`wrenn_sandboxes{state="running"} 2`, `wrenn_network_slots{state="open"} 2`, "wrenn_panics_total 0",
		"wrenn_egress_connections 0", `wrenn_egress_total{result="refused"} 0`} {
		if !strings.Contains(numbers, line+"\n") {
			t.Errorf("the metrics lack %q", line)
		}
	}
	for _, id := range want {
		if status, answer := r.call("DestroySandbox", `{"sandbox_id":"`+id+`"}`); status != http.StatusOK {
			t.Errorf("destroy: HTTP %d, %v", status, answer)
		}
	}
	if got := r.list(); len(got) > 0 {
		t.Errorf("after destroy: %v", got)
	}
	if err := r.ended(); err != nil {
		t.Errorf("Run: %v", err)
	}
	r.wantNothing()
	if c, err := net.DialTimeout("tcp", r.agent.Addr().String(), time.Second); err == nil {
		c.Close()
		t.Error("the agent still listens")
	}
}

// Other paths, / among them, are the REST API's, which tells strangers nothing.
func TestUnknownPaths(t *testing.T) {
	r := newRig(t)
	r.start()
	for _, path := range []string{"/", "/healthz/", "/readyz/x", "/metrics/x", "/favicon.ico"} {
		if status, body := r.get(path); status != http.StatusUnauthorized {
			t.Errorf("%s: HTTP %d, %q", path, status, body)
		}
	}
}

func TestSandboxesGoOnWithTheNextAgent(t *testing.T) {
	r := newRig(t)
	r.start()
	id := r.create()
	if err := r.ended(); err != nil {
		t.Fatalf("Run: %v", err)
	}
	if live := r.vms.Live(); !slices.Equal(live, []string{id}) || r.net.TornDown() || !exists(r.cfg.parts.claims) {
		t.Fatalf("what the sandbox needs is gone: VMs %v", live)
	}

	r.cfg.DestroyAtEnd = true
	r.start()
	if got := r.list(); !slices.Equal(got, []string{id}) || !strings.Contains(r.log.String(), "state taken over") {
		t.Errorf("the next agent has %v, want %v", got, id)
	}
	if err := r.ended(); err != nil {
		t.Errorf("Run: %v", err)
	}
	r.wantNothing()
}

// A second agent on the directory, an address in use, and a host without
// templates or VMM are found before anything is touched.
func TestNewFails(t *testing.T) {
	r := newRig(t)
	r.start()
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
		class  *errdefs.Class
	}{
		"another agent":  {func(*Config) {}, "", errdefs.Busy},
		"address in use": {func(c *Config) { c.Listen = r.agent.Addr().String() }, "--listen", nil},
		"no template": {func(c *Config) {
			c.StateDir = filepath.Join(r.dir, "empty")
		}, "wrenn setup --state-dir " + filepath.Join(r.dir, "empty"), errdefs.NotFound},
		"no VMM": {func(c *Config) {
			driver := vmmtest.NewFake(r.vms)
			driver.Inject(vmmtest.OpCheck, 1, vmmtest.Fault{Err: errors.New("no program")})
			c.parts.drivers = []vmm.Driver{driver}
		}, "no program", errdefs.Unavailable},
		"no key":         {func(c *Config) { c.Listen = "0.0.0.0:0" }, "wrenn key create --state-dir " + r.cfg.StateDir, errdefs.WrongState},
		"wrong settings": {func(c *Config) { c.VMM, c.Pool = "xen", -1 }, "--pool", nil},
	} {
		cfg := r.cfg
		c.change(&cfg)
		before := r.net
		a, err := New(t.Context(), cfg)
		if err == nil {
			t.Fatalf("%s: there is an agent on %v", name, a.Addr())
		}
		if !strings.Contains(err.Error(), c.want) || errdefs.ClassOf(err) != c.class {
			t.Errorf("%s: %v", name, err)
		}
		if c.class != errdefs.Busy && r.net != before {
			t.Errorf("%s: a network was made", name)
		}
		r.net = before
	}
	if status, body := r.get("/readyz"); status != http.StatusOK {
		t.Errorf("the first agent: HTTP %d, %q", status, body)
	}
}

// Handler answers like the listener, without one.
func TestHandler(t *testing.T) {
	r := newRig(t)
	r.start()
	for host, want := range map[string]int{"localhost": http.StatusOK, "evil.example": http.StatusForbidden} {
		req, w := httptest.NewRequest(http.MethodGet, "http://"+host+"/readyz", nil), httptest.NewRecorder()
		r.agent.Handler().ServeHTTP(w, req)
		if w.Code != want {
			t.Errorf("%s: HTTP %d, want %d", host, w.Code, want)
		}
	}
}

// Calls that come while the agent ends are refused, and it says that it ends.
func TestReadinessWhileTheAgentEnds(t *testing.T) {
	r := newRig(t)
	r.start()
	if err := r.agent.base.manager.Shutdown(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if status, body := r.get("/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(body, "draining") {
		t.Errorf("/readyz: HTTP %d, %q", status, body)
	}
	if status, _ := r.get("/healthz"); status != http.StatusOK {
		t.Errorf("/healthz: HTTP %d", status)
	}
	if status, answer := r.call("CreateSandbox", `{}`); status != http.StatusServiceUnavailable {
		t.Errorf("create: HTTP %d, %v", status, answer)
	}
}

// An agent that cannot read its keys does not start, and one that cannot keep requests
// gives back what it took.
func TestStoresThatCannotBeOpened(t *testing.T) {
	r := newRig(t)
	damaged := filepath.Join(r.cfg.StateDir, "keys.json")
	if err := os.WriteFile(damaged, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := New(t.Context(), r.cfg)
	if errdefs.ClassOf(err) != errdefs.Corrupt || !strings.Contains(err.Error(), "keys.json") || r.net != nil {
		t.Errorf("damaged keys: %v", err)
	}
	if err := errors.Join(os.Remove(damaged), os.WriteFile(filepath.Join(r.cfg.StateDir, "idempotency"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), r.cfg); err == nil || !strings.Contains(err.Error(), "open requests") {
		t.Errorf("no directory of requests: %v", err)
	}
	r.wantNothing()
}

// A drained agent has hibernated its sandboxes, lets none be made or resumed, says so, and
// ends.
func TestDrain(t *testing.T) {
	r := newRig(t)
	r.cfg.DestroyAtEnd = true // which a drain does not
	r.start()
	asleep, running := r.create(), r.create()
	if status, answer := r.call("PauseSandbox", `{"sandbox_id":"`+asleep+`","to_disk":true}`); status != http.StatusOK {
		t.Fatal(answer)
	}
	if status, answer := r.call("DrainHost", `{"timeout_sec":-1}`); status != http.StatusBadRequest {
		t.Errorf("a negative time: HTTP %d, %v", status, answer)
	}
	drained := make(chan map[string]any, 1)
	go func() {
		defer close(drained)
		_, answer := r.call("DrainHost", `{"timeout_sec":600}`)
		drained <- answer
	}()
	for {
		status, body := r.get("/readyz")
		if status == http.StatusServiceUnavailable && strings.Contains(body, "draining") {
			break
		}
	}
	if status, body := r.get("/healthz"); status != http.StatusOK {
		t.Errorf("/healthz: HTTP %d %s", status, body)
	}
	for rpc, request := range map[string]string{
		"CreateSandbox": `{}`, "ResumeSandbox": `{"sandbox_id":"` + asleep + `"}`, "ForkSandbox": `{"sandbox_id":"` + running + `"}`,
	} {
		if status, answer := r.call(rpc, request); status != http.StatusServiceUnavailable {
			t.Errorf("%s: HTTP %d, %v", rpc, status, answer)
		}
	}
	if status, answer := r.call("DrainHost", `{"hibernate":true}`); answer["code"] != "aborted" {
		t.Errorf("a second drain: HTTP %d, %v", status, answer)
	}
	if status, answer := r.call("PauseSandbox", `{"sandbox_id":"`+running+`","to_disk":true}`); status != http.StatusOK {
		t.Errorf("hibernate: %v", answer) // the last one: the drain is over
	}
	if answer := <-drained; answer == nil || answer["left"] != nil || answer["code"] != nil {
		t.Errorf("drain answers %v", answer)
	}
	if err := r.wait(); err != nil {
		t.Errorf("Run: %v", err)
	}
	r.start() // the next agent has both
	if got := r.list(); len(got) != 2 {
		t.Errorf("there are %v", got)
	}
	if status, answer := r.call("ResumeSandbox", `{"sandbox_id":"`+asleep+`"}`); status != http.StatusOK {
		t.Errorf("resume: %v", answer)
	}
	if _, answer := r.call("DrainHost", `{"hibernate":true}`); answer["left"] != nil || answer["code"] != nil {
		t.Errorf("drain answers %v", answer)
	}
	if err := r.wait(); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestPrepare(t *testing.T) {
	testenv.Root(t) // publishing reads the files of a snapshot, which only root may
	r := newRig(t)
	made, err := Prepare(t.Context(), r.cfg)
	if err != nil || !made {
		t.Fatalf("prepare: %v, %v", made, err)
	}
	r.wantNothing()
	if made, err := Prepare(t.Context(), r.cfg); err != nil || made {
		t.Errorf("once more: %v, %v", made, err)
	}
	r.start()
	if _, answer := r.call("CreateSandbox", `{}`); answer["startedFrom"] != "ready snapshot" {
		t.Errorf("a create after prepare: %v", answer)
	}
	if _, err := Prepare(t.Context(), r.cfg); errdefs.ClassOf(err) != errdefs.Busy {
		t.Errorf("beside an agent: %v", err)
	}
}

func TestDoctor(t *testing.T) {
	cfg := newRig(t).cfg
	checks, err := cfg.Doctor(t.Context(), "")
	if err != nil || len(checks) == 0 {
		t.Errorf("%d checks, %v", len(checks), err)
	}
	cfg.VMM = "xen"
	if _, err := cfg.Doctor(t.Context(), ""); err == nil {
		t.Error("a VMM that does not exist is taken")
	}
}
