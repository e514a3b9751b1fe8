package e2e_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// behaviours are what E2B's clients expect of a host, by number.
var behaviours = [52]string{
	1:  "create answers with all that clients require",
	2:  "create by the older call lives 15 seconds",
	3:  "the CLI's create",
	4:  "unknown template",
	5:  "timeout 0 and -1",
	6:  "no key, wrong key",
	7:  "pause without memory excludes what it excludes",
	8:  "metadata comes back as it was given",
	9:  "variables of the sandbox and of a command",
	10: "Idempotency-Key",
	11: "chunked body",
	12: "full",
	13: "no internet",
	14: "get shows what was asked for",
	15: "kill, twice, and of one that never was",
	16: "spellings of an id",
	17: "timeout shortens and extends, and what is there after the end",
	18: "connect for a shorter time moves nothing",
	19: "connect for a longer time",
	20: "connect after kill",
	21: "refreshes never shorten",
	22: "pause, twice",
	23: "connect to a paused one",
	24: "pause without memory",
	25: "ten connects at once",
	26: "pause at the end, again and again",
	27: "traffic resumes",
	28: "a stranger on envd's port does not resume",
	29: "kill of a paused one frees its disk",
	30: "the agent is killed and started again",
	31: "a new sandbox is on page one",
	32: "pages while others come and go",
	33: "list by metadata",
	34: "list by state, start and template, in order",
	35: "bad limits and tokens of lists",
	36: "named snapshot",
	37: "unnamed snapshot",
	38: "delete of a snapshot, twice",
	39: "fork",
	40: "fork of a paused one, of none",
	41: "envd's token and signed URLs",
	42: "closed port, private port",
	43: "kill during a stream",
	44: "a silent stream of 60 seconds",
	45: "a template is built of files and steps",
	46: "a second build runs nothing again",
	47: "a build that fails says where",
	48: "a template's program runs in a new sandbox",
	49: "names and tags of templates",
	50: "templates in use, lists of templates",
	51: "metrics, logs and events",
}

// shown is what a client had to say of a behaviour.
type shown struct {
	by, err string
}

// showcase collects what is shown. It is safe for concurrent use.
type showcase struct {
	mu sync.Mutex
	by [len(behaviours)][]shown
}

func (s *showcase) add(n int, by, err string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.by[n] = append(s.by[n], shown{by, err})
}

// report has a subtest for each of the behaviours with these numbers.
func (s *showcase) report(t *testing.T, numbers ...int) {
	for _, n := range numbers {
		t.Run(fmt.Sprintf("%02d %s", n, behaviours[n]), func(t *testing.T) {
			if len(s.by[n]) == 0 {
				t.Error("no client has shown it")
			}
			for _, shown := range s.by[n] {
				if shown.err != "" {
					t.Errorf("%s: %s", shown.by, shown.err)
				}
			}
		})
	}
}

// hears runs a script that prints what it shows, one JSON object a line.
func (s *showcase) hears(t *testing.T, by string, cmd *exec.Cmd) {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Errorf("%s: %v", by, err)
		return
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var line struct {
			N     int
			Error string
			MS    int
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil || line.N <= 0 || line.N >= len(behaviours) {
			t.Logf("%s: %s", by, lines.Text())
			continue
		}
		s.add(line.N, by, line.Error)
		t.Logf("%s: %d in %d ms", by, line.N, line.MS)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%s: %v\n%s", by, err, stderr.String())
	}
}

// e2bHost is an agent with an API key, as E2B's clients see it.
type e2bHost struct {
	*agent
	key string
	// smallKey is of a project that may have one sandbox.
	smallKey string
}

// startE2B starts an agent for one test, and makes a key.
func startE2B(t testing.TB, args ...string) *e2bHost {
	t.Helper()
	h := &e2bHost{agent: startAgent(t, args...)}
	h.key = h.newKey(t)
	h.setKey(h.key)
	h.smallKey = h.newKey(t, "--project", "small", "--quota-sandboxes", "1")
	return h
}

// newKey makes a key with `wrenn key create`.
func (h *e2bHost) newKey(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(h.bin, "wrenn"), append([]string{"key", "create", "--state-dir", h.stateDir}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("make key: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// env is what clients go by.
func (h *e2bHost) env() []string {
	return []string{"E2B_API_KEY=" + h.key, "E2B_API_URL=" + h.url, "E2B_SANDBOX_URL=" + h.url,
		"E2B_DOMAIN=localhost:" + h.addr[strings.LastIndex(h.addr, ":")+1:]}
}

// reply is one of the REST API.
type reply struct {
	status int
	header http.Header
	text   string
}

func (a reply) object() map[string]any {
	var o map[string]any
	_ = json.Unmarshal([]byte(a.text), &o)
	return o
}

func (a reply) str(name string) string {
	s, _ := a.object()[name].(string)
	return s
}

// at is a time in the answer, zero if it has none of that name.
func (a reply) at(name string) time.Time {
	at, _ := time.Parse(time.RFC3339, a.str(name))
	return at
}

// is returns an error unless the answer has a status, and a body with all words.
func (a reply) is(status int, words ...string) error {
	for _, w := range words {
		if !strings.Contains(a.text, w) {
			return fmt.Errorf("HTTP %d %s: want %q in it", a.status, a.text, w)
		}
	}
	if a.status != status {
		return fmt.Errorf("HTTP %d %s: want %d", a.status, a.text, status)
	}
	if status < 400 {
		return nil
	}
	code, _ := a.object()["code"].(float64)
	if message := a.str("message"); int(code) != status || message == "" {
		return fmt.Errorf("HTTP %d %s: want the status as code, and a message", a.status, a.text)
	}
	return nil
}

// call sends a request; headers are pairs, and the last of a name counts.
func (h *e2bHost) call(method, path string, body io.Reader, headers ...string) (reply, error) {
	r, err := http.NewRequest(method, h.url+path, body)
	if err != nil {
		return reply{}, err
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := rawClient.Do(r)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(text)}, err
}

var rawClient = &http.Client{
	Transport:     &http.Transport{},
	Timeout:       2 * time.Minute,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// rest calls the REST API with the host's key.
func (h *e2bHost) rest(method, path, body string, headers ...string) (reply, error) {
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	return h.call(method, path, r, append([]string{"X-API-KEY", h.key, "Content-Type", "application/json"}, headers...)...)
}

// plane calls a port of a sandbox.
func (h *e2bHost) plane(id, port, path string, headers ...string) (reply, error) {
	return h.call("GET", path, nil, append([]string{"E2b-Sandbox-Id", id, "E2b-Sandbox-Port", port}, headers...)...)
}

// want is rest with an error unless the answer has a status, and a body with all words.
func (h *e2bHost) want(method, path, body string, status int, words ...string) (reply, error) {
	a, err := h.rest(method, path, body)
	if err == nil {
		err = a.is(status, words...)
	}
	if err != nil {
		err = fmt.Errorf("%s %s %s: %w", method, path, body, err)
	}
	return a, err
}

// newSandbox creates a sandbox by REST and returns its id and token.
func (h *e2bHost) newSandbox(body string) (id, token string, err error) {
	a, err := h.want("POST", "/v2/sandboxes", body, 201)
	return a.str("sandboxID"), a.str("envdAccessToken"), err
}

func (h *e2bHost) kill(id string) error {
	_, err := h.want("DELETE", "/sandboxes/"+id, "", 204)
	return err
}

// The fifty behaviours, each by every client that can show it: the published ones for
// JavaScript, Python and the command line, and plain HTTP. One agent, and the clients
// at the same time.
func TestE2B(t *testing.T) {
	c := installClients(t)
	h := startE2B(t, "--rate", "1000", "--create-rate", "1000")
	var seen showcase
	var together sync.WaitGroup
	for by, cmd := range map[string]*exec.Cmd{
		"JavaScript": c.node(t, "testdata/e2b/suite.mjs"),
		"Python":     c.python("testdata/e2b/suite.py"),
	} {
		cmd.Env = append(cmd.Env, h.env()...)
		together.Go(func() { seen.hears(t, by, cmd) })
	}
	together.Go(func() { h.showRaw(&seen) })
	together.Wait()
	seen.add(30, "HTTP", text(h.showRestart()))

	for n := 1; n < len(behaviours); n++ {
		if n < 45 || n > 48 { // those are TestE2BTemplates's
			seen.report(t, n)
		}
	}
	t.Run("nothing is left", func(t *testing.T) {
		left, err := h.want("GET", "/v2/sandboxes", "", 200)
		if err != nil || strings.TrimSpace(left.text) != "[]" {
			t.Errorf("sandboxes are left: %s, %v", left.text, err)
		}
		snapshots, err := h.want("GET", "/snapshots", "", 200)
		if err != nil || strings.TrimSpace(snapshots.text) != "[]" {
			t.Errorf("snapshots are left: %s, %v", snapshots.text, err)
		}
	})
}

// text is an error's, empty for none.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
