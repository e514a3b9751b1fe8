package server

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

func TestCommandBounds(t *testing.T) {
	for name, req := range map[string]*hostagentv1.ExecRequest{
		"empty":            {},
		"NUL in cmd":       {Cmd: "a\x00b"},
		"NUL in args":      {Cmd: "a", Args: []string{"\x00"}},
		"long argument":    {Cmd: "a", Args: []string{strings.Repeat("x", maxArgBytes+1)}},
		"many arguments":   {Cmd: "a", Args: make([]string, maxArgs+1)},
		"much in all":      {Cmd: "a", Args: slicesOf(strings.Repeat("x", maxArgBytes), maxArgsBytes/maxArgBytes+1)},
		"negative timeout": {Cmd: "a", TimeoutSec: -1},
		"huge timeout":     {Cmd: "a", TimeoutSec: 1<<31 - 1},
	} {
		if _, err := command(req); errdefs.ClassOf(err) != errdefs.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	cmd, err := command(&hostagentv1.ExecRequest{Cmd: "a", Args: []string{"b"}})
	if err != nil || cmd.Timeout != 30*time.Second || cmd.MaxOutput != maxOutputBytes {
		t.Errorf("defaults: %+v, %v", cmd, err)
	}
}

// A VMM's log may be any bytes: they must not make every list an error.
func TestDetailOfAnyBytes(t *testing.T) {
	pb := sandboxInfo(sandbox.Info{Detail: "qemu said \xff\x9b"})
	if _, err := proto.Marshal(pb); err != nil || pb.Detail != "qemu said \ufffd" {
		t.Errorf("%q: %v", pb.Detail, err)
	}
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
		c, err := command(&hostagentv1.ExecRequest{Cmd: cmd, Args: []string{arg}, TimeoutSec: timeout})
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
