package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	gocmp "github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain, \tÄ 漢 e\u0301 🙂\n":          "plain, \tÄ 漢 e\u0301 🙂\n",
		"\x1b]52;c;ZXZpbA==\a":              `\u001b]52;c;ZXZpbA==\u0007`,
		"\x1b[2J\x1b[1;1H":                  `\u001b[2J\u001b[1;1H`,
		"\x9b2J":                            `\x9b2J`,
		"\u009b2J\u009d52;c;x\u009c":        `\u009b2J\u009d52;c;x\u009c`,
		"secret\b\b\b\x7f":                  `secret\u0008\u0008\u0008\u007f`,
		"over\rwritten":                     `over\u000dwritten`,
		"line\r\nline\r\r\n":                "line\nline\n",
		"end\r":                             `end\u000d`,
		"a\u202eb\u202d\u2066c\u2069\u200f": `a\u202eb\u202d\u2066c\u2069\u200f`,
		"\x00\v\f\x0e\x0f":                  `\u0000\u000b\u000c\u000e\u000f`,
		"\u200b\ufeff\u2028\u2029":          `\u200b\ufeff\u2028\u2029`,
		"tag \U000e0041":                    `tag \udb40\udc41`,
		"cut \xe6\xbc":                      `cut \xe6\xbc`,
		"\xed\xa0\x80":                      `\xed\xa0\x80`,
	} {
		if got := printable(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := printableLine("a\n\tb\r\n"); got != `a\u000a\u0009b\u000d\u000a` {
		t.Errorf("a line: %q", got)
	}
	for r := rune(0); r <= unicode.MaxRune; r++ {
		if r == 0x10000 {
			r = 0xe0000 // tags: invisible, as nothing in between is
		} else if r == 0xe1000 {
			break
		}
		if got := printable(string(r)); unsafeRune(got) >= 0 {
			t.Fatalf("%U is shown as %q", r, got)
		}
	}
}

// unsafeRune is where text has what a terminal may obey, or -1.
func unsafeRune(text string) int {
	for i, r := range text {
		if r == utf8.RuneError && !strings.HasPrefix(text[i:], "\ufffd") || r != '\n' && r != '\t' && !unicode.IsGraphic(r) {
			return i
		}
	}
	return -1
}

// evil is what a guest would have a terminal obey: it writes the clipboard,
// clears the screen in two ways, rings, goes back, turns the writing and forges
// a message. mark shows that it got as far as being printed.
const (
	mark = "MARK"
	evil = mark + "\x1b]52;c;ZXZpbA==\a\x1b[2J\u009b2J\b\r\x7f\u202e\nwrenn: all is well\n"
)

// saying are commands that print what is in the answers of an agent.
var saying = []string{
	"ps", "ps --json", "snapshots", "version", "version --json", "host", "host --json", "verify", "verify --json", "gc",
	"template ls", "template ls --json", "template history app", "template rm app", "template pull app", "template prune",
}

// Whatever a guest says, and wherever a command prints it, a terminal is given
// nothing to obey.
func TestTerminalIsGivenNothingToObey(t *testing.T) {
	quoted, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	refusal := strings.Trim(string(quoted), `"`)
	failing := func(code connect.Code) *clienttest.Agent {
		return &clienttest.Agent{Fail: connect.NewError(code, errors.New(evil))}
	}
	packing := func(name string) *clienttest.Agent {
		return &clienttest.Agent{Archive: clienttest.Archive(t, tar.Header{Name: name, Typeflag: tar.TypeFifo}), Entry: clienttest.Dir("/x")}
	}
	refusing := func() *clienttest.Agent { return &clienttest.Agent{Refusal: refusal, Entry: clienttest.File(0o644)} }
	target := t.TempDir()
	// Each has a target of its own: they run at the same time.
	copyOfX := func() []string { return []string{"cp", clienttest.ID + ":/x", t.TempDir()} }
	cases := map[string]struct {
		guest *clienttest.Agent
		args  []string
	}{
		"logs":              {&clienttest.Agent{Console: []byte(evil + "\x9b2J\xff")}, []string{"logs", clienttest.ID}},
		"inspect":           {&clienttest.Agent{Text: evil}, []string{"inspect", clienttest.ID}},
		"events":            {&clienttest.Agent{Text: evil}, []string{"events", "--no-follow"}},
		"events --json":     {&clienttest.Agent{Text: evil}, []string{"events", "--no-follow", "--json"}},
		"top":               {&clienttest.Agent{Text: evil}, []string{"top", clienttest.ID}},
		"top's error":       {&clienttest.Agent{Refusal: refusal}, []string{"top", clienttest.ID}},
		"top --json":        {&clienttest.Agent{Text: evil}, []string{"top", clienttest.ID, "--json"}},
		"create":            {&clienttest.Agent{Text: evil}, []string{"create", "-v"}},
		"run":               {&clienttest.Agent{Text: evil}, []string{"run", "--", "true"}},
		"rm":                {&clienttest.Agent{Text: evil}, []string{"rm", clienttest.ID}},
		"several":           {&clienttest.Agent{Text: evil}, []string{"pause", clienttest.ID, clienttest.ID}},
		"exec":              {failing(connect.CodeInternal), []string{"exec", clienttest.ID, "--", "true"}},
		"exec of nothing":   {failing(connect.CodeNotFound), []string{"exec", clienttest.ID, "--", "true"}},
		"shell":             {failing(connect.CodeUnavailable), []string{"shell", clienttest.ID}},
		"port":              {&clienttest.Agent{Status: "paused", Text: evil}, []string{"port", clienttest.ID, "80"}},
		"cp of a file":      {refusing(), []string{"cp", clienttest.ID + ":/x", target}},
		"cp to stdout":      {refusing(), []string{"cp", clienttest.ID + ":/x", "-"}},
		"cp in":             {refusing(), []string{"cp", "/proc/self/comm", clienttest.ID + ":/x"}},
		"cp of a directory": {&clienttest.Agent{Stderr: evil, Exit: 1, Entry: clienttest.Dir("/x")}, copyOfX()},
		"cp without tar": {
			&clienttest.Agent{Fail: connect.NewError(connect.CodeAborted, errors.New(evil)), Entry: clienttest.Dir("/x")}, copyOfX(),
		},
		"cp of odd things":     {packing(evil), copyOfX()},
		"cp of what leads out": {packing("../" + evil), copyOfX()},
		"cp of a path": {
			&clienttest.Agent{Stderr: evil, Exit: 1, Entry: clienttest.Dir(evil)}, []string{"cp", clienttest.ID + ":/x", "-"},
		},
	}
	for _, line := range saying {
		c := cases[line]
		c.guest, c.args = &clienttest.Agent{Text: evil}, strings.Fields(line)
		cases[line] = c
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, _ := wrenn(t, c.guest.Serve(t), c.args...)
			if all := stdout + stderr; !strings.Contains(all, mark) {
				t.Errorf("what the guest says is not shown at all:\n%s\n%s", stdout, stderr)
			}
			for stream, text := range map[string]string{"stdout": stdout, "stderr": stderr} {
				if at := unsafeRune(text); at >= 0 {
					t.Errorf("%s has %q", stream, text[at:min(len(text), at+20)])
				}
				if name != "logs" && strings.Contains(text, "\nwrenn: all is well") {
					t.Errorf("%s has a forged message:\n%s", stream, text)
				}
			}
			if strings.Contains(name, "json") || name == "inspect" {
				if !json.Valid([]byte(stdout)) {
					t.Errorf("no JSON:\n%s", stdout)
				} else if !holds(t, stdout, evil) {
					t.Errorf("the JSON does not mean what it stands for:\n%s", stdout)
				}
			}
		})
	}
}

// What shows progress moves the cursor itself, on a terminal, and says between
// that what a guest has said.
func TestProgressOnATerminal(t *testing.T) {
	own := regexp.MustCompile(`\x1b\[[HJK]|\r`)
	for name, c := range map[string]struct {
		guest *clienttest.Agent
		args  []string
	}{
		"top":      {&clienttest.Agent{Text: evil}, []string{"top", clienttest.ID}},
		"top ends": {&clienttest.Agent{Refusal: `MARK\u001b]52;c;x\u0007`}, []string{"top", clienttest.ID}},
		"cp": {&clienttest.Agent{Archive: clienttest.Archive(t, tar.Header{Name: evil, Typeflag: tar.TypeFifo}), Entry: clienttest.Dir("/x")},
			[]string{"cp", clienttest.ID + ":/x/.", t.TempDir()}},
		"create":        {&clienttest.Agent{Text: evil}, []string{"create", "-v"}},
		"template pull": {&clienttest.Agent{Text: evil}, []string{"template", "pull", "app"}},
	} {
		t.Run(name, func(t *testing.T) {
			file, tty, err := pty.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			cmd := program(t, c.guest.Serve(t), c.args...)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			tty.Close()
			var shown strings.Builder
			buf := make([]byte, 4096)
			for err == nil {
				var n int
				n, err = file.Read(buf)
				shown.Write(buf[:n])
				if name == "top" && strings.Contains(shown.String(), "COMMAND") && strings.Contains(shown.String(), "\x1b[J") {
					break
				}
			}
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait()
			text := own.ReplaceAllString(shown.String(), "")
			if at := unsafeRune(text); at >= 0 || !strings.Contains(text, mark) {
				t.Errorf("the terminal was given %q", shown.String())
			}
		})
	}
}

// holds reports whether a JSON document has a text somewhere.
func holds(t *testing.T, document, text string) bool {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(document), &v); err != nil {
		t.Fatal(err)
	}
	var in func(v any) bool
	in = func(v any) bool {
		switch v := v.(type) {
		case string:
			return v == text
		case []any:
			for _, e := range v {
				if in(e) {
					return true
				}
			}
		case map[string]any:
			for _, e := range v {
				if in(e) {
					return true
				}
			}
		}
		return false
	}
	return in(v)
}

func TestMessageIsBounded(t *testing.T) {
	h := &clienttest.Agent{Fail: connect.NewError(connect.CodeInternal, errors.New(strings.Repeat("ä", 100_000)))}
	_, stderr, _ := wrenn(t, h.Serve(t), "exec", clienttest.ID, "--", "true")
	if len(stderr) < 400 || len(stderr) > 600 || unsafeRune(stderr) >= 0 {
		t.Errorf("%d bytes of message", len(stderr))
	}
}

// A command's own stream is what it wrote, and so is a console with --raw.
func TestOwnStreamsAreRaw(t *testing.T) {
	const bytes = evil + "\x9b2J\xff\r\n"
	for name, c := range map[string]struct {
		guest *clienttest.Agent
		args  []string
	}{
		"exec":       {&clienttest.Agent{Archive: []byte(bytes)}, []string{"exec", clienttest.ID, "--", "true"}},
		"cp":         {&clienttest.Agent{File: []byte(bytes), Entry: clienttest.File(0o644)}, []string{"cp", clienttest.ID + ":/x", "-"}},
		"logs --raw": {&clienttest.Agent{Console: []byte(bytes)}, []string{"logs", "--raw", clienttest.ID}},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, status := wrenn(t, c.guest.Serve(t), c.args...)
			if stdout != bytes || stderr != "" || status != 0 {
				t.Errorf("got %q, %q, %d", stdout, stderr, status)
			}
		})
	}
}

// The agent's log, in both forms, has guests' texts in it.
func TestLogIsPrintable(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		before := os.Stderr
		os.Stderr = w
		(&serveFlags{logFormat: format}).logger().Error(evil, "detail", evil, "err", errors.New(evil))
		os.Stderr = before
		w.Close()
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if at := unsafeRune(string(got)); at >= 0 || strings.Count(string(got), mark) != 3 || strings.Count(string(got), "\n") != 1 {
			t.Errorf("%s: %q", format, got)
		}
		if format == "json" && !holds(t, string(got), evil) {
			t.Errorf("not what it stands for: %s", got)
		}
	}
}

// What goes to the terminal past the printer is known: a command's own streams,
// and what says itself how a cursor moves.
func TestWhoWritesToTheTerminal(t *testing.T) {
	want := map[string]bool{
		"main.go newRoot": true, "printable.go complain": true, // the printer itself
		"exec.go connected": true, "cp.go copyOut": true, "list.go newLogs": true, // own streams, --raw
		"cli.go spin": true, "meter.go startMeter": true, "meter.go show": true, // progress
		"build.go password": true, "buildview.go newBuildView": true, "buildview.go paint": true, "export.go newTemplateExport": true,
		"top.go newTop": true, "top.go watchUsage": true, "setup.go newSetup": true, "serve.go logger": true,
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			ast.Inspect(decl, func(n ast.Node) bool {
				s, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				pkg, ok := s.X.(*ast.Ident)
				if !ok {
					return true
				}
				name := pkg.Name + "." + s.Sel.Name
				if name == "os.Stdout" || name == "os.Stderr" || strings.HasPrefix(name, "fmt.Print") {
					where := file
					if f, ok := decl.(*ast.FuncDecl); ok {
						where += " " + f.Name.Name
					}
					got[where] = true
				}
				return true
			})
		}
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("print to the command's OutOrStdout and ErrOrStderr, or with complain; what cannot is listed here: %s", diff)
	}
}
