package e2b

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// startedAt makes n sandboxes, each a second older than the next one, and returns
// their ids, oldest first.
func (h *host) startedAt(first time.Time, n int) []string {
	var ids []string
	for i := range n {
		id := h.create(base)
		box, _ := sandbox.ParseLooseID(id)
		h.fake.boxes[box].StartedAt = first.Add(time.Duration(i) * time.Second)
		ids = append(ids, id)
	}
	return ids
}

// ids returns the sandboxes of a list.
func ids(t *testing.T, r reply) []string {
	t.Helper()
	var all []struct{ SandboxID string }
	if err := json.Unmarshal([]byte(r.body), &all); err != nil {
		t.Fatalf("%s: %v", r.body, err)
	}
	var names []string
	for _, sb := range all {
		names = append(names, sb.SandboxID)
	}
	return names
}

func TestPages(t *testing.T) {
	for _, order := range []string{"", "desc", "asc"} {
		h := newHost(t)
		want := h.startedAt(time.Unix(5000, 0), 5)
		if order != "asc" {
			slices.Reverse(want)
		}
		var got []string
		var sizes []int
		for token, first := "", true; first || token != ""; first = false {
			r := h.want(h.call("GET", "/v2/sandboxes?limit=2&order="+orderOr(order)+"&nextToken="+url.QueryEscape(token), ""), 200, "")
			page := ids(t, r)
			got, sizes = append(got, page...), append(sizes, len(page))
			if total := r.header.Get("X-Total-Running"); total != fmt.Sprint(5+len(sizes)-1) {
				t.Errorf("total is %s", total)
			}
			token = r.header.Get("X-Next-Token")
			if order != "asc" { // another one starts while the pages are read
				h.create(base)
			} else {
				box, _ := sandbox.ParseLooseID(h.create(base))
				h.fake.boxes[box].StartedAt = time.Unix(1, 0)
			}
		}
		if !slices.Equal(got, want) || !slices.Equal(sizes, []int{2, 2, 1}) {
			t.Errorf("order %q: pages of %v have %v, want %v", order, sizes, got, want)
		}
	}
}

func orderOr(order string) string {
	if order == "" {
		return "desc"
	}
	return order
}

// Equal times are in the order of ids; times are equal to the millisecond.
func TestEqualTimes(t *testing.T) {
	h := newHost(t)
	want := h.startedAt(time.Unix(5000, 0), 3)
	for i, id := range want {
		box, _ := sandbox.ParseLooseID(id)
		h.fake.boxes[box].StartedAt = time.Unix(5000, int64(900_000-i))
	}
	if got := ids(t, h.call("GET", "/v2/sandboxes", "")); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	r := h.call("GET", "/v2/sandboxes?limit=1", "")
	r = h.call("GET", "/v2/sandboxes?limit=1&nextToken="+r.header.Get("X-Next-Token"), "")
	if got := ids(t, r); !slices.Equal(got, want[1:2]) {
		t.Errorf("page 2 is %v, want %v", got, want[1:2])
	}
}

func TestFilters(t *testing.T) {
	h := newHost(t)
	all := h.startedAt(time.Unix(5000, 0), 3)
	h.want(h.call("POST", "/sandboxes/"+all[0]+"/pause", ""), 204, "")
	box, _ := sandbox.ParseLooseID(all[2])
	h.fake.boxes[box].Template, h.fake.boxes[box].StartedAt = "other", time.Unix(5002, 999_999)
	for query, want := range map[string][]string{
		"":                                  {all[2], all[1], all[0]},
		"state=running":                     {all[2], all[1]},
		"state=paused":                      {all[0]},
		"state=running,paused":              {all[2], all[1], all[0]},
		"state=running%2Cpaused":            {all[2], all[1], all[0]},
		"state=running&state=paused":        {all[2], all[1], all[0]},
		"startedAfter=1970-01-01T01:23:21Z": {all[2], all[1]},
		"startedAfter=1970-01-01T01:23:22Z": {all[2]},
		"startedAfter=1970-01-01T01%3A23%3A22.000%2B00%3A00": {all[2]},
		"startedAfter=1970-01-01T01:23:22.001Z":              nil,
		"template=base":                                      {all[1], all[0]},
		"template=minimal":                                   {all[1], all[0]},
		"template=p/minimal":                                 {all[1], all[0]},
		"template=" + baseID:                                 {all[1], all[0]},
		"template=nope":                                      nil,
	} {
		r := h.want(h.call("GET", "/v2/sandboxes?"+query, ""), 200, "")
		if got := ids(t, r); !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", query, got, want)
		}
		if counted := r.header.Get("X-Total-Running") != ""; counted != (query != "state=paused") {
			t.Errorf("%s: X-Total-Running is %q", query, r.header.Get("X-Total-Running"))
		}
	}
	if got := ids(t, h.call("GET", "/sandboxes", "")); !slices.Equal(got, []string{all[2], all[1]}) {
		t.Errorf("v1 has %v", got)
	}
}

func TestListRefuses(t *testing.T) {
	h := newHost(t)
	h.startedAt(time.Unix(5000, 0), 3)
	token := h.call("GET", "/v2/sandboxes?limit=1", "").header.Get("X-Next-Token")
	foreign := base64.RawURLEncoding.EncodeToString([]byte(`{"k":"snapshots","o":"desc","t":1,"n":"a"}`))
	for query, text := range map[string]string{
		"limit=0":                      "limit",
		"limit=101":                    "limit",
		"limit=x":                      "limit",
		"limit=99999999999999999999":   "limit",
		"order=up":                     "order",
		"order=asc&nextToken=" + token: "Invalid next token",
		"nextToken=" + foreign:         "Invalid next token",
		"nextToken=%21":                "Invalid next token",
		"nextToken=bnVsbA":             "Invalid next token",
		"nextToken=" + token[:9]:       "Invalid next token",
		"state=gone":                   "state",
		"startedAfter=yesterday":       "startedAfter",
		"template=base:default":        "has a tag",
		"template=%20%2F":              "template",
		"metadata=a":                   "key=value",
		"metadata=a%3Db%3Dc":           "key=value",
		"metadata=a%3Db%26":            "key=value",
		"metadata=%2525zz%3Da":         "not encoded",
	} {
		h.want(h.call("GET", "/v2/sandboxes?"+query, ""), 400, text)
	}
	h.want(h.call("GET", "/sandboxes?metadata=a", ""), 400, "key=value")
}

func TestMetadataFilter(t *testing.T) {
	h := newHost(t)
	id := h.create(`{"templateID":"base","metadata":{"a b":"c&d","plain":"x","ü=":"100%","empty":""}}`)
	h.create(`{"templateID":"base","metadata":{"plain":"y"}}`)
	for query, found := range map[string]bool{
		// As the SDKs send it: encodeURIComponent, URLSearchParams, the query.
		"a%252520b%3Dc%252526d":              true,
		"a%252520b%3Dc%252526d%26plain%3Dx":  true,
		"a%252520b%3Dc%252526d%26plain%3Dy":  false,
		"plain=x":                            true, // as the CLI sends simple words
		"plain%3Dx":                          true,
		"plain%3Dz":                          false,
		"empty%3D":                           true,
		"missing%3D":                         false,
		"%2525C3%2525BC%25253D%3D100%252525": true,
	} {
		for _, path := range []string{"/v2/sandboxes?state=running&metadata=", "/sandboxes?metadata="} {
			got := ids(t, h.want(h.call("GET", path+query, ""), 200, ""))
			if slices.Contains(got, id) != found {
				t.Errorf("%s%s finds %v", path, query, got)
			}
		}
	}
}

// A hundred keys with 50 sandboxes each: a list reads the caller's own alone.
func BenchmarkList(b *testing.B) {
	h := newHost(b)
	for i := range 50 {
		id := sandbox.ID(fmt.Sprintf("sb-%016x", i))
		h.fake.boxes[id] = &Sandbox{ID: id, Project: "p", State: sandbox.Running, StartedAt: time.Unix(int64(i), 0)}
	}
	for b.Loop() {
		if r := h.call("GET", "/v2/sandboxes", ""); r.status != 200 || !strings.Contains(r.body, "sandboxID") {
			b.Fatal(r)
		}
	}
}

func FuzzMetadata(f *testing.F) {
	f.Add("a%252520b=c")
	f.Add("a=b&c=d")
	f.Fuzz(func(t *testing.T, text string) {
		pairs, err := parseMetadata(&text)
		if err == nil && text != "" && len(pairs) == 0 {
			t.Fatalf("%q has no pair", text)
		}
	})
}

func FuzzNextToken(f *testing.F) {
	f.Add("bnVsbA")
	f.Fuzz(func(t *testing.T, token string) {
		p, err := parsePage("sandboxes", nil, nil, &token)
		if err == nil && token != "" && p.after.Kind != "sandboxes" {
			t.Fatalf("%q is %+v", token, p)
		}
	})
}
