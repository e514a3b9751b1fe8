package gateway

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestTarget(t *testing.T) {
	for _, c := range []struct {
		host, id, port   string
		wantID, wantPort string
	}{
		{"localhost:50051", "", "", "", ""},
		{"localhost:50051", "sb-1", "", "sb-1", "49983"},
		{"localhost:50051", "sb-1", "80", "sb-1", "80"},
		{"80-sb-0a.localhost:50051", "", "", "sb-0a", "80"},
		{"80-sb-0a.example", "sb-1", "81", "sb-1", "81"}, // headers go first
		{"80-sb-0a", "", "", "", ""},
		{"80-sb-0A.x", "", "", "", ""},
		{"x.80-sb-0a.x", "", "", "", ""},
		{"123456-sb-0a.x", "", "", "", ""},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Host = c.host
		if c.id != "" {
			r.Header.Set(headerID, c.id)
		}
		if c.port != "" {
			r.Header.Set(headerPort, c.port)
		}
		id, port, ok := target(r)
		if id != c.wantID || port != c.wantPort || ok != (c.wantID != "") {
			t.Errorf("%+v: got %q, %q, %v", c, id, port, ok)
		}
	}
}

func TestIsReserved(t *testing.T) {
	for path, want := range map[string]bool{
		"/init": true, "init": true, "//init": true, "/init/": true, "/./init": true, "/a/../init": true, "/../init": true, "/init/.": true,
		"/freeze": true, "/upgrade": true, "/": false, "": false, "/initial": false, "/health": false, "/files": false, "/init/x": false,
	} {
		if got := isReserved(path); got != want {
			t.Errorf("%q: %v", path, got)
		}
	}
}

func TestRequestsPerSandbox(t *testing.T) {
	g := New(nil, http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	for range maxPerSandbox {
		if !g.enter("a") {
			t.Fatal("refused too early")
		}
	}
	if g.enter("a") {
		t.Error("one too many")
	}
	if !g.enter("b") {
		t.Error("another sandbox is counted with it")
	}
	g.leave("a")
	if !g.enter("a") {
		t.Error("a place was not given back")
	}
	for range maxPerSandbox {
		g.leave("a")
	}
	g.leave("b")
	if len(g.count) != 0 {
		t.Errorf("still counted: %v", g.count)
	}
}
