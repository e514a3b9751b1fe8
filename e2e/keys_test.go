package e2e_test

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	hostagent "git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// overSocket has calls go over the agent's Unix socket.
func (a *agent) overSocket() {
	a.HostAgentServiceClient = hostagentv1connect.NewHostAgentServiceClient(&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", hostagent.SocketPath(a.stateDir))
		},
	}}, "http://localhost")
}

// shell runs a script as root's shell on the host, with wrenn in PATH and nothing but
// the state directory to find the agent by.
func (a *agent) shell(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-euc", script)
	cmd.WaitDelay = patience // what it started may have its output
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "WRENN_") }),
		"PATH="+a.bin+":"+os.Getenv("PATH"), "WRENN_STATE_DIR="+a.stateDir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

// An agent from its first call without a key to one that others reach by TLS, as curl
// and wrenn see it.
func TestKeysAndTLS(t *testing.T) {
	testenv.Program(t, "curl")
	a := startAgent(t, "--on-shutdown=leave")
	const curl = `curl -sS --max-time 60 -H "Content-Type: application/json" `
	plain := curl + a.url + "/hostagent.v1.HostAgentService/"
	hosts := a.create(t, nil).id
	if got := a.shell(t, plain+`ListSandboxes -d {}`); !strings.Contains(got, hosts) {
		t.Errorf("without any key: %s", got)
	}
	a.overSocket()
	env := a.shell(t, "wrenn env")
	if again := a.shell(t, "wrenn env"); again != env || !strings.Contains(env, "E2B_API_URL='"+a.url+"'") {
		t.Errorf("wrenn env: %s, then %s", env, again)
	}
	eval := `eval "$(wrenn env)"; `
	keyed := eval + `curl() { command curl -H "X-API-KEY: $E2B_API_KEY" "$@"; }; `
	var made struct{ SandboxID, Domain string }
	if got := a.shell(t, keyed+curl+`$E2B_API_URL/v2/sandboxes -d '{"templateID":"base"}'`); json.Unmarshal([]byte(got), &made) != nil ||
		made.SandboxID == "" || !strings.HasPrefix(made.Domain, "localhost:") {
		t.Fatalf("create by REST: %s", got)
	}
	own := strings.Replace(made.SandboxID, "sb", "sb-", 1)
	for what, c := range map[string]struct{ script, want, not string }{
		"without a key": {plain + `ListSandboxes -d {}`, `"code":"unauthenticated"`, own},
		"wrong key":     {curl + `-H "X-API-KEY: e2b_0" ` + a.url + "/v2/sandboxes", `"code":401`, own},
		"health":        {curl + a.url + "/readyz", "ready", ""},
		"list":          {keyed + plain + `ListSandboxes -d {}`, own, hosts},
		"another's":     {keyed + plain + `GetSandbox -d '{"sandbox_id":"` + hosts + `"}'`, `"code":"not_found"`, ""},
		"whole host":    {keyed + plain + `Verify -d {}`, "", own},
		"socket":        {`wrenn ps -q`, hosts, ""},
		"exec":          {`wrenn exec ` + own + ` -- echo over the socket`, "over the socket", ""},
		"port":          {`wrenn port ` + own + ` 8000`, "http://8000-" + own + ".localhost:", "hostagent"},
		"wrenn and key": {eval + `wrenn ps -q --host $E2B_API_URL --api-key $E2B_API_KEY`, own, hosts},
		"audit":         {`wrenn events --no-follow --json ` + own, `"keyId"`, ""},
	} {
		if got := a.shell(t, c.script); !strings.Contains(got, c.want) || c.not != "" && strings.Contains(got, c.not) {
			t.Errorf("%s: %s", what, got)
		}
	}
	// A snapshot is its project's, too.
	a.shell(t, keyed+plain+`SnapshotSandbox -d '{"sandbox_id":"`+own+`","name":"mine"}' | grep sizeBytes`)
	other := `E2B_API_KEY=$(wrenn key create --project other 2>/dev/null); curl() { command curl -H "X-API-KEY: $E2B_API_KEY" "$@"; }; `
	for _, call := range []string{`CreateSandbox -d '{"template":"mine"}'`, `DeleteSnapshot -d '{"name":"mine"}'`} {
		if got := a.shell(t, other+plain+call); !strings.Contains(got, `"code":"not_found"`) {
			t.Errorf("%s of another project: %s", call, got)
		}
	}
	if got := a.shell(t, other+plain+`ListSnapshots -d {}`); got != "{}" {
		t.Errorf("snapshots of another project: %s", got)
	}
	if got := a.shell(t, keyed+plain+`ListSnapshots -d {}; `+plain+`DeleteSnapshot -d '{"name":"mine"}'`); !strings.Contains(got, `"mine"`) ||
		!strings.HasSuffix(got, "{}") {
		t.Errorf("snapshots of the project: %s", got)
	}
	if err := a.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := a.start("--tls-self-signed", "--domain", "boxes.example", "--on-shutdown=leave"); err != nil {
		t.Fatal(err)
	}
	b := &sandbox{t, a, own}
	b.sh("mkdir /tmp/www && echo by TLS >/tmp/www/index.html && (python3 -m http.server -d /tmp/www 8000 >/dev/null 2>&1 & " +
		"for i in $(seq 300); do curl -sf localhost:8000 >/dev/null && exit; sleep 0.1; done; exit 1)")
	_, port, _ := net.SplitHostPort(a.addr)
	secure := keyed + `curl() { command curl -sS --max-time 60 --cacert "$NODE_EXTRA_CA_CERTS" --connect-to ::127.0.0.1:` + port + ` "$@"; }; `
	for what, c := range map[string]struct{ script, want string }{
		"env":       {eval + `echo $E2B_API_URL $E2B_DOMAIN`, "https://api.boxes.example:" + port + " boxes.example:" + port},
		"REST":      {secure + `curl -H "X-API-KEY: $E2B_API_KEY" $E2B_API_URL/v2/sandboxes`, made.SandboxID},
		"port":      {secure + `curl -w '%{http_version}' https://8000-` + made.SandboxID + `.$E2B_DOMAIN/`, "by TLS\n2"},
		"HTTP/1.1":  {secure + `curl --http1.1 https://8000-` + own + `.$E2B_DOMAIN/`, "by TLS"},
		"address":   {`wrenn port ` + own + ` 8000`, "https://8000-" + own + ".boxes.example:" + port + "/"},
		"wrenn":     {eval + `wrenn --host https://localhost:` + port + ` --api-key $E2B_API_KEY exec ` + own + ` -- echo by TLS`, "by TLS"},
		"stranger":  {`curl -s --max-time 60 https://localhost:` + port + `/healthz || echo refused`, "refused"},
		"key files": {`stat -c %a ` + filepath.Join(a.stateDir, "tls", "*-key.pem") + ` ` + filepath.Join(a.stateDir, "env-key"), "600\n600"},
	} {
		if got := a.shell(t, c.script); !strings.Contains(got, c.want) {
			t.Errorf("%s: %s", what, got)
		}
	}
}
