package e2b

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// tagged gives the fake a template of project p with two builds and tags.
func (h *host) tagged() {
	h.fake.templates = append(h.fake.templates, Template{
		ID: "app00000000000000000", Project: "p", Names: []string{"app", "app-2"},
		CreatedAt: time.Unix(2000, 0), UpdatedAt: time.Unix(2000, 0),
		Builds: []Build{
			{ID: otherBuild, Status: "building", CreatedAt: time.Unix(2001, 0), VCPUs: 2, MemMiB: 1024, DiskMiB: 4096, EnvdVersion: "0.6.4"},
			{ID: baseBuild, Status: "ready", CreatedAt: time.Unix(2000, 0), FinishedAt: time.Unix(2001, 0), VCPUs: 1},
		},
		Tags: []Tag{
			{Name: "default", Build: baseBuild, CreatedAt: time.Unix(2000, 0)},
			{Name: "v1.0", Build: baseBuild, CreatedAt: time.Unix(2000, 0)},
			{Name: "next", Build: otherBuild, CreatedAt: time.Unix(2000, 0)},
		},
	})
}

func TestReferences(t *testing.T) {
	h := newHost(t)
	h.tagged()
	for text, want := range map[string]string{
		"app": "201", "APP ": "201", "app-2": "201", "p/app": "201", "app:v1.0": "201", "p/app:v1.0": "201", "app:" + baseBuild: "201",
		"app00000000000000000": "201", "app00000000000000000:v1.0": "201",
		"app:next": "400 not ready", "app:" + otherBuild: "400 not ready", "app:v2": "404 tag 'v2' does not exist for template 'app:v2'",
		"q/app": "404 not found", "app:": "400 tag", "/app": "400 namespace", "p/q/app": "400 name", "app:a:b": "400 tag", "": "400 name",
		strings.Repeat("a", 129): "400 name", "p/base": "201", "q/base": "404",
	} {
		status, word, _ := strings.Cut(want, " ")
		r := h.call("POST", "/v2/sandboxes", fmt.Sprintf(`{"templateID":%q}`, text))
		if fmt.Sprint(r.status) != status || !strings.Contains(r.body, word) {
			t.Errorf("%q: got %d %s, want %s", text, r.status, r.body, want)
		}
	}
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"p/app"}`, "X-API-KEY", h.q), 404, "not found")
	h.want(h.call("PATCH", "/v2/templates/app", `{"public":true}`), 200, `"names":["p/app","p/app-2"]`)
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"p/app"}`, "X-API-KEY", h.q), 201, "")
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"app"}`, "X-API-KEY", h.q), 404, "not found")
}

// A project's own template called base comes before the host's.
func TestOwnBase(t *testing.T) {
	h := newHost(t)
	h.tagged()
	h.fake.templates[1].Names = []string{"base"}
	h.want(h.call("POST", "/v2/sandboxes", base), 201, "app0000")
	h.want(h.call("POST", "/v2/sandboxes", base, "X-API-KEY", h.q), 201, baseID)
}

func TestTemplates(t *testing.T) {
	h := newHost(t)
	h.tagged()
	r := h.want(h.call("GET", "/templates", ""), 200, `"templateID":"app00000000000000000"`)
	var all []map[string]any
	if err := json.Unmarshal([]byte(r.body), &all); err != nil || len(all) != 2 {
		t.Fatalf("templates are %s", r.body)
	}
	for _, field := range strings.Fields("templateID buildID cpuCount memoryMB diskSizeMB public aliases names createdAt updatedAt " +
		"createdBy lastSpawnedAt spawnCount buildCount envdVersion buildStatus") {
		if _, ok := all[0][field]; !ok {
			t.Errorf("%s is missing", field)
		}
	}
	project, _ := h.keys.Projects()
	h.want(h.call("GET", "/templates?teamID="+project[0].ID, ""), 200, "app")
	h.want(h.call("GET", "/templates?teamID="+project[1].ID, ""), 400, "team")
	h.want(h.call("GET", "/v2/templates?limit=1", ""), 200, "app")
	next := h.call("GET", "/v2/templates?limit=1", "").header.Get("X-Next-Token")
	h.want(h.call("GET", "/v2/templates?limit=1&nextToken="+next, ""), 200, baseID)
	h.want(h.call("GET", "/default-templates?nextToken="+next, ""), 400, "Invalid next token")
	h.want(h.call("GET", "/default-templates", ""), 200, `"isDefault":true`)
	h.want(h.call("GET", "/templates/app?limit=1", ""), 200, `"builds":[{"buildID":"`+otherBuild)
	h.want(h.call("GET", "/templates/app/builds/"+baseBuild+"/status?logsOffset=0", ""), 200, `"logEntries":[],"logs":[],"status":"ready"`)
	h.want(h.call("GET", "/templates/app/builds/nope/status", ""), 400, "does not exist")
	h.want(h.call("GET", "/templates/app/builds/"+baseBuild+"/logs", ""), 200, `{"logs":[]}`)
	for path, status := range map[string]int{
		"app": 200, "app:v1.0": 200, "app:v2": 404, "nope": 404, "p%2Fapp": 200, "q%2Fapp": 404, "tags": 404, "a..b": 400, "base": 200,
	} {
		h.want(h.call("GET", "/templates/aliases/"+path, ""), status, "")
	}
	h.want(h.call("GET", "/templates/aliases/app", "", "X-API-KEY", h.q), 404, "")
	h.want(h.call("GET", "/templates/aliases/tags", ""), 404, "'tags' not found")
}

func TestTags(t *testing.T) {
	h := newHost(t)
	h.tagged()
	h.want(h.call("POST", "/templates/tags", `{"target":"app:v1.0","tags":["Stable","next"]}`), 201,
		`{"buildID":"`+baseBuild+`","tags":["stable","next"]}`)
	h.want(h.call("GET", "/templates/app/tags", ""), 200, `"tag":"stable"`)
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"app:next"}`), 201, "")
	h.want(h.call("DELETE", "/templates/tags", `{"name":"app","tags":["stable"]}`), 204, "")
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"app:stable"}`), 404, "tag 'stable'")
	for _, c := range []struct {
		method, body string
		status       int
	}{
		{"POST", `{"target":"app","tags":[]}`, 400},
		{"POST", `{"target":"app"}`, 400},
		{"POST", `{"target":"app","tags":["a/b"]}`, 400},
		{"POST", `{"target":"app","tags":["` + baseBuild + `"]}`, 400},
		{"POST", `{"target":"app:nope","tags":["x"]}`, 404},
		{"POST", `{"target":"nope","tags":["x"]}`, 404},
		{"POST", `{"target":"minimal","tags":["x"]}`, 403},
		{"DELETE", `{"name":"app","tags":["default"]}`, 400},
		{"DELETE", `{"name":"app:v1.0","tags":["x"]}`, 400},
		{"DELETE", `{"name":"minimal","tags":["x"]}`, 403},
	} {
		h.want(h.call(c.method, "/templates/tags", c.body), c.status, "")
	}
	h.want(h.call("DELETE", "/templates/tags", `{"name":"app","tags":["x"]}`, "X-API-KEY", h.q), 404, "")
}

func TestDeleteTemplate(t *testing.T) {
	h := newHost(t)
	h.tagged()
	h.want(h.call("DELETE", "/templates/minimal", ""), 403, "not of your project")
	h.want(h.call("DELETE", "/templates/app:v1.0", ""), 400, "DELETE /templates/tags")
	h.want(h.call("DELETE", "/templates/app", "", "X-API-KEY", h.q), 404, "")
	h.fake.fail["delete template"] = errdefs.WrongState.Errorf("cannot delete template 'app' because there are running sandboxes using it")
	h.want(h.call("DELETE", "/templates/app", ""), 400, "running sandboxes using it")
	delete(h.fake.fail, "delete template")
	h.want(h.call("DELETE", "/templates/app", ""), 204, "")
	h.want(h.call("DELETE", "/templates/app", ""), 404, "")
}

func TestSnapshots(t *testing.T) {
	h := newHost(t)
	id := h.create(base)
	path := "/sandboxes/" + id + "/snapshots"
	h.want(h.call("POST", path, `{"name":"nm"}`), 201, `{"names":["p/nm"],"snapshotID":"p/nm:default"}`)
	h.want(h.call("POST", path, `{"name":"p/nm:v2"}`), 201, `"snapshotID":"p/nm:v2"`)
	unnamed := h.want(h.call("POST", path, ""), 201, `"names":[]`).field("snapshotID").(string)
	for body, text := range map[string]string{
		`{"name":"a b"}`: "name", `{"name":"q/nm"}`: "namespace", `{"name":"nm:` + baseBuild + `"}`: "UUID",
	} {
		h.want(h.call("POST", path, body), 400, text)
	}
	for query, want := range map[string]string{
		"":                              unnamed + " p/nm:v2 p/nm:default",
		"?name=nm":                      "p/nm:v2 p/nm:default",
		"?name=p/nm:v2":                 "p/nm:v2",
		"?name=nope":                    "",
		"?name=q/nm":                    "",
		"?sandboxID=" + id + "-x":       unnamed + " p/nm:v2 p/nm:default",
		"?sandboxID=sb0123456789abcdef": "",
		"?sandboxID=junk":               "",
		"?limit=1":                      unnamed,
	} {
		var all []struct{ SnapshotID string }
		r := h.want(h.call("GET", "/snapshots"+query, ""), 200, "")
		_ = json.Unmarshal([]byte(r.body), &all)
		var got []string
		for _, s := range all {
			got = append(got, s.SnapshotID)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %v, want %s", query, got, want)
		}
	}
	h.want(h.call("GET", "/snapshots?name=a%20b", ""), 400, "name")
	h.want(h.call("GET", "/snapshots", "", "X-API-KEY", h.q), 200, "[]")
	if body := h.call("GET", "/templates", "").body; strings.Contains(body, "nm") {
		t.Errorf("templates have snapshots: %s", body)
	}
	h.want(h.call("DELETE", "/sandboxes/"+id, ""), 204, "")
	for _, text := range []string{"p/nm:default", "nm", "p/nm:v2", unnamed} {
		h.want(h.call("POST", "/v2/sandboxes", fmt.Sprintf(`{"templateID":%q}`, text), "X-API-KEY", h.q), 404, "")
		h.want(h.call("POST", "/v2/sandboxes", fmt.Sprintf(`{"templateID":%q}`, text)), 201, "")
	}
	h.want(h.call("DELETE", "/templates/p%2Fnm%3Adefault", "", "X-API-KEY", h.q), 404, "")
	h.want(h.call("DELETE", "/templates/p%2Fnm%3Adefault", ""), 204, "")
	h.want(h.call("DELETE", "/templates/p%2Fnm%3Adefault", ""), 404, "")
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"nm:v2"}`), 201, "")
	h.want(h.call("DELETE", "/templates/"+strings.ReplaceAll(unnamed, ":", "%3A"), ""), 204, "")
}

func TestForks(t *testing.T) {
	h := newHost(t)
	id := h.create(`{"templateID":"base","metadata":{"k":"v"}}`)
	for _, body := range []string{`{"count":0}`, `{"count":-1}`, `{"count":101}`, `{"count":1,"timeout":0}`} {
		h.want(h.call("POST", "/sandboxes/"+id+"/fork", body), 400, "")
	}
	r := h.want(h.call("POST", "/sandboxes/"+id+"/fork", `{"count":3}`), 201, "")
	var forks []struct {
		Sandbox struct{ SandboxID, EnvdAccessToken string }
	}
	err := json.Unmarshal([]byte(r.body), &forks)
	if err != nil || len(forks) != 3 || forks[0].Sandbox.EnvdAccessToken == forks[1].Sandbox.EnvdAccessToken {
		t.Fatalf("forks are %s", r.body)
	}
	h.want(h.call("GET", "/sandboxes/"+forks[2].Sandbox.SandboxID, ""), 200, `"metadata":{"k":"v"}`)
	h.fake.fail["create"] = errdefs.Exhausted.Errorf("full")
	h.want(h.call("POST", "/sandboxes/"+id+"/fork", ""), 429, `"error_code":"sandbox_capacity_unavailable"`)
}
