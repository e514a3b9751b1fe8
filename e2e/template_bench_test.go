package e2e_test

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// largeImage pushes an image of 8,000 files and 200 MiB, in three layers, to a registry on
// loopback.
func largeImage(b *testing.B) (host string, img v1.Image) {
	b.Helper()
	random := rand.New(rand.NewSource(7))
	img = empty.Image
	for _, l := range []struct {
		dir        string
		count, mib int
	}{{"usr/lib", 3000, 80}, {"usr/share", 4000, 100}, {"srv", 1000, 20}} {
		var files bytes.Buffer
		w := tar.NewWriter(&files)
		half := make([]byte, l.mib<<20/l.count/2) // hexadecimal digits compress to about half
		for i := range l.count {
			random.Read(half)
			text := hex.EncodeToString(half)
			err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("%s/%d/%d", l.dir, i/50, i), Mode: 0o644, Size: int64(len(text))})
			if err == nil {
				_, err = io.WriteString(w, text)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil })
		if err == nil {
			img, err = mutate.AppendLayers(img, layer)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	config := must(img.ConfigFile()).DeepCopy()
	config.Architecture, config.OS = "amd64", "linux"
	img = must(mutate.ConfigFile(img, config))
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	b.Cleanup(server.Close)
	host = strings.TrimPrefix(server.URL, "http://")
	if err := remote.Write(must(name.ParseReference(host+"/bench:1")), img); err != nil {
		b.Fatal(err)
	}
	return host, img
}

// downloadAndUnpack is what a pull is made of: each layer to a file, and that by tar.
func downloadAndUnpack(b *testing.B, host string, img v1.Image, dir string) error {
	for i, layer := range must(img.Layers()) {
		resp, err := http.Get("http://" + host + "/v2/bench/blobs/" + must(layer.Digest()).String())
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		path := filepath.Join(dir, fmt.Sprint(i, ".tar.gz"))
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := io.Copy(f, resp.Body); err != nil {
			return err
		}
		if out, err := exec.CommandContext(b.Context(), "tar", "-C", dir, "-xzf", path).CombinedOutput(); err != nil {
			return fmt.Errorf("tar: %w: %s", err, out)
		}
	}
	return nil
}

// BenchmarkTemplates times what templates are made of and what they save.
func BenchmarkTemplates(b *testing.B) {
	testenv.Program(b, "tar", "gzip")
	a, cold := benchAgent(b), coldAgent(b)
	b.Run("Pull", benchPull)
	b.Run("Build", func(b *testing.B) { a.benchBuild(b) })
	b.Run("Program", func(b *testing.B) { benchProgram(b, a, cold) })
	b.Run("TenLayers", func(b *testing.B) { a.benchTenLayers(b) })
}

func benchPull(b *testing.B) {
	host, img := largeImage(b)
	pull := row("pull and unpack an image of 200 MiB", "download, then tar -x")
	repeat(b, 5, 2*time.Minute, func() {
		store, err := image.Open(b.TempDir(), slog.New(slog.DiscardHandler), image.Limits{})
		if err != nil {
			b.Fatal(err)
		}
		timed(b, &pull.agent, func() error {
			got, err := store.Pull(b.Context(), host+"/bench:1", image.Credentials{}, nil)
			if err == nil {
				_, err = store.Root(b.Context(), got, nil)
			}
			return err
		})
		timed(b, &pull.floor, func() error { return downloadAndUnpack(b, host, img, b.TempDir()) })
	})
	pull.report(b)
}

// cliBuild builds a Dockerfile with the command line.
func (a *agent) cliBuild(b *testing.B, name, dockerfile string, args ...string) error {
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		return err
	}
	out, err := a.cli(b, append(append([]string{"template", "build", "-q", "-t", name}, args...), dir)...)
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, out)
	}
	return err
}

func (a *agent) benchBuild(b *testing.B) {
	again := row("build, all of 5 steps in the cache", "of a build that runs them")
	const text = "FROM minimal\nENV A=1\nRUN echo $A >/srv/a\nWORKDIR /srv/app\nRUN seq 100000 >b\nRUN wc b >c\n"
	repeat(b, 20, time.Minute, func() {
		if len(again.floor) < 3 {
			timed(b, &again.floor, func() error { return a.cliBuild(b, "bench", text, "--no-cache") })
		}
		timed(b, &again.agent, func() error { return a.cliBuild(b, "bench", text) })
	})
	again.report(b)
}

func benchProgram(b *testing.B, a, cold *agent) {
	program := template.Program{
		Start: "exec python3 -m http.server 8000", Ready: "curl -fs localhost:8000 >/dev/null",
		Login: template.Login{User: "user", Workdir: "/home/user"},
	}
	for _, host := range []*agent{a, cold} {
		host.publish(b, "server", program)
	}
	// As coldAgent does with "minimal".
	if err := os.WriteFile(filepath.Join(cold.buildDir(b, "server"), "ready"), nil, 0o444); err != nil {
		b.Fatal(err)
	}
	req := &hostagentv1.CreateSandboxRequest{Template: "server"}
	if err := a.create(b, req).destroy(); err != nil { // makes the boot snapshot
		b.Fatal(err)
	}
	first := row("create and first request, its server runs", "of a cold boot")
	repeat(b, 10, 2*time.Minute, func() {
		for _, of := range []struct {
			host *agent
			to   *[]time.Duration
		}{{a, &first.agent}, {cold, &first.floor}} {
			var box *sandbox
			timed(b, of.to, func() error {
				box = of.host.create(b, req)
				_, err := box.ask(8000, "/")
				return err
			})
			if box.record().Restored != (of.host == a) {
				b.Fatal("it did not start as it was to")
			}
			if err := box.destroy(); err != nil {
				b.Fatal(err)
			}
		}
	})
	first.report(b)
}

// benchTenLayers makes ten templates on one another, of which each adds 10 MiB, and ten
// beside one another on one base.
func (a *agent) benchTenLayers(b *testing.B) {
	box := a.restoredBox(b)
	box.sh("head -c 10M /dev/urandom >/srv/own; for d in bin lib lib/x86_64-linux-gnu lib/python3.11; " +
		"do for i in $(seq 40); do echo $d >/usr/$d/layer-$i; done; done")
	if err := box.hibernate(); err != nil {
		b.Fatal(err)
	}
	layer := filepath.Join(a.stateDir, "sandboxes", box.id, "snapshot", "overlay.ext4")
	base := a.templateBytes(b)
	for i := range 10 {
		a.build(b, "minimal", fmt.Sprint("beside-", i), layer)
	}
	added := a.templateBytes(b) - base
	whole, _ := os.Stat(filepath.Join(a.buildDir(b, "minimal"), "base.ext4"))
	remark("ten templates on minimal, each with 10 MiB of its own: %d MiB together; without sharing the base's %d MiB it would be %d MiB",
		added>>20, taken(whole)>>20, (added+10*taken(whole))>>20)

	a.build(b, "minimal", "ten", slices.Repeat([]string{layer}, template.MaxLayers-2)...)
	for i := template.MaxLayers - 1; i < 10; i++ { // each is one more on the one before
		if err := a.cliBuild(b, "ten", fmt.Sprintf("FROM ten\nRUN head -c 10M /dev/urandom >/srv/own; echo %d >/srv/%[1]d\n", i)); err != nil {
			b.Fatal(err)
		}
	}
	ready := row("create from ten templates on one another", "of minimal")
	run := row("the same and a first exec", "of minimal")
	for _, of := range []string{"ten", "minimal"} { // makes the boot snapshots
		if err := a.create(b, &hostagentv1.CreateSandboxRequest{Template: of}).destroy(); err != nil {
			b.Fatal(err)
		}
	}
	repeat(b, 20, time.Minute, func() {
		for _, of := range []struct {
			template  string
			ready, on *[]time.Duration
		}{{"ten", &ready.agent, &run.agent}, {"minimal", &ready.floor, &run.floor}} {
			s, made, err := a.startTimed(b.Context(), &hostagentv1.CreateSandboxRequest{Template: of.template}, "python3", "-c", "import json")
			if err != nil {
				b.Fatal(err)
			}
			*of.ready, *of.on = append(*of.ready, s.ready), append(*of.on, s.exec)
			if err := (&sandbox{b, a, made.SandboxId}).destroy(); err != nil {
				b.Fatal(err)
			}
		}
	})
	ready.report(b)
}

// templateBytes is what the agent's templates take of the disk, without their boot
// snapshots.
func (a *agent) templateBytes(b *testing.B) (sum int64) {
	b.Helper()
	seen := map[uint64]bool{}
	layers, err := filepath.Glob(filepath.Join(a.stateDir, "templates", "*", "*", "*.ext4"))
	if err != nil {
		b.Fatal(err)
	}
	for _, path := range layers {
		info, err := os.Stat(path)
		if err != nil {
			b.Fatal(err)
		}
		if inode := info.Sys().(*syscall.Stat_t).Ino; !seen[inode] {
			seen[inode] = true
			sum += taken(info)
		}
	}
	return sum
}

// taken is what a file takes of the disk.
func taken(info os.FileInfo) int64 { return info.Sys().(*syscall.Stat_t).Blocks * 512 }
