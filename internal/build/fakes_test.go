package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// fakeBytes is the size of a fake's disk.
const fakeBytes = 64 << 20

// boxes are build sandboxes whose guests are directories, and whose commands are run by
// the host's sh there.
type boxes struct {
	t   *testing.T
	dir string

	mu       sync.Mutex
	all      map[string]*box
	created  int
	layers   []int // of each, in order
	commands []string
	prepared []string

	// What is to go wrong.
	captureErr, createErr, prepareErr error
	// stuck, if not nil, is closed when a command "hang" has begun, which ends with its ctx.
	stuck chan struct{}
	// pack, if not nil, is what packs the root of a guest.
	pack func(ctx context.Context, w io.Writer) error
}

type box struct {
	boxes *boxes
	root  string
	sent  []tar.Header
}

func (b *boxes) Create(ctx context.Context, r Request) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.createErr != nil {
		return "", b.createErr
	}
	b.created++
	b.layers = append(b.layers, len(r.Root.Layers))
	id := fmt.Sprintf("sb-%d", b.created)
	x := &box{boxes: b, root: filepath.Join(b.dir, id)}
	b.all[id] = x
	if r.Overlay == "" {
		return id, errors.Join(
			os.MkdirAll(filepath.Join(x.root, "etc"), 0o755),
			os.WriteFile(filepath.Join(x.root, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\napp:x:7:8::/home/app:/bin/sh\n"), 0o644),
			os.WriteFile(filepath.Join(x.root, "etc/group"), []byte("root:x:0:\nstaff:x:50:\n"), 0o644))
	}
	f, err := os.Open(r.Overlay)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return id, x.untar(x.root, f)
}

func (b *boxes) box(id string) *box {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all[id]
}

func (b *boxes) Guest(id string) (Guest, error) {
	if x := b.box(id); x != nil {
		return x, nil
	}
	return nil, errdefs.NotFound.Errorf("build sandbox %s does not exist", id)
}

func (b *boxes) Capture(ctx context.Context, id, path string) error {
	if b.captureErr != nil {
		return b.captureErr
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return errors.Join(b.box(id).tar(b.box(id).root, f), f.Truncate(fakeBytes))
}

func (b *boxes) Destroy(ctx context.Context, id string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	x := b.all[id]
	delete(b.all, id)
	return os.RemoveAll(x.root)
}

func (b *boxes) Prepare(ctx context.Context, template, build string, said func(level, step, line string)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.prepared = append(b.prepared, build)
	said(Info, "start", "the program says hello")
	return b.prepareErr
}

// ran returns the commands that were run since the last call.
func (b *boxes) ran() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.commands
	b.commands = nil
	return all
}

func (x *box) Exec(ctx context.Context, c guest.Command, output func(bool, []byte)) (guest.Result, error) {
	text := c.Args[len(c.Args)-1]
	x.boxes.mu.Lock()
	x.boxes.commands = append(x.boxes.commands, text)
	x.boxes.mu.Unlock()
	if text == "hang" {
		close(x.boxes.stuck)
		<-ctx.Done()
		return guest.Result{ExitCode: -1}, context.Cause(ctx)
	}
	cmd := exec.Command("sh", "-c", text)
	cmd.Dir = filepath.Join(x.root, c.Cwd)
	for _, name := range slices.Sorted(maps.Keys(c.Env)) {
		cmd.Env = append(cmd.Env, name+"="+c.Env[name])
	}
	cmd.Env = append(cmd.Env, "AS="+c.User)
	out, err := cmd.CombinedOutput()
	output(false, out)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return guest.Result{ExitCode: exit.ExitCode()}, nil
	}
	return guest.Result{}, err
}

func (x *box) Unpack(ctx context.Context, dir string, r io.Reader) error {
	return x.untar(filepath.Join(x.root, dir), r)
}

func (x *box) untar(dir string, r io.Reader) error {
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return err
		}
		x.sent = append(x.sent, *h)
		to := filepath.Join(dir, h.Name)
		err = os.MkdirAll(filepath.Dir(to), 0o755)
		switch h.Typeflag {
		case tar.TypeDir:
			err = errors.Join(err, os.MkdirAll(to, 0o755))
		case tar.TypeSymlink:
			os.Remove(to)
			err = errors.Join(err, os.Symlink(h.Linkname, to))
		case tar.TypeLink:
			err = errors.Join(err, os.Link(filepath.Join(dir, h.Linkname), to))
		default:
			data, e := io.ReadAll(in)
			err = errors.Join(err, e, os.WriteFile(to, data, fs.FileMode(h.Mode)&0o777))
		}
		if err != nil {
			return err
		}
	}
}

func (x *box) Pack(ctx context.Context, path string, w io.Writer) error {
	if path == "/" && x.boxes.pack != nil {
		return x.boxes.pack(ctx, w)
	}
	at := filepath.Join(x.root, path)
	if real, err := filepath.EvalSymlinks(at); err == nil {
		at = real
	}
	return x.tar(at, w)
}

func (x *box) tar(at string, w io.Writer) error {
	out := tar.NewWriter(w)
	err := filepath.Walk(at, func(path string, info fs.FileInfo, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return errdefs.NotFound.Errorf("it does not exist")
		}
		if err != nil {
			return err
		}
		link, _ := os.Readlink(path)
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		h.Name, h.ModTime = info.Name(), time.Unix(0, 0)
		if top, _ := os.Stat(at); top.IsDir() {
			h.Name, _ = filepath.Rel(at, path)
			if info.IsDir() {
				h.Name += "/"
			}
		}
		h.Format = tar.FormatPAX
		if err := out.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err == nil {
			_, err = out.Write(data)
		}
		return err
	})
	return errors.Join(err, out.Close())
}

// fakeImages are images: a name that begins with "none" does not exist.
type fakeImages struct {
	dir    string
	config image.Config
	pulls  int
	flats  int

	flatErr error
}

func (f *fakeImages) Hold(context.Context) (func(), error) { return func() {}, nil }

func (f *fakeImages) Pull(ctx context.Context, ref string, _ image.Credentials, progress func(image.Progress)) (image.Image, error) {
	if strings.HasPrefix(ref, "none") {
		return image.Image{}, errdefs.NotFound.Errorf("image %s not found", ref)
	}
	f.pulls++
	progress(image.Progress{Stage: "pull", Done: 1, Total: 2})
	sum := sha256.Sum256([]byte(ref))
	return image.Image{Reference: ref, Digest: "sha256:" + hex.EncodeToString(sum[:]), Config: f.config}, nil
}

func (f *fakeImages) Import(ctx context.Context, r io.Reader, name string, progress func(image.Progress)) (image.Image, error) {
	text, err := io.ReadAll(r)
	return image.Image{Reference: name, Digest: "sha256:" + string(text)}, err
}

func (f *fakeImages) Root(ctx context.Context, img image.Image, _ func(image.Progress)) (string, error) {
	path := filepath.Join(f.dir, strings.ReplaceAll(img.Digest, ":", "-"))
	return path, os.WriteFile(path, []byte("root of "+img.Digest), 0o400)
}

func (f *fakeImages) Flat(ctx context.Context, img image.Image, _ func(image.Progress)) (string, error) {
	if f.flatErr != nil {
		return "", f.flatErr
	}
	f.flats++
	path := filepath.Join(f.dir, strings.ReplaceAll(img.Digest, ":", "-")+"-flat")
	return path, os.WriteFile(path, []byte("flat root of "+img.Digest), 0o400)
}

// rig is an engine over a real store of templates, and fakes.
type rig struct {
	*Engine
	t      *testing.T
	boxes  *boxes
	images *fakeImages
	store  *template.Store
	dir    string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"vmlinux": "kernel", "initrd.img": "initrd",
		"kernel.json": `{"format":1,"files":{"vmlinux":{"size":6,"sha256":"aa"},"initrd.img":{"size":6,"sha256":"bb"}},"envd_sha256":"cc"}`,
	} {
		path := filepath.Join(dir, "kernels/default", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	store, err := template.Open(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, store: store, images: &fakeImages{dir: t.TempDir()}}
	r.images.dir = filepath.Join(dir, "images")
	r.boxes = &boxes{t: t, dir: t.TempDir(), all: map[string]*box{}}
	if err := os.Mkdir(r.images.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r.Engine, err = New(Config{
		Dir: filepath.Join(dir, "builds"), Templates: store, Images: r.images, Sandboxes: r.boxes, Log: log,
		Dirs: []string{filepath.Join(dir, "templates"), r.images.dir},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
		if len(r.boxes.all) != 0 {
			t.Errorf("build sandboxes left: %v", r.boxes.all)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "builds/*/.*")); len(left) != 0 {
			t.Errorf("half-made: %v", left)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "builds/work/*")); len(left) != 0 {
			t.Errorf("work left: %v", left)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "templates/.build*")); len(left) != 0 {
			t.Errorf("stages left: %v", left)
		}
	})
	return r
}

// begin starts a build of the template t.
func (r *rig) begin(spec Spec) Spec {
	r.t.Helper()
	info, b, err := r.store.NewBuild(r.t.Context(), template.NewBuild{Project: "p", Name: "t", VCPUs: 1, MemMiB: 256, DiskMiB: 64})
	if err != nil {
		r.t.Fatal(err)
	}
	spec.Project, spec.Template, spec.Build = "p", info.ID, b.ID
	if err := r.Start(r.t.Context(), spec); err != nil {
		r.t.Fatal(err)
	}
	return spec
}

// end waits for a build's end and returns it.
func (r *rig) end(spec Spec) template.Build {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Watch(ctx, spec.Template, spec.Build, 0, func(Entry) error { return nil }); err != nil {
		r.t.Fatal(err)
	}
	_, b, err := r.lookup(spec.Template, spec.Build)
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// made runs a build that is to be ready, and returns the commands that ran.
func (r *rig) made(spec Spec) (Spec, []string) {
	r.t.Helper()
	r.boxes.ran()
	spec = r.begin(spec)
	if b := r.end(spec); b.Status != template.StatusReady {
		r.t.Fatalf("build is %s: %+v\n%s", b.Status, b.Reason, r.text(spec))
	}
	return spec, r.boxes.ran()
}

// text is a build's log.
func (r *rig) text(spec Spec) string {
	r.t.Helper()
	all, err := r.Log(spec.Template, spec.Build, 0, 0, Debug)
	if err != nil {
		r.t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range all {
		fmt.Fprintf(&b, "%s %s %s\n", e.Level, e.Step, e.Message)
	}
	return b.String()
}

// upload stores an archive with these files, and returns its hash.
func (r *rig) upload(files ...string) string {
	r.t.Helper()
	data := archive(r.t, true, files...)
	sum := sha256.Sum256(data)
	hash := hex.EncodeToString(sum[:])
	if err := r.Put(r.t.Context(), "p", hash, bytes.NewReader(data)); err != nil {
		r.t.Fatal(err)
	}
	return hash
}

// archive makes an archive of "name=content", "name->target" and "name/".
func archive(t *testing.T, zipped bool, files ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	var w io.Writer = &buf
	var zip *gzip.Writer
	if zipped {
		zip = gzip.NewWriter(&buf)
		w = zip
	}
	out := tar.NewWriter(w)
	for _, f := range files {
		h := &tar.Header{Mode: 0o640, Uid: 501, Gid: 502}
		name, content, regular := strings.Cut(f, "=")
		link, target, isLink := strings.Cut(f, "->")
		switch {
		case isLink:
			h.Name, h.Typeflag, h.Linkname = link, tar.TypeSymlink, target
		case regular:
			h.Name, h.Typeflag, h.Size = name, tar.TypeReg, int64(len(content))
		default:
			h.Name, h.Typeflag, h.Mode = f, tar.TypeDir, 0o750
		}
		if err := out.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := out.Write([]byte(content)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	if zip != nil {
		if err := zip.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return buf.Bytes()
}
