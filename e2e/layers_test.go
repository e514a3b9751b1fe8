package e2e_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// buildOn makes a template whose top layer is what a sandbox wrote, over the layers of
// the template from. The sandbox is hibernated.
func (b *sandbox) buildOn(from, name string) {
	b.t.Helper()
	if err := b.hibernate(); err != nil {
		b.t.Fatal(err)
	}
	overlay := filepath.Join(b.a.stateDir, "sandboxes", b.id, "snapshot", "overlay.ext4")
	b.a.build(b.t, from, name, overlay)
}

// build makes a template of copies of files over the layers of the template from.
func (a *agent) build(t testing.TB, from, name string, overlays ...string) {
	t.Helper()
	s, err := template.Open(a.stateDir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	base, err := s.Get(from)
	if err != nil {
		t.Fatal(err)
	}
	about := template.Making{Recipe: "test", Defaults: base.Defaults}
	_, _, err = s.MakeBuild(t.Context(), template.NewBuild{Name: name}, about, func(stage *template.BuildStage) error {
		err := stage.Inherit(base)
		for _, overlay := range overlays {
			layer := filepath.Join(stage.Dir(), "layer")
			if err == nil {
				err = s.CloneOverlay(t.Context(), layer, overlay)
			}
			if err == nil {
				err = stage.AddLayer(t.Context(), layer)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// What the layers of TestLayers do to those below them.
const (
	secondLayer = `set -e
rm /usr/bin/git
echo second >/etc/debian_version
rm -r /etc/skel; mkdir /etc/skel; echo second >/etc/skel/only
mv /usr/share/common-licenses /usr/share/licences
mkdir -p /srv/tree/sub /srv/gone; cd /srv/tree
echo second >deleted; echo second >replaced; echo second >kept; echo x >sub/below; echo x >/srv/gone/x
echo linked >link1; ln link1 link2; ln -s link1 symlink
install -m 4755 /bin/true setuid; chown 1000:1000 kept; mknod null c 1 3; mkfifo pipe; truncate -s 1G sparse
python3 -c 'import os; os.setxattr("kept", "user.note", b"here")'`
	thirdLayer = `set -e
cd /srv/tree
rm deleted; echo third >replaced; rm -r sub /srv/gone; mkdir sub; echo third >sub/above
printf '#!/bin/sh\necho git of the third layer\n' >/usr/bin/git; chmod 755 /usr/bin/git
mv /usr/share/licences /usr/share/twice
mkdir /srv/moved; mv /srv/tree /srv/moved/tree
rm /srv/moved/tree/link1`
	// layered shows what is to be seen of both.
	layered = `set -e
git; cat /etc/debian_version; ls -A /etc/skel; test ! -e /srv/gone; test ! -e /srv/tree
ls /usr/share | grep -c 'licen' || true; grep -o 'GNU GENERAL PUBLIC LICENSE' /usr/share/twice/GPL-3 | head -1
cd /srv/moved/tree; echo *; cat replaced kept link2 sub/above; ls -A sub; test ! -e deleted
stat -c '%a %U' setuid link2; stat -c '%a %u:%g' kept; test -c null; test -p pipe
echo x >null; stat -c '%s %b' sparse; readlink symlink
python3 -c 'import os; print(os.getxattr("kept", "user.note").decode())'`
	layeredShows = `git of the third layer
second
only
0
GNU GENERAL PUBLIC LICENSE
kept link2 null pipe replaced setuid sparse sub symlink
third
second
linked
third
above
4755 root
644 root
644 1000:1000
1073741824 0
link1
here`
)

func (b *sandbox) wantLayers(when string) {
	b.t.Helper()
	if got := b.sh(layered); got != layeredShows {
		b.t.Errorf("%s:\n%s\nwant\n%s", when, got, layeredShows)
	}
}

// TestLayers: a template of three layers is what its makers saw, in sandboxes that boot
// and in such that start from every kind of snapshot.
func TestLayers(t *testing.T) {
	a := startAgent(t)
	create := func(name, startedFrom string) *sandbox {
		t.Helper()
		resp, err := a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: name, MemoryMb: 256}))
		if err != nil {
			t.Fatalf("create from %s: %v", name, err)
		}
		if resp.Msg.StartedFrom != startedFrom {
			t.Errorf("%s started from %q (%s), want %q", name, resp.Msg.StartedFrom, resp.Msg.Why, startedFrom)
		}
		return &sandbox{t, a, resp.Msg.SandboxId}
	}
	first := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 512})
	first.sh(secondLayer)
	first.buildOn("minimal", "two")
	second := create("two", "cold boot")
	second.sh(thirdLayer)
	second.buildOn("two", "three")
	for _, b := range []*sandbox{first, second} { // the layers do not need them
		if err := b.destroy(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(a.buildDir(t, "three"), "layer-3.ext4")); err != nil {
		t.Fatal(err)
	}

	booted := create("three", "cold boot")
	booted.wantLayers("booted")
	b := create("three", "ready snapshot")
	b.wantLayers("from the boot snapshot")
	// A sandbox changes what it sees, and the layers stay as they are.
	b.sh("rm -r /srv/moved /usr/share/twice/GPL-3; mv /usr/share/twice /usr/share/thrice; echo mine >/etc/debian_version")
	mine := "cat /etc/debian_version; ls /srv; test ! -e /usr/share/thrice/GPL-3; ls /usr/share/thrice/GPL-2; md5sum </usr/bin/git"
	want := b.sh(mine)
	if !strings.HasPrefix(want, "mine\n/usr/share/thrice/GPL-2\n") {
		t.Errorf("its own: %q", want)
	}
	if err := b.hibernate(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.signal(syscall.SIGKILL), a.start("--on-shutdown=destroy")); err != nil {
		t.Fatal(err)
	}
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	if got := b.sh(mine); got != want {
		t.Errorf("after the resume: %q, want %q", got, want)
	}
	forked, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: b.id}))
	if err != nil {
		t.Fatal(err)
	}
	fork := &sandbox{t, a, forked.Msg.Sandboxes[0].SandboxId}
	if got := fork.sh(mine); got != want {
		t.Errorf("the fork: %q, want %q", got, want)
	}
	if _, err := b.snapshot("kept"); err != nil {
		t.Fatal(err)
	}
	kept := create("kept", "snapshot")
	if got := kept.sh(mine); got != want {
		t.Errorf("from the named snapshot: %q, want %q", got, want)
	}
	booted.wantLayers("the first one, after all that")
}

// listTree prints what there is below directories of a guest: kind, mode, owners, device
// number, attributes, links, size and digest of each, and its time unless it is new. The
// files of a sandbox's identity are left out.
const listTree = `import hashlib, os, stat, sys, time
for top in sys.argv[1:]:
    for dir, dirs, files in os.walk(top):
        dirs.sort()
        for name in sorted([*dirs, *files]):
            path = os.path.join(dir, name)
            if path in ("/etc/hostname", "/etc/hosts", "/etc/machine-id"):
                continue
            st = os.lstat(path)
            what = [path, oct(st.st_mode), st.st_uid, st.st_gid, st.st_rdev]
            what += [(a, os.getxattr(path, a, follow_symlinks=False)) for a in os.listxattr(path, follow_symlinks=False)]
            if time.time() - st.st_mtime > 3600:
                what.append(int(st.st_mtime))
            if stat.S_ISLNK(st.st_mode):
                what.append(os.readlink(path))
            if stat.S_ISREG(st.st_mode):
                what += [st.st_nlink, st.st_size]
                if st.st_size < 1 << 16:
                    what.append(hashlib.sha256(open(path, "rb").read()).hexdigest())
            print(*what)
`

// tree is what listTree prints in a sandbox.
func (b *sandbox) tree() string {
	b.t.Helper()
	return b.sh("cat >/tmp/tree.py <<'E'\n" + listTree + "E\npython3 /tmp/tree.py /srv /etc /usr/bin /usr/share/twice; rm /tmp/tree.py")
}

// layerFiles are the inodes of a template's layers, lowest first.
func (a *agent) layerFiles(t *testing.T, name string) (inodes []uint64) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(a.buildDir(t, name), "*.ext4")) // base.ext4 is the first by name, too
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		inodes = append(inodes, st.Sys().(*syscall.Stat_t).Ino)
	}
	return inodes
}

// TestDeepStack: there can be builds on builds on builds. Where a template has as many
// layers as there can be, a build on it goes on in a copy of the highest one, and a
// sandbox sees what it sees where the same was done in one place. The cache holds, and a
// larger disk is as large as asked for.
func TestDeepStack(t *testing.T) {
	a := startAgent(t, "--on-shutdown=destroy")
	b := a.create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 256})
	b.sh("touch /opt/filler")
	if err := b.hibernate(); err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(a.stateDir, "sandboxes", b.id, "snapshot", "overlay.ext4")
	a.build(t, "minimal", "deep", slices.Repeat([]string{overlay}, template.MaxLayers-2)...)
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	build := func(name, from, script string, more ...string) string {
		t.Helper()
		dir := t.TempDir()
		text := "FROM " + from + "\nRUN <<E bash\n" + script + "\nE\n"
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := a.cli(t, append(append([]string{"template", "build", "--progress", "plain", "-t", name}, more...), dir)...)
		if err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
		return out
	}
	const third = thirdLayer + "; df --output=size -m / | tail -1"
	build("deep1", "deep", secondLayer)
	out := build("deep2", "deep1", third, "--disk", "6g")
	size := 0
	for line := range strings.Lines(out) {
		if n, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
			size = n
		}
	}
	if size < 5500 || size > 6144 {
		t.Errorf("its disk has %d MiB, want those of 6 GiB:\n%s", size, out)
	}
	if out := build("again", "deep1", third, "--disk", "6g"); !strings.Contains(out, "CACHED") {
		t.Errorf("the same build again:\n%s", out)
	}
	was, is := a.layerFiles(t, "deep"), a.layerFiles(t, "deep2")
	if len(was) != template.MaxLayers-1 || len(is) != template.MaxLayers || !slices.Equal(is[:len(was)], was) {
		t.Errorf("the layers of deep are %v, of deep2 %v", was, is)
	}

	deep := a.create(t, &hostagentv1.CreateSandboxRequest{Template: "deep2", MemoryMb: 256})
	deep.wantLayers("builds on builds")
	deep.sh("rm /opt/filler")
	for _, script := range []string{secondLayer, third, "rm /opt/filler"} {
		b.sh(script)
	}
	if got, want := deep.tree(), b.tree(); got != want {
		t.Errorf("a sandbox of builds on builds is not what one is where the same was done:\n%s", diffLines(want, got))
	}
}

// diffLines are the lines that only one of two texts has.
func diffLines(want, got string) string {
	var out []string
	for line := range strings.Lines(want) {
		if !strings.Contains(got, line) {
			out = append(out, "- "+line)
		}
	}
	for line := range strings.Lines(got) {
		if !strings.Contains(want, line) {
			out = append(out, "+ "+line)
		}
	}
	return strings.Join(out, "")
}
