package image

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	inprocess "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// testRegistry is a registry on loopback, of which a test sees and changes the requests.
type testRegistry struct {
	*httptest.Server
	host string

	mu  sync.Mutex
	log []string // "GET /v2/…", with the Range header
	// on, if it is not nil, may answer instead of the registry.
	on func(w http.ResponseWriter, r *http.Request) (done bool)
}

func newRegistry(t testing.TB) *testRegistry {
	reg := &testRegistry{}
	to := inprocess.New(inprocess.Logger(log.New(io.Discard, "", 0)))
	reg.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reg.mu.Lock()
		reg.log = append(reg.log, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
		on := reg.on
		reg.mu.Unlock()
		if on == nil || !on(w, r) {
			to.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(reg.Close)
	reg.host = strings.TrimPrefix(reg.URL, "http://")
	return reg
}

// meddle sets what answers instead of the registry, and forgets the requests so far.
func (r *testRegistry) meddle(on func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.on, r.log = on, nil
}

// requests are those that contain text.
func (r *testRegistry) requests(text string) (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.log {
		if strings.Contains(l, text) {
			out = append(out, l)
		}
	}
	return out
}

func (r *testRegistry) put(t testing.TB, method, path, contentType string, body []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, r.URL+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		text, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s %s: %s %s", method, path, resp.Status, text)
	}
}

// made is an image that a test makes: documents and blobs.
type madeImage struct {
	manifest, config []byte
	blobs            map[string][]byte // of layers, by digest
	layers           []Layer
}

// makeImage makes an image of archives, which are compressed by gzip unless they are
// compressed already.
func makeImage(t testing.TB, config v1.Config, archives ...[]byte) madeImage {
	t.Helper()
	c := v1.ConfigFile{OS: "linux", Architecture: "amd64", Config: config, RootFS: v1.RootFS{Type: "layers"}}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	out := madeImage{blobs: map[string][]byte{}}
	for _, a := range archives {
		z, err := plain(bytes.NewReader(a))
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		blob := a
		if bytes.Equal(content, a) {
			blob = gzipped(a)
		}
		l := Layer{Digest: digestOf(blob), DiffID: digestOf(content), Size: int64(len(blob))}
		out.layers = append(out.layers, l)
		out.blobs[l.Digest] = blob
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, hashOf(t, l.DiffID))
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: types.OCILayer, Size: l.Size, Digest: hashOf(t, l.Digest)})
	}
	out.config = jsonOf(t, c)
	m.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(out.config)), Digest: hashOf(t, digestOf(out.config))}
	out.manifest = jsonOf(t, m)
	return out
}

func hashOf(t testing.TB, digest string) v1.Hash {
	t.Helper()
	h, err := v1.NewHash(digest)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func jsonOf(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// push puts an image into the registry and returns its reference.
func (r *testRegistry) push(t testing.TB, repo, tag string, img madeImage) string {
	t.Helper()
	for digest, blob := range img.blobs {
		r.put(t, http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest="+digest, "application/octet-stream", blob)
	}
	r.put(t, http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest="+digestOf(img.config), "application/octet-stream", img.config)
	r.put(t, http.MethodPut, "/v2/"+repo+"/manifests/"+tag, string(types.OCIManifestSchema1), img.manifest)
	return r.host + "/" + repo + ":" + tag
}

// smallImage has two layers.
func smallImage(t testing.TB) madeImage {
	return makeImage(t, v1.Config{
		Env: []string{"A=b"}, User: "user:100", WorkingDir: "/w", Entrypoint: []string{"/e"}, Cmd: []string{"c", "d"},
		Shell: []string{"/bin/bash", "-c"}, Labels: map[string]string{"l": "m"}, StopSignal: "SIGINT",
		ExposedPorts: map[string]struct{}{"80/tcp": {}, "53/udp": {}}, Volumes: map[string]struct{}{"/v": {}},
		Healthcheck: &v1.HealthConfig{Test: []string{"CMD", "true"}, Interval: 5e9, Retries: 2}, OnBuild: []string{"RUN x"},
	},
		archiveOf(t, entry{name: "a", text: "1"}, entry{name: "b", text: strings.Repeat("random enough", 10_000)}),
		zstded(archiveOf(t, entry{name: ".wh.a"}, entry{name: "c", text: "2"})))
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// say describes an error for a comparison.
func say(err error) string { return fmt.Sprint(err) }
