package e2b

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// fakeBuilds is a Builds over the templates of a fake: nothing is built.
type fakeBuilds struct {
	*fake
	mu        sync.Mutex
	specs     []BuildSpec
	cancelled []string
	log       []BuildEntry
	// archives are by project and hash.
	archives map[string]string
}

func withBuilds(b *fakeBuilds) func(*Config) {
	return func(c *Config) {
		b.fake = c.Manager.(*fake)
		b.archives = map[string]string{}
		c.Builds, c.DiskMiB = b, 4096
	}
}

func (b *fakeBuilds) New(_ context.Context, n NewBuild) (Template, Build, error) {
	b.fake.mu.Lock()
	defer b.fake.mu.Unlock()
	i := slices.IndexFunc(b.templates, func(t Template) bool {
		return t.Project == n.Project && (slices.Contains(t.Names, n.Name) || t.ID == n.Name)
	})
	b.ids++
	if i < 0 {
		i = len(b.templates)
		b.templates = append(b.templates, Template{ID: fmt.Sprintf("made%016x", b.ids), Project: n.Project, Names: []string{n.Name}})
	}
	made := Build{
		ID: fmt.Sprintf("44444444-4444-4444-8444-%012x", b.ids), Status: template.StatusWaiting, CreatedAt: time.Now(),
		VCPUs: n.VCPUs, MemMiB: n.MemMiB, DiskMiB: n.DiskMiB, Wants: n.Tags,
	}
	t := &b.templates[i]
	t.Builds = append([]Build{made}, t.Builds...)
	return *t, made, nil
}

// set changes the newest build of a template.
func (b *fakeBuilds) set(id string, fn func(*Build)) {
	b.fake.mu.Lock()
	defer b.fake.mu.Unlock()
	i := slices.IndexFunc(b.templates, func(t Template) bool { return t.ID == id })
	b.templates[i].Builds = slices.Clone(b.templates[i].Builds)
	fn(&b.templates[i].Builds[0])
}

func (b *fakeBuilds) Start(_ context.Context, s BuildSpec) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.fail["start build"]; err != nil {
		return err
	}
	b.specs = append(b.specs, s)
	b.set(s.Template, func(b *Build) { b.Status = template.StatusBuilding })
	return nil
}

func (b *fakeBuilds) Cancel(_ context.Context, id, build string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cancelled = append(b.cancelled, build)
	return errdefs.NotFound.Errorf("no build of %s", id)
}

func (b *fakeBuilds) Log(_, _ string, offset, limit int, level string) ([]BuildEntry, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	kept := slices.DeleteFunc(slices.Clone(b.log), func(e BuildEntry) bool {
		return slices.Index(levels, e.Level) < slices.Index(levels, level)
	})
	kept = kept[min(offset, len(kept)):]
	return kept[:min(limit, len(kept))], nil
}

func (b *fakeBuilds) Upload(project, hash string) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.archives[project+hash]
	return ok, nil
}

func (b *fakeBuilds) Put(_ context.Context, project, hash string, r io.Reader) error {
	text, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.archives[project+hash] = string(text)
	return nil
}

// newTemplate makes a template with a waiting build by REST.
func (h *host) newTemplate(body string) (id, build string) {
	h.t.Helper()
	r := h.want(h.call("POST", "/v3/templates", body), 202, "")
	return r.field("templateID").(string), r.field("buildID").(string)
}

func TestNewTemplate(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	h.tagged()
	h.want(h.call("POST", "/v3/templates", `{"name":" Built:V1 ","tags":["b","v1"],"cpuCount":4,"memoryMB":512,"minFreeDiskMb":4096}`), 202,
		`"names":["p/built"],"public":false,"tags":["b","v1"]`)
	made := b.templates[len(b.templates)-1]
	if got := made.Builds[0]; got.VCPUs != 4 || got.MemMiB != 512 || got.DiskMiB != 4096 || made.Project != "p" {
		t.Errorf("it has %+v", made)
	}
	h.want(h.call("POST", "/v3/templates", `{"alias":"plain"}`), 202, `"tags":["default"]`)
	if got := b.templates[len(b.templates)-1].Builds[0]; got.VCPUs != 2 || got.MemMiB != 1024 {
		t.Errorf("defaults are %+v", got)
	}
	h.want(h.call("POST", "/v3/templates", `{"name":"app"}`), 202, `"templateID":"app00000000000000000"`)
	h.want(h.call("POST", "/v3/templates", `{"name":"p/app"}`), 202, `"templateID":"app00000000000000000"`)
	h.want(h.call("POST", "/v3/templates", `{"name":"app00000000000000000"}`), 202, `"templateID":"app00000000000000000"`)
	h.want(h.call("POST", "/v2/templates", `{"alias":"older","teamID":""}`), 202, `"buildStatus":"waiting"`)
	before := len(b.templates)
	for body, want := range map[string]string{
		`{}`: "400 name is missing", `{"name":" "}`: "400 name is missing", `{"name":"q/app"}`: "403 namespace",
		`{"name":"a.b"}`: "400 a name has", `{"name":"` + strings.Repeat("a", 129) + `"}`: "400",
		`{"name":"x","tags":["a/b"]}`: "400 tag", `{"name":"x:` + baseBuild + `"}`: "400 tag",
		`{"name":"x","cpuCount":0}`: "400 CPU count must be at least 1", `{"name":"x","cpuCount":3}`: "400 divisible by 2",
		`{"name":"x","cpuCount":64}`: "400 at most 32", `{"name":"x","memoryMB":127}`: "400 at least 128",
		`{"name":"x","memoryMB":129}`: "400 Memory must be divisible by 2", `{"name":"x","memoryMB":9999998}`: "400 at most",
		`{"name":"x","minFreeDiskMb":-1}`: "400 minFreeDiskMb", `{"name":"x","minFreeDiskMb":4097}`: "400 of this host",
		`{"name":"x","teamID":"other"}`: "400 team",
		`{"name":"x","cpuCount":"2"}`:   "400",
		`{"name":"` + baseID + `"}`:     "403 not of your project",
	} {
		status, word, _ := strings.Cut(want, " ")
		if r := h.call("POST", "/v3/templates", body); fmt.Sprint(r.status) != status || !strings.Contains(r.body, word) {
			t.Errorf("%.80s: got %d %s, want %s", body, r.status, r.body, want)
		}
	}
	if len(b.templates) != before {
		t.Error("a refused request has made a template")
	}
	h.want(h.call("POST", "/v3/templates", `{"name":"app00000000000000000"}`, "X-API-KEY", h.q), 409, "taken")
	for _, path := range []string{"/templates", "/templates/app"} {
		h.want(h.call("POST", path, `{"dockerfile":"FROM x"}`), 400, "not of a pushed image")
	}
}

func TestTooManyBuilds(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	for i := range maxBuilds {
		h.newTemplate(fmt.Sprintf(`{"name":"t%d"}`, i))
	}
	h.want(h.call("POST", "/v3/templates", `{"name":"more"}`), 429, "have not ended")
	h.newTemplate(`{"name":"t0"}`) // replaces one
	h.want(h.call("POST", "/v3/templates", `{"name":"more"}`, "X-API-KEY", h.q), 202, "")
	stale := b.templates[1]
	b.set(stale.ID, func(b *Build) { b.CreatedAt = time.Now().Add(-3 * time.Hour) })
	b.set(b.templates[2].ID, func(b *Build) { b.Status = template.StatusError })
	h.newTemplate(`{"name":"more"}`)
	if !slices.Contains(b.cancelled, b.templates[1].Builds[0].ID) {
		t.Errorf("the build that was never started goes on: %s", b.cancelled)
	}
}

const (
	hashA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	hashB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// upload asks for an address and returns its path.
func (h *host) upload(id, hash, present string) string {
	h.t.Helper()
	r := h.want(h.call("GET", "/templates/"+id+"/files/"+hash, ""), 201, `"present":`+present)
	u, err := url.Parse(fmt.Sprint(r.field("url")))
	if err != nil || u.Scheme != "http" || u.Host != "example.com" {
		h.t.Fatalf("the address is %v, %v", r.field("url"), err)
	}
	return u.Path
}

// put sends an archive as clients do: without a key.
func (h *host) put(path string, body io.Reader, length int64) reply {
	h.t.Helper()
	r := httptest.NewRequest("PUT", path, body)
	r.ContentLength = length
	w := httptest.NewRecorder()
	h.handler.ServeHTTP(w, r)
	got := reply{w.Code, w.Header(), w.Body.String()}
	h.checkForm("PUT "+path, got)
	return got
}

func TestUploads(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	id, _ := h.newTemplate(`{"name":"app"}`)
	path := h.upload("app", hashA, "false")
	h.want(h.put(path, strings.NewReader("tar"), 3), 200, "")
	if got := b.archives["p"+hashA]; got != "tar" || len(b.archives) != 1 {
		t.Errorf("archives are %v", b.archives)
	}
	h.upload(id, hashA, "true")
	h.want(h.put(path, iotest.OneByteReader(strings.NewReader("other")), -1), 200, "") // again, chunked
	if got := b.archives["p"+hashA]; got != "other" {
		t.Errorf("it was not replaced: %q", got)
	}
	for hash, status := range map[string]int{"x": 400, strings.ToUpper(hashA): 400, hashA + "a": 400} {
		h.want(h.call("GET", "/templates/app/files/"+hash, ""), status, "hash")
	}
	h.want(h.call("GET", "/templates/nope/files/"+hashA, ""), 404, "not found")
	h.want(h.call("GET", "/templates/minimal/files/"+hashA, ""), 403, "project")
	h.want(h.call("GET", "/templates/app/files/"+hashA, "", "X-API-KEY", h.q), 404, "")
	h.want(h.call("GET", "/templates/app/files/"+hashA, "", "X-API-KEY", "wrong"), 401, "")

	for what, bad := range map[string]string{
		"none": uploadPath, "no base64": uploadPath + "!", "short": uploadPath + "AAAA", "cut": path[:len(path)-2], "longer": path + "AAAA",
		"another bit": path[:len(uploadPath)] + flip(path[len(uploadPath)]) + path[len(uploadPath)+1:],
	} {
		if r := h.put(bad, strings.NewReader("x"), 1); r.status != 403 {
			t.Errorf("%s: %d %s", what, r.status, r.body)
		}
	}
	h.want(h.call("GET", path, ""), 405, "PUT")
	h.want(h.call("GET", path, "", "X-API-KEY", h.p), 405, "PUT")
	h.want(h.put(path, strings.NewReader("x"), maxArchive+1), 413, "more than")
	h.want(h.put(path, iotest.ErrReader(io.ErrUnexpectedEOF), 7), 400, "did not come in full")
	if got := b.archives["p"+hashA]; got != "other" {
		t.Errorf("what was refused has changed it: %q", got)
	}
}

func flip(c byte) string {
	if c == 'A' {
		return "B"
	}
	return "A"
}

// TestUploadOverTLS: a client that calls by https is given an address by https, at the same
// host, and can put its archive there.
func TestUploadOverTLS(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	server := httptest.NewTLSServer(h.handler)
	defer server.Close()
	h.newTemplate(`{"name":"app"}`)
	ask, err := http.NewRequestWithContext(t.Context(), "GET", server.URL+"/templates/app/files/"+hashA, nil)
	if err != nil {
		t.Fatal(err)
	}
	ask.Header.Set("X-API-KEY", h.p)
	resp, err := server.Client().Do(ask)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct{ URL string }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || !strings.HasPrefix(answer.URL, server.URL+uploadPath) {
		t.Fatalf("the address is %q, %v", answer.URL, err)
	}
	put, err := http.NewRequestWithContext(t.Context(), "PUT", answer.URL, strings.NewReader("tar"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err = server.Client().Do(put)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 || b.archives["p"+hashA] != "tar" {
		t.Errorf("HTTP %d, archives %v", resp.StatusCode, b.archives)
	}
}

func noneRevoked(string) bool { return false }

// TestKeyIsRevoked: with its key an address ends, and a build learns it.
func TestKeyIsRevoked(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	id, made := h.newTemplate(`{"name":"app"}`)
	path := h.upload("app", hashA, "false")
	h.want(h.call("POST", "/v2/templates/"+id+"/builds/"+made, `{"fromTemplate":"minimal"}`), 202, "")
	spec := b.specs[len(b.specs)-1]
	if spec.KeyID == "" || spec.Revoked() {
		t.Errorf("the build is of key %q, revoked %t", spec.KeyID, spec.Revoked())
	}
	if _, err := h.keys.RemoveKey(spec.KeyID); err != nil {
		t.Fatal(err)
	}
	if !spec.Revoked() {
		t.Error("the key is still there for the build")
	}
	if r := h.put(path, strings.NewReader("x"), 1); r.status != 403 || !strings.Contains(r.body, "revoked") || len(b.archives) != 0 {
		t.Errorf("an upload: %d %s, archives %v", r.status, r.body, b.archives)
	}
}

func TestUploadEnds(t *testing.T) {
	u := newUploads(noneRevoked, nil, nil)
	now := time.Now()
	path := u.path("k", "p", hashA, now)
	if project, hash, err := u.read(path, now.Add(uploadTime-2*time.Second)); project != "p" || hash != hashA || err != nil {
		t.Errorf("it is for %q, %q, %v", project, hash, err)
	}
	if _, _, err := u.read(path, now.Add(uploadTime)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("after its end: %v", err)
	}
	if _, _, err := newUploads(noneRevoked, nil, nil).read(path, now); err == nil {
		t.Error("another agent takes it")
	}
	if other := u.path("k", "q", hashA, now); other == path {
		t.Error("two projects have one address")
	}
}

// An upload past maxUploads waits for another one's end, and gives up with its client.
func TestUploadsWait(t *testing.T) {
	hold := make(chan struct{})
	begun := make(chan struct{}, maxUploads)
	u := newUploads(noneRevoked, func(context.Context, string, string, io.Reader) error {
		begun <- struct{}{}
		<-hold
		return nil
	}, func(w http.ResponseWriter, _ *http.Request, err error) { w.WriteHeader(499) })
	handler := u.before(http.NotFoundHandler())
	put := func(ctx context.Context) int {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequestWithContext(ctx, "PUT", u.path("k", "p", hashA, time.Now()), bytes.NewReader([]byte("x"))))
		return w.Code
	}
	var all sync.WaitGroup
	for range maxUploads {
		all.Go(func() {
			if got := put(t.Context()); got != 200 {
				t.Errorf("HTTP %d", got)
			}
		})
		<-begun
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	if got := put(gone); got != 499 {
		t.Errorf("one too many: HTTP %d", got)
	}
	all.Go(func() {
		if got := put(t.Context()); got != 200 {
			t.Errorf("the last: HTTP %d", got)
		}
	})
	close(hold)
	all.Wait()
}

func TestStartBuild(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	id, made := h.newTemplate(`{"name":"app:v2"}`)
	h.want(h.put(h.upload(id, hashA, "false"), strings.NewReader("tar"), 3), 200, "")
	path := "/v2/templates/" + id + "/builds/" + made
	h.want(h.call("POST", path, `{"fromImage":"python:3","force":true,"startCmd":"serve","steps":[
		{"type":"run","args":["echo hi","root"]},
		{"type":"COPY","args":["app/*","/srv/","www",""],"filesHash":"`+hashA+`","force":false,"forceUpload":true,"resolveSymlinks":false},
		{"type":"ENV","args":["A","1","B","2"]},{"type":"WORKDIR","args":["/srv"]},{"type":"USER","args":["www"],"force":true}]}`), 202, "")
	if len(b.specs) != 1 {
		t.Fatal("no build was started")
	}
	got := b.specs[0]
	if got.Project != "p" || got.Template != id || got.Build != made || !slices.Equal(got.Tags, []string{"v2"}) ||
		!got.E2B || got.KeepEnv || !got.Force || got.Start != "serve" || got.Ready != defaultReady {
		t.Errorf("the build is %+v", got)
	}
	want := []build.Step{
		{Kind: "RUN", Args: []string{"echo hi"}, User: "root", Text: "RUN echo hi"},
		{Kind: "COPY", Files: hashA, Src: []string{"app/*"}, Dst: "/srv/", Owner: "www", Text: "COPY app/* /srv/"},
		{Kind: "ENV", Args: []string{"A", "1", "B", "2"}, Text: "ENV A 1 B 2"},
		{Kind: "WORKDIR", Args: []string{"/srv"}, Text: "WORKDIR /srv"},
		{Kind: "USER", Args: []string{"www"}, Force: true, Text: "USER www"},
	}
	if len(got.Stages) != 1 || got.Stages[0].From.Image != "python:3" || !reflect.DeepEqual(got.Stages[0].Steps, want) {
		t.Errorf("the stage is %+v", got.Stages)
	}
	h.want(h.call("POST", path, `{"fromImage":"python:3"}`), 400, "build is not in waiting state")
	h.want(h.call("POST", "/v2/templates/"+id+"/builds/nope", `{"fromImage":"x"}`), 400, "does not exist")
	h.want(h.call("POST", "/v2/templates/nope/builds/"+made, `{"fromImage":"x"}`), 404, "not found")
	h.want(h.call("POST", path, `{"fromImage":"x"}`, "X-API-KEY", h.q), 404, "")
	h.want(h.call("POST", "/v2/templates/minimal/builds/"+baseBuild, `{"fromImage":"x"}`), 403, "project")
	h.fake.fail["start build"] = errdefs.InvalidArgument.Errorf("no such thing")
	id, made = h.newTemplate(`{"name":"app"}`)
	h.want(h.call("POST", "/v2/templates/"+id+"/builds/"+made, `{"fromImage":"x"}`), 400, "no such thing")
	h.fake.fail["start build"] = errdefs.WrongState.Errorf("another was faster")
	h.want(h.call("POST", "/v2/templates/"+id+"/builds/"+made, `{"fromImage":"x"}`), 400, "build is not in waiting state")
}

// What is wrong with a build is said before it begins, and it waits on.
func TestStartBuildRefuses(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	h.tagged()
	id, made := h.newTemplate(`{"name":"mine"}`)
	step := func(text string) string {
		return `{"fromImage":"x","steps":[{"type":"RUN","args":["true"]},` + text + `]}`
	}
	for body, want := range map[string]string{
		`{}`: "either fromImage or fromTemplate", `{"fromImage":"x","fromTemplate":"y"}`: "cannot both",
		`{"fromTemplate":"nope"}`:     "404 not found",
		`{"fromTemplate":"app:next"}`: "not ready", `{"fromTemplate":"app:v9"}`: "404 tag", `{"fromTemplate":"q/secret"}`: "404 not found",
		`{"fromTemplate":"app","fromImageRegistry":{"type":"registry"}}`:                    "for fromImage only",
		step(`{"type":"VOLUME","args":["/x"]}`):                                             `step 2: there are RUN, COPY, ENV, WORKDIR and USER`,
		step(`{"type":"RUN"}`):                                                              "step 2: RUN has 0 arguments",
		step(`{"type":"RUN","args":["a","b","c"]}`):                                         "RUN has 3",
		step(`{"type":"COPY","args":["a"],"filesHash":"` + hashA + `"}`):                    "COPY has 1",
		step(`{"type":"COPY","args":["a","b"]}`):                                            "filesHash",
		step(`{"type":"COPY","args":["a","b","","rwx"],"filesHash":"` + hashA + `"}`):       "mode",
		step(`{"type":"COPY","args":["a","b"],"filesHash":"` + hashB + `"}`):                "step 2: the files " + hashB + " were not uploaded",
		step(`{"type":"ENV","args":["A"]}`):                                                 "ENV has 1",
		step(`{"type":"WORKDIR","args":[""]}`):                                              "WORKDIR has",
		step(`{"type":"USER","args":["a","b"]}`):                                            "USER has 2",
		`{"fromImage":"x","fromImageRegistry":{}}`:                                          "type registry, aws or gcp",
		`{"fromImage":"x","fromImageRegistry":{"type":"registry","username":"u"}}`:          "has no password",
		`{"fromImage":"x","fromImageRegistry":{"type":"gcp","serviceAccountJson":"{"}}`:     "not JSON",
		`{"fromImage":"x","fromImageRegistry":{"type":"aws","awsAccessKeyId":"a"}}`:         "has no awsSecretAccessKey",
		`{"fromImage":"x","fromImageRegistry":{"type":"registry","username":1}}`:            "has no username",
		`{"fromImage":"x","steps":[` + strings.Repeat(`{"type":"RUN"},`, maxSteps) + `{}]}`: "at most 1000",
		strings.Replace(step(`{}`), "true", "", 1):                                          "step 1: RUN has 1",
	} {
		status, word, ok := strings.Cut(want, " ")
		if status != "404" || !ok {
			status, word = "400", want
		}
		r := h.call("POST", "/v2/templates/"+id+"/builds/"+made, body)
		if fmt.Sprint(r.status) != status || !strings.Contains(r.body, word) {
			t.Errorf("%.100s: got %d %s, want %s", body, r.status, r.body, want)
		}
	}
	if len(b.specs) > 0 {
		t.Errorf("a build was started: %+v", b.specs)
	}
	h.want(h.call("GET", "/templates/mine/builds/"+made+"/status", ""), 200, `"status":"waiting"`)
}

func TestBuildSource(t *testing.T) {
	for body, want := range map[string]build.Source{
		`{"fromTemplate":"app"}`:                  {Template: "app00000000000000000:" + baseBuild},
		`{"fromTemplate":"minimal"}`:              {Template: baseID + ":" + baseBuild},
		`{"fromTemplate":"p/app:v1.0"}`:           {Template: "app00000000000000000:" + baseBuild},
		`{"fromImage":"e2bdev/base"}`:             {Template: baseID + ":" + baseBuild},
		`{"fromImage":"e2bdev/base:latest"}`:      {Template: baseID + ":" + baseBuild},
		`{"fromImage":"e2bdev/code-interpreter"}`: {Image: "e2bdev/code-interpreter"}, // the host has none of its own
		`{"fromImage":"x","fromImageRegistry":{"type":"registry","username":"u","password":"p"}}`: {
			Image: "x", Credentials: build.Credentials{Username: "u", Password: "p"}},
		`{"fromImage":"x","fromImageRegistry":{"type":"gcp","serviceAccountJson":"{\"a\":1}"}}`: {
			Image: "x", Credentials: build.Credentials{Username: "_json_key", Password: `{"a":1}`}},
	} {
		var b fakeBuilds
		var log bytes.Buffer
		h := newHost(t, withBuilds(&b), func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
		h.tagged()
		id, made := h.newTemplate(`{"name":"mine"}`)
		h.want(h.call("POST", "/v2/templates/"+id+"/builds/"+made, body), 202, "")
		if len(b.specs) != 1 || fmt.Sprint(b.specs[0].Stages[0].From) != fmt.Sprint(want) {
			t.Errorf("%s: it stands on %+v", body, b.specs)
		}
		if strings.Contains(log.String(), "_json_key") || strings.Contains(log.String(), "assword") {
			t.Errorf("the log has credentials: %s", log.String())
		}
	}
}

// Registries on the host itself are for callers on it.
func TestLocalImages(t *testing.T) {
	for local, want := range map[bool]int{false: 403, true: 202} {
		var b fakeBuilds
		h := newHost(t, withBuilds(&b), func(c *Config) { c.LocalImages = local })
		id, made := h.newTemplate(`{"name":"mine"}`)
		h.want(h.call("POST", "/v2/templates/"+id+"/builds/"+made, `{"fromImage":"127.0.0.1:5000/app"}`), want, "")
	}
}

func TestBuildStatus(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	id, made := h.newTemplate(`{"name":"app"}`)
	for i := range 250 {
		e := BuildEntry{At: time.UnixMilli(int64(1_000_000 + i)), Level: "info", Message: fmt.Sprintf("line %d", i), Step: "1"}
		if i%50 == 0 {
			e.Level, e.Step = "error", ""
		}
		b.log = append(b.log, e)
	}
	path := "/templates/app/builds/" + made
	count := func(query string) int {
		t.Helper()
		r := h.want(h.call("GET", path+query, ""), 200, "")
		entries, _ := r.field("logEntries").([]any)
		if entries == nil {
			entries, _ = r.field("logs").([]any)
		}
		return len(entries)
	}
	for query, want := range map[string]int{
		"/status": 100, "/status?logsOffset=0": 100, "/status?logsOffset=200": 50, "/status?logsOffset=250": 0, "/status?logsOffset=99999": 0,
		"/status?limit=7": 7, "/status?level=error": 5, "/status?level=error&logsOffset=4": 1,
		"/logs": 100, "/logs?limit=3": 3, "/logs?level=warn": 5, "/logs?direction=forward&cursor=1000245": 5, "/logs?cursor=1000009": 10,
	} {
		if got := count(query); got != want {
			t.Errorf("%s: %d entries, want %d", query, got, want)
		}
	}
	h.want(h.call("GET", path+"/status?logsOffset=249", ""), 200,
		`"logEntries":[{"level":"info","message":"line 249","step":"1","timestamp":"1970-01-01T00:16:40.249Z"}],`+
			`"logs":["line 249"],"status":"waiting"`)
	h.want(h.call("GET", path+"/logs?limit=1", ""), 200, "line 249")
	h.want(h.call("GET", path+"/logs?limit=1&direction=forward", ""), 200, "line 0")
	for _, query := range []string{
		"/status?limit=0", "/status?limit=101", "/status?logsOffset=-1", "/status?level=loud",
		"/logs?limit=101", "/logs?direction=up", "/logs?level=x",
	} {
		h.want(h.call("GET", path+query, ""), 400, "")
	}
	h.want(h.call("GET", path+"/status", "", "X-API-KEY", h.q), 404, "")
	h.want(h.call("GET", "/templates/minimal/builds/"+baseBuild+"/logs", ""), 403, "")
	b.set(id, func(b *Build) {
		b.Status, b.Reason = template.StatusError, &template.Reason{Message: "it broke", Step: "2"}
	})
	h.want(h.call("GET", path+"/status?logsOffset=250", ""), 200,
		`"reason":{"logEntries":[],"message":"it broke","step":"2"},"status":"error"`)
	for step, want := range map[string]string{"base": "base", "ready": "finalize", "finalize": "finalize", "17": "17"} {
		b.set(id, func(b *Build) { b.Reason.Step = step })
		h.want(h.call("GET", path+"/status", ""), 200, `"message":"it broke","step":"`+want+`"}`)
	}
	// The reason has the last entries of its step.
	b.set(id, func(b *Build) { b.Reason.Step = "1" })
	r := h.want(h.call("GET", path+"/status?logsOffset=250", ""), 200, `"reason":{"logEntries":[{"level":"info","message":"line 230",`)
	if n := strings.Count(r.body, `"step":"1","timestamp"`); n != maxReasonEntries {
		t.Errorf("the reason has %d entries, want %d", n, maxReasonEntries)
	}
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"app"}`), 400, "not ready")
	h.want(h.call("POST", "/templates/tags", `{"target":"app:`+made+`","tags":["x"]}`), 400, "not ready")
}

func TestDeleteEndsBuilds(t *testing.T) {
	var b fakeBuilds
	h := newHost(t, withBuilds(&b))
	_, made := h.newTemplate(`{"name":"app"}`)
	h.fake.fail["delete template"] = errdefs.WrongState.Errorf("in use")
	h.want(h.call("DELETE", "/templates/app", ""), 400, "in use")
	if len(b.cancelled) > 0 {
		t.Error("a template that stays lost its build")
	}
	delete(h.fake.fail, "delete template")
	h.want(h.call("DELETE", "/templates/app", ""), 204, "")
	if !slices.Equal(b.cancelled, []string{made}) {
		t.Errorf("cancelled %s, want %s", b.cancelled, made)
	}
}

// transport answers requests of a client.
type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestAWS(t *testing.T) {
	key := awsKey{id: "AKIDEXAMPLE", secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", region: "eu-west-1"}
	const image = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/app:1"
	status, answer, failure := 200, `{"authorizationData":[{"authorizationToken":"QVdTOnNlY3JldDpv"}]}`, error(nil)
	var asked *http.Request
	client := &http.Client{Transport: transport(func(r *http.Request) (*http.Response, error) {
		asked = r
		return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(answer)), Header: http.Header{}}, failure
	})}
	who, err := key.registryLogin(t.Context(), client, image)
	if err != nil || who.Username != "AWS" || who.Password != "secret:o" {
		t.Errorf("got %+v, %v", who, err)
	}
	if asked.URL.String() != "https://api.ecr.eu-west-1.amazonaws.com/" ||
		!strings.Contains(asked.Header.Get("Authorization"), "/eu-west-1/ecr/aws4_request") {
		t.Errorf("it asked %s with %v", asked.URL, asked.Header)
	}
	for image, want := range map[string]string{
		"123456789012.dkr.ecr.us-east-1.amazonaws.com/app": "is in the region us-east-1", "python:3": "not in a registry of AWS",
		"123456789012.dkr.ecr.eu-west-1.amazonaws.com.example.org/app": "not in a registry of AWS",
	} {
		if _, err := key.registryLogin(t.Context(), client, image); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", image, err)
		}
	}
	for _, c := range []struct {
		status       int
		answer, want string
		failure      error
	}{
		{403, `{}`, "access denied", nil}, {200, `{}`, "no token", nil}, {200, `<html>`, "no token", nil},
		{200, `{"authorizationData":[{"authorizationToken":"!"}]}`, "cannot be read", nil},
		{0, "", "cannot be reached", errors.New("no route")},
	} {
		status, answer, failure = c.status, c.answer, c.failure
		if _, err := key.registryLogin(t.Context(), client, image); err == nil || !strings.Contains(err.Error(), c.want) ||
			strings.Contains(err.Error(), key.secret) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// The signature is that which botocore 1.35.0 makes.
func TestAWSSignature(t *testing.T) {
	r, err := http.NewRequest("POST", "https://api.ecr.us-east-1.amazonaws.com/", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-amz-json-1.1")
	r.Header.Set("X-Amz-Target", "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken")
	key := awsKey{id: "AKIDEXAMPLE", secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", region: "us-east-1"}
	key.sign(r, []byte("{}"), "ecr", time.Date(2015, 8, 30, 12, 36, 0, 0, time.UTC))
	const want = "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/ecr/aws4_request, " +
		"SignedHeaders=content-type;host;x-amz-date;x-amz-target, Signature=527a2155e9afc2426cb4c659023df9c031e8103458f349819615ff25111f5de0"
	if got := r.Header.Get("Authorization"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
