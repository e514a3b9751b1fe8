package e2e_test

import (
	"bytes"
	"io"
	"mime/multipart"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// put uploads a file as E2B's clients do, without a user.
func (b *sandbox) put(path, content string) {
	b.t.Helper()
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	part, err := form.CreateFormFile("file", filepath.Base(path))
	if err == nil {
		_, err = io.WriteString(part, content)
	}
	if err != nil || form.Close() != nil {
		b.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(b.t.Context(), http.MethodPost, b.a.url+"/files?path="+path, &body)
	if err != nil {
		b.t.Fatal(err)
	}
	b.address(req.Header)
	req.Header.Set("Content-Type", form.FormDataContentType())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
		b.t.Fatalf("upload: %s %s", resp.Status, text)
	}
}

// TestUserAndVariables are those that the create named, whatever happens to the
// sandbox or to the agent, and its copies'.
func TestUserAndVariables(t *testing.T) {
	a := startAgent(t)
	const secret = "s3cret of ours"
	b := a.create(t, &hostagentv1.CreateSandboxRequest{User: "user", Envs: map[string]string{"A": secret, "B": "b"}})
	token, argv := b.token(), commandLines(t)
	want := func(b *sandbox, user, home, env string) {
		b.t.Helper()
		if got, want := b.sh("id -un; pwd; echo $HOME; echo $A $B."), user+"\n"+home+"\n"+home+"\n"+env+"."; got != want {
			t.Errorf("%s says %q, want %q", b.id, got, want)
		}
		if got := b.info().User; got != user {
			t.Errorf("it is listed with user %q, want %q", got, user)
		}
	}
	ours := secret + " b"
	want(b, "user", "/home/user", ours)
	b.put("note", "kept")
	if got := b.sh("stat -c '%U %n' /home/user/note; cat note"); got != "user /home/user/note\nkept" {
		t.Errorf("a file without a user: %q", got)
	}
	resp, err := a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
		SandboxId: b.id, Cmd: "sh", Args: []string{"-c", "id -un; pwd; echo $A $B $C"},
		User: "root", Cwd: "/tmp", Envs: map[string]string{"B": "other", "C": "c"},
	}))
	if err != nil || string(resp.Msg.Stdout) != "root\n/tmp\n"+secret+" other c\n" {
		t.Errorf("exec as another: %v, %v", resp, err)
	}
	_, err = a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: b.id, Cmd: "true", User: "no-such"}))
	wantCode(t, err, connect.CodeInvalidArgument, "no-such")

	forked, err := a.ForkSandbox(t.Context(), connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: b.id}))
	if err != nil {
		t.Fatal(err)
	}
	fork := &sandbox{t, a, forked.Msg.Sandboxes[0].SandboxId}
	want(fork, "user", "/home/user", ours)
	if err := fork.destroy(); err != nil {
		t.Error(err)
	}
	if _, err := b.snapshot("theirs"); err != nil {
		t.Fatal(err)
	}
	same, _ := a.from(t, "theirs", "snapshot")
	want(same, "user", "/home/user", ours)
	if err := same.destroy(); err != nil {
		t.Error(err)
	}
	other := a.create(t, &hostagentv1.CreateSandboxRequest{Template: "theirs", User: "root", Envs: map[string]string{"B": "new"}})
	want(other, "root", "/root", secret+" new")
	if err := other.destroy(); err != nil {
		t.Error(err)
	}

	if err := b.hibernate(); err != nil {
		t.Fatal(err)
	}
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	if err := b.resume(); err != nil {
		t.Fatal(err)
	}
	want(b, "user", "/home/user", ours)
	if err := b.destroy(); err != nil {
		t.Error(err)
	}

	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{User: "no-such"}))
	wantCode(t, err, connect.CodeNotFound, "no-such")
	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{User: "a:b"}))
	wantCode(t, err, connect.CodeInvalidArgument, "a:b")
	plain := a.createFrom(t, "ready snapshot", &hostagentv1.CreateSandboxRequest{})
	want(plain, "root", "/root", "")
	if err := plain.destroy(); err != nil {
		t.Error(err)
	}
	a.wantUntold(t, argv, secret, token)
}

// wantUntold checks that neither the agent's logs nor command lines have a secret.
func (a *agent) wantUntold(t *testing.T, argv string, secrets ...string) {
	t.Helper()
	events, err := os.ReadFile(filepath.Join(a.stateDir, "events.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"the agent's log": a.log.String(), "the event log": string(events), "a command line": argv} {
		for i, secret := range secrets {
			if secret == "" || strings.Contains(text, secret) {
				t.Errorf("%s has secret %d", what, i)
			}
		}
	}
}

// commandLines are those of all processes of this machine.
func commandLines(t *testing.T) string {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no processes: %v", err)
	}
	var all strings.Builder
	for _, path := range paths {
		text, _ := os.ReadFile(path) // it may have ended
		all.Write(text)
	}
	return all.String()
}

func TestCreateForUser(t *testing.T) {
	a := startAgent(t)
	cmd := exec.Command(filepath.Join(a.bin, "wrenn"), "--host", a.url, "create", "-u", "user", "-e", "A=1", "--env", "B", "-e", "NOT_SET")
	cmd.Env = append(cmd.Environ(), "B=2")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	b := &sandbox{t, a, strings.TrimSpace(string(out))}
	if got := b.sh("id -un; echo $A $B; env | grep NOT_SET || echo none"); got != "user\n1 2\nnone" {
		t.Errorf("it says %q", got)
	}
}

// TestMinimalHolds what everybody's first script needs, for both of its users.
func TestMinimalHolds(t *testing.T) {
	a := startAgent(t)
	for _, user := range []string{"root", "user"} {
		b := a.create(t, &hostagentv1.CreateSandboxRequest{User: user})
		for script, want := range map[string]string{
			"sudo -n id -u":                                             "0",
			"sudo -n -u user id -un 2>&1":                               "user",
			"git --version | cut -d' ' -f1-2":                           "git version",
			"python --version | cut -d. -f1":                            "Python 3",
			"curl --version | head -1 | cut -d' ' -f1":                  "curl",
			"test -s /etc/ssl/certs/ca-certificates.crt && echo bundle": "bundle",
			"python -c 'import ssl; print(len(ssl.create_default_context().get_ca_certs()) > 50)'": "True",
			"ps -o comm= -p $$": "sh",
			"ip -br -4 address show eth0 | awk '{print $3}'": "169.254.0.21/30",
			"stat -c '%a %U %G' /etc/sudoers.d/user":         "440 root root",
			"cd $(mktemp -d) && git init -q . && git -c user.name=a -c user.email=a@b commit -qm x --allow-empty && git log --format=%s": "x",
		} {
			if strings.HasPrefix(script, "stat") && user != "root" {
				script = "sudo -n " + script
			}
			if got := b.sh(script); got != want {
				t.Errorf("%s: %s says %q, want %q", user, script, got, want)
			}
		}
		if err := b.destroy(); err != nil {
			t.Error(err)
		}
	}
}

// TestGuestIsAsAContainer in what programs take for granted.
func TestGuestIsAsAContainer(t *testing.T) {
	a := sharedAgent(t)
	b := sharedBox(t)
	const loopback = `python3 -c 'import socket
l = socket.create_server(("::1", 0), family=socket.AF_INET6)
c = socket.socket(socket.AF_INET6); c.connect(("localhost", l.getsockname()[1]))
print(c.getpeername()[0])'`
	for _, c := range []struct {
		user, env, script, want string
	}{
		{"", "", "echo $LANG; locale charmap", "C.UTF-8\nUTF-8"},
		{"user", "", "echo $LANG; locale charmap; sudo -n sh -c 'echo $LANG'", "C.UTF-8\nUTF-8\nC.UTF-8"},
		{"", "LANG=C", "echo $LANG", "C"},
		{"", "TZ=Asia/Tokyo", "date -d @0 +%H%Z", "09JST"},
		{"", "", "date -d @0 +%H%Z", "00UTC"},
		{"user", "", "sudo -n id -u", "0"},
		{"0", "", "id -un; pwd; echo $HOME", "root\n/root\n/root"},
		{"1000", "", "id -un; id -G; pwd; echo $USER", "user\n1000\n/home/user\nuser"},
		{"1000:33", "", "id -u; id -G; pwd", "1000\n33\n/home/user"},
		{"user:33", "", "id -u; id -G; pwd", "1000\n33\n/home/user"},
		{"4242", "", "id -u; id -G; pwd; echo $HOME", "4242\n0\n/\n/"},
		{"4242:4343", "", "id -u; id -G; pwd; touch /tmp/of-4242; stat -c %u:%g /tmp/of-4242", "4242\n4343\n/\n4242:4343"},
		{"", "", "getent hosts localhost | awk '{print $1}'; getent ahostsv4 localhost | awk '{print $1; exit}'", "::1\n127.0.0.1"},
		{"user", "", loopback, "::1"},
		{"", "", "ulimit -n; ulimit -Hn", "65536\n524288"},
		{"user", "", "ulimit -n; ulimit -Hn", "65536\n524288"},
		{"user", "", "stat -f -c %T /dev/shm; stat -c %a /dev/shm; echo x >/dev/shm/x && rm /dev/shm/x", "tmpfs\n1777"},
		{"user", "", "python3 -c 'import multiprocessing as m; print(m.Value(\"i\", 7).value)'", "7"},
	} {
		req := &hostagentv1.ExecRequest{SandboxId: b.id, Cmd: "sh", Args: []string{"-c", c.script}, User: c.user}
		if name, value, ok := strings.Cut(c.env, "="); ok {
			req.Envs = map[string]string{name: value}
		}
		resp, err := a.Exec(t.Context(), connect.NewRequest(req))
		if err != nil {
			t.Errorf("%q as %q: %v", c.script, c.user, err)
			continue
		}
		if got := strings.TrimSpace(string(resp.Msg.Stdout)); got != c.want {
			t.Errorf("%q as %q with %q says %q, want %q; %s", c.script, c.user, c.env, got, c.want, resp.Msg.Stderr)
		}
	}
	if out, err := a.cli(t, "cp", "-u", "4242:4343", "login_test.go", b.id+":/tmp/copied"); err != nil {
		t.Errorf("copy: %v: %s", err, out)
	} else if got := b.sh("stat -c %u:%g /tmp/copied"); got != "4242:4343" {
		t.Errorf("a copy belongs to %s", got)
	}
	own := a.create(t, &hostagentv1.CreateSandboxRequest{User: "4242:4343", Envs: map[string]string{"TZ": "America/New_York"}})
	if got := own.sh("id -u; id -g; date -d @0 +%H%Z"); got != "4242\n4343\n19EST" || own.info().User != "4242:4343" {
		t.Errorf("a sandbox of uid and gid says %q, is %v", got, own.info())
	}
}
