package server

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

func TestCommandBounds(t *testing.T) {
	for name, req := range map[string]*pb.ExecRequest{
		"empty":            {},
		"NUL in cmd":       {Cmd: "a\x00b"},
		"NUL in args":      {Cmd: "a", Args: []string{"\x00"}},
		"long argument":    {Cmd: "a", Args: []string{strings.Repeat("x", maxArgBytes+1)}},
		"many arguments":   {Cmd: "a", Args: make([]string, maxArgs+1)},
		"much in all":      {Cmd: "a", Args: slicesOf(strings.Repeat("x", maxArgBytes), maxArgsBytes/maxArgBytes+1)},
		"user":             {Cmd: "a", User: "a:b"},
		"name of variable": {Cmd: "a", Envs: map[string]string{"a=b": ""}},
		"NUL in variable":  {Cmd: "a", Envs: map[string]string{"a": "\x00"}},
		"long variables":   {Cmd: "a", Envs: map[string]string{"a": strings.Repeat("x", sandbox.MaxEnvBytes)}},
		"many variables":   {Cmd: "a", Envs: variables(sandbox.MaxEnv + 1)},
		"NUL in cwd":       {Cmd: "a", Cwd: "/\x00"},
		"long cwd":         {Cmd: "a", Cwd: strings.Repeat("x", maxPathBytes+1)},
		"negative timeout": {Cmd: "a", TimeoutSec: -1},
		"huge timeout":     {Cmd: "a", TimeoutSec: 1<<31 - 1},
	} {
		if _, err := command(req); errdefs.ClassOf(err) != errdefs.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	cmd, err := command(&pb.ExecRequest{Cmd: "a", Args: []string{"b"}})
	if err != nil || cmd.Timeout != 30*time.Second || cmd.MaxOutput != maxOutputBytes {
		t.Errorf("defaults: %+v, %v", cmd, err)
	}
}

// A VMM's log may be any bytes: they must not make every list an error.
func TestDetailOfAnyBytes(t *testing.T) {
	info := sandboxInfo(sandbox.Info{Detail: "qemu said \xff\x9b"})
	if _, err := proto.Marshal(info); err != nil || info.Detail != "qemu said \ufffd" {
		t.Errorf("%q: %v", info.Detail, err)
	}
}

func TestCommandLogin(t *testing.T) {
	cmd, err := command(&pb.ExecRequest{Cmd: "a", User: "user", Envs: variables(sandbox.MaxEnv), Cwd: "/tmp"})
	if err != nil || cmd.User != "user" || len(cmd.Env) != sandbox.MaxEnv || cmd.Cwd != "/tmp" {
		t.Errorf("%+v, %v", cmd, err)
	}
}

func TestLastLines(t *testing.T) {
	at := time.UnixMilli(1_700_000_000_123)
	logs := []sandbox.LogLine{{At: at, Message: "first"}, {At: at, Message: "second"}, {At: at.Add(time.Millisecond), Message: "ü"}}
	first, second, third := "2023-11-14T22:13:20.123Z first\n", "2023-11-14T22:13:20.123Z second\n", "2023-11-14T22:13:20.124Z ü\n"
	for n, want := range map[int]string{
		0: "", len(third) - 1: "", len(third): third, len(second + third): second + third, 1000: first + second + third,
	} {
		if got := string(lastLines(logs, n)); got != want {
			t.Errorf("%d bytes: %q, want %q", n, got, want)
		}
	}
}

func variables(n int) map[string]string {
	env := map[string]string{}
	for i := range n {
		env[fmt.Sprint("v", i)] = "x"
	}
	return env
}

func slicesOf(s string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = s
	}
	return out
}

func FuzzCommand(f *testing.F) {
	f.Add("sh", "-c", int32(0))
	f.Add("", "\x00", int32(-1))
	f.Fuzz(func(t *testing.T, cmd, arg string, timeout int32) {
		c, err := command(&pb.ExecRequest{Cmd: cmd, Args: []string{arg}, TimeoutSec: timeout})
		if err != nil {
			if errdefs.ClassOf(err) != errdefs.InvalidArgument {
				t.Errorf("error of another class: %v", err)
			}
			return
		}
		if c.Cmd == "" || strings.Contains(c.Cmd+c.Args[0], "\x00") || c.Timeout <= 0 || c.Timeout > maxExecTimeout {
			t.Errorf("accepted %+v", c)
		}
	})
}

// What a policy says is the same on its way through the API; of name servers, none are
// told from none said.
func TestPolicyThroughTheAPI(t *testing.T) {
	no := false
	for _, e := range []sandbox.Egress{
		{AllowInternet: &no, Allow: []string{"example.com"}, Deny: []string{"192.0.2.0/24"}},
		{AllowInternet: &no, Allow: []string{"example.com"}, DNS: []string{}},
		{AllowInternet: &no, Allow: []string{"example.com"}, DNS: []string{"1.1.1.1", "9.9.9.9"}},
	} {
		p := sandbox.Policy{Egress: e, Limits: sandbox.NetworkLimits{InBytes: 10_000, Connections: 3}}
		b, err := proto.Marshal(networkPolicy(p))
		if err != nil {
			t.Fatal(err)
		}
		var m pb.NetworkPolicy
		if err := proto.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(p, policyOf(&m)); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
	if m := networkPolicy(sandbox.Policy{}); m != nil {
		t.Errorf("no policy is %v", m)
	}
	if d := cmp.Diff(sandbox.Policy{}, policyOf(&pb.NetworkPolicy{AllowOut: []string{}})); d != "" {
		t.Errorf("an empty list is not as an absent one:\n%s", d)
	}
}
