package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

func TestWhoTheSocketAdmits(t *testing.T) {
	for _, c := range []struct {
		uid, gid uint32
		groups   []uint32
		of       int // the socket's group
		want     bool
	}{
		{0, 0, nil, 0, true}, {0, 5, nil, 7, true}, {42, 5, nil, 7, true}, // the agent's own user
		{1, 7, nil, 7, true}, {1, 5, []uint32{6, 7}, 7, true}, {1, 5, []uint32{6}, 7, false},
		{1, 0, []uint32{0}, 0, false}, {1, 5, nil, 0, false},
	} {
		s := socket{uid: 42, gid: c.of}
		if got := s.admits(&unix.Ucred{Uid: c.uid, Gid: c.gid}, c.groups); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestGroupID(t *testing.T) {
	for name, want := range map[string]int{"": 0, "7": 7, "root": 0, "no such group": -1, "-1": -1} {
		got, err := groupID(name)
		if (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
}

// connectAs connects to a socket as a user, and returns the first bytes of the answer to
// a request.
func connectAs(path string, uid, gid int, groups ...uint32) (answer string, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // which ends with this goroutine, for it is another user's
		answer, err = requestAs(path, uid, gid, groups)
	}()
	<-done
	return answer, err
}

func requestAs(path string, uid, gid int, groups []uint32) (string, error) {
	first := uintptr(0)
	if len(groups) > 0 {
		first = uintptr(unsafe.Pointer(&groups[0]))
	}
	for _, call := range [][4]uintptr{
		{unix.SYS_SETGROUPS, uintptr(len(groups)), first, 0},
		{unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)},
		{unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)},
	} {
		if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 { // of this thread alone
			return "", errno
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return "", err
	}
	if _, err := unix.Write(fd, []byte("GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")); err != nil {
		return "", err
	}
	var buf [100]byte
	n, err := unix.Read(fd, buf[:])
	return string(buf[:max(n, 0)]), err
}

// Only root and the group of the socket reach the agent by it.
func TestSocketOfTheAgent(t *testing.T) {
	testenv.Root(t)
	const group, member, stranger = 54321, 54322, 54323
	r := newRig(t)
	for dir := r.dir; len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil { // of tests; /run can be entered
			t.Fatal(err)
		}
	}
	r.cfg.parts.run = filepath.Join(r.dir, "r")
	if err := os.Mkdir(r.cfg.parts.run, 0o755); err != nil {
		t.Fatal(err)
	}
	r.cfg.SocketGroup = strconv.Itoa(group)
	path := socketPath(r.cfg.parts.run, r.cfg.StateDir)
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		t.Fatal(err)
	}
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}) // of an agent that was killed
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	r.start()
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o660 || info.Sys().(*syscall.Stat_t).Gid != group || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Fatalf("the socket is %v, %v", info, err)
	}
	for name, c := range map[string]struct {
		uid, gid int
		groups   []uint32
		want     bool
	}{
		"root": {0, 0, nil, true}, "the group": {member, group, nil, true}, "a member": {member, member, []uint32{group}, true},
		"a stranger": {stranger, stranger, nil, false},
	} {
		out, err := connectAs(path, c.uid, c.gid, c.groups...)
		if got := err == nil && strings.Contains(out, "200 OK"); got != c.want {
			t.Errorf("%s: %v, %q", name, err, out)
		}
		if !c.want && !errors.Is(err, unix.EACCES) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Where the mode lets a stranger in, the agent does not.
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if out, err := connectAs(path, stranger, stranger); strings.Contains(out, "HTTP") {
		t.Errorf("a stranger on an open socket: %v, %q", err, out)
	}
	if !strings.Contains(r.log.String(), "of user 54323 may not command this host") {
		t.Error("the log does not tell of the stranger")
	}
	if err := r.ended(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is left")
	}
	r.wantNothing()
}

// localClient is a client of a Unix socket.
func localClient(path string) *http.Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}
}

// askAs makes a call of the control plane with a key, unless that is empty.
func askAs(t *testing.T, c *http.Client, base, key, rpc, request string) (status int, answer string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
		base+"/hostagent.v1.HostAgentService/"+rpc, strings.NewReader(request))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if key != "" {
		req.Header.Set("X-API-KEY", key)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(all)
}

// Over the socket everything goes on when there is a key, over TCP nothing does without.
func TestSocketAfterAKeyIsMade(t *testing.T) {
	r := newRig(t)
	r.start()
	id := r.create()
	secret, _, err := r.agent.keys.CreateKey("", "")
	if err != nil {
		t.Fatal(err)
	}
	if status, answer := r.call("GetVersion", `{}`); status != http.StatusUnauthorized {
		t.Errorf("TCP without a key: HTTP %d, %v", status, answer)
	}
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/metrics": 401} {
		if status, _ := r.get(path); status != want {
			t.Errorf("%s: HTTP %d, want %d", path, status, want)
		}
	}
	local := localClient(socketPath(r.cfg.parts.run, r.cfg.StateDir))
	if status, list := askAs(t, local, "http://localhost", "", "ListSandboxes", "{}"); status != http.StatusOK || !strings.Contains(list, id) {
		t.Errorf("over the socket: HTTP %d, %s", status, list)
	}
	status, list := askAs(t, http.DefaultClient, "http://"+r.agent.Addr().String(), secret, "ListSandboxes", "{}")
	if status != http.StatusOK || strings.Contains(list, id) {
		t.Errorf("TCP with a key: HTTP %d, %s", status, list)
	}
}

func TestListenUnixFails(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	for name, path := range map[string]string{
		"no directory": filepath.Join(dir, "none", "s"), "long path": filepath.Join(dir, strings.Repeat("a", 120)),
	} {
		if _, err := listenUnix(path, 0, log); err == nil {
			t.Errorf("%s: it listens", name)
		}
	}
	path := filepath.Join(dir, "s")
	s, err := listenUnix(path, 0, log)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if info, err := os.Stat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// The host sees and deletes the snapshots of all projects; a project those of its own.
func TestSnapshotsOfProjects(t *testing.T) {
	testenv.Root(t) // publishing reads the files of a snapshot, which only root may
	r := newRig(t)
	r.start()
	local := localClient(socketPath(r.cfg.parts.run, r.cfg.StateDir))
	secrets := map[string]string{}
	for _, project := range []string{"blue", "red"} {
		secret, _, err := r.agent.keys.CreateKey(project, "")
		if err != nil {
			t.Fatal(err)
		}
		secrets[project] = secret
		_, answer := askAs(t, http.DefaultClient, "http://"+r.agent.Addr().String(), secret, "CreateSandbox", "{}")
		var made struct{ SandboxID string }
		if err := json.Unmarshal([]byte(answer), &made); err != nil {
			t.Fatal(err)
		}
		status, answer := askAs(t, http.DefaultClient, "http://"+r.agent.Addr().String(), secret, "SnapshotSandbox",
			`{"sandbox_id":"`+made.SandboxID+`","name":"same"}`)
		if status != http.StatusOK {
			t.Fatalf("snapshot: HTTP %d, %s", status, answer)
		}
	}
	list := func(c *http.Client, base, secret string) (projects []string) {
		t.Helper()
		_, answer := askAs(t, c, base, secret, "ListSnapshots", "{}")
		var all struct {
			Snapshots []struct{ Name, Project string }
		}
		if err := json.Unmarshal([]byte(answer), &all); err != nil {
			t.Fatalf("%s: %v", answer, err)
		}
		for _, s := range all.Snapshots {
			projects = append(projects, s.Name+" of "+s.Project)
		}
		return projects
	}
	tcp := "http://" + r.agent.Addr().String()
	if got := list(local, "http://localhost", ""); !slices.Equal(got, []string{"same of blue", "same of red"}) {
		t.Errorf("the host lists %q", got)
	}
	if got := list(http.DefaultClient, tcp, secrets["blue"]); !slices.Equal(got, []string{"same of "}) {
		t.Errorf("blue lists %q", got)
	}
	status, _ := askAs(t, http.DefaultClient, tcp, secrets["blue"], "DeleteSnapshot", `{"name":"same","project":"red"}`)
	if status != http.StatusNotFound {
		t.Errorf("blue deletes red's: HTTP %d", status)
	}
	for request, want := range map[string]int{`{"name":"same"}`: 404, `{"name":"same","project":"red"}`: 200} {
		if status, answer := askAs(t, local, "http://localhost", "", "DeleteSnapshot", request); status != want {
			t.Errorf("the host deletes %s: HTTP %d, %s", request, status, answer)
		}
	}
	if got := list(local, "http://localhost", ""); !slices.Equal(got, []string{"same of blue"}) {
		t.Errorf("after the deletion the host lists %q", got)
	}
}
