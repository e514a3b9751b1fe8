package e2e_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

const neverMade = "sb0123456789abcdef"

// showRaw shows what plain HTTP shows better than a client.
func (h *e2bHost) showRaw(seen *showcase) {
	var silent sync.WaitGroup
	defer silent.Wait()
	for _, b := range []struct {
		n    int
		show func() error
	}{
		{2, h.showOlderCreate}, {3, h.showCLIsCreate}, {4, h.showUnknownTemplate}, {5, h.showBadTimeouts},
		{6, h.showKeys}, {7, h.showPauseConflicts},
		{10, h.showIdempotency}, {11, h.showChunked}, {12, h.showFull}, {29, h.showPausedDisk}, {35, h.showBadLists},
		{49, h.showTags}, {50, h.showTemplates},
	} {
		seen.add(b.n, "HTTP", text(b.show()))
	}
	id, token, err := h.showCreate()
	seen.add(1, "HTTP", text(err))
	if err != nil {
		return
	}
	silent.Go(func() { // beside all else: it takes a minute
		seen.add(44, "HTTP", text(h.showSilentStream()))
	})
	for _, b := range []struct {
		n    int
		show func(id, token string) error
	}{
		{15, h.showNever}, {16, h.showSpellings}, {17, h.showAfterTheEnd}, {21, h.showRefreshes},
		{51, h.showLogs}, {51, h.showEvents}, {41, h.showToken}, {41, h.showSignatures}, {42, h.showClosedPort},
	} {
		seen.add(b.n, "HTTP", text(b.show(id, token)))
	}
	seen.add(15, "HTTP", text(h.kill(id)))
}

// showLogs wants what a guest prints in both lists of its lines, with time and level.
func (h *e2bHost) showLogs(id, _ string) error {
	mark, began := "mark-of-"+id, time.Now().Add(-time.Second)
	req := &hostagentv1.ExecRequest{SandboxId: "sb-" + id[2:], Cmd: "sh", Args: []string{"-c", "echo " + mark + " >/dev/ttyS0"}, User: "root"}
	if _, err := h.Exec(context.Background(), connect.NewRequest(req)); err != nil {
		return err
	}
	var entry struct {
		Logs []struct {
			Timestamp      time.Time
			Message, Level string
		}
	}
	for deadline := time.Now().Add(patience); len(entry.Logs) == 0; time.Sleep(pollEvery) {
		a, err := h.want("GET", "/v2/sandboxes/"+id+"/logs?search="+mark, "", 200)
		if err == nil {
			err = json.Unmarshal([]byte(a.text), &entry)
		}
		if err == nil && time.Now().After(deadline) {
			err = errors.New("the line is not there")
		}
		if err != nil {
			return err
		}
	}
	l := entry.Logs[0]
	if !strings.Contains(l.Message, mark) || l.Level != "info" || l.Timestamp.Before(began) || l.Timestamp.After(time.Now()) {
		return fmt.Errorf("the line is %+v", l)
	}
	_, err := h.want("GET", fmt.Sprintf("/sandboxes/%s/logs?start=%d", id, began.UnixMilli()), "", 200, mark, `\"level\":\"info\"`)
	return err
}

// showEvents wants a sandbox's create and another timeout among its events.
func (h *e2bHost) showEvents(id, _ string) error {
	_, err := h.want("POST", "/sandboxes/"+id+"/timeout", `{"timeout":900}`, 204)
	if err == nil {
		_, err = h.want("GET", "/events/sandboxes/"+id+"?limit=100&orderAsc=true", "", 200, id,
			`"sandbox.lifecycle.created"`, `"sandbox.lifecycle.updated"`, `"set_timeout"`)
	}
	if err == nil {
		_, err = h.want("GET", "/events/sandboxes?limit=100&types=sandbox.lifecycle.updated", "", 200, id)
	}
	return err
}

func (h *e2bHost) showCreate() (id, token string, err error) {
	a, err := h.want("POST", "/v2/sandboxes", `{"templateID":"base"}`, 201)
	if err != nil {
		return "", "", err
	}
	for _, field := range []string{"templateID", "sandboxID", "clientID", "envdVersion", "envdAccessToken"} {
		if a.str(field) == "" {
			err = errors.Join(err, fmt.Errorf("%s has no %s", a.text, field))
		}
	}
	id = a.str("sandboxID")
	if strings.Contains(id, "-") {
		err = errors.Join(err, fmt.Errorf("the id %s has a dash", id))
	}
	return id, a.str("envdAccessToken"), errors.Join(err, h.lives(id, 300*time.Second))
}

// lives says whether a sandbox was given so much time from its start on.
func (h *e2bHost) lives(id string, life time.Duration) error {
	a, err := h.want("GET", "/sandboxes/"+id, "", 200)
	if err != nil {
		return err
	}
	if got := a.at("endAt").Sub(a.at("startedAt")); (got - life).Abs() > time.Second {
		return fmt.Errorf("it lives %s, want %s", got, life)
	}
	return nil
}

func (h *e2bHost) showOlderCreate() error {
	a, err := h.want("POST", "/sandboxes", `{"templateID":"base"}`, 201)
	if err != nil {
		return err
	}
	return errors.Join(h.lives(a.str("sandboxID"), 15*time.Second), h.kill(a.str("sandboxID")))
}

func (h *e2bHost) showCLIsCreate() error {
	a, err := h.want("POST", "/sandboxes", `{"templateID":"base","timeout":300,"secure":true,"allow_internet_access":true}`, 201)
	if err != nil {
		return err
	}
	return errors.Join(h.lives(a.str("sandboxID"), 300*time.Second), h.kill(a.str("sandboxID")))
}

func (h *e2bHost) showUnknownTemplate() error {
	_, err := h.want("POST", "/v2/sandboxes", `{"templateID":"no-such-template"}`, 404, "template 'no-such-template' not found")
	_, err2 := h.want("POST", "/v2/sandboxes", `{"templateID":"base:no-such-tag"}`, 404, "tag 'no-such-tag' does not exist")
	_, err3 := h.want("POST", "/v2/sandboxes", `{"templateID":"Not a name!"}`, 400)
	return errors.Join(err, err2, err3)
}

func (h *e2bHost) showBadTimeouts() error {
	var errs []error
	for _, path := range []string{"/sandboxes", "/v2/sandboxes"} {
		for _, timeout := range []string{"0", "-1"} {
			_, err := h.want("POST", path, `{"templateID":"base","timeout":`+timeout+`}`, 400, "Timeout must be greater than 0")
			errs = append(errs, err)
		}
		_, err := h.want("POST", path, `{"templateID":"base","timeout":999999999}`, 400)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (h *e2bHost) showKeys() error {
	var errs []error
	for _, headers := range [][]string{
		nil, {"X-API-KEY", ""}, {"X-API-KEY", "e2b_" + strings.Repeat("0", 40)}, {"Authorization", "Bearer x"},
	} {
		a, err := h.call("GET", "/v2/sandboxes", nil, headers...)
		if err == nil {
			err = a.is(401)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (h *e2bHost) showPauseConflicts() error {
	_, err := h.want("POST", "/v2/sandboxes", `{"templateID":"base","autoPauseMemory":false}`, 400)
	_, err2 := h.want("POST", "/v2/sandboxes",
		`{"templateID":"base","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}}`, 400)
	return errors.Join(err, err2)
}

func (h *e2bHost) showIdempotency() error {
	const body = `{"templateID":"base","metadata":{"once":"yes"}}`
	create := func(body string) (reply, error) {
		return h.rest("POST", "/v2/sandboxes", body, "Idempotency-Key", "suite-once")
	}
	var both [2]reply
	var errs [2]error
	var wg sync.WaitGroup
	for i := range both {
		wg.Go(func() { both[i], errs[i] = create(body) })
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	// One may be told that the other is under way; asked again, it gets that one's.
	id := ""
	for _, a := range both {
		if a.status == 409 && strings.Contains(a.text, "idempotency_in_progress") {
			continue
		}
		if err := a.is(201); err != nil {
			return err
		}
		if id != "" && id != a.str("sandboxID") {
			return fmt.Errorf("two sandboxes: %s and %s", id, a.str("sandboxID"))
		}
		id = a.str("sandboxID")
	}
	again, err := create(body)
	if err == nil {
		err = again.is(201, id)
	}
	other, err2 := create(`{"templateID":"base","metadata":{"once":"no"}}`)
	if err2 == nil {
		err2 = other.is(422, "idempotency_request_mismatch")
	}
	listed, err3 := h.want("GET", "/v2/sandboxes?metadata="+url.QueryEscape("once=yes"), "", 200)
	if n := strings.Count(listed.text, "sandboxID"); n != 1 {
		err3 = errors.Join(err3, fmt.Errorf("%d sandboxes are listed, want 1", n))
	}
	return errors.Join(err, err2, err3, h.kill(id))
}

func (h *e2bHost) showChunked() error {
	body := io.MultiReader(strings.NewReader(`{"templateID":"base",`), strings.NewReader(`"metadata":{"chunks":"two"}}`))
	a, err := h.call("POST", "/v2/sandboxes", body, "X-API-KEY", h.key, "Content-Type", "application/json")
	if err == nil {
		err = a.is(201)
	}
	if err != nil {
		return err
	}
	id := a.str("sandboxID")
	_, err = h.want("GET", "/sandboxes/"+id, "", 200, `"chunks":"two"`)
	// The JavaScript client sends a body with a DELETE.
	gone, err2 := h.call("DELETE", "/sandboxes/"+id, io.MultiReader(strings.NewReader("{}")), "X-API-KEY", h.key,
		"Content-Type", "application/json")
	if err2 == nil {
		err2 = gone.is(204)
	}
	return errors.Join(err, err2)
}

// showFull is of a project that may have one sandbox.
func (h *e2bHost) showFull() error {
	small := *h
	small.key = h.smallKey
	id, _, err := small.newSandbox(`{"templateID":"base"}`)
	if err != nil {
		return err
	}
	_, err = small.want("POST", "/v2/sandboxes", `{"templateID":"base"}`, 429, "sandbox_capacity_unavailable")
	listed, err2 := small.want("GET", "/v2/sandboxes", "", 200)
	if n := strings.Count(listed.text, "sandboxID"); n != 1 {
		err2 = errors.Join(err2, fmt.Errorf("%d sandboxes are listed, want 1", n))
	}
	return errors.Join(err, err2, small.kill(id))
}

func (h *e2bHost) showPausedDisk() error {
	id, _, err := h.newSandbox(`{"templateID":"base"}`)
	if err == nil {
		_, err = h.want("POST", "/sandboxes/"+id+"/pause", "", 204)
	}
	if err != nil {
		return err
	}
	before, err := h.filesOf(id)
	if err == nil && len(before) == 0 {
		err = errors.New("a paused sandbox has no files")
	}
	err = errors.Join(err, h.kill(id))
	after, err2 := h.filesOf(id)
	if len(after) > 1 { // what remembers that it was there
		err2 = errors.Join(err2, fmt.Errorf("files are left: %q", after))
	}
	return errors.Join(err, err2)
}

// filesOf returns the disks and memory files that the state directory has of a
// sandbox.
func (h *e2bHost) filesOf(id string) (files []string, err error) {
	err = filepath.WalkDir(h.stateDir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.Contains(path, strings.TrimPrefix(id, "sb")) {
			return errors.Join(ignoreGone(err))
		}
		files = append(files, path)
		return nil
	})
	return files, err
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (h *e2bHost) showBadLists() error {
	var errs []error
	for _, query := range []string{
		"limit=0", "limit=101", "limit=x", "nextToken=foreign", "order=up", "state=asleep", "startedAfter=now",
	} {
		_, err := h.want("GET", "/v2/sandboxes?"+query, "", 400)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (h *e2bHost) showTags() error {
	a, err := h.want("GET", "/templates/aliases/base", "", 200, "templateID")
	_, err2 := h.want("GET", "/templates/aliases/no-such-template", "", 404)
	_, err3 := h.want("GET", "/templates/"+a.str("templateID")+"/tags", "", 200, `"tag":"default"`)
	_, err4 := h.want("DELETE", "/templates/tags", `{"name":"base","tags":["default"]}`, 400)
	_, err5 := h.want("POST", "/templates/tags", `{"target":"base","tags":[]}`, 400)
	return errors.Join(err, err2, err3, err4, err5)
}

func (h *e2bHost) showTemplates() error {
	_, err := h.want("GET", "/templates", "", 200, `"aliases":["minimal"]`, `"buildStatus":"ready"`)
	_, err2 := h.want("DELETE", "/templates/minimal", "", 403)
	return errors.Join(err, err2)
}

func (h *e2bHost) showNever(string, string) error {
	_, err := h.want("DELETE", "/sandboxes/"+neverMade, "", 404, `Sandbox \"`+neverMade+`\" doesn't exist`)
	_, err2 := h.want("DELETE", "/sandboxes/no-id-at-all", "", 404)
	return errors.Join(err, err2)
}

func (h *e2bHost) showSpellings(id, token string) error {
	dashed := strings.Replace(id, "sb", "sb-", 1)
	var errs []error
	for _, text := range []string{id, dashed, id + "-0a1b2c", dashed + "-x"} {
		_, err := h.want("GET", "/sandboxes/"+text, "", 200, `"sandboxID":"`+id+`"`)
		a, err2 := h.plane(text, "49983", "/files?path=/etc/hostname&username=root", "X-Access-Token", token)
		if err2 == nil && a.status != 200 {
			err2 = fmt.Errorf("data plane of %s: HTTP %d %s", text, a.status, a.text)
		}
		errs = append(errs, err, err2)
	}
	return errors.Join(errs...)
}

// isGone says whether the data plane answers for a sandbox that is not there, on every
// path, as clients understand it.
func (h *e2bHost) isGone(id string) error {
	want := map[string]any{"sandboxId": id, "message": "The sandbox was not found", "code": 502.0}
	var errs []error
	for _, at := range []struct{ port, path string }{
		{"49983", "/health"}, {"49983", "/files?path=/x"}, {"49983", "/process.Process/List"}, {"8000", "/"},
	} {
		a, err := h.plane(id, at.port, at.path)
		if err == nil && (a.status != 502 || !maps.Equal(a.object(), want)) {
			err = fmt.Errorf("port %s %s: HTTP %d %s, want %v", at.port, at.path, a.status, a.text, want)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (h *e2bHost) showAfterTheEnd(string, string) error {
	id, _, err := h.newSandbox(`{"templateID":"base","timeout":1}`)
	if err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		a, err := h.rest("GET", "/sandboxes/"+id, "")
		if err != nil || a.status == 404 {
			return errors.Join(err, h.isGone(id), h.isGone(neverMade), h.isGone("no-id-at-all"))
		}
		if time.Now().After(end) {
			return fmt.Errorf("it is still there: %s", a.text)
		}
	}
}

func (h *e2bHost) showRefreshes(id, _ string) error {
	before, err := h.want("GET", "/sandboxes/"+id, "", 200)
	_, err2 := h.want("POST", "/sandboxes/"+id+"/refreshes", `{"duration":20}`, 204)
	_, err3 := h.want("POST", "/sandboxes/"+id+"/refreshes", "", 204)
	after, err4 := h.want("GET", "/sandboxes/"+id, "", 200)
	if before.str("endAt") != after.str("endAt") {
		err4 = errors.Join(err4, fmt.Errorf("endAt was %s and is %s", before.str("endAt"), after.str("endAt")))
	}
	_, err5 := h.want("POST", "/sandboxes/"+id+"/refreshes", `{"duration":3600}`, 204)
	extended, err6 := h.want("GET", "/sandboxes/"+id, "", 200)
	if !extended.at("endAt").After(after.at("endAt")) {
		err6 = errors.Join(err6, errors.New("it is not extended"))
	}
	return errors.Join(err, err2, err3, err4, err5, err6)
}

func (h *e2bHost) showToken(id, token string) error {
	const path = "/files?path=/etc/hostname&username=root"
	var errs []error
	for _, c := range []struct {
		token  string
		status int
	}{{"", 401}, {"wrong", 401}, {token, 200}} {
		a, err := h.plane(id, "49983", path, "X-Access-Token", c.token)
		if err == nil && a.status != c.status {
			err = fmt.Errorf("with the token %.5q: HTTP %d %s, want %d", c.token, a.status, a.text, c.status)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// signedFile is the query of a signed URL that expires.
func signedFile(path, operation, user, token string, expires int64) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s:%s:%s:%s:%d", path, operation, user, token, expires))
	return url.Values{
		"path": {path}, "username": {user}, "signature_expiration": {fmt.Sprint(expires)},
		"signature": {"v1_" + base64.RawStdEncoding.EncodeToString(sum[:])},
	}.Encode()
}

// showSignatures calls signed URLs that name no sandbox.
func (h *e2bHost) showSignatures(id, token string) error {
	now := time.Now().Unix()
	good := signedFile("/etc/hostname", "read", "root", token, now+3600)
	var errs []error
	for _, c := range []struct {
		what, query, id string
		status          int
	}{
		{"good", good, "", 200},
		{"with the sandbox", good, id, 200},
		{"another path", strings.Replace(good, "hostname", "passwd", 1), id, 401},
		{"expired", signedFile("/etc/hostname", "read", "root", token, now-60), id, 401},
		{"of no sandbox", signedFile("/etc/hostname", "read", "root", "another token", now+3600), "", 502},
		{"another path, no sandbox", strings.Replace(good, "hostname", "passwd", 1), "", 502},
	} {
		var headers []string
		if c.id != "" {
			headers = []string{"E2b-Sandbox-Id", c.id, "E2b-Sandbox-Port", "49983"}
		}
		a, err := h.call("GET", "/files?"+c.query, nil, headers...)
		if err == nil && a.status != c.status {
			err = fmt.Errorf("%s: HTTP %d %s, want %d", c.what, a.status, a.text, c.status)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (h *e2bHost) showClosedPort(id, _ string) error {
	a, err := h.plane(id, "8003", "/")
	if err != nil {
		return err
	}
	if port, _ := a.object()["port"].(float64); port != 8003 {
		return fmt.Errorf("HTTP %d %s: want the port", a.status, a.text)
	}
	return a.is(502, "The sandbox is running but port is not open", id)
}

// silentServer answers with a stream in which a minute passes.
const silentServer = `
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"first ")
        self.wfile.flush()
        time.sleep(60 if self.path == "/silent" else 0)
        self.wfile.write(b"last")
http.server.ThreadingHTTPServer(("", 49999), Handler).serve_forever()
`

func (h *e2bHost) showSilentStream() (err error) {
	id, _, err := h.newSandbox(`{"templateID":"base","timeout":1200}`)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.kill(id)) }()
	_, err = h.Exec(context.Background(), connect.NewRequest(&hostagentv1.ExecRequest{
		SandboxId: strings.Replace(id, "sb", "sb-", 1), Cmd: "sh",
		Args: []string{"-c", "printf %s \"$1\" > /tmp/silent.py; python3 /tmp/silent.py >/dev/null 2>&1 &", "sh", silentServer},
	}))
	if err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		a, err := h.plane(id, "49999", "/")
		if err == nil && a.status == 200 {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("the server does not answer: HTTP %d %s, %w", a.status, a.text, err)
		}
	}
	a, err := h.plane(id, "49999", "/silent")
	if err == nil && a.text != "first last" {
		err = fmt.Errorf("HTTP %d %q", a.status, a.text)
	}
	return err
}

// showRestart kills the agent and starts it again, with a sandbox that runs and one
// that is paused.
func (h *e2bHost) showRestart() error {
	var ids, tokens [2]string
	var before [2]reply
	for i := range ids {
		var err error
		body := fmt.Sprintf(`{"templateID":"base","timeout":3600,"autoPause":true,"metadata":{"n":"%d"}}`, i)
		if ids[i], tokens[i], err = h.newSandbox(body); err != nil {
			return err
		}
	}
	if _, err := h.want("POST", "/sandboxes/"+ids[1]+"/pause", "", 204); err != nil {
		return err
	}
	for i, id := range ids {
		var err error
		if before[i], err = h.want("GET", "/sandboxes/"+id, "", 200); err != nil {
			return err
		}
	}
	if err := errors.Join(h.signal(syscall.SIGKILL), h.agent.start("--on-shutdown=destroy")); err != nil {
		return err
	}
	var errs []error
	for i, id := range ids {
		after, err := h.want("GET", "/sandboxes/"+id, "", 200)
		if before[i].text != after.text {
			err = errors.Join(err, fmt.Errorf("before: %s\nafter: %s", before[i].text, after.text))
		}
		errs = append(errs, err)
	}
	_, err := h.want("POST", "/v2/sandboxes/"+ids[1]+"/connect", `{}`, 201, tokens[1])
	errs = append(errs, err)
	for i, id := range ids {
		errs = append(errs, h.showToken(id, tokens[i]), h.kill(id))
	}
	return errors.Join(errs...)
}
