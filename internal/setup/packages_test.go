package setup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/progress"
)

func TestMissing(t *testing.T) {
	all := []Package{{"a", "x", ""}, {"e2fsprogs", "mke2fs", ""}, {"e2fsprogs", "resize2fs", ""}}
	got := missing(all, func(file string) bool { return file == "x" })
	if diff := cmp.Diff([]Package{{"e2fsprogs", "mke2fs", ""}}, got); diff != "" {
		t.Errorf("missing (-want +got):\n%s", diff)
	}
	if got := missing(all, func(string) bool { return true }); got != nil {
		t.Errorf("missing on a complete machine: %v", got)
	}
	for _, p := range Packages() {
		if p.Name == "" || p.File == "" || p.Why == "" {
			t.Errorf("package %+v is not described", p)
		}
	}
}

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	script := func(body string) func(string) (string, error) {
		path := filepath.Join(dir, "apt-get")
		if err := os.WriteFile(path, []byte("#!/bin/sh\necho \"$@\" >> "+calls+"\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return func(string) (string, error) { return path, nil }
	}
	none := func(string) (string, error) { return "", errdefs.Unavailable.Errorf("apt-get is not installed") }
	want := []Package{{"mmdebstrap", "mmdebstrap", ""}, {"e2fsprogs", "mke2fs", ""}}
	cases := []struct {
		name  string
		apt   func() apt
		want  []Package
		class error
		text  string
		calls string
	}{
		{name: "nothing to do", apt: func() apt { return apt{find: none} }},
		{name: "installs", apt: func() apt { return apt{true, script("echo Setting up")} }, want: want,
			calls: "-q update\n-q -y --no-install-recommends install mmdebstrap e2fsprogs\n"},
		{name: "not root", apt: func() apt { return apt{false, script("")} }, want: want, class: errdefs.Denied,
			text: "sudo apt-get install -y --no-install-recommends mmdebstrap e2fsprogs"},
		{name: "no apt", apt: func() apt { return apt{true, none} }, want: want, class: errdefs.Unsupported, text: "mmdebstrap, mke2fs"},
		{name: "install breaks", apt: func() apt { return apt{true, script(`[ "$2" = update ] || { echo E: broken >&2; exit 100; }`)} },
			want: want, class: errdefs.Unavailable, text: "E: broken",
			calls: "-q update\n-q -y --no-install-recommends install mmdebstrap e2fsprogs\n"},
		{name: "old lists will do", apt: func() apt { return apt{true, script(`[ "$2" != update ]`)} }, want: want,
			calls: "-q update\n-q -y --no-install-recommends install mmdebstrap e2fsprogs\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			os.Remove(calls)
			var events []progress.Phase
			err := c.apt().install(context.Background(), c.want, func(e progress.Event) { events = append(events, e.Phase) })
			if !errors.Is(err, c.class) {
				t.Fatalf("install = %v, want %v", err, c.class)
			}
			if err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%q lacks %q", err, c.text)
			}
			if b, _ := os.ReadFile(calls); string(b) != c.calls {
				t.Errorf("calls:\n%s", b)
			}
			if err == nil && events[len(events)-1] == progress.Going {
				t.Errorf("events %v do not end", events)
			}
		})
	}
}

func TestInstallObeysContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "apt-get")
	if err := os.WriteFile(path, []byte("#!/bin/sh\ntrap 'exit 130' INT\necho up\nwhile :; do sleep 0.01; done\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	began := make(chan struct{})
	go func() { <-began; cancel() }()
	a := apt{true, func(string) (string, error) { return path, nil }}
	err := a.install(ctx, []Package{{"x", "x", ""}}, func(e progress.Event) {
		if e.Phase == progress.Going {
			close(began)
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("install = %v", err)
	}
}
