package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestPull(t *testing.T) {
	dir := t.TempDir()
	testenv.NoLeaks(t, dir)
	reg, s, img := newRegistry(t), open(t, dir), smallImage(t)
	ref := reg.push(t, "some/image", "v1", img)
	var stages []string
	got, err := s.Pull(t.Context(), ref, Credentials{}, func(p Progress) {
		if len(stages) == 0 || stages[len(stages)-1] != p.Stage {
			stages = append(stages, p.Stage)
		}
		if p.Done > p.Total {
			t.Errorf("%+v", p)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	want := Image{Reference: ref, Digest: digestOf(img.manifest), Layers: img.layers, Config: Config{
		Env: []string{"A=b"}, User: "user:100", Workdir: "/w", Entrypoint: []string{"/e"}, Cmd: []string{"c", "d"},
		Shell: []string{"/bin/bash", "-c"}, Labels: map[string]string{"l": "m"}, StopSignal: "SIGINT",
		Exposed: []string{"53/udp", "80/tcp"}, Volumes: []string{"/v"}, OnBuild: []string{"RUN x"},
		Healthcheck: &Healthcheck{Test: []string{"CMD", "true"}, Interval: 5 * time.Second, Retries: 2},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if fmt.Sprint(stages) != "[resolving downloading]" {
		t.Errorf("stages %v", stages)
	}

	// By digest; the blobs are not asked for again.
	reg.meddle(nil)
	byDigest := reg.host + "/some/image@" + digestOf(img.manifest)
	if got, err = s.Pull(t.Context(), byDigest, Credentials{}, nil); err != nil || got.Digest != want.Digest {
		t.Errorf("by digest: %+v, %v", got, err)
	}
	for _, l := range img.layers {
		if r := reg.requests(l.Digest); fmt.Sprint(r) != "[HEAD /v2/some/image/blobs/"+l.Digest+"]" {
			t.Errorf("requests %v", r)
		}
	}
	if names := left(t, s.dir); len(names) != 2 {
		t.Errorf("left %v", names)
	}
}

func TestPullChoosesThePlatform(t *testing.T) {
	reg, s := newRegistry(t), open(t, t.TempDir())
	img, arm := smallImage(t), makeImage(t, v1.Config{})
	arm.config = []byte(strings.Replace(string(arm.config), "amd64", "arm64", 1))
	arm.manifest = []byte(strings.Replace(string(arm.manifest), digestOf(makeImage(t, v1.Config{}).config), digestOf(arm.config), 1))
	reg.push(t, "i", "amd", img)
	armRef := reg.push(t, "i", "arm", arm)
	describe := func(m madeImage, p *v1.Platform) v1.Descriptor {
		digest := hashOf(t, digestOf(m.manifest))
		return v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: int64(len(m.manifest)), Digest: digest, Platform: p}
	}
	armed := describe(arm, &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"})
	about := describe(arm, &v1.Platform{OS: "unknown", Architecture: "unknown"})
	modern := describe(arm, &v1.Platform{OS: "linux", Architecture: "amd64", Variant: "v3"})
	put := func(tag string, all ...v1.Descriptor) string {
		index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: all}
		reg.put(t, http.MethodPut, "/v2/i/manifests/"+tag, string(types.OCIImageIndex), jsonOf(t, index))
		return reg.host + "/i:" + tag
	}
	both := put("both", about, armed, modern, describe(img, &v1.Platform{OS: "linux", Architecture: "amd64"}))
	got, err := s.Pull(t.Context(), both, Credentials{}, nil)
	if err != nil || got.Digest != digestOf(img.manifest) {
		t.Errorf("got %+v, %v", got, err)
	}
	_, err = s.Pull(t.Context(), put("none", about, armed), Credentials{}, nil)
	if errdefs.ClassOf(err) != errdefs.Unsupported || !strings.Contains(say(err), "linux/amd64: linux/arm64/v8") {
		t.Errorf("an index without: %v", err)
	}
	if _, err = s.Pull(t.Context(), armRef, Credentials{}, nil); errdefs.ClassOf(err) != errdefs.Unsupported {
		t.Errorf("a manifest of another platform: %v", err)
	}
}

// A wrong answer ends with the right class and leaves nothing.
func TestPullRefuses(t *testing.T) {
	img := smallImage(t)
	first := img.layers[0].Digest
	answer := func(code int, text string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.WriteHeader(code); io.WriteString(w, text) }
	}
	manifest := func(change func(*v1.Manifest)) func(http.ResponseWriter) {
		m, err := v1.ParseManifest(strings.NewReader(string(img.manifest)))
		if err != nil {
			t.Fatal(err)
		}
		change(m)
		return func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			w.Write(jsonOf(t, m))
		}
	}
	for _, c := range []struct {
		name, path string
		answer     func(http.ResponseWriter)
		class      *errdefs.Class
		text       string
	}{
		{"no such tag", "/manifests/", answer(404, "{}"), errdefs.NotFound, "image or tag not found at"},
		{"denied", "/manifests/", answer(403, "{}"), errdefs.Denied, "needs credentials"},
		{"broken registry", "/manifests/", answer(503, "secret words"), errdefs.Unavailable, "503"},
		{"too many requests", "/manifests/", answer(429, ""), errdefs.Unavailable, "no more requests"},
		{"no JSON", "/manifests/", answer(200, "<html>"), errdefs.Unsupported, "no image of a kind"},
		{"endless manifest", "/manifests/", answer(200, strings.Repeat("x", maxManifest+1)), errdefs.InvalidArgument, "more than"},
		{"not an image", "/manifests/", manifest(func(m *v1.Manifest) { m.Config.MediaType = "application/x" }), errdefs.Unsupported, "no image"},
		{"layer of another kind", "/manifests/", manifest(func(m *v1.Manifest) { m.Layers[0].MediaType = "application/x" }),
			errdefs.Unsupported, "layer 1"},
		{"layer too few", "/manifests/", manifest(func(m *v1.Manifest) { m.Layers = m.Layers[1:] }), errdefs.InvalidArgument, "1 layers"},
		{"huge layer", "/manifests/", manifest(func(m *v1.Manifest) { m.Layers[0].Size = 1 << 60 }), errdefs.Exhausted, "more than"},
		{"negative size", "/manifests/", manifest(func(m *v1.Manifest) { m.Layers[0].Size = -1 }), errdefs.InvalidArgument, "layer 1"},
		{"digest that leads elsewhere", "/manifests/", manifest(func(m *v1.Manifest) { m.Layers[0].Digest.Hex = "../../x" }),
			errdefs.InvalidArgument, ""},
		{"wrong size", "/manifests/", manifest(func(m *v1.Manifest) { m.Layers[0].Size++ }), errdefs.Corrupt, "bytes"},
		{"other configuration", "/blobs/" + digestOf(img.config), answer(200, `{"os":"linux"}`), errdefs.Corrupt, "has the digest"},
		{"missing layer", "/blobs/" + first, answer(404, ""), errdefs.NotFound, first},
		{"denied layer", "/blobs/" + first, answer(403, ""), errdefs.Denied, first},
		{"other layer", "/blobs/" + first, answer(200, strings.Repeat("x", int(img.layers[0].Size))), errdefs.Corrupt, "has the digest"},
		{"endless layer", "/blobs/" + first, func(w http.ResponseWriter) {
			w.(http.Flusher).Flush() // no length
			for range 100 {
				w.Write(make([]byte, 10_000))
			}
		}, errdefs.Corrupt, "has the digest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg, s := newRegistry(t), open(t, t.TempDir())
			ref := reg.push(t, "i", "v1", img)
			reg.meddle(func(w http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, c.path) {
					c.answer(w)
					return true
				}
				return false
			})
			_, err := s.Pull(t.Context(), ref, Credentials{}, nil)
			if errdefs.ClassOf(err) != c.class || !strings.Contains(say(err), c.text) || strings.Contains(say(err), "secret") {
				t.Errorf("got %v, %v", errdefs.ClassOf(err), err)
			}
			for _, n := range left(t, s.dir) {
				if n[0] == '.' || n == strings.TrimPrefix(first, sha256Prefix) {
					t.Errorf("left %s", n)
				}
			}
		})
	}
}

func TestPullByDigestVerifiesTheManifest(t *testing.T) {
	reg, s, img := newRegistry(t), open(t, t.TempDir()), smallImage(t)
	reg.push(t, "i", "v1", img)
	reg.meddle(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			w.Write(append([]byte(" "), img.manifest...))
			return true
		}
		return false
	})
	_, err := s.Pull(t.Context(), reg.host+"/i@"+digestOf(img.manifest), Credentials{}, nil)
	if errdefs.ClassOf(err) != errdefs.Corrupt {
		t.Errorf("got %v", err)
	}
}

const password = "pass word/1"

// private makes the registry ask for credentials, by basic authentication or by a token.
func private(reg *testRegistry, bearer bool) {
	reg.meddle(func(w http.ResponseWriter, r *http.Request) bool {
		user, pass, _ := r.BasicAuth()
		known := user == "me" && pass == password
		if r.URL.Path == "/token" {
			if !known {
				w.WriteHeader(http.StatusUnauthorized)
				fmt.Fprintf(w, `{"errors":[{"code":"UNAUTHORIZED","message":%q}]}`, pass)
			} else {
				fmt.Fprint(w, `{"token":"t0"}`)
			}
			return true
		}
		if bearer {
			known = r.Header.Get("Authorization") == "Bearer t0"
		}
		if known {
			return false
		}
		challenge := `Basic realm="x"`
		if bearer {
			challenge = fmt.Sprintf(`Bearer realm="%s/token",service="s"`, reg.URL)
		}
		w.Header().Set("WWW-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
}

func TestPullPrivate(t *testing.T) {
	for _, bearer := range []bool{false, true} {
		t.Run(fmt.Sprint("bearer=", bearer), func(t *testing.T) {
			reg, s := newRegistry(t), open(t, t.TempDir())
			ref := reg.push(t, "i", "v1", smallImage(t))
			private(reg, bearer)
			for _, c := range []Credentials{{}, {"me", "wrong " + password}} {
				_, err := s.Pull(t.Context(), ref, c, nil)
				if errdefs.ClassOf(err) != errdefs.Denied || strings.Contains(say(err), password) {
					t.Errorf("got %v", err)
				}
			}
			if names := left(t, s.dir); len(names) != 0 {
				t.Errorf("left %v", names)
			}
			if _, err := s.Pull(t.Context(), ref, Credentials{"me", password}, nil); err != nil {
				t.Fatal(err)
			}
			// That the layers are there opens them to no one.
			if _, err := s.Pull(t.Context(), ref, Credentials{}, nil); errdefs.ClassOf(err) != errdefs.Denied {
				t.Errorf("got %v", err)
			}
			searchSecret(t, s.dir)
		})
	}
}

// searchSecret looks for the password in all files.
func searchSecret(t *testing.T, dir string) {
	t.Helper()
	encoded := base64.StdEncoding.EncodeToString([]byte("me:" + password))
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if strings.Contains(string(b), password) || strings.Contains(string(b), encoded) {
			t.Errorf("%s has the password", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// An image whose manifest names layers of another one gets them only from a registry that
// shows them to the caller, and no root layer by what it says of its own.
func TestPullDoesNotOpenOthersLayers(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "mke2fs", "resize2fs")
	reg, s, img := newRegistry(t), open(t, t.TempDir()), smallImage(t)
	owner, err := s.Pull(t.Context(), reg.push(t, "private", "v1", img), Credentials{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Root(t.Context(), owner, nil); err != nil {
		t.Fatal(err)
	}
	reg.meddle(func(w http.ResponseWriter, r *http.Request) bool {
		theirs := strings.Contains(r.URL.Path, "/v2/thief/blobs/") && !strings.Contains(r.URL.Path, digestOf(img.config))
		if theirs && r.Method != http.MethodPost {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		return false
	})
	if _, err := s.Pull(t.Context(), reg.push(t, "thief", "v1", img), Credentials{}, nil); errdefs.ClassOf(err) != errdefs.NotFound {
		t.Errorf("layers: %v", err)
	}
	// Layers of its own, and the DiffIDs of the other's.
	reg.meddle(nil)
	own := makeImage(t, v1.Config{}, archiveOf(t, entry{name: "x"}), archiveOf(t, entry{name: "y"}))
	lie := own
	for i := range own.layers {
		lie.config = []byte(strings.Replace(string(lie.config), own.layers[i].DiffID, img.layers[i].DiffID, 1))
	}
	lie.manifest = []byte(strings.Replace(string(own.manifest), digestOf(own.config), digestOf(lie.config), 1))
	got, err := s.Pull(t.Context(), reg.push(t, "liar", "v1", lie), Credentials{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Root(t.Context(), got, nil); errdefs.ClassOf(err) != errdefs.InvalidArgument {
		t.Errorf("root layer: %v", err)
	}
}

// bigImage is an image with one layer that does not compress.
func bigImage(t testing.TB, size int) madeImage {
	return makeImage(t, v1.Config{}, archiveOf(t, entry{name: "big", text: noise(size)}))
}

// breakOff answers requests for the blob with at most n bytes of it at a time.
func breakOff(blob []byte, digest string, n int, ranges bool) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest) || r.Method != http.MethodGet {
			return false
		}
		off := 0
		if ranges {
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &off)
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)-off))
		if off > 0 {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, len(blob)-1, len(blob)))
			w.WriteHeader(http.StatusPartialContent)
		}
		w.Write(blob[off:min(off+n, len(blob))])
		w.(http.Flusher).Flush()
		if off+n < len(blob) {
			panic(http.ErrAbortHandler)
		}
		return true
	}
}

// A download that breaks off goes on where it was.
func TestPullResumes(t *testing.T) {
	reg, s, img := newRegistry(t), open(t, t.TempDir()), bigImage(t, 1<<20)
	ref, digest := reg.push(t, "i", "v1", img), img.layers[0].Digest
	blob := img.blobs[digest]
	reg.meddle(breakOff(blob, digest, 300_000, true))
	var last Progress
	if _, err := s.Pull(t.Context(), ref, Credentials{}, func(p Progress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if r := reg.requests(digest); len(r) != 4 || !strings.HasSuffix(r[3], " bytes=900000-") {
		t.Errorf("requests %v", r)
	}
	if last.Done != int64(len(blob)) || last.Total != last.Done {
		t.Errorf("last progress %+v", last)
	}
}

// Where the registry does not serve parts, the download begins again, and where that does
// not help it ends and leaves nothing.
func TestPullWithoutRanges(t *testing.T) {
	reg, s, img := newRegistry(t), open(t, t.TempDir()), bigImage(t, 1<<20)
	ref, digest := reg.push(t, "i", "v1", img), img.layers[0].Digest
	broken := breakOff(img.blobs[digest], digest, 700_000, false)
	reg.meddle(broken)
	_, err := s.Pull(t.Context(), ref, Credentials{}, nil)
	if errdefs.ClassOf(err) != errdefs.Unavailable || !strings.Contains(say(err), "breaks connections off") || len(left(t, s.dir)) != 0 {
		t.Errorf("got %v, left %v", err, left(t, s.dir))
	}
	var n atomic.Int32
	reg.meddle(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest) || n.Add(1) == 1 {
			return broken(w, r)
		}
		w.Write(img.blobs[digest])
		return true
	})
	var last Progress
	if _, err := s.Pull(t.Context(), ref, Credentials{}, func(p Progress) { last = p }); err != nil {
		t.Error(err)
	}
	if last.Done != last.Total {
		t.Errorf("last progress %+v", last)
	}
}

// What the registry serves as the rest of a blob may be of another one.
func TestPullResumedIsVerified(t *testing.T) {
	reg, s, img := newRegistry(t), open(t, t.TempDir()), bigImage(t, 1<<20)
	ref, digest := reg.push(t, "i", "v1", img), img.layers[0].Digest
	other := append([]byte{}, img.blobs[digest]...)
	other[1_000_000]++
	reg.meddle(breakOff(other, digest, 600_000, true))
	_, err := s.Pull(t.Context(), ref, Credentials{}, nil)
	if errdefs.ClassOf(err) != errdefs.Corrupt || len(left(t, s.dir)) != 0 {
		t.Errorf("got %v, left %v", err, left(t, s.dir))
	}
}

// Two pulls share one download, which goes on when one of them is given up.
func TestPullShared(t *testing.T) {
	reg, s, img := newRegistry(t), open(t, t.TempDir()), bigImage(t, 1<<20)
	ref, digest := reg.push(t, "i", "v1", img), img.layers[0].Digest
	asked, send := make(chan struct{}, 10), make(chan struct{})
	reg.meddle(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, digest) && r.Method == http.MethodGet {
			asked <- struct{}{}
			<-send
		}
		return false
	})
	first, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	errs := make(chan error, 3)
	pull := func(ctx context.Context) {
		_, err := s.Pull(ctx, ref, Credentials{}, nil)
		errs <- err
	}
	go pull(first)
	<-asked
	go pull(t.Context())
	go pull(t.Context())
	waitFor(t, func() bool {
		s.flights.mu.Lock()
		defer s.flights.mu.Unlock()
		fl := s.flights.all["blob "+digest]
		return fl != nil && fl.callers == 3
	})
	giveUp()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("the one given up: %v", err)
	}
	close(send)
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if r := reg.requests("GET /v2/i/blobs/" + digest); len(r) != 1 {
		t.Errorf("requests %v", r)
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited for 10 s")
		}
	}
}

// A cancelled pull leaves what is verified and nothing else, and tells nothing more.
func TestPullCancelled(t *testing.T) {
	dir := t.TempDir()
	testenv.NoLeaks(t, dir)
	reg, s := newRegistry(t), open(t, dir)
	img := makeImage(t, v1.Config{}, archiveOf(t, entry{name: "a"}), archiveOf(t, entry{name: "b", text: "b"}))
	ref, slow := reg.push(t, "i", "v1", img), img.layers[1].Digest
	asked := make(chan struct{})
	var once sync.Once
	reg.meddle(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, slow) {
			once.Do(func() { close(asked) })
			<-r.Context().Done()
			return true
		}
		return false
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		waitFor(t, func() bool { _, err := os.Stat(s.blob(img.layers[0].Digest)); return err == nil })
		cancel()
	}()
	var ended atomic.Bool
	_, err := s.Pull(ctx, ref, Credentials{}, func(Progress) {
		if ended.Load() {
			t.Error("progress after the end")
		}
	})
	ended.Store(true)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if names := left(t, s.dir); len(names) != 1 || names[0] != strings.TrimPrefix(img.layers[0].Digest, sha256Prefix) {
		t.Errorf("left %v", names)
	}
	reg.meddle(nil)
	if _, err := s.Pull(t.Context(), ref, Credentials{}, nil); err != nil {
		t.Error(err)
	}
}

func TestParseReference(t *testing.T) {
	for ref, ok := range map[string]bool{
		"python": true, "python:3.12-slim": true, "some/image": true, "127.0.0.1:5000/a/b:c": true, "localhost:5000/a": true,
		"host.example/a@sha256:" + strings.Repeat("a", 64): true, "a:tag@sha256:" + strings.Repeat("a", 64): true,
		"": false, "UPPER": false, "a b": false, "https://host.example/a": false, "me:secret@host.example/a": false,
		"a@sha256:12": false, "../../etc": false, strings.Repeat("a", 2000): false,
	} {
		err := ParseReference(ref)
		if (err == nil) != ok || err != nil && (errdefs.ClassOf(err) != errdefs.InvalidArgument || strings.Contains(say(err), "secret")) {
			t.Errorf("%.50q: %v", ref, err)
		}
	}
}

func TestIsLocal(t *testing.T) {
	for ref, want := range map[string]bool{
		"localhost:5000/a": true, "127.0.0.1:5000/a:b": true, "127.1.2.3/a": true, "[::1]:5000/a": true, "python": false,
		"localhost/a": true, "host.example/localhost": false, "10.0.0.1/a": false, "//": false,
	} {
		if got := IsLocal(ref); got != want {
			t.Errorf("%s: %v", ref, got)
		}
	}
}

func TestCredentialsAreNotPrinted(t *testing.T) {
	c := Credentials{"me", password}
	if text := fmt.Sprintf("%v %+v %#v %s", c, c, c, struct{ C Credentials }{c}); strings.Contains(text, password) {
		t.Errorf("%s", text)
	}
}

// Without TLS only registries on this machine are asked, and one elsewhere leads to
// nothing on it.
func TestRegistriesElsewhere(t *testing.T) {
	asked := func(w http.ResponseWriter, r *http.Request) bool { t.Errorf("%s is asked", r.URL); return false }
	reg, s := newRegistry(t), open(t, t.TempDir())
	reg.meddle(asked)
	for host, local := range map[string]bool{
		"localhost": true, "localhost:5000": true, "127.0.0.1:80": true, "127.9.9.9": true, "[::1]:5000": true,
		"10.0.0.1:5000": false, "host.local": false, "localhost.example": false, "169.254.169.254": false, "0.0.0.0:1": false,
	} {
		if got := isLoopback(host); got != local {
			t.Errorf("%s: local %v", host, got)
		}
	}
	req, _ := http.NewRequest(http.MethodGet, reg.URL+"/v2/", nil)
	for _, local := range []bool{true, false} {
		tr := newTransport(local)
		defer tr.CloseIdleConnections()
		_, err := (&guard{tr, false}).RoundTrip(req)
		if !errors.Is(err, errPlain) {
			t.Errorf("plain http: %v", err)
		}
	}
	tr := newTransport(false)
	defer tr.CloseIdleConnections()
	if _, err := tr.RoundTrip(req); !errors.Is(err, errInside) {
		t.Errorf("an address of this machine: %v", err)
	}
	// A link-local address is refused before it is connected to.
	if _, err := s.Pull(t.Context(), "169.254.169.254/a", Credentials{}, nil); errdefs.ClassOf(err) != errdefs.Denied {
		t.Errorf("got %v", err)
	}
}
