package e2e_test

import (
	"archive/tar"
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// TestTemplates runs the scenarios of testdata/template as TestCLI runs its own. In their
// environment REGISTRY is a registry on loopback that has the image hello:1 with DIGEST, and
// PRIVATE the same for the user me with the password secret.
func TestTemplates(t *testing.T) {
	testenv.StateDir(t)
	host, private, digest := serveImage(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/template",
		Setup: func(e *testscript.Env) error {
			a := startAgent(e.T().(testing.TB))
			dir, err := filepath.Abs(a.bin)
			if err != nil {
				return err
			}
			e.Setenv("PATH", dir+":"+e.Getenv("PATH"))
			e.Setenv("WRENN_HOST", a.url)
			e.Setenv("WRENN_STATE_DIR", a.stateDir)
			e.Setenv("REGISTRY", host)
			e.Setenv("PRIVATE", private)
			e.Setenv("DIGEST", digest)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"status": status, "id": rememberID},
	})
}

// serveImage serves an image with one program until the test ends.
func serveImage(t *testing.T) (host, private, digest string) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "hello")
	build := exec.Command("go", "build", "-o", bin, "./testdata/hello")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	for _, h := range []tar.Header{
		{Name: "srv/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "hello", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write(program); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err == nil {
		image, err = mutate.ConfigFile(image, &v1.ConfigFile{
			Architecture: "amd64", OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{must(layer.DiffID())}},
			Config: v1.Config{Env: []string{"COLOUR=blue"}, WorkingDir: "/srv"},
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(images)
	t.Cleanup(server.Close)
	host = strings.TrimPrefix(server.URL, "http://")
	locked := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="images"`)
			http.Error(w, "{}", http.StatusUnauthorized)
			return
		}
		images.ServeHTTP(w, r)
	}))
	t.Cleanup(locked.Close)
	ref, err := name.ParseReference(host + "/team/hello:1")
	if err == nil {
		err = remote.Write(ref, image)
	}
	if err != nil {
		t.Fatal(err)
	}
	return host, strings.TrimPrefix(locked.URL, "http://"), must(image.Digest()).String()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
