package e2b

import (
	"path/filepath"
	"sync"
	"testing"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/idempotency"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

const keyHeader = "Idempotency-Key"

func TestIdempotencyKey(t *testing.T) {
	h := newHost(t)
	first := h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k-1"), 201, "")
	again := h.want(h.call("POST", "/v2/sandboxes", `{ "templateID": "base", "timeout": 300 }`, keyHeader, "k-1"), 201, "")
	if again.body != first.body {
		t.Errorf("answers are %s and %s", first.body, again.body)
	}
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"base","timeout":1}`, keyHeader, "k-1"), 422, "idempotency_request_mismatch")
	h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k-2"), 201, "")
	h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k-1", "X-API-KEY", h.q), 201, "")
	for _, key := range []string{"", "A", "a_b", string(make([]byte, 256))} {
		h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, key), 400, "")
	}
	if len(h.fake.boxes) != 3 {
		t.Errorf("%d sandboxes were made", len(h.fake.boxes))
	}
	// The answer outlives the sandbox, without its token.
	id, _ := first.field("sandboxID").(string)
	h.want(h.call("DELETE", "/sandboxes/"+id, ""), 204, "")
	gone := h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k-1"), 201, `"sandboxID":"`+id+`"`)
	if gone.field("envdAccessToken") != nil {
		t.Errorf("answer is %s", gone.body)
	}
	// The template, too, may be gone.
	h.fake.templates = nil
	h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k-2"), 201, "")
}

func TestFailedCreateMayComeAgain(t *testing.T) {
	h := newHost(t)
	h.fake.fail["create"] = errdefs.Unavailable.Errorf("no")
	h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k"), 503, "sandbox_create_failed")
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"nope"}`, keyHeader, "k"), 404, "")
	delete(h.fake.fail, "create")
	h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k"), 201, "")
}

func TestSameKeyTwiceAtOnce(t *testing.T) {
	h := newHost(t)
	h.fake.hold, h.fake.held = make(chan struct{}), make(chan struct{})
	var first reply
	var all sync.WaitGroup
	ended := make(chan struct{})
	all.Go(func() {
		first = h.call("POST", "/v2/sandboxes", base, keyHeader, "k")
		close(ended)
	})
	select {
	case <-h.fake.held:
	case <-ended:
		t.Fatalf("the first request ended with %d %s", first.status, first.body)
	}
	r := h.want(h.call("POST", "/v2/sandboxes", base, keyHeader, "k"), 409, "idempotency_in_progress")
	if r.header.Get("Should-Retry") != "true" {
		t.Error("clients are not told to come again")
	}
	h.want(h.call("POST", "/v2/sandboxes", `{"templateID":"base","timeout":1}`, keyHeader, "k"), 422, "idempotency_request_mismatch")
	h.fake.hold <- struct{}{}
	all.Wait()
	h.want(first, 201, "")
	if len(h.fake.boxes) != 1 {
		t.Errorf("%d sandboxes were made", len(h.fake.boxes))
	}
}

// The agent ends in the middle of two creates, of which one has made its sandbox.
func TestCreateAcrossARestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "requests")
	begin := func(exists func(string) bool) *host {
		return newHost(t, func(c *Config) {
			requests, err := idempotency.Open(dir, exists)
			if err != nil {
				t.Fatal(err)
			}
			c.Requests = requests
		})
	}
	h := begin(nil)
	made := h.create(base)
	box, _ := sandbox.ParseLooseID(made)
	requests, err := idempotency.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	body := apiBase()
	for key, subject := range map[string]string{"made": string(box), "half": "sb-00000000000000ff"} {
		if _, _, err := requests.Begin(idempotency.Request{Scope: "create p", Key: key, Digest: digestOf(body, 300)}, subject); err != nil {
			t.Fatal(err)
		}
	}
	after := begin(func(subject string) bool { return subject == string(box) })
	after.fake.boxes, after.fake.requests = h.fake.boxes, h.fake.requests
	after.fake.ids = 100
	after.want(after.call("POST", "/v2/sandboxes", base, keyHeader, "made"), 201, `"sandboxID":"`+made+`"`)
	r := after.want(after.call("POST", "/v2/sandboxes", base, keyHeader, "half"), 201, "")
	if r.field("sandboxID") == made || len(after.fake.boxes) != 2 {
		t.Errorf("%d sandboxes, the second is %s", len(after.fake.boxes), r.body)
	}
	// What was made before the agent ended, and is gone since, cannot be told.
	after.want(after.call("DELETE", "/sandboxes/"+made, ""), 204, "")
	after.want(after.call("POST", "/v2/sandboxes", base, keyHeader, "made"), 409, "idempotency_outcome_unknown")
}

func apiBase() api.NewSandbox { return api.NewSandbox{TemplateID: "base"} }
