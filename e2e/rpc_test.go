package e2e_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// post is what curl does: it returns the status and the JSON object answered.
func post(t testing.TB, a *agent, rpc, body string) (int, map[string]any) {
	t.Helper()
	return send(t, http.DefaultClient, a, rpc, strings.NewReader(body))
}

func send(t testing.TB, client *http.Client, a *agent, rpc string, body io.Reader) (int, map[string]any) {
	t.Helper()
	resp, err := client.Post(a.url+"/hostagent.v1.HostAgentService/"+rpc, "application/json", body)
	if err != nil {
		t.Fatalf("%s: %v", rpc, err)
	}
	defer resp.Body.Close()
	if ct := resp.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("%s: content type %q", rpc, ct)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %v", rpc, err)
	}
	var answer map[string]any
	if err := json.Unmarshal(text, &answer); err != nil {
		t.Fatalf("%s answered %d %q: %v", rpc, resp.StatusCode, text, err)
	}
	return resp.StatusCode, answer
}

// The contract to the letter: what a script with curl sees.
func TestPlainJSON(t *testing.T) {
	a := startAgent(t)
	want := func(rpc, body string, status int) map[string]any {
		t.Helper()
		got, answer := post(t, a, rpc, body)
		if got != status {
			t.Fatalf("%s %s: HTTP %d %v, want %d", rpc, body, got, answer, status)
		}
		return answer
	}
	refused := func(rpc, body string, status int, code string, words ...string) {
		t.Helper()
		answer := want(rpc, body, status)
		if answer["code"] != code {
			t.Errorf("%s %s: %v, want code %s", rpc, body, answer, code)
		}
		for _, w := range words {
			if message, _ := answer["message"].(string); !strings.Contains(message, w) {
				t.Errorf("%s %s: message %q does not say %q", rpc, body, message, w)
			}
		}
	}
	text := func(answer map[string]any, field string) string {
		t.Helper()
		encoded, _ := answer[field].(string)
		data, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			t.Errorf("%s: %v", field, err)
		}
		return string(data)
	}

	if answer := want("ListSandboxes", `{}`, 200); len(answer) != 0 {
		t.Errorf("a new host lists %v", answer)
	}
	began := time.Now()
	created := want("CreateSandbox", `{}`, 200)
	id, _ := created["sandboxId"].(string)
	if !regexp.MustCompile(`^sb-[0-9a-f]{16,}$`).MatchString(id) {
		t.Errorf("sandboxId %q", id)
	}
	if created["status"] != "running" || created["hostIp"] == nil {
		t.Errorf("created %v", created)
	}
	self := fmt.Sprintf(`{"sandboxId":%q}`, id)
	// Field names as in the protocol file are accepted, too.
	alias := fmt.Sprintf(`{"sandbox_id":%q}`, id)

	list := func() map[string]any {
		t.Helper()
		boxes, _ := want("ListSandboxes", `{}`, 200)["sandboxes"].([]any)
		if len(boxes) != 1 {
			t.Fatalf("%d sandboxes listed, want 1", len(boxes))
		}
		return boxes[0].(map[string]any)
	}
	info := list()
	for field, value := range map[string]any{
		"sandboxId": id, "status": "running", "template": "minimal", "vcpus": 1.0, "memoryMb": 512.0, "hostIp": created["hostIp"],
	} {
		if info[field] != value {
			t.Errorf("listed %s is %v, want %v", field, info[field], value)
		}
	}
	if _, ok := info["timeoutSec"]; ok {
		t.Errorf("timeoutSec %v of a sandbox that never expires", info["timeoutSec"])
	}
	var unix int64
	if _, err := fmt.Sscan(fmt.Sprint(info["createdAtUnix"]), &unix); err != nil || unix < began.Unix() || unix > time.Now().Unix() {
		t.Errorf("createdAtUnix %v: %v", info["createdAtUnix"], err)
	}

	exec := want("Exec", fmt.Sprintf(`{"sandboxId":%q,"cmd":"sh","args":["-c","echo out; echo err >&2; exit 3"],"timeoutSec":10}`, id), 200)
	if text(exec, "stdout") != "out\n" || text(exec, "stderr") != "err\n" || exec["exitCode"] != 3.0 {
		t.Errorf("exec answered %v", exec)
	}
	refused("ResumeSandbox", self, 400, "failed_precondition", "running")
	if answer := want("PauseSandbox", self, 200); len(answer) != 0 {
		t.Errorf("pause answered %v", answer)
	}
	if info := list(); info["status"] != "paused" {
		t.Errorf("paused sandbox is listed as %v", info["status"])
	}
	refused("Exec", fmt.Sprintf(`{"sandboxId":%q,"cmd":"true"}`, id), 400, "failed_precondition", "paused", id)
	refused("PauseSandbox", alias, 400, "failed_precondition", "paused")
	want("ResumeSandbox", alias, 200)
	if answer := want("Exec", fmt.Sprintf(`{"sandbox_id":%q,"cmd":"true"}`, id), 200); len(answer) != 0 {
		t.Errorf("exec of true answered %v", answer)
	}
	want("DestroySandbox", self, 200)
	for _, rpc := range []string{"DestroySandbox", "PauseSandbox", "ResumeSandbox", "Exec"} {
		refused(rpc, fmt.Sprintf(`{"sandboxId":%q,"cmd":"true"}`, id)[:len(self)-1]+map[bool]string{true: `,"cmd":"true"}`,
			false: `}`}[rpc == "Exec"],
			404, "not_found", id)
	}
	if answer := want("ListSandboxes", `{}`, 200); len(answer) != 0 {
		t.Errorf("after the destroy the host lists %v", answer)
	}
}

// Every dialect that the API speaks, over both versions of HTTP.
func TestDialects(t *testing.T) {
	b := sharedBox(t)
	h2c := &http.Transport{Protocols: new(http.Protocols)}
	h2c.Protocols.SetUnencryptedHTTP2(true)
	h1 := &http.Transport{}
	defer h2c.CloseIdleConnections()
	defer h1.CloseIdleConnections()
	for name, c := range map[string]struct {
		transport *http.Transport
		options   []connect.ClientOption
	}{
		"connect binary, HTTP/1.1": {h1, nil},
		"connect JSON, HTTP/1.1":   {h1, []connect.ClientOption{connect.WithProtoJSON()}},
		"gRPC-Web, HTTP/1.1":       {h1, []connect.ClientOption{connect.WithGRPCWeb()}},
		"connect binary, h2c":      {h2c, nil},
		"connect JSON, h2c":        {h2c, []connect.ClientOption{connect.WithProtoJSON()}},
		"gRPC, h2c":                {h2c, []connect.ClientOption{connect.WithGRPC()}},
		"gzip, h2c":                {h2c, []connect.ClientOption{connect.WithSendGzip()}},
	} {
		t.Run(name, func(t *testing.T) {
			client := hostagentv1connect.NewHostAgentServiceClient(&http.Client{Transport: c.transport}, b.a.url, c.options...)
			resp, err := client.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
				SandboxId: b.id, Cmd: "sh", Args: []string{"-c", "printf '\\377\\0'; exit 4"},
			}))
			if err != nil || !bytes.Equal(resp.Msg.Stdout, []byte{0xff, 0}) || resp.Msg.ExitCode != 4 {
				t.Errorf("exec: %v, %v", resp, err)
			}
			list, err := client.ListSandboxes(t.Context(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
			if err != nil || !slices.ContainsFunc(list.Msg.Sandboxes, func(s *hostagentv1.SandboxInfo) bool { return s.SandboxId == b.id }) {
				t.Errorf("list: %v, %v", list, err)
			}
			_, err = client.DestroySandbox(t.Context(), connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: "sb-0000000000000000"}))
			wantCode(t, err, connect.CodeNotFound, "sb-0000000000000000")
		})
	}
}

// Whatever is asked, a bad request gets the right code and a sentence, and
// changes nothing on the machine.
func TestBadInput(t *testing.T) {
	a := sharedAgent(t)
	b := sharedBox(t)
	testenv.NoLeaks(t, a.instance())
	before := len(listAll(t, a))
	t.Cleanup(func() {
		if after := len(listAll(t, a)); after != before {
			t.Errorf("%d sandboxes before, %d after", before, after)
		}
	})
	const none = "sb-0123456789abcdef"

	create := func(req *hostagentv1.CreateSandboxRequest) error {
		_, err := a.CreateSandbox(t.Context(), connect.NewRequest(req))
		return err
	}
	for _, name := range []string{
		"/", "a/", "a/b/c", "..", ".", "../minimal", "minimal/..", "mini\x00mal", strings.Repeat("x", 300), "Ünïcode", " ", ".hidden",
		"a b", "$(id)",
	} {
		wantCode(t, create(&hostagentv1.CreateSandboxRequest{Template: name}), connect.CodeInvalidArgument, "template")
	}
	wantCode(t, create(&hostagentv1.CreateSandboxRequest{Template: "a/no-such"}), connect.CodeNotFound, "no-such")
	for _, n := range []int32{-1, 33, 1000, math.MinInt32, math.MaxInt32} {
		wantCode(t, create(&hostagentv1.CreateSandboxRequest{Vcpus: n}), connect.CodeInvalidArgument, "vcpus", fmt.Sprint(n))
	}
	for _, n := range []int32{-1, 1, 127, math.MinInt32, math.MaxInt32} {
		wantCode(t, create(&hostagentv1.CreateSandboxRequest{MemoryMb: n}), connect.CodeInvalidArgument, "memory", fmt.Sprint(n))
	}
	for _, n := range []int32{-1, math.MinInt32, math.MaxInt32} {
		wantCode(t, create(&hostagentv1.CreateSandboxRequest{TimeoutSec: n}), connect.CodeInvalidArgument, "timeout", fmt.Sprint(n))
	}
	// Within the bounds of a sandbox, but more than this host has.
	wantCode(t, create(&hostagentv1.CreateSandboxRequest{MemoryMb: 256 << 10}), connect.CodeResourceExhausted, "memory", "free")

	for id, code := range map[string]connect.Code{
		none: connect.CodeNotFound, "": connect.CodeInvalidArgument, "x": connect.CodeNotFound, // which may be a name
		"sb-": connect.CodeInvalidArgument, "sb-../../etc": connect.CodeInvalidArgument, "SB-0123456789ABCDEF": connect.CodeInvalidArgument,
		b.id + "\x00": connect.CodeInvalidArgument, b.id + "\n": connect.CodeInvalidArgument,
		strings.Repeat("sb-0", 1000): connect.CodeInvalidArgument,
	} {
		ctx := t.Context()
		_, err := a.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{SandboxId: id}))
		wantCode(t, err, code, "sandbox")
		_, err = a.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{SandboxId: id}))
		wantCode(t, err, code, "sandbox")
		_, err = a.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id}))
		wantCode(t, err, code, "sandbox")
		_, err = a.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id, Cmd: "true"}))
		wantCode(t, err, code, "sandbox")
		_, err = a.GetConsole(ctx, connect.NewRequest(&hostagentv1.GetConsoleRequest{SandboxId: id}))
		wantCode(t, err, code, "sandbox")
	}

	for name, c := range map[string]struct {
		req  *hostagentv1.ExecRequest
		word string
	}{
		"no command":       {&hostagentv1.ExecRequest{}, "cmd"},
		"NUL in command":   {&hostagentv1.ExecRequest{Cmd: "a\x00b"}, "NUL"},
		"NUL in argument":  {&hostagentv1.ExecRequest{Cmd: "echo", Args: []string{"a", "\x00"}}, "NUL"},
		"long argument":    {&hostagentv1.ExecRequest{Cmd: "echo", Args: []string{strings.Repeat("x", 200<<10)}}, "long"},
		"many arguments":   {&hostagentv1.ExecRequest{Cmd: "echo", Args: make([]string, 5000)}, "arguments"},
		"all too long":     {&hostagentv1.ExecRequest{Cmd: "echo", Args: slices.Repeat([]string{strings.Repeat("x", 100<<10)}, 20)}, "long"},
		"negative timeout": {&hostagentv1.ExecRequest{Cmd: "true", TimeoutSec: -1}, "timeout"},
		"least timeout":    {&hostagentv1.ExecRequest{Cmd: "true", TimeoutSec: math.MinInt32}, "timeout"},
		"huge timeout":     {&hostagentv1.ExecRequest{Cmd: "true", TimeoutSec: math.MaxInt32}, "timeout"},
	} {
		c.req.SandboxId = b.id
		_, err := a.Exec(t.Context(), connect.NewRequest(c.req))
		if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%s: %v, want invalid_argument that says %q", name, err, c.word)
		}
	}
	_, err := a.GetConsole(t.Context(), connect.NewRequest(&hostagentv1.GetConsoleRequest{SandboxId: b.id, TailBytes: math.MaxInt32}))
	wantCode(t, err, connect.CodeInvalidArgument, "tail_bytes")

	for _, body := range []string{``, `{`, `nonsense`, `[]`, `"x"`, `{"vcpus":"many"}`, `{"vcpus":1e99}`, `{"vcpus":1.5}`,
		`{"template":7}`, "\xff\xfe", `{"memoryMb":99999999999}`} {
		if body == `` {
			continue // an empty message, by the protocol
		}
		status, answer := post(t, a, "CreateSandbox", body)
		if message, _ := answer["message"].(string); status != 400 || answer["code"] != "invalid_argument" || message == "" {
			t.Errorf("%q: HTTP %d %v, want invalid_argument", body, status, answer)
		}
	}

	const large = 100 << 20
	for name, body := range map[string]io.Reader{
		"said beforehand": bytes.NewReader(append([]byte(`{"template":"`), bytes.Repeat([]byte("x"), large)...)),
		"streamed":        io.MultiReader(strings.NewReader(`{"template":"`), io.LimitReader(forever('x'), large)),
	} {
		began := time.Now()
		resp, err := http.Post(a.url+"/hostagent.v1.HostAgentService/CreateSandbox", "application/json", body)
		if err != nil {
			t.Errorf("100 MB, %s: no answer: %v", name, err)
			continue
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if !strings.Contains(string(text), "resource_exhausted") || time.Since(began) > 10*time.Second {
			t.Errorf("100 MB, %s: HTTP %d %s after %s", name, resp.StatusCode, text, time.Since(began))
		}
	}

	resp, err := http.Get(a.url + "/no/such/page")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 401 { // the REST API's
		t.Errorf("an unknown path: HTTP %d", resp.StatusCode)
	}
	// It still answers, and the sandbox lives.
	if got := b.sh("echo alive"); got != "alive" {
		t.Errorf("afterwards: %q", got)
	}
}

type forever byte

func (f forever) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(f)
	}
	return len(p), nil
}

func listAll(t testing.TB, a *agent) []*hostagentv1.SandboxInfo {
	t.Helper()
	resp, err := a.ListSandboxes(context.Background(), connect.NewRequest(&hostagentv1.ListSandboxesRequest{All: true}))
	if err != nil {
		t.Fatalf("list sandboxes: %v", err)
	}
	return resp.Msg.Sandboxes
}
