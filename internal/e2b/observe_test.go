package e2b

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

func TestTimeoutIsDemanded(t *testing.T) {
	h := newHost(t)
	id := h.create(base)
	for _, body := range []string{"{}", `{"timeout":null}`, ""} {
		h.want(h.call("POST", "/sandboxes/"+id+"/timeout", body), 400, "")
		h.want(h.call("POST", "/sandboxes/"+id+"/connect", body), 400, "")
	}
	h.want(h.call("POST", "/sandboxes/"+id+"/timeout", `{"timeout":-1}`), 400, "negative")
	h.want(h.call("POST", "/sandboxes/"+id+"/timeout", `{"timeout":86401}`), 400, "86400")
	h.want(h.call("POST", "/sandboxes/"+id+"/timeout", `{"timeout":0}`), 204, "")
	h.want(h.call("POST", "/v2/sandboxes/"+id+"/connect", `{"timeout":0}`), 400, "greater than 0")
}

func TestNetworkUpdateReplacesEverything(t *testing.T) {
	h := newHost(t)
	id := h.create(`{"templateID":"base","network":{"denyOut":["0.0.0.0/0"],"allowOut":["a.test"],"maskRequestHost":"m"}}`)
	h.want(h.call("PUT", "/sandboxes/"+id+"/network", `{"allowOut":["a.test"]}`), 400, "ALL_TRAFFIC")
	h.want(h.call("PUT", "/sandboxes/"+id+"/network", `{"rules":{"a":[]}}`), 400, "rules")
	h.want(h.call("PUT", "/sandboxes/"+id+"/network", `{"allow_internet_access":false,"allowOut":["b.test"]}`), 204, "")
	h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"network":{"allowOut":["b.test"],"maskRequestHost":"m"}`)
	h.want(h.call("PUT", "/sandboxes/"+id+"/network", `{}`), 204, "")
	r := h.want(h.call("GET", "/sandboxes/"+id, ""), 200, `"network":{"maskRequestHost":"m"}`)
	if r.field("allowInternetAccess") != nil {
		t.Errorf("detail is %s", r.body)
	}
}

func TestMetrics(t *testing.T) {
	h := newHost(t)
	id := h.create(base)
	path := "/sandboxes/" + id + "/metrics"
	h.want(h.call("GET", path, ""), 200, "[]")
	h.want(h.call("GET", "/sandboxes/metrics?sandbox_ids="+id, ""), 200, `{"sandboxes":{}}`)
	for i := range 3 {
		h.fake.metrics = append(h.fake.metrics, Metric{At: time.Unix(int64(100+5*i), 500_000_000), VCPUs: 1, MemTotal: 512 << 20})
	}
	for query, want := range map[string][]int64{
		"": {100, 105, 110}, "?start=101": {105, 110}, "?end=105": {100, 105}, "?start=101&end=109": {105}, "?start=200": nil,
	} {
		var all []struct{ TimestampUnix int64 }
		r := h.want(h.call("GET", path+query, ""), 200, "")
		_ = json.Unmarshal([]byte(r.body), &all)
		var got []int64
		for _, m := range all {
			got = append(got, m.TimestampUnix)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", query, got, want)
		}
	}
	for _, query := range []string{"?start=-1", "?start=x", "?start=10&end=5", "?end=9223372036854775807"} {
		h.want(h.call("GET", path+query, ""), 400, "")
	}
	h.want(h.call("GET", "/sandboxes/metrics?sandbox_ids=nope,"+id, ""), 200, `"`+id+`":{"cpuCount":1`)
	h.want(h.call("GET", "/sandboxes/metrics", ""), 400, "sandbox_ids")
	h.want(h.call("GET", "/sandboxes/metrics?sandbox_ids="+strings.Repeat("a,", 101), ""), 400, "at most 100")
}

// The manager is told who calls, without the key.
func TestActor(t *testing.T) {
	h := newHost(t)
	h.want(h.call("DELETE", "/sandboxes/"+h.create(base), ""), 204, "")
	caller, err := h.keys.Lookup(h.p)
	if err != nil {
		t.Fatal(err)
	}
	want := sandbox.Actor{KeyID: caller.KeyID, Project: "p", Address: "192.0.2.1:1234", What: "KillSandbox"}
	if h.fake.destroyer != want {
		t.Errorf("got %+v, want %+v", h.fake.destroyer, want)
	}
}

func TestLogs(t *testing.T) {
	h := newHost(t)
	id := h.create(base)
	for i, level := range []string{"debug", "info", "warn", "error", "odd"} {
		h.fake.lines = append(h.fake.lines, LogLine{
			At: time.UnixMilli(int64(1000 + i)), Level: level, Message: fmt.Sprint("line ", i), Fields: map[string]string{"logger": "console"},
		})
	}
	h.want(h.call("GET", "/sandboxes/"+id+"/logs?limit=1", ""), 200,
		`"line":"{\"level\":\"debug\",\"logger\":\"console\",\"message\":\"line 0\"}"`)
	h.want(h.call("GET", "/sandboxes/"+id+"/logs?start=1005", ""), 200, `{"logEntries":[],"logs":[]}`)
	for query, want := range map[string]string{
		"":                               "4 3 2 1 0",
		"?direction=forward":             "0 1 2 3 4",
		"?direction=forward&cursor=1003": "3 4",
		"?cursor=1001":                   "1 0",
		"?level=warn":                    "3 2",
		"?search=line+2":                 "2",
		"?limit=2":                       "4 3",
	} {
		var answer struct{ Logs []struct{ Message string } }
		r := h.want(h.call("GET", "/v2/sandboxes/"+id+"/logs"+query, ""), 200, "")
		_ = json.Unmarshal([]byte(r.body), &answer)
		var got []string
		for _, l := range answer.Logs {
			got = append(got, strings.TrimPrefix(l.Message, "line "))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %v, want %s", query, got, want)
		}
	}
	for _, query := range []string{"?limit=0", "?limit=1001", "?direction=up", "?level=loud"} {
		h.want(h.call("GET", "/v2/sandboxes/"+id+"/logs"+query, ""), 400, "")
	}
}

func TestEvents(t *testing.T) {
	h := newHost(t)
	for i, what := range []string{"created", "paused", "resumed", "killed"} {
		h.fake.log = append(h.fake.log, Event{
			ID: uint64(i), At: time.Unix(int64(i), 0), Type: what, Sandbox: "sb-0123456789abcdef", Data: map[string]any{"project": "p"},
		})
	}
	h.fake.log = append(h.fake.log, Event{Type: "created", Sandbox: "sb-0123456789abcdee", Data: map[string]any{"project": "q"}})
	for query, want := range map[string]string{
		"": "3 2 1 0", "?orderAsc=true": "0 1 2 3", "?limit=1&offset=1": "2", "?offset=9": "",
		"?types=sandbox.lifecycle.killed,sandbox.lifecycle.created": "3 0",
	} {
		for _, path := range []string{"/events/sandboxes", "/events/sandboxes/sb0123456789abcdef"} {
			var all []struct{ ID string }
			r := h.want(h.call("GET", path+query, ""), 200, "")
			_ = json.Unmarshal([]byte(r.body), &all)
			var got []string
			for _, e := range all {
				got = append(got, e.ID)
			}
			if strings.Join(got, " ") != want {
				t.Errorf("%s%s: got %v, want %s", path, query, got, want)
			}
		}
	}
	h.want(h.call("GET", "/events/sandboxes?limit=1", ""), 200, `"type":"sandbox.lifecycle.killed"`)
	for _, query := range []string{"?limit=0", "?limit=101", "?offset=-1"} {
		h.want(h.call("GET", "/events/sandboxes"+query, ""), 400, "")
	}
	h.want(h.call("GET", "/events/sandboxes/nope", ""), 404, "")
}
