package testenv

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// installLimit bounds one installation.
const installLimit = 5 * time.Minute

// Install has commands, which are given the directory, install packages into a
// directory beside the prepared state directory, and returns it. The directory is there
// completely or not at all, and serves later runs that want the same packages.
func Install(t testing.TB, packages []string, commands func(dir string) []*exec.Cmd) string {
	t.Helper()
	sum := sha256.Sum256([]byte(strings.Join(packages, " ")))
	dir := fmt.Sprintf("%s/wrenn-test-clients-%x", filepath.Dir(StateDir(t)), sum[:6])
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	stage, err := os.MkdirTemp(filepath.Dir(dir), ".wrenn-test-clients-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(stage)
	if err := os.WriteFile(filepath.Join(stage, "package.json"), []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range commands(stage) {
		ctx, cancel := context.WithTimeout(t.Context(), installLimit)
		defer cancel()
		bounded := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
		bounded.Dir = stage
		if out, err := bounded.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
		}
	}
	if err := os.Chmod(stage, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(stage, dir); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		t.Fatal(err)
	}
	return dir
}

// Pip is a command that installs Python packages into a directory.
func Pip(dir string, packages ...string) *exec.Cmd {
	return exec.Command("pip3", append([]string{"install", "--quiet", "--disable-pip-version-check", "--no-warn-script-location",
		"--root-user-action=ignore", "--target", dir}, packages...)...)
}
