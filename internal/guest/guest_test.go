package guest_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// TestInitBody: the guest is told the time at which the body is sent, and a
// user's variable that looks like the stand-in for it stays as it is.
func TestInitBody(t *testing.T) {
	var got guestapi.InitRequest
	var took time.Duration
	var length int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		dec := json.NewDecoder(r.Body)
		dec.DisallowUnknownFields()
		if err := dec.Decode(&got); err != nil {
			t.Error(err)
		}
		took, length = time.Since(*got.Timestamp), r.ContentLength
		w.Header().Set(guestapi.HeaderProtocol, guestapi.Protocol)
		w.WriteHeader(http.StatusNoContent)
	}))
	defer server.Close()
	c := guest.New(netip.MustParseAddrPort(server.Listener.Addr().String()), "")
	defer c.Close()
	in := guest.Init{
		AccessToken: "a", Env: map[string]string{"A": "9999-12-31T23:59:59.999999999Z"}, DefaultUser: "u", DefaultWorkdir: "/w",
		Hostname: "h", SandboxID: "sb-1", Entropy: []byte("e"), Restored: true, NewBootID: true, CloneKey: "key",
	}
	if _, err := c.Init(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	if took < 0 || took > 5*time.Second || length <= 0 {
		t.Errorf("the body is %v old and %d bytes long", took, length)
	}
	key := sha256.Sum256([]byte("key"))
	want := guestapi.InitRequest{
		Timestamp: got.Timestamp, AccessToken: "a", EnvVars: in.Env, DefaultUser: "u", DefaultWorkdir: "/w",
		Hostname: "h", SandboxID: "sb-1", Entropy: []byte("e"), Restored: true, NewBootID: true, CloneKey: key[:],
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	// A given time goes as it is; a user that is not told any variables keeps them.
	at := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	got = guestapi.InitRequest{}
	if _, err := c.Init(t.Context(), guest.Init{Time: at}); err != nil || !got.Timestamp.Equal(at) || got.EnvVars != nil {
		t.Errorf("got %v, %v, %v", got.Timestamp, got.EnvVars, err)
	}
}

func TestWaitReadySeesItAtOnce(t *testing.T) {
	addr := freePort(t)
	c := guest.New(addr, "")
	defer c.Close()
	const boots = 100 * time.Millisecond
	began := time.Now()
	go func() {
		time.Sleep(boots)
		l, err := net.Listen("tcp", addr.String())
		if err != nil {
			t.Error(err)
			return
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNoContent)
			go l.Close()
		})}
		_ = server.Serve(l)
		t.Cleanup(func() { server.Close() })
	}()
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < boots || took > boots+time.Second {
		t.Errorf("ready after %v", took)
	}
}

func TestWaitReadyObeysContext(t *testing.T) {
	c := guest.New(freePort(t), "")
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.WaitReady(ctx); errdefs.ClassOf(err) != errdefs.Unavailable {
		t.Errorf("got %v, want unavailable", err)
	}
}

func TestInit(t *testing.T) {
	c := serveEnvd(t)
	in := guest.Init{AccessToken: "secret", Env: map[string]string{"A": "1"}, DefaultUser: "root", DefaultWorkdir: "/usr", SandboxID: "sb-1"}
	if _, err := c.Init(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	// This client knows no token: it may not even try again.
	if _, err := c.Init(t.Context(), guest.Init{AccessToken: "other"}); errdefs.ClassOf(err) != errdefs.Unauthenticated {
		t.Errorf("second init: %v, want unauthenticated", err)
	}
	if _, err := c.Exec(t.Context(), guest.Command{Cmd: "true"}); err == nil {
		t.Error("a command ran without the token")
	}
	withToken := guest.New(netip.MustParseAddrPort(c.URL()[len("http://"):]), "secret")
	defer withToken.Close()
	got, err := withToken.Exec(t.Context(), guest.Command{Cmd: "sh", Args: []string{"-c", "echo $A $E2B_SANDBOX_ID; pwd"}})
	if want := "1 sb-1\n/usr\n"; err != nil || string(got.Stdout) != want {
		t.Errorf("got %q, %v; want %q", got.Stdout, err, want)
	}
	if version, err := withToken.Init(t.Context(), in); err != nil || version != guestapi.E2BVersion {
		t.Errorf("init with the token: %q, %v", version, err)
	}
	resp, err := c.HTTPClient().Get(c.URL() + guestapi.PathHealth)
	if err != nil || resp.StatusCode != http.StatusNoContent || resp.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("health: %v, %v", resp, err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
}

// A clone's key opens a restored guest, which knows its digest, in place of the
// token of before.
func TestInitOfAClone(t *testing.T) {
	c := serveEnvd(t)
	if _, err := c.Init(t.Context(), guest.Init{AccessToken: "source's", CloneKey: "key"}); err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort(c.URL()[len("http://"):])
	host := guest.New(addr, "key")
	defer host.Close()
	if _, err := host.Init(t.Context(), guest.Init{AccessToken: "clone's"}); errdefs.ClassOf(err) != errdefs.Unauthenticated {
		t.Errorf("not restored: %v, want unauthenticated", err)
	}
	in := guest.Init{AccessToken: "clone's", CloneKey: "another", Restored: true}
	if _, err := host.Init(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	in.AccessToken = "third"
	if _, err := host.Init(t.Context(), in); errdefs.ClassOf(err) != errdefs.Unauthenticated {
		t.Errorf("again: %v, want unauthenticated", err)
	}
}

func TestInitRefusesAnotherProtocol(t *testing.T) {
	for _, version := range []string{"", "0", "2"} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(guestapi.HeaderProtocol, version)
			w.WriteHeader(http.StatusNoContent)
		}))
		c := guest.New(netip.MustParseAddrPort(server.Listener.Addr().String()), "")
		if _, err := c.Init(t.Context(), guest.Init{}); errdefs.ClassOf(err) != errdefs.Unsupported {
			t.Errorf("version %q: %v, want unsupported", version, err)
		}
		c.Close()
		server.Close()
	}
}

// Nothing of a client outlives the incarnation of its guest.
func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	testenv.Program(t, "pgrep")
	c := serveEnvd(t)
	ended := make(chan error, 1)
	go func() {
		_, err := c.Exec(t.Context(), guest.Command{Cmd: "sleep", Args: []string{"100"}})
		ended <- err
	}()
	other := guest.New(netip.MustParseAddrPort(c.URL()[len("http://"):]), "")
	defer other.Close()
	waitUntil(t, func() bool {
		got, err := other.Exec(t.Context(), guest.Command{Cmd: "pgrep", Args: []string{"-P", strconv.Itoa(os.Getpid()), "-x", "sleep"}})
		return err == nil && got.ExitCode == 0
	})
	c.Close()
	c.Close()
	if err := <-ended; errdefs.ClassOf(err) != errdefs.Unavailable {
		t.Errorf("under way: %v, want unavailable", err)
	}
	if _, err := c.Exec(t.Context(), guest.Command{Cmd: "true"}); errdefs.ClassOf(err) != errdefs.Unavailable {
		t.Errorf("after close: %v, want unavailable", err)
	}
}

// TestQuiesceParts: when Quiesce returns, the guest knows that the connection is
// over; otherwise the snapshot holds it.
func TestQuiesceParts(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var knows atomic.Bool
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		if _, err := http.ReadRequest(in); err != nil {
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
		_, err = in.ReadByte()
		knows.Store(err == io.EOF)
	}()
	c := guest.New(l.Addr().(*net.TCPAddr).AddrPort(), "")
	defer c.Close()
	if err := c.Quiesce(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if !knows.Load() {
		t.Error("the guest does not know that the connection is over")
	}
}

// TestFreezeAnswers: a guest that cannot, or does not know how, says so.
func TestFreezeAnswers(t *testing.T) {
	for status, want := range map[int]*errdefs.Class{
		http.StatusNoContent: nil, http.StatusConflict: errdefs.Unavailable,
		http.StatusNotFound: errdefs.Unsupported, http.StatusOK: errdefs.Unavailable,
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != guestapi.PathFreeze {
				status = http.StatusTeapot
			}
			w.Header().Set("Connection", "close")
			w.WriteHeader(status)
		}))
		c := guest.New(netip.MustParseAddrPort(server.Listener.Addr().String()), "")
		if _, err := c.Freeze(t.Context()); errdefs.ClassOf(err) != want || (err == nil) != (want == nil) {
			t.Errorf("answered %d: %v, want class %v", status, err, want)
		}
		c.Close()
		server.Close()
	}
}

// TestFreezeSaysSinceWhen: since the moment that the guest tells, but not before the
// call began; a guest that does not tell may have stood still for all of it.
func TestFreezeSaysSinceWhen(t *testing.T) {
	const took = 50 * time.Millisecond
	for told, atLeast := range map[string]time.Duration{"": took, "20": 20 * time.Millisecond, "999999999": took, "-1": took, "x": took} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(took)
			w.Header().Set("Connection", "close")
			if told != "" {
				w.Header().Set(guestapi.HeaderStill, told)
			}
			w.WriteHeader(http.StatusNoContent)
		}))
		c := guest.New(netip.MustParseAddrPort(server.Listener.Addr().String()), "")
		began := time.Now()
		since, err := c.Freeze(t.Context())
		if still := time.Since(since); err != nil || still < atLeast || since.Before(began) || told == "20" && since.Sub(began) < took-atLeast {
			t.Errorf("told %q: still for %s of %s, %v", told, still, time.Since(began), err)
		}
		c.Close()
		server.Close()
	}
}

// TestVersion: what a guest says is believed only if clients can parse it.
func TestVersion(t *testing.T) {
	for said, want := range map[string]string{
		"0.6.4": "0.6.4", "10.20.30": "10.20.30", "": "", "dev": "", "0.6": "", "0.6.4-wrenn": "", "0.6.4+x": "", "v0.6.4": "",
		" 0.6.4 ": "0.6.4", "0.6.4 0.6.5": "", "٠.٦.٤": "", strings.Repeat("9", 100_000) + ".0.0": "", "1.2.123456": "",
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(guestapi.HeaderProtocol, guestapi.Protocol)
			w.Header().Set(guestapi.HeaderE2BVersion, said)
			w.WriteHeader(http.StatusNoContent)
		}))
		c := guest.New(netip.MustParseAddrPort(server.Listener.Addr().String()), "")
		if got, err := c.Init(t.Context(), guest.Init{}); err == nil && got != want || err != nil && len(said) < 1000 {
			t.Errorf("version %.40q: %q, %v, want %q", said, got, err, want)
		}
		c.Close()
		server.Close()
	}
}

// TestInitWithAMissingUser: the host can tell a user that is not there from a guest that
// is of no use.
func TestInitWithAMissingUser(t *testing.T) {
	c := serveEnvd(t)
	_, err := c.Init(t.Context(), guest.Init{DefaultUser: "no-such-user"})
	if errdefs.ClassOf(err) != errdefs.NotFound || !strings.Contains(err.Error(), "no-such-user") {
		t.Errorf("no such user: %v, want not found", err)
	}
}
