package launch

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// TestReadOnlyFile: a program that opens its file for reading and writing reads
// it and cannot write to it; other files it opens as ever. Once it has started,
// it opens none for writing by name.
func TestReadOnlyFile(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "memory")
	for _, c := range []struct {
		name, script, want string
	}{
		{"read", `exec 3<>memory; cat <&3`, "kept"},
		{"write", `exec 3<>memory; echo x >&3 || echo refused; cat memory`, "refused\nkept"},
		{"again", `exec 3<>memory; exec 4<>memory; echo x >&4 || echo refused; cat memory`, "refused\nkept"},
		{"child", `sh -c 'exec 3<>memory; echo x >&3 || echo refused'; cat memory`, "refused\nkept"},
		{"another", `exec 3<>other; echo x >&3; cat other; exec 3<>memory`, "x"},
		{"missing", `( exec 3<>missing/file ) 2>/dev/null || echo missing; exec 3<>memory`, "missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, name := range []string{path, filepath.Join(dir, "other")} {
				if err := os.WriteFile(name, []byte("kept\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Truncate(filepath.Join(dir, "other"), 0); err != nil {
				t.Fatal(err)
			}
			p := sh("exec 2>/dev/null; " + strings.NewReplacer("memory", path, "other", filepath.Join(dir, "other")).Replace(c.script))
			p.Log, p.ReadOnly = filepath.Join(t.TempDir(), "log"), path
			process := launch(t, p)
			wait(t, process)
			if err := process.Started(); err != nil {
				t.Error(err)
			}
			if got, err := os.ReadFile(p.Log); err != nil || strings.TrimSpace(string(got)) != c.want {
				t.Errorf("it says %q, %v; want %q", got, err, c.want)
			}
		})
	}

	t.Run("started", func(t *testing.T) {
		p := sh(`exec 3<>` + path + `; echo opened; read line; ( exec 4<>` + path + ` ) 2>/dev/null || echo refused`)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		p.Args[2] = strings.Replace(p.Args[2], "read line", "read line <&4", 1)
		p.Log, p.ReadOnly, p.Files = filepath.Join(t.TempDir(), "log"), path, []*os.File{r, r}
		process := launch(t, p)
		says := func(want string) {
			t.Helper()
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
				if got, err := os.ReadFile(p.Log); err != nil || string(got) == want {
					return
				} else if time.Now().After(deadline) {
					t.Fatalf("it says %q, want %q", got, want)
				}
			}
		}
		says("opened\n")
		if err := process.Started(); err != nil {
			t.Error(err)
		}
		w.WriteString("go on\n")
		w.Close()
		says("opened\nrefused\n")
		wait(t, process)
	})

	// Whoever does not take the file as it was to is found out.
	p := sh("read line < " + path)
	p.ReadOnly = path
	process := launch(t, p)
	wait(t, process)
	if err := process.Started(); err == nil {
		t.Error("a program that never opened its file for writing passes")
	}
	p.ReadOnly = filepath.Join(dir, "nothing")
	if process, err := Start(p); err == nil {
		process.Kill(t.Context())
		t.Error("launched with a file that is not there")
	}
}
