package build

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// TestExpand: variables of words, by Docker's rules and by E2B's.
func TestExpand(t *testing.T) {
	s := &state{env: map[string]string{"A": "1", "PATH": "/bin"}, args: map[string]string{"A": "of ARG", "B": "2"}}
	for word, want := range map[string][2]string{
		`x`:             {`x`, `x`},
		`$A`:            {`1`, `1`},
		`${A}$B.`:       {`12.`, `1.`},
		`'$A'`:          {`$A`, `'1'`},
		`"a $A"`:        {`a 1`, `"a 1"`},
		`\$A`:           {`$A`, `$A`},
		`$NONE-${A:-d}`: {`-1`, `-${A:-d}`},
		`$PATH:/x`:      {`/bin:/x`, `/bin:/x`},
		`$HOME`:         {``, `/root`},
		`100$ $`:        {`100$ $`, `100$ $`},
		`$(id) $1`:      {``, `$(id) $1`},
	} {
		if got, err := s.expand(word, true); err != nil || got != want[1] {
			t.Errorf("E2B: %s is %q, %v, want %q", word, got, err, want[1])
		}
		if strings.Contains(word, "$(") || strings.HasSuffix(word, "$") {
			continue // Docker's own affair
		}
		if got, err := s.expand(word, false); err != nil || got != want[0] {
			t.Errorf("Docker: %s is %q, %v, want %q", word, got, err, want[0])
		}
	}
	if _, err := s.expand("${A", false); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("a brace that does not end: %v", err)
	}
}

func FuzzExpandPlain(f *testing.F) {
	f.Add("a$B${C}\\$")
	f.Fuzz(func(t *testing.T, word string) {
		same := expandPlain(word, func(name string) string { return "${" + name + "}" })
		if !strings.Contains(word, "$") && same != word {
			t.Errorf("%q became %q", word, same)
		}
	})
}

// TestProgram: what a template's sandboxes run, of CMD, ENTRYPOINT, HEALTHCHECK, the
// spec and the template in FROM.
func TestProgram(t *testing.T) {
	own := func(exec bool, args ...string) command { return command{args: args, exec: exec, own: true} }
	for name, c := range map[string]struct {
		state state
		spec  Spec
		start string
		ready string
	}{
		"the image's own CMD is none":     {state{cmd: command{args: []string{"python3"}, exec: true}}, Spec{}, "", ""},
		"CMD":                             {state{cmd: own(true, "python3", "a b.py")}, Spec{}, "python3 'a b.py'", ""},
		"CMD of the shell":                {state{cmd: own(false, "serve $X")}, Spec{}, "serve $X", ""},
		"ENTRYPOINT and CMD":              {state{entry: own(true, "a"), cmd: own(true, "b", "c")}, Spec{}, "a b c", ""},
		"ENTRYPOINT and CMD of the shell": {state{entry: own(true, "a"), cmd: own(false, "b $C")}, Spec{}, "a /bin/sh -c 'b $C'", ""},
		"ENTRYPOINT of the shell":         {state{entry: own(false, "a"), cmd: own(true, "b")}, Spec{}, "a", ""},
		"the spec's go before":            {state{cmd: own(true, "a"), health: own(true, "h")}, Spec{Start: "s", Ready: "r"}, "s", "r"},
		"HEALTHCHECK":                     {state{cmd: own(true, "a"), health: own(false, "curl -f x")}, Spec{}, "a", "curl -f x"},
		"the parent's":                    {state{start: template.Program{Start: "p", Ready: "q"}}, Spec{}, "p", "q"},
		"a quote":                         {state{cmd: own(true, "it's")}, Spec{}, `'it'\''s'`, ""},
	} {
		if p := c.state.program(c.spec); p.Start != c.start || p.Ready != c.ready {
			t.Errorf("%s: %q and %q, want %q and %q", name, p.Start, p.Ready, c.start, c.ready)
		}
	}
	s := ofImage(image.Config{Cmd: []string{"of the image"}}, false)
	s, _, err := s.after(Step{Kind: Entrypoint, Args: []string{"a"}, Exec: true}, false)
	if err != nil || s.program(Spec{}).Start != "a" {
		t.Errorf("the image's CMD went to another ENTRYPOINT: %q, %v", s.program(Spec{}).Start, err)
	}
}

// TestWorkdir: a relative WORKDIR is below the one before.
func TestWorkdir(t *testing.T) {
	s := ofImage(image.Config{}, false)
	for _, c := range [][2]string{{"a", "/a"}, {"b/../c", "/a/c"}, {"/x", "/x"}, {"../../y", "/y"}} {
		var err error
		if s, _, err = s.after(Step{Kind: Workdir, Args: []string{c[0]}}, false); err != nil || s.workdir != c[1] {
			t.Errorf("WORKDIR %s is %s, %v, want %s", c[0], s.workdir, err, c[1])
		}
	}
}

// TestLog: offsets stay what they are, levels leave out, and a log that is too long drops
// lines of commands only.
func TestLog(t *testing.T) {
	r := newRig(t)
	path := filepath.Join(t.TempDir(), "logs", "t", "b")
	log, err := newLog(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxEntries + 10 {
		log.line(Info, "1", fmt.Sprint("line ", i))
	}
	log.say(Error, "1", "the end\xff")
	if n := log.lost(); n != 10 {
		t.Errorf("%d lines are lost, want 10", n)
	}
	live, ended, _ := log.from(maxEntries - 1)
	if ended || len(live) != 2 || live[0].Message != fmt.Sprint("line ", maxEntries-1) || live[1].Message != "the end\ufffd" {
		t.Errorf("the end is %+v", live)
	}
	log.end()
	log.say(Info, "", "too late")
	kept, err := readLog(path)
	if err != nil || len(kept) != maxEntries+1 || kept[maxEntries] != live[1] {
		t.Errorf("the file has %d entries, %v", len(kept), err)
	}
	spec, _ := r.made(from(run("echo a"), run("echo b")))
	all, err := r.Log(spec.Template, spec.Build, 0, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range all {
		page, err := r.Log(spec.Template, spec.Build, i, 1, Debug)
		if err != nil || len(page) != 1 || page[0] != all[i] {
			t.Errorf("offset %d: %+v, %v", i, page, err)
		}
	}
	infos, err := r.Log(spec.Template, spec.Build, 0, 0, Info)
	if err != nil || len(infos) != len(all)-1 {
		t.Errorf("%d of %d entries are info or above, %v", len(infos), len(all), err)
	}
	if page, err := r.Log(spec.Template, spec.Build, len(all), 100, ""); err != nil || len(page) != 0 {
		t.Errorf("behind the end: %+v, %v", page, err)
	}
	if _, err := r.Log("../x", spec.Build, 0, 0, ""); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("a name that is a path: %v", err)
	}
}
