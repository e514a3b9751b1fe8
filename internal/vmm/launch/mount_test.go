package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

const (
	testUID = 871234
	testGID = 871235
)

// room returns a program in a root of its own with a shell, what it needs, and
// mounts below that; the directory that the root is made on; and a directory of
// files that are root's alone.
func room(t *testing.T, script string, mounts ...Mount) (p Program, root, files string) {
	t.Helper()
	testenv.Root(t)
	root, files = t.TempDir(), t.TempDir()
	p = sh(script)
	p.Root, p.UID, p.GID = root, testUID, testGID
	p.Log = filepath.Join(files, "log")
	p.Mounts = []Mount{{Target: root}}
	for _, dir := range []string{"/bin", "/usr", "/lib", "/lib64"} {
		if source, err := filepath.EvalSymlinks(dir); err == nil {
			p.Mounts = append(p.Mounts, Mount{Source: source, Target: root + dir, ReadOnly: true})
		}
	}
	return p, root, files
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func logOf(t *testing.T, p Program) string {
	t.Helper()
	data, err := os.ReadFile(p.Log)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// A program reads and writes files of root's as somebody else: those that it was
// given and as it was given them.
func TestMounts(t *testing.T) {
	p, root, files := room(t, `
		id -u; id -g; id -G
		cat /in; test -w /in && echo may write /in
		echo more >>/out && cat /out
		echo made >/dir/new && stat -c '%u %g %n' /dir/*
		stat -c '%u %g %t,%T' /dev/zero; head -c 2 /dev/zero | wc -c
		ls /`)
	write(t, files+"/in", "read me\n")
	write(t, files+"/out", "before\n")
	if err := os.Mkdir(files+"/dir", 0o700); err != nil {
		t.Fatal(err)
	}
	for source, m := range map[string]Mount{
		files + "/in": {Target: root + "/in", ReadOnly: true}, files + "/out": {Target: root + "/out"},
		files + "/dir": {Target: root + "/dir"}, "/dev/zero": {Target: root + "/dev/zero"},
	} {
		m.Source, m.UID, m.GID = source, testUID, testGID
		p.Mounts = append(p.Mounts, m)
	}
	if exit := wait(t, launch(t, p)); exit.Code != 0 {
		t.Errorf("%s: %s", exit, exit.Detail)
	}
	got := strings.Fields(logOf(t, p))
	want := strings.Fields(fmt.Sprintf(`%[1]d %[2]d %[2]d read me before more %[1]d %[2]d /dir/new %[1]d %[2]d 1,5 2 bin dev dir in lib lib64 out usr`, testUID, testGID))
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("it saw\n%s, want\n%s", got, want)
	}
	// On disk all of it is root's.
	for _, path := range []string{"/in", "/out", "/dir", "/dir/new"} {
		var st unix.Stat_t
		if err := unix.Stat(files+path, &st); err != nil || st.Uid != 0 || st.Gid != 0 {
			t.Errorf("%s belongs to %d:%d, %v", path, st.Uid, st.Gid, err)
		}
	}
	if left, err := os.ReadDir(root); err != nil || len(left) != 0 {
		t.Errorf("the host sees %v, %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), root) {
		t.Errorf("mounts of the program are the host's, too: %v\n%s", err, mounts)
	}
}

// Without being lent to it, root's files are closed to the program.
func TestMountOfRoots(t *testing.T) {
	p, root, files := room(t, "cat /in")
	write(t, files+"/in", "secret")
	p.Mounts = append(p.Mounts, Mount{Source: files + "/in", Target: root + "/in"})
	if exit := wait(t, launch(t, p)); exit.Code == 0 || strings.Contains(logOf(t, p), "secret") {
		t.Errorf("%s: %s", exit, exit.Detail)
	}
}

func TestMountOfNothing(t *testing.T) {
	p, root, files := room(t, "true")
	p.Mounts = append(p.Mounts, Mount{Source: files + "/absent", Target: root + "/in"})
	_, err := Start(p)
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("launch: %v", err)
	}
	// A link might lead to anything.
	p, root, files = room(t, "cat /in")
	write(t, files+"/secret", "secret")
	if err := os.Symlink(files+"/secret", files+"/in"); err != nil {
		t.Fatal(err)
	}
	p.Mounts = append(p.Mounts, Mount{Source: files + "/in", Target: root + "/in", UID: testUID, GID: testGID})
	if _, err := Start(p); err == nil || !strings.Contains(err.Error(), "mount in: it is a link") {
		t.Errorf("launch: %v", err)
	}
	// /proc has no idmapped mounts; the error says so without the path.
	p, root, _ = room(t, "true")
	p.Mounts = append(p.Mounts, Mount{Source: "/proc", Target: root + "/p", UID: testUID, GID: testGID})
	if _, err := Start(p); !errors.Is(err, errdefs.Unsupported) || !strings.Contains(err.Error(), "mount p: its file system cannot show root's files as another user's") {
		t.Errorf("launch: %v", err)
	}
}

// A program that runs is shown a directory, and no longer.
func TestMountLater(t *testing.T) {
	p, root, files := room(t, `echo up >&2; while ! [ -e /later/go ]; do sleep 0.01; done; cat /later/go; echo made >/later/new; while [ -e /later/go ]; do sleep 0.01; done; echo gone; ls /later`)
	p.Mounts = append(p.Mounts, Mount{Target: root + "/later"})
	process := launch(t, p)
	dir := files + "/dir"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/go", "shown\n")
	eventually(t, func() bool { return strings.Contains(logOf(t, p), "up") })
	// By another agent, as after a restart.
	adopted, err := Adopt(t.Context(), process.Ref())
	if err != nil {
		t.Fatal(err)
	}
	defer adopted.Release()
	if err := adopted.Mount(Mount{Source: dir, Target: "/later", UID: testUID, GID: testGID}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { _, err := os.Stat(dir + "/new"); return err == nil })
	if err := adopted.Unmount("/later"); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, process); exit.Code != 0 || exit.Detail != "up\nshown\ngone" {
		t.Errorf("%s: %q", exit, exit.Detail)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir+"/new", &st); err != nil || st.Uid != 0 {
		t.Errorf("what it made belongs to %d, %v", st.Uid, err)
	}
	if err := process.Mount(Mount{Source: dir, Target: "/later"}); err == nil {
		t.Error("mount for the dead: no error")
	}
	if err := process.Unmount("/later"); err != nil {
		t.Errorf("unmount for the dead: %v", err)
	}
}

// The limits hold for a program that is not root.
func TestLimitsOfAUser(t *testing.T) {
	p, _, _ := room(t, "exec sleep 60")
	process := launch(t, p)
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", process.Ref().PID))
	text := strings.Join(strings.Fields(string(limits)), " ")
	if err != nil || !strings.Contains(text, "Max open files 1024 1024") || !strings.Contains(text, "Max core file size 0 0") {
		t.Errorf("%v: %s", err, text)
	}
}

// Standard output alone goes to the console, for appending.
func TestConsoleOnStdout(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/console", "before\n")
	p := sh("echo out; echo err >&2")
	p.Log, p.Console = dir+"/log", dir+"/console"
	if exit := wait(t, launch(t, p)); exit.Detail != "err" {
		t.Errorf("detail %q", exit.Detail)
	}
	if console, err := os.ReadFile(dir + "/console"); err != nil || string(console) != "before\nout\n" {
		t.Errorf("console %q, %v", console, err)
	}
}

// A program whose environment was wiped is ours by its log, and by no other
// file of that name.
func TestStraysWithoutEnvironment(t *testing.T) {
	testenv.Root(t)
	root := t.TempDir()
	start := func(dir, log string) *Process {
		t.Helper()
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		p := Program{Args: []string{"/usr/bin/env", "-i", "/bin/sleep", "60"}, RunDir: dir, Log: filepath.Join(dir, log)}
		process := launch(t, p)
		eventually(t, func() bool {
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", process.Ref().PID))
			return err == nil && string(name) == "sleep\n"
		})
		return process
	}
	stray, deleted := start(root+"/sb-1", LogName), start(root+"/sb-2", LogName)
	if err := os.RemoveAll(root + "/sb-2"); err != nil {
		t.Fatal(err)
	}
	others := []*Process{start(root+"/sb-3", "other.log"), start(root+"/deeper/sb-4", LogName), start(root+"/sb-5", LogName)}
	names, err := KillStrays(context.Background(), root, "wrenn-strays-none", func(name string) bool { return name == "sb-5" })
	if err != nil || strings.Join(names, " ") != "sb-1 sb-2" {
		t.Errorf("killed %v, %v", names, err)
	}
	for _, p := range []*Process{stray, deleted} {
		select {
		case <-p.Done():
		case <-time.After(10 * time.Second):
			t.Error("a stray lives on")
		}
	}
	for i, p := range others {
		select {
		case <-p.Done():
			t.Errorf("process %d was killed", i)
		default:
		}
	}
}

// eventually waits until ok is true.
func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come about")
		}
	}
}
