package e2b

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/idempotency"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// host is the API over a fake, with a key of project p and one of project q.
type host struct {
	t       testing.TB
	fake    *fake
	keys    *auth.Store
	p, q    string
	handler http.Handler
}

func newHost(t testing.TB, change ...func(*Config)) *host {
	t.Helper()
	keys, err := auth.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, fake: newFake(), keys: keys}
	for project, key := range map[string]*string{"p": &h.p, "q": &h.q} {
		if *key, _, err = keys.CreateKey(project, ""); err != nil {
			t.Fatal(err)
		}
	}
	requests, err := idempotency.Open(t.TempDir(), func(string) bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Manager: h.fake, Templates: fakeTemplates{h.fake}, Keys: keys, Limiter: auth.NewLimiter(auth.Rates{}), Requests: requests,
		Domain: "example.test", DefaultTemplate: "minimal", MaxTimeout: 24 * time.Hour, Log: slog.New(slog.DiscardHandler),
	}
	for _, fn := range change {
		fn(&cfg)
	}
	h.handler = New(cfg)
	return h
}

type reply struct {
	status int
	header http.Header
	body   string
}

// field returns a value of an object, or nothing.
func (r reply) field(name string) any {
	var object map[string]any
	_ = json.Unmarshal([]byte(r.body), &object)
	return object[name]
}

// call sends a request with p's key; headers are pairs. Bodies are chunked, as
// those of the JavaScript client.
func (h *host) call(method, path, body string, headers ...string) reply {
	h.t.Helper()
	var r *http.Request
	if body == "" {
		r = httptest.NewRequest(method, path, nil)
	} else {
		r = httptest.NewRequest(method, path, struct{ *bytes.Reader }{bytes.NewReader([]byte(body))})
		r.ContentLength = -1
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("X-API-KEY", h.p)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.handler.ServeHTTP(w, r)
	got := reply{w.Code, w.Header(), w.Body.String()}
	h.checkForm(method+" "+path, got)
	return got
}

// checkForm checks what holds for every answer.
func (h *host) checkForm(what string, r reply) {
	h.t.Helper()
	switch {
	case r.status >= 400:
		if r.field("code") != float64(r.status) || r.field("message") == nil || r.field("message") == "" ||
			r.header.Get("Content-Type") != "application/json" {
			h.t.Errorf("%s: error %d has the body %s", what, r.status, r.body)
		}
		if strings.Contains(r.body, "/tmp/") || strings.Contains(r.body, h.p) {
			h.t.Errorf("%s: error tells too much: %s", what, r.body)
		}
	case r.status == http.StatusNoContent:
		if r.body != "" {
			h.t.Errorf("%s: 204 has a body: %s", what, r.body)
		}
	case strings.Contains(r.body, ":null") && !strings.Contains(what, "templates"):
		h.t.Errorf("%s: a field that is absent is null: %s", what, r.body)
	}
}

// want checks a status, and that the body has a text.
func (h *host) want(r reply, status int, text string) reply {
	h.t.Helper()
	if r.status != status || !strings.Contains(r.body, text) {
		h.t.Errorf("got %d %s, want %d with %q", r.status, r.body, status, text)
	}
	return r
}

// create makes a sandbox and returns its id.
func (h *host) create(body string) string {
	h.t.Helper()
	r := h.want(h.call("POST", "/v2/sandboxes", body), 201, "sandboxID")
	id, _ := r.field("sandboxID").(string)
	return id
}

const base = `{"templateID":"base"}`

func TestKeysAreDemanded(t *testing.T) {
	h := newHost(t)
	revoked, key, err := h.keys.CreateKey("p", "")
	if err != nil {
		t.Fatal(err)
	}
	h.want(h.call("GET", "/sandboxes", "", "X-API-KEY", revoked), 200, "")
	if _, err := h.keys.RemoveKey(key.ID); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{"", "x", "e2b_" + strings.Repeat("0", 40), revoked} {
		for _, path := range []string{"/sandboxes", "/v2/sandboxes?limit=0", "/no/such", "/sandboxes/sbx", "/volumes"} {
			h.want(h.call("GET", path, "", "X-API-KEY", wrong), 401, "API key")
		}
		h.want(h.call("POST", "/v2/sandboxes", "junk", "X-API-KEY", wrong), 401, "API key")
	}
	h.want(h.call("GET", "/health", "", "X-API-KEY", ""), 204, "")
	h.want(h.call("GET", "/sandboxes", "", "X-API-KEY", "", "Authorization", "Bearer "+h.p), 200, "[]")
	r := h.want(h.call("GET", "/teams", "", "X-API-KEY", "", "Authorization", "Bearer "+h.p), 200, `"isDefault":true`)
	if !strings.Contains(r.body, h.p) {
		t.Errorf("teams are %s", r.body)
	}
}

func TestCreate(t *testing.T) {
	for _, c := range []struct {
		name, path, body string
		life             time.Duration
	}{
		{"JavaScript", "/v2/sandboxes", base, 300 * time.Second},
		{"Python", "/v2/sandboxes", `{"templateID":"base","metadata":{},"envVars":{}}`, 300 * time.Second},
		{"CLI", "/sandboxes", `{"templateID":"base","timeout":300,"secure":true,"allow_internet_access":true}`, 300 * time.Second},
		{"v1", "/sandboxes", base, 15 * time.Second},
		{"unknown fields", "/v2/sandboxes", `{"templateID":"base","new":{"field":[1]},"mcp":{"x":1},"network":{"y":2}}`, 300 * time.Second},
		{"template's own name", "/v2/sandboxes", `{"templateID":" Minimal "}`, 300 * time.Second},
		{"template's id", "/v2/sandboxes", `{"templateID":"` + baseID + `","timeout":1}`, time.Second},
		{"build", "/v2/sandboxes", `{"templateID":"minimal:` + baseBuild + `"}`, 300 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			r := h.want(h.call("POST", c.path, c.body), 201, `"templateID":"`+baseID+`"`)
			for _, field := range []string{"sandboxID", "clientID", "envdVersion", "envdAccessToken", "domain"} {
				if text, _ := r.field(field).(string); text == "" {
					t.Errorf("%s is missing in %s", field, r.body)
				}
			}
			id := r.field("sandboxID").(string)
			if strings.Contains(id, "-") || r.field("trafficAccessToken") != nil {
				t.Errorf("answer is %s", r.body)
			}
			d := h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"state":"running"`)
			start, _ := time.Parse(time.RFC3339, d.field("startedAt").(string))
			end, _ := time.Parse(time.RFC3339, d.field("endAt").(string))
			if life := end.Sub(start); life != c.life {
				t.Errorf("it lives %s, want %s", life, c.life)
			}
			made, _ := sandbox.ParseLooseID(id)
			if req := h.fake.requests[made]; req.User != "user" {
				t.Errorf("programs run as %q", req.User)
			}
			// What is made of a snapshot has the snapshot's user.
			snap := h.want(h.call("POST", "/sandboxes/"+id+"/snapshots", "{}"), 201, "").field("snapshotID").(string)
			r = h.want(h.call("POST", c.path, `{"templateID":"`+snap+`"}`), 201, "")
			made, _ = sandbox.ParseLooseID(r.field("sandboxID").(string))
			if req := h.fake.requests[made]; req.User != "" {
				t.Errorf("programs of a sandbox of a snapshot run as %q", req.User)
			}
		})
	}
}

func TestCreateKeepsWhatItIsTold(t *testing.T) {
	h := newHost(t)
	id := h.create(`{"templateID":"base","metadata":{"a b":"c&d=e","ü":""},"envVars":{"A":"1"},"autoPause":true,"autoResume":{"enabled":true},
		"allow_internet_access":false,"network":{"allowOut":["*.example.com","1.1.1.1"],"denyOut":["10.0.0.0/8"],"dnsServers":[],
		"allowPublicTraffic":false,"maskRequestHost":"app:${PORT}"}}`)
	r := h.call("GET", "/sandboxes/"+id, "")
	for _, text := range []string{
		`"metadata":{"a b":"c\u0026d=e","ü":""}`, `"lifecycle":{"autoResume":true,"onTimeout":"pause"}`, `"allowInternetAccess":false`,
		`"network":{"allowOut":["*.example.com","1.1.1.1"],"allowPublicTraffic":false,"denyOut":["10.0.0.0/8"],` +
			`"dnsServers":[],"maskRequestHost":"app:${PORT}"}`,
	} {
		h.want(r, 200, text)
	}
	sb, _ := sandbox.ParseLooseID(id)
	req := h.fake.requests[sb]
	if req.Env["A"] != "1" || req.Project != "p" || req.OnEnd != Pause || !req.AutoResume || req.Build != baseBuild {
		t.Errorf("the manager was asked %+v", req)
	}
	h.want(h.call("POST", "/v2/sandboxes/"+id+"/connect", "{}"), 200, `"trafficAccessToken":"traffic-of-`)
}

func TestCreateRefuses(t *testing.T) {
	with := func(fields string) string { return `{"templateID":"base",` + fields + `}` }
	for name, c := range map[string]struct {
		body   string
		status int
		text   string
	}{
		"no body":               {"", 400, "decode"},
		"no JSON":               {"{", 400, "decode"},
		"no object":             {"[]", 400, "decode"},
		"no template":           {"{}", 400, "name"},
		"type of timeout":       {with(`"timeout":"1"`), 400, "timeout"},
		"no timeout":            {with(`"timeout":0`), 400, "Timeout must be greater than 0"},
		"negative timeout":      {with(`"timeout":-1`), 400, "Timeout must be greater than 0"},
		"long timeout":          {with(`"timeout":86401`), 400, "greater than 86400"},
		"huge timeout":          {with(`"timeout":9223372036854775807`), 400, "greater than 86400"},
		"memory alone":          {with(`"autoPauseMemory":false`), 400, "autoPause"},
		"memory and resume":     {with(`"autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}`), 400, "autoResume"},
		"bad env":               {with(`"envVars":{"A=B":"c"}`), 400, "envVars"},
		"much metadata":         {with(`"metadata":{"a":"` + strings.Repeat("x", 70_000) + `"}`), 400, "metadata"},
		"too much of all":       {with(`"metadata":{"a":"` + strings.Repeat("x", 2<<20) + `"}`), 413, "bytes"},
		"volume":                {with(`"volumeMounts":[{"name":"v","path":"/v"}]`), 400, "volume 'v' not found"},
		"iam":                   {with(`"iam":{"tokens":{}}`), 400, "iam"},
		"httpsPorts":            {with(`"network":{"httpsPorts":[443]}`), 400, "httpsPorts"},
		"egressProxy":           {with(`"network":{"egressProxy":{"address":"a:1","password":"secret"}}`), 400, "egressProxy"},
		"rules":                 {with(`"network":{"rules":{"a":[]}}`), 400, "rules"},
		"denied name":           {with(`"network":{"denyOut":["example.com"]}`), 400, "invalid denied CIDR example.com"},
		"denied range":          {with(`"network":{"denyOut":["1.2.3.4/40"]}`), 400, "invalid denied CIDR 1.2.3.4/40"},
		"denied nothing":        {with(`"network":{"denyOut":["0.0.0.0"]}`), 400, "invalid denied CIDR 0.0.0.0"},
		"denied with a zone":    {with(`"network":{"denyOut":["fe80::1%eth0"]}`), 400, "invalid denied CIDR"},
		"allowed nothing":       {with(`"network":{"allowOut":["0.0.0.0/8"],"denyOut":["0.0.0.0/0"]}`), 400, "invalid allowed"},
		"allowed name alone":    {with(`"network":{"allowOut":["example.com"]}`), 400, "ALL_TRAFFIC"},
		"allowed junk":          {with(`"network":{"allowOut":["a b"],"denyOut":["0.0.0.0/0"]}`), 400, "invalid allowed"},
		"allowed bad address":   {with(`"network":{"allowOut":["1.2.3.400"],"denyOut":["0.0.0.0/0"]}`), 400, "invalid allowed"},
		"DNS":                   {with(`"network":{"dnsServers":["x"]}`), 400, "DNS"},
		"DNS by IPv6":           {with(`"network":{"dnsServers":["2001:db8::1"]}`), 400, "DNS"},
		"mask":                  {with(`"network":{"maskRequestHost":"ü"}`), 400, "maskRequestHost"},
		"template's text":       {`{"templateID":"../x y"}`, 400, "namespace"},
		"template with a dot":   {`{"templateID":"a..b"}`, 400, "template name"},
		"unknown template":      {`{"templateID":"nope"}`, 404, "template 'nope' not found"},
		"unknown tag":           {`{"templateID":"base:v1"}`, 404, "tag 'v1' does not exist for template 'base:v1'"},
		"unknown build":         {`{"templateID":"base:` + otherBuild + `"}`, 404, "does not exist"},
		"another's namespace":   {`{"templateID":"q/minimal"}`, 404, "not found"},
		"another's private one": {`{"templateID":"secret"}`, 404, "not found"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.fake.templates = append(h.fake.templates, Template{ID: "t1", Project: "q", Names: []string{"secret"}, Builds: []Build{{ID: "b"}}})
			for _, path := range []string{"/sandboxes", "/v2/sandboxes"} {
				h.want(h.call("POST", path, c.body), c.status, c.text)
			}
			if len(h.fake.calls) > 0 {
				t.Errorf("the manager was asked to %v", h.fake.calls)
			}
		})
	}
}

// What is unknown is 404, whatever it looks like, and so is what is another's.
func TestOthersSandboxesAreNotThere(t *testing.T) {
	h := newHost(t)
	id := h.create(base)
	for _, name := range []string{"nonexistingsandbox", "sb", "sb-0123456789abcdef", id, strings.ToUpper(id)} {
		key := h.p
		if name == id {
			key = h.q
		}
		for _, c := range [][2]string{
			{"GET /sandboxes/%s", ""}, {"DELETE /sandboxes/%s", ""}, {"POST /sandboxes/%s/connect", `{"timeout":1}`},
			{"POST /v2/sandboxes/%s/connect", ""}, {"POST /sandboxes/%s/resume", ""}, {"POST /sandboxes/%s/pause", ""},
			{"POST /sandboxes/%s/timeout", `{"timeout":1}`}, {"POST /sandboxes/%s/refreshes", ""}, {"PUT /sandboxes/%s/network", "{}"},
			{"POST /sandboxes/%s/fork", ""}, {"POST /sandboxes/%s/snapshots", ""}, {"GET /sandboxes/%s/metrics", ""},
			{"GET /sandboxes/%s/logs", ""}, {"GET /v2/sandboxes/%s/logs", ""},
		} {
			method, path, _ := strings.Cut(fmt.Sprintf(c[0], name), " ")
			r := h.call(method, path, c[1], "X-API-KEY", key)
			h.want(r, 404, `Sandbox \"`+name+`\" doesn't exist or you don't have access to it`)
		}
	}
	if got := h.call("GET", "/v2/sandboxes", "", "X-API-KEY", h.q).body; got != "[]\n" {
		t.Errorf("q sees %s", got)
	}
	h.want(h.call("GET", "/sandboxes/metrics?sandbox_ids="+id, "", "X-API-KEY", h.q), 200, `{"sandboxes":{}}`)
	if len(h.fake.calls) != 1 {
		t.Errorf("the manager was asked to %v", h.fake.calls)
	}
}

func TestLifeOfASandbox(t *testing.T) {
	h := newHost(t)
	id := h.create(base)
	both := []string{id, id + "-x", "sb-" + id[2:], "sb-" + id[2:] + "-x"}
	endAt := func() string { return fmt.Sprint(h.call("GET", "/sandboxes/"+id, "").field("endAt")) }
	before := endAt()
	for _, name := range both {
		h.want(h.call("POST", "/v2/sandboxes/"+name+"/connect", `{"timeout":10}`), 200, `"sandboxID":"`+id+`"`)
	}
	h.want(h.call("POST", "/sandboxes/"+id+"/refreshes", `{"duration":20}`), 204, "")
	if endAt() != before {
		t.Errorf("the end was %s, is %s", before, endAt())
	}
	h.want(h.call("POST", "/sandboxes/"+id+"/connect", `{"timeout":1000}`), 200, "")
	if endAt() <= before {
		t.Errorf("the end was %s, is %s", before, endAt())
	}
	h.want(h.call("POST", "/sandboxes/"+id+"/timeout", `{"timeout":1}`), 204, "")
	if endAt() >= before {
		t.Errorf("the end was %s, is %s", before, endAt())
	}
	h.want(h.call("POST", "/sandboxes/"+id+"/refreshes", ""), 204, "")
	h.want(h.call("POST", "/sandboxes/"+id+"/resume", `{"timeout":5}`), 409, "Sandbox "+id+" is already running")
	h.want(h.call("POST", "/sandboxes/"+id+"/pause", ""), 204, "")
	h.want(h.call("POST", "/sandboxes/"+id+"/pause", `{"memory":true}`), 409, "sandbox '"+id+"' is already paused")
	h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"pauseMode":"full"`)
	h.want(h.call("POST", "/sandboxes/"+id+"/timeout", `{"timeout":1}`), 404, "paused")
	h.want(h.call("POST", "/sandboxes/"+id+"/fork", ""), 409, "cannot be forked")
	h.want(h.call("POST", "/v2/sandboxes/"+id+"/connect", ""), 201, `"sandboxID":"`+id+`"`)
	h.want(h.call("POST", "/sandboxes/"+id+"/pause", `{"memory":false}`), 204, "")
	h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"pauseMode":"filesystem"`)
	h.want(h.call("POST", "/sandboxes/"+id+"/resume", `{"autoPause":true}`), 201, `"sandboxID":"`+id+`"`)
	h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"onTimeout":"pause"`)
	h.want(h.call("DELETE", "/sandboxes/"+id+"-x", ""), 204, "")
	h.want(h.call("DELETE", "/sandboxes/"+id, ""), 404, "")
	h.want(h.call("POST", "/sandboxes/"+id+"/connect", `{"timeout":5}`), 404, "")
}

// Each error of the manager has the status that clients act on.
func TestErrorsOfTheManager(t *testing.T) {
	for _, c := range managerErrors {
		t.Run(c.call+" "+fmt.Sprint(c.err), func(t *testing.T) {
			h := newHost(t)
			id := h.create(base)
			h.fake.fail[c.call] = c.err
			method, path, _ := strings.Cut(strings.ReplaceAll(c.request, "ID", id), " ")
			body := ""
			if method == "POST" || method == "PUT" {
				body = `{"timeout":1,"templateID":"base"}`
			}
			r := h.want(h.call(method, path, body), c.status, "")
			if word, _ := r.field("error_code").(string); word != c.word {
				t.Errorf("error_code is %q, want %q", word, c.word)
			}
			if strings.Contains(r.body, "internal secret") {
				t.Errorf("body is %s", r.body)
			}
		})
	}
}

func TestTransitions(t *testing.T) {
	h := newHost(t)
	id := h.create(base)
	box, _ := sandbox.ParseLooseID(id)
	sb := h.fake.boxes[box]
	sb.Pausing = true
	h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"state":"paused"`)
	sb.Pausing, sb.EndAt = false, time.Time{}
	h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"endAt":"9999-12-31T23:59:59.000Z"`)
	for _, state := range []sandbox.State{sandbox.Creating, sandbox.Stopping, sandbox.Stopped, sandbox.Unknown} {
		sb.State = state
		h.want(h.call("GET", "/sandboxes/"+id, ""), 404, "")
		h.want(h.call("GET", "/v2/sandboxes", ""), 200, "[]")
		status := 404
		if state == sandbox.Stopping {
			status = 409
		}
		h.want(h.call("POST", "/v2/sandboxes/"+id+"/connect", ""), status, "")
	}
}

func TestMethodsAndPaths(t *testing.T) {
	h := newHost(t)
	h.want(h.call("GET", "/nope", ""), 404, "there is no /nope")
	h.want(h.call("GET", "/", ""), 404, "")
	r := h.want(h.call("PATCH", "/sandboxes", "{}"), 405, "does not take PATCH")
	if r.header.Get("Allow") == "" {
		t.Error("Allow is missing")
	}
	for _, path := range []string{"/volumes", "/volumes/x", "/secrets", "/secrets/x", "/events/webhooks", "/volumecontent/x/file?path=a"} {
		h.want(h.call("GET", path, ""), 400, "this host has no")
	}
	for _, c := range []string{
		"POST /v3/templates", "POST /v2/templates", "GET /templates/t/files/h", "POST /v2/templates/t/builds/b",
	} {
		method, path, _ := strings.Cut(c, " ")
		h.want(h.call(method, path, `{"name":"x"}`), 400, "builds no templates")
	}
}

func TestBrowsers(t *testing.T) {
	h := newHost(t)
	r := h.call("OPTIONS", "/v2/sandboxes", "", "X-API-KEY", "", "Origin", "http://a.test", "Access-Control-Request-Headers", "x-api-key,lang")
	h.want(r, 204, "")
	if r.header.Get("Access-Control-Allow-Origin") != "*" || r.header.Get("Access-Control-Allow-Headers") != "x-api-key,lang" {
		t.Errorf("headers are %v", r.header)
	}
	r = h.call("GET", "/sandboxes", "", "X-API-KEY", "", "Origin", "http://a.test")
	h.want(r, 401, "")
	if r.header.Get("Access-Control-Allow-Origin") != "*" || !strings.Contains(r.header.Get("Access-Control-Expose-Headers"), "X-Next-Token") {
		t.Errorf("headers are %v", r.header)
	}
	for _, kind := range []string{"text/plain", "application/x-www-form-urlencoded; charset=UTF-8", "multipart/form-data; boundary=x"} {
		h.want(h.call("POST", "/v2/sandboxes", base, "Content-Type", kind), 415, "application/json")
	}
	h.want(h.call("POST", "/v2/sandboxes", base, "Content-Type", ""), 201, "")
}

func TestRates(t *testing.T) {
	h := newHost(t, func(c *Config) {
		c.Limiter = auth.NewLimiter(auth.Rates{Requests: 0.001, Burst: 3, Creates: 0.1, CreatesBurst: 1})
	})
	h.want(h.call("POST", "/v2/sandboxes", base), 201, "")
	r := h.want(h.call("POST", "/sandboxes", base), 429, "too often")
	if r.header.Get("Retry-After") != "10" || r.header.Get("RateLimit-Remaining") != "0" || r.header.Get("RateLimit-Limit") != "1" {
		t.Errorf("headers are %v", r.header)
	}
	h.want(h.call("GET", "/sandboxes", ""), 200, "")
	h.want(h.call("GET", "/sandboxes", ""), 429, "")
	h.want(h.call("GET", "/sandboxes", "", "X-API-KEY", h.q), 200, "")
	h.want(h.call("GET", "/sandboxes", "", "X-API-KEY", "x"), 401, "")
	if len(h.fake.calls) != 1 {
		t.Errorf("the manager was asked to %v", h.fake.calls)
	}
}

func TestQuota(t *testing.T) {
	h := newHost(t)
	h.fake.quota = 1
	h.create(base)
	r := h.want(h.call("POST", "/v2/sandboxes", base), 429, "sandbox_capacity_unavailable")
	if r.header.Get("Retry-After") != "" {
		t.Error("it has a Retry-After")
	}
	h.want(h.call("POST", "/v2/sandboxes", base, "X-API-KEY", h.q), 201, "")
}
