package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/network/networktest"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// noDisks are templates whose disks have no content, and no snapshots.
type noDisks struct{ *template.Store }

func (noDisks) NewOverlay(_ context.Context, path string, _ int) error {
	return os.WriteFile(path, nil, 0o600)
}

func (noDisks) StageReady(context.Context, string, string) (template.Stage, error) {
	return template.Stage{}, errdefs.Unavailable.Errorf("there is no room for a boot snapshot")
}

// mute is a guest without programs.
type mute struct{}

func (mute) WaitReady(context.Context) error                         { return nil }
func (mute) Init(context.Context, guest.Init) (string, error)        { return "", nil }
func (mute) Quiesce(context.Context, bool) error                     { return nil }
func (mute) Freeze(context.Context) (time.Time, error)               { return time.Now(), nil }
func (mute) Close()                                                  {}
func (mute) Metrics(context.Context) (m guestapi.Metrics, err error) { return m, nil }

// Exec ends as the command's name says.
func (mute) Start(context.Context, guest.Command, string) (<-chan guest.Ended, error) {
	ended := make(chan guest.Ended)
	close(ended)
	return ended, nil
}
func (mute) Unpack(context.Context, string, string, io.Reader) error { return nil }
func (mute) Pack(context.Context, string, io.Writer) error           { return nil }
func (mute) Exec(_ context.Context, cmd guest.Command) (guest.Result, error) {
	switch cmd.Cmd {
	case "hog":
		return guest.Result{ExitCode: 137, Signal: syscall.SIGKILL, OutOfMemory: true, MemoryLimit: 448}, nil
	case "late":
		return guest.Result{Stdout: []byte("half"), Stderr: bytes.Repeat([]byte("e"), 3<<20)}, errdefs.TimedOut.Errorf("too late")
	case "late and silent":
		return guest.Result{}, errdefs.TimedOut.Errorf("too late")
	}
	return guest.Result{}, nil
}

// plane is a control plane in front of a manager with one running sandbox, whose
// VMs, networks and guests are fakes.
type plane struct {
	*testing.T
	url     string
	id      string // of the sandbox
	dir     string
	manager *sandbox.Manager
	store   *template.Store
	builds  *builder
	net     *networktest.Network
	vms     *vmmtest.Host
	panics  *atomic.Int64
	keys    *auth.Store
	config  Config
	mux     *http.ServeMux
	secret  string // the key that call shows
}

// setUp makes a guest kernel and the template "minimal", all of them empty.
func (p *plane) setUp(store *template.Store) {
	p.Helper()
	kernel, err := store.StageKernel(p.Context(), nil)
	if err != nil {
		p.Fatal(err)
	}
	defer kernel.Discard()
	image := filepath.Join(p.TempDir(), "image")
	for _, path := range []string{kernel.Dir + "/vmlinux", kernel.Dir + "/initrd.img", image} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			p.Fatal(err)
		}
	}
	about := template.Making{Recipe: "empty", Defaults: template.Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: 4096}}
	err = kernel.Publish(template.Kernel{})
	if err == nil {
		_, _, err = store.MakeBuild(p.Context(), template.NewBuild{Name: template.DefaultName}, about, func(b *template.BuildStage) error {
			return b.AddLayer(p.Context(), image)
		})
	}
	if err != nil {
		p.Fatal(err)
	}
}

func newPlane(t *testing.T) *plane {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	p := &plane{T: t, dir: t.TempDir(), vms: vmmtest.NewHost(), panics: new(atomic.Int64)}
	p.net = networktest.New(network.DefaultPlan(), network.Options{Log: log})
	store, err := template.Open(p.dir, log)
	if err != nil {
		t.Fatal(err)
	}
	p.setUp(store)
	p.store, p.builds = store, newBuilder(store)
	driver := vmmtest.NewFake(p.vms)
	driver.Lenient = true
	p.manager, _, err = sandbox.Open(t.Context(), sandbox.Config{
		StateDir: p.dir, RunDir: filepath.Join(t.TempDir(), "run"),
		Drivers: []vmm.Driver{driver}, Network: p.net, Templates: noDisks{store},
		Guests:     func(netip.Addr, string) sandbox.Guest { return mute{} },
		KillStrays: func(context.Context, string, string, func(string) bool) ([]string, error) { return nil, nil },
		NetNSOf:    func(string, string, []string) (string, error) { return "", nil },
		Capacity: sandbox.Capacity{
			Resources: sandbox.Resources{Sandboxes: 100, VCPUs: 100, MemMiB: 1 << 20, DiskMiB: 1 << 20},
			Starts:    4, StartQueue: time.Minute,
		},
		OverlayMiB: 64, BootTimeout: time.Minute, KeepStopped: time.Hour, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	if p.keys, err = auth.Open(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	p.mux = http.NewServeMux()
	p.config = Config{
		Keys: p.keys, Limiter: auth.NewLimiter(auth.Rates{}), Keyless: true,
		Manager: p.manager, Version: Version{Version: "1", VMMs: []VMM{
			{Name: "fake", Version: "7", Accel: "tcg", CPU: "v3", Isolation: "emulation", Speed: "slow", Why: "a test says so"},
			{Name: "absent", Unusable: "absent is not installed"},
		}},
		Store: store, Builds: p.builds, Images: &images{}, DiskMiB: 1024, Export: exportOf,
		Panics: p.panics, Log: log, Templates: func() ([]string, error) { return []string{"minimal"}, nil },
		Slots:   func() map[string]int { return p.net.Stats().ByState() },
		Names:   func() NameCounts { return NameCounts{Open: 1, Accepted: 2, Refused: 3} },
		Refused: func() int64 { return 4 },
	}
	Register(p.mux, p.config)
	s := httptest.NewServer(p.mux)
	p.url = s.URL
	t.Cleanup(func() {
		s.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := p.manager.Shutdown(ctx, true); err != nil {
			t.Errorf("shut down: %v", err)
		}
	})
	created, err := p.manager.Create(t.Context(), sandbox.CreateRequest{Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	p.id = string(created.ID)
	return p
}

// state is everything that a call could have changed.
func (p *plane) state() map[string]string {
	p.Helper()
	state := map[string]string{
		"sandboxes": fmt.Sprintf("%+v", p.manager.List(true)),
		"slots":     fmt.Sprint(p.net.OpenSlots()),
		"VMs":       fmt.Sprint(p.vms.Live(), p.vms.Paused(p.id)),
	}
	err := filepath.WalkDir(p.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		state[path] = string(content)
		return err
	})
	if err != nil {
		p.Fatal(err)
	}
	return state
}

// call makes a call and returns the code and the message of its error.
func (p *plane) call(rpc, request string) (code, message string) {
	p.Helper()
	kind, body := "application/json", []byte(request)
	if streams(rpc) {
		kind = "application/connect+json"
		body = append([]byte{0, 0, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	}
	_, answer := postAs(p.T, p.secret, p.url, rpc, kind, "", body)
	var refusal struct {
		Code, Message string
		Error         struct{ Code, Message string }
	}
	for kind == "application/connect+json" && len(answer) >= 5 && answer[0]&2 == 0 { // to the last message
		size := int(answer[1])<<24 | int(answer[2])<<16 | int(answer[3])<<8 | int(answer[4])
		answer = answer[5+size:]
	}
	if kind == "application/connect+json" && len(answer) >= 5 {
		answer = answer[5:]
	}
	if err := json.Unmarshal([]byte(answer), &refusal); err != nil {
		p.Fatalf("%s %s: %q: %v", rpc, request, answer, err)
	}
	return refusal.Code + refusal.Error.Code, refusal.Message + refusal.Error.Message
}

// refuse checks that a request is refused as invalid, in words that name what is
// wrong.
func (p *plane) refuse(rpc, request, word string) {
	p.Helper()
	if code, message := p.call(rpc, request); code != "invalid_argument" || !strings.Contains(message, word) {
		p.Errorf("%s %.200s: %s, %q; want invalid_argument about %s", rpc, request, code, message, word)
	}
}

// methods are those of the control plane.
func methods() []protoreflect.MethodDescriptor {
	var all []protoreflect.MethodDescriptor
	for _, service := range []protoreflect.ServiceDescriptor{
		pb.File_hostagent_v1_hostagent_proto.Services().ByName("HostAgentService"),
		pb.File_hostagent_v1_template_proto.Services().ByName("TemplateService"),
	} {
		for i := range service.Methods().Len() {
			all = append(all, service.Methods().Get(i))
		}
	}
	return all
}

// procedure is the path of a call.
func procedure(rpc string) string {
	for _, m := range methods() {
		if string(m.Name()) == rpc {
			return "/" + string(m.Parent().FullName()) + "/" + rpc
		}
	}
	return "/hostagent.v1.HostAgentService/" + rpc
}

func streams(rpc string) bool {
	for _, m := range methods() {
		if string(m.Name()) == rpc {
			return m.IsStreamingServer() || m.IsStreamingClient()
		}
	}
	return false
}

// wrong returns JSON values that a field cannot have.
func wrong(f protoreflect.FieldDescriptor) []string {
	switch {
	case f.IsMap():
		return []string{`["a"]`, `"a"`, `{"a":1}`}
	case f.IsList():
		return []string{`{"a":"b"}`, `"a"`, `[1]`}
	}
	switch f.Kind() {
	case protoreflect.StringKind:
		return []string{`1`, `true`, `["a"]`, `{}`}
	case protoreflect.BoolKind:
		return []string{`1`, `"true"`, `[]`}
	case protoreflect.MessageKind:
		return []string{`1`, `"a"`, `[]`}
	default:
		return []string{`"a"`, `1.5`, `true`, `[1]`, `1e300`, `-99999999999999999999`}
	}
}

// named is what a refusal of one of these values has: the field's name, or the
// place of a value that has another structure than the field.
func named(f protoreflect.FieldDescriptor) string {
	if f.IsMap() || f.IsList() || f.Kind() == protoreflect.MessageKind {
		return "(line 1:"
	}
	return f.JSONName()
}

// Every field of every request: of a wrong kind, and of a name that it does not
// have.
func TestWrongAndUnknownFields(t *testing.T) {
	p := newPlane(t)
	before := p.state()
	for _, m := range methods() {
		rpc, fields := string(m.Name()), m.Input().Fields()
		p.refuse(rpc, `{"colour":"blue"}`, "colour")
		for i := range fields.Len() {
			f := fields.Get(i)
			for _, value := range wrong(f) {
				p.refuse(rpc, fmt.Sprintf(`{%q:%s}`, f.Name(), value), named(f))
			}
			p.refuse(rpc, fmt.Sprintf(`{%q:null,%q:null}`, f.Name(), f.Name()), string(f.Name()))
			if f.Kind() != protoreflect.MessageKind || f.IsMap() || f.Message().ParentFile().Package() == "google.protobuf" {
				continue // the last have a form of their own in JSON
			}
			within := `{%q:{%q:%s}}`
			if f.IsList() {
				within = `{%q:[{%q:%s}]}`
			}
			p.refuse(rpc, fmt.Sprintf(within, f.Name(), "colour", "1"), "colour")
			for j := range f.Message().Fields().Len() {
				inner := f.Message().Fields().Get(j)
				for _, value := range wrong(inner) {
					p.refuse(rpc, fmt.Sprintf(within, f.Name(), inner.Name(), value), named(inner))
				}
			}
		}
		for _, request := range []string{`[]`, `null`, `"a"`, `{`, `{} {}`, `{"a"}`} {
			p.refuse(rpc, request, "")
		}
	}
	if diff := cmp.Diff(before, p.state()); diff != "" {
		t.Errorf("refused requests have changed something:\n%s", diff)
	}
	if n := p.panics.Load(); n > 0 {
		t.Errorf("%d requests made a handler panic", n)
	}
}

// limits are requests that are beyond what a field can have, with a word that the
// answer has about each. ID stands for the sandbox.
var limits = []struct{ rpc, request, word string }{
	{"CreateSandbox", `{"template":"../minimal"}`, "template"},
	{"CreateSandbox", `{"template":"` + strings.Repeat("a", 129) + `"}`, "template"},
	{"CreateSandbox", `{"vcpus":-1}`, "vcpus"},
	{"CreateSandbox", `{"vcpus":33}`, "vcpus"},
	{"CreateSandbox", `{"memory_mb":127}`, "memory"},
	{"CreateSandbox", `{"memory_mb":2147483647}`, "memory"},
	{"CreateSandbox", `{"timeout_sec":-1}`, "timeout"},
	{"CreateSandbox", `{"timeout_sec":2147483647}`, "timeout"},
	{"CreateSandbox", `{"on_timeout":"explode"}`, "explode"},
	{"CreateSandbox", `{"user":"a:b"}`, "user"},
	{"CreateSandbox", `{"user":"` + strings.Repeat("a", 33) + `"}`, "user"},
	{"CreateSandbox", `{"envs":{"":"x"}}`, "variable"},
	{"CreateSandbox", `{"envs":{"a=b":"x"}}`, "variable"},
	{"CreateSandbox", `{"envs":{"a":"\u0000"}}`, "variable"},
	{"CreateSandbox", `{"envs":{"a":"` + strings.Repeat("x", sandbox.MaxEnvBytes) + `"}}`, "variables"},
	{"CreateSandbox", `{"metadata":{"":"x"}}`, "metadata"},
	{"CreateSandbox", `{"metadata":{"a":"` + strings.Repeat("x", sandbox.MaxMetadataValue+1) + `"}}`, "metadata"},
	{"CreateSandbox", `{"metadata":{"` + strings.Repeat("x", sandbox.MaxMetadataKey+1) + `":""}}`, "metadata"},
	{"CreateSandbox", `{"name":"a b"}`, "name"},
	{"CreateSandbox", `{"name":"sb-web"}`, "name"},
	{"CreateSandbox", `{"name":"-web"}`, "name"},
	{"CreateSandbox", `{"name":"` + strings.Repeat("a", 64) + `"}`, "name"},
	{"CreateSandbox", `{"busy":"always"}`, "busy"},
	{"CreateSandbox", `{"publish":[{}]}`, "publish"},
	{"CreateSandbox", `{"publish":[{"port":80,"host_port":65536}]}`, "publish"},
	{"CreateSandbox", `{"publish":[` + strings.Repeat(`{"port":80},`, 64) + `{"port":80}]}`, "65 ports"},
	{"CreateSandbox", `{"workdir":"/\u0000"}`, "workdir"},
	{"CreateSandbox", `{"disk_mb":63}`, "disk"},
	{"CreateSandbox", `{"disk_mb":-1}`, "disk"},
	{"CreateSandbox", `{"disk_mb":1048577}`, "disk"},
	{"CreateSandbox", `{"deadline":"2001-01-01T00:00:00Z"}`, "deadline"},
	{"CreateSandbox", `{"deadline":"9999-01-01T00:00:00Z"}`, "deadline"},
	{"CreateSandbox", `{"owner_key":"a b"}`, "owner_key"},
	{"CreateSandbox", `{"owner_key":"` + strings.Repeat("a", 256) + `"}`, "owner_key"},
	{"CreateSandbox", `{"on_deadline":"explode"}`, "on_deadline"},
	{"SetDeadline", `{"sandbox_id":"ID","deadline":"9999-01-01T00:00:00Z"}`, "deadline"},
	{"SetDeadline", `{"sandbox_id":"ID","deadline":"0001-01-01T00:00:00Z"}`, "deadline"},
	{"SetDeadline", `{"sandbox_id":"ID","on_deadline":"explode"}`, "on_deadline"},
	{"CreateSandbox", `{"network":{"allow_out":["no name!"]}}`, "allow"},
	{"CreateSandbox", `{"network":{"deny_out":["no name!"]}}`, "deny"},
	{"CreateSandbox", `{"network":{"in_bytes_per_sec":-1}}`, "bytes per second in"},
	{"CreateSandbox", `{"network":{"out_bytes_per_sec":1}}`, "bytes per second out"},
	{"CreateSandbox", `{"network":{"in_packets_per_sec":-1}}`, "packets per second in"},
	{"CreateSandbox", `{"network":{"out_packets_per_sec":100000001}}`, "packets per second out"},
	{"CreateSandbox", `{"network":{"max_connections":-1}}`, "connections"},
	{"UpdateNetwork", `{"sandbox_id":"ID","network":{"allow_out":["no name!"]}}`, "allow"},
	{"UpdateNetwork", `{"sandbox_id":"ID","network":{"in_bytes_per_sec":1}}`, "bytes per second in"},
	{"UpdateNetwork", `{"sandbox_id":"ID","network":{"max_connections":-5}}`, "connections"},
	{"ForkSandbox", `{"sandbox_id":"ID","count":-1}`, "count"},
	{"ForkSandbox", `{"sandbox_id":"ID","count":100000}`, "count"},
	{"SnapshotSandbox", `{"sandbox_id":"ID","name":"../x"}`, "name"},
	{"SnapshotSandbox", `{"sandbox_id":"ID","name":".x"}`, "name"},
	{"DeleteSnapshot", `{}`, "name"},
	{"DeleteSnapshot", `{"name":"a b"}`, "name"},
	{"Exec", `{"sandbox_id":"ID"}`, "cmd"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a\u0000b"}`, "NUL"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a","args":["\u0000"]}`, "NUL"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a","args":["` + strings.Repeat("x", maxArgBytes+1) + `"]}`, "argument"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a","timeout_sec":-1}`, "timeout_sec"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a","timeout_sec":86401}`, "timeout_sec"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a","user":"a b"}`, "user"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a","envs":{"a=":""}}`, "variable"},
	{"Exec", `{"sandbox_id":"ID","cmd":"a","cwd":"/\u0000"}`, "cwd"},
	{"DrainHost", `{"timeout_sec":-1}`, "timeout_sec"},
	{"DrainHost", `{"hibernate":true,"timeout_sec":86401}`, "timeout_sec"},
	{"DrainHost", `{"timeout_sec":9223372036854775807}`, "timeout_sec"},
	{"SetTimeout", `{"sandbox_id":"ID","timeout_sec":-1}`, "timeout"},
	{"SetTimeout", `{"sandbox_id":"ID","timeout_sec":2147483647}`, "timeout"},
	{"GetConsole", `{"sandbox_id":"ID","tail_bytes":-1}`, "tail_bytes"},
	{"GetConsole", `{"sandbox_id":"ID","tail_bytes":1048577}`, "tail_bytes"},
	{"WatchEvents", `{"after":18446744073709551615,"no_follow":true}`, "cursor"},
	{"WatchEvents", `{"sandbox_id":"x y"}`, "sandbox_id"},
	{"GetTemplate", `{}`, "template name"},
	{"GetTemplate", `{"template":"../minimal"}`, "template"},
	{"GetTemplate", `{"template":"minimal:a b"}`, "tag"},
	{"DeleteTemplate", `{}`, "template name"},
	{"DeleteTemplate", `{"template":"minimal:default"}`, "has a tag"},
	{"TagTemplate", `{"template":"minimal"}`, "0 tags"},
	{"TagTemplate", `{"template":"minimal","tags":["A"]}`, "tag"},
	{"TagTemplate", `{"template":"minimal","tags":["00000000-0000-0000-0000-000000000000"]}`, "UUID"},
	{"TagTemplate", `{"template":"minimal","tags":[` + strings.Repeat(`"a",`, maxTags) + `"a"]}`, "33 tags"},
	{"UntagTemplate", `{"template":"minimal"}`, "0 tags"},
	{"UntagTemplate", `{"template":"minimal","tags":["default"]}`, "cannot be removed"},
	{"ExportTemplate", `{"template":".x"}`, "template name"},
	{"CancelBuild", `{}`, "template name"},
	{"WatchBuild", `{"template":"minimal","from":-1}`, "from is -1"},
	{"GetUpload", `{}`, "hash"},
	{"GetUpload", `{"hash":"` + strings.Repeat("A", 64) + `"}`, "hash"},
	{"PutUpload", `{}`, "hash"},
	{"PutUpload", `{"hash":"../x"}`, "hash"},
	{"PutUpload", `{"hash":"` + strings.Repeat("0", 65) + `","data":"AAAA"}`, "hash"},
	{"BuildTemplate", `{}`, "name"},
	{"BuildTemplate", `{"name":"a","tags":["a b"],"stages":[{}]}`, "tag"},
	{"BuildTemplate", `{"name":"a"}`, "0 stages"},
	{"BuildTemplate", `{"name":"a","stages":[` + strings.Repeat(`{},`, maxStages) + `{}]}`, "33 stages"},
	{"BuildTemplate", `{"name":"a","vcpus":-1,"stages":[{}]}`, "vcpus"},
	{"BuildTemplate", `{"name":"a","memory_mb":1,"stages":[{}]}`, "memory_mb"},
	{"BuildTemplate", `{"name":"a","disk_mb":1,"stages":[{}]}`, "disk_mb"},
	{"BuildTemplate", `{"name":"a","ready_interval_sec":-1,"stages":[{}]}`, "ready_interval_sec"},
	{"BuildTemplate", `{"name":"a","start_command":"\u0000","stages":[{}]}`, "start_command"},
	{"BuildTemplate", `{"name":"a","ready_command":"` + strings.Repeat("a", maxStepText+1) + `","stages":[{}]}`, "ready_command"},
	{"BuildTemplate", `{"name":"a","stages":[{}]}`, "stage 0: from needs one"},
	{"BuildTemplate", `{"name":"a","stages":[{"from":{"image":"a","template":"b"}}]}`, "stage 0: from needs one"},
	{"BuildTemplate", `{"name":"a","stages":[{"from":{"image":"` + strings.Repeat("a", 1025) + `"}}]}`, "image"},
	{"BuildTemplate", `{"name":"a","stages":[{"from":{"image":"http://a","pull":true}}]}`, "image"},
	{"BuildTemplate", `{"name":"a","stages":[{"from":{"image":"a","password":"\u0000"}}]}`, "password"},
	{"BuildTemplate", `{"name":"a","stages":[{"from":{"template":"a b"}}]}`, "template"},
	{"BuildTemplate", `{"name":"a","stages":[{"from":{"archive":"x"}}]}`, "archive"},
	{"BuildTemplate", building(`{"kind":"SING"}`), "step 1: kind"},
	{"BuildTemplate", building(`{"kind":"RUN","args":["\u0000"]}`), "NUL"},
	{"BuildTemplate", building(`{"kind":"RUN","args":["` + strings.Repeat("a", maxStepText+1) + `"]}`), "bytes long"},
	{"BuildTemplate", building(`{"kind":"ENV","args":[` + strings.Repeat(`"a",`, maxStepArgs) + `"a"]}`), "1025 words"},
	{"BuildTemplate", building(`{"kind":"COPY","files":"x"}`), "files"},
	{"BuildTemplate", building(`{"kind":"COPY","dst":"` + strings.Repeat("a", maxPathBytes+1) + `"}`), "dst"},
	{"BuildTemplate", building(`{"kind":"RUN","line":-1}`), "line"},
	{"BuildTemplate", building(strings.Repeat(`{"kind":"USER","args":["a"]},`, maxSteps) + `{"kind":"USER"}`), "more than 1000 steps"},
}

// building is a request of BuildTemplate with steps.
func building(steps string) string {
	return `{"name":"a","stages":[{"from":{"scratch":true},"steps":[` + steps + `]}]}`
}

func TestLimitsOfFields(t *testing.T) {
	p := newPlane(t)
	before := p.state()
	tried := map[string]bool{}
	for _, c := range limits {
		tried[c.rpc] = true
		p.refuse(c.rpc, strings.ReplaceAll(c.request, "ID", p.id), c.word)
	}
	for _, m := range methods() {
		rpc := string(m.Name())
		if m.Input().Fields().ByName("sandbox_id") == nil {
			// ListSandboxes and CollectGarbage take any bool, and Verify looks for any name.
			free := []string{"ListSandboxes", "Verify", "CollectGarbage", "PruneTemplates"}
			if !tried[rpc] && m.Input().Fields().Len() > 0 && !slices.Contains(free, rpc) {
				t.Errorf("%s has fields, and no limit of them is tried", rpc)
			}
			continue
		}
		if rpc != "WatchEvents" { // which watches all sandboxes without one
			p.refuse(rpc, `{}`, "sandbox_id")
			p.refuse(rpc, `{"sandbox_id":""}`, "sandbox_id")
		}
		for _, id := range []string{"x y", "sb-", "sb-../x", "SB-0123456789ABCDEF", p.id + `\n`, p.id + `\u0000`, strings.Repeat("sb-0", 1000)} {
			p.refuse(rpc, `{"sandbox_id":"`+id+`"}`, "sandbox_id")
		}
	}
	if diff := cmp.Diff(before, p.state()); diff != "" {
		t.Errorf("refused requests have changed something:\n%s", diff)
	}
	if n := p.panics.Load(); n > 0 {
		t.Errorf("%d requests made a handler panic", n)
	}
	// The word ID has stood for a sandbox that works.
	if code, message := p.call("Exec", `{"sandbox_id":"`+p.id+`","cmd":"true"}`); code != "" {
		t.Errorf("exec: %s, %s", code, message)
	}
	if got := slices.Sorted(maps.Keys(before)); len(got) < 5 {
		t.Errorf("the state is looked at in too few places: %q", got)
	}
}

// TestEndOfACommand: the answer says which signal ended a command and whether memory
// was short, and an error has what was written until then.
func TestEndOfACommand(t *testing.T) {
	p := newPlane(t)
	for protocol, limit := range map[string]int{connect.ProtocolConnect: 1 << 20, connect.ProtocolGRPCWeb: 2 << 10} {
		var option []connect.ClientOption
		if protocol == connect.ProtocolGRPCWeb {
			option = append(option, connect.WithGRPCWeb())
		}
		client := hostagentv1connect.NewHostAgentServiceClient(http.DefaultClient, p.url, option...)
		exec := func(cmd string) (*pb.ExecResponse, error) {
			resp, err := client.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: p.id, Cmd: cmd}))
			if err != nil {
				return nil, err
			}
			return resp.Msg, nil
		}
		if got, err := exec("hog"); err != nil || got.ExitCode != 137 || got.Signal != 9 || !got.OutOfMemory || got.MemoryLimitMb != 448 {
			t.Errorf("%s: %v, %v", protocol, got, err)
		}
		if got, err := exec("true"); err != nil || got.Signal != 0 || got.OutOfMemory {
			t.Errorf("%s: %v, %v", protocol, got, err)
		}
		_, err := exec("late")
		var coded *connect.Error
		if !errors.As(err, &coded) || coded.Code() != connect.CodeDeadlineExceeded || len(coded.Details()) != 1 {
			t.Fatalf("%s: %v", protocol, err)
		}
		value, err := coded.Details()[0].Value()
		out, ok := value.(*pb.ExecOutput)
		if err != nil || !ok || string(out.Stdout) != "half" {
			t.Fatalf("%s: %.100v, %v", protocol, value, err)
		}
		missing := fmt.Sprintf("e\n[wrenn: %d bytes of stderr are missing]\n", 3<<20-limit)
		if n := bytes.Count(out.Stderr, []byte("e")); n < limit || n > limit+10 || !strings.HasSuffix(string(out.Stderr), missing) {
			t.Errorf("%s: %d bytes of stderr", protocol, len(out.Stderr))
		}
		if _, err := exec("late and silent"); !errors.As(err, &coded) || len(coded.Details()) != 0 {
			t.Errorf("%s: without output: %v, %v", protocol, err, coded.Details())
		}
	}
}

func TestMetrics(t *testing.T) {
	p := newPlane(t)
	resp, err := http.Get(p.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("HTTP %d, %v", resp.StatusCode, err)
	}
	for _, line := range []string{
		`wrenn_sandboxes{state="running"} 1`, `wrenn_network_slots{state="open"} 1`, `wrenn_reserved{resource="vcpus"} 1`,
		"wrenn_egress_connections 1", `wrenn_egress_total{result="accepted"} 2`, `wrenn_egress_total{result="refused"} 3`,
		"wrenn_connections_refused_total 4", "wrenn_panics_total 0", "wrenn_cleanup_pending 0",
	} {
		if !strings.Contains(string(body), "\n"+line+"\n") {
			t.Errorf("the metrics lack %q", line)
		}
	}
}
