package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// publish makes a template of the host's that is minimal with a program.
func (a *agent) publish(t testing.TB, name string, p template.Program) {
	t.Helper()
	ctx := t.Context()
	store, err := template.Open(a.stateDir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	from, err := store.Get(template.DefaultName)
	if err != nil {
		t.Fatal(err)
	}
	about := template.Making{Recipe: name, Defaults: from.Defaults, Start: p, From: from.ID + ":" + from.Build}
	about.Defaults.VCPUs, about.Defaults.MemMiB = 1, 256
	_, _, err = store.MakeBuild(ctx, template.NewBuild{Name: name}, about, func(b *template.BuildStage) error { return b.Inherit(from) })
	if err != nil {
		t.Fatal(err)
	}
}

// ask makes one request to a server of the sandbox, and returns its answer.
func (b *sandbox) ask(port int, path string) (string, error) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.a.url+path, nil)
	if err != nil {
		return "", err
	}
	b.address(req.Header)
	req.Header.Set("E2b-Sandbox-Port", fmt.Sprint(port))
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = errors.Join(err, fmt.Errorf("%s: %s", resp.Status, body))
	}
	return string(body), err
}

// TestProgramOfATemplate: the server that a template starts answers the first request to a
// new sandbox, whether that was booted, restored, or boots again from its own disk.
func TestProgramOfATemplate(t *testing.T) {
	a := startAgent(t)
	a.publish(t, "server", template.Program{
		Start: `echo "$GREETING" >index.html; cat /proc/sys/kernel/random/boot_id >boot; exec python3 -m http.server 8000`,
		Ready: "curl -fs localhost:8000 >/dev/null",
		Login: template.Login{User: "user", Workdir: "/home/user", Env: map[string]string{"GREETING": "it serves"}},
	})
	request := &hostagentv1.CreateSandboxRequest{Template: "server"}
	var boots []string
	for i := range 3 {
		began := time.Now()
		b := a.create(t, request)
		took := time.Since(began)
		answer, err := b.ask(8000, "/")
		if err != nil || answer != "it serves\n" {
			t.Fatalf("sandbox %d: the first request: %q, %v", i, answer, err)
		}
		t.Logf("sandbox %d: create %s, first request %s", i, took.Round(time.Millisecond), (time.Since(began) - took).Round(time.Millisecond))
		if restored := b.record().Restored; restored != (i > 0) {
			t.Errorf("sandbox %d: restored is %v", i, restored)
		}
		boots = append(boots, b.sh("cat /proc/sys/kernel/random/boot_id"))
		if got := b.sh("env"); strings.Contains(got, "GREETING") {
			t.Errorf("the program's variables are the sandbox's: %s", got)
		}
		if got := b.sh("ps -o user= -C python3; hostname; cat /home/user/index.html"); got != "user\n"+b.id+"\nit serves" {
			t.Errorf("in the sandbox: %q", got)
		}
		if i == 0 {
			hibernate := &hostagentv1.PauseSandboxRequest{SandboxId: b.id, FilesOnly: true}
			if _, err := a.PauseSandbox(t.Context(), connect.NewRequest(hibernate)); err != nil {
				t.Fatal(err)
			}
			if err := b.resume(); err != nil {
				t.Fatal(err)
			}
			if answer, err := b.ask(8000, "/"); err != nil || answer != "it serves\n" {
				t.Errorf("after a boot from its own disk: %q, %v", answer, err)
			}
		}
		if err := b.destroy(); err != nil {
			t.Error(err)
		}
	}
	if boots[0] == boots[1] || boots[1] == boots[2] {
		t.Errorf("the boot ids are %q", boots)
	}
}

// TestProgramThatFails: the create says what failed and the end of its output.
func TestProgramThatFails(t *testing.T) {
	a := startAgent(t)
	a.publish(t, "failing", template.Program{Start: "echo no such port >&2; exit 3", Ready: "false"})
	_, err := a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: "failing"}))
	wantCode(t, err, connect.CodeFailedPrecondition,
		"start command failed: exit status 3; the end of what its start command wrote: no such port")
	a.publish(t, "no-shell", template.Program{Start: "true", Shell: []string{"/bin/none"}})
	_, err = a.CreateSandbox(t.Context(), connect.NewRequest(&hostagentv1.CreateSandboxRequest{Template: "no-shell"}))
	wantCode(t, err, connect.CodeFailedPrecondition, "start command failed", "/bin/none")
}

// TestAgentKilledWithABuildSandbox: what an agent's death leaves of a build sandbox is gone
// when the next one serves. NoLeaks looks at what is left after that.
func TestAgentKilledWithABuildSandbox(t *testing.T) {
	a := startAgent(t)
	client := hostagentv1connect.NewTemplateServiceClient(&http.Client{Transport: &http.Transport{}}, a.url)
	stream, err := client.ExportTemplate(t.Context(), connect.NewRequest(&hostagentv1.ExportTemplateRequest{Template: template.DefaultName}))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // what it is, and the first piece: a build sandbox is there, and waits for us
		if !stream.Receive() {
			t.Fatalf("export: %v", stream.Err())
		}
	}
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	stream.Close()
	if left := traces(t, a); len(left) == 0 {
		t.Error("there was no build sandbox")
	}
	if err := a.start("--on-shutdown=destroy"); err != nil {
		t.Fatal(err)
	}
	settled(t, a)
}
