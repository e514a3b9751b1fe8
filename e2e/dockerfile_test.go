package e2e_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// everything is a Dockerfile with each instruction that is supported.
const everything = `# syntax=docker/dockerfile:1
ARG BASE=minimal
FROM ${BASE} AS build
ARG WHO=nothing
SHELL ["/bin/bash", "-c"]
RUN mkdir /out && echo "hello $WHO" >/out/greeting && ln -s greeting /out/link && chown 1:2 /out/greeting

FROM ${BASE} AS unused
RUN exit 1

FROM ${BASE}
LABEL maker="a test"
ENV DIR=/srv/app GREETING="in $WHO"
WORKDIR ${DIR}
COPY --from=build /out/ ./
COPY --chown=daemon:daemon --chmod=0640 *.txt data/
COPY <<TEXT heredoc
of $DIR
TEXT
ADD t.tar /added/
RUN <<CHECK
set -e
test "$(cat greeting link)" = "$(printf 'hello you\nhello you')"
test "$(stat -c %u:%g greeting)" = 1:2
test "$(stat -c %U:%G:%a data/a.txt)" = daemon:daemon:640
test ! -e data/ignored.txt
test "$(cat heredoc)" = "of /srv/app"
test "$(cat /added/inside)" = packed
CHECK
USER daemon
RUN ["sh", "-c", "id -un >/tmp/as"]
EXPOSE 8000
HEALTHCHECK --interval=1s CMD test -f /tmp/up
ENTRYPOINT ["sh", "-c"]
CMD ["touch /tmp/up; exec sleep 1000"]
`

// contextDir makes a directory for builds.
func contextDir(t *testing.T, dockerfile string) string {
	t.Helper()
	var packed bytes.Buffer
	out := tar.NewWriter(&packed)
	err := out.WriteHeader(&tar.Header{Name: "inside", Mode: 0o644, Size: 6})
	if err == nil {
		_, err = out.Write([]byte("packed"))
	}
	if err = errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"Dockerfile": dockerfile, "a.txt": "A", "ignored.txt": "I", ".dockerignore": "ignored*\n", "t.tar": packed.String(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestDockerfile: a Dockerfile with every instruction becomes a template whose sandboxes
// are as it says. The same build again runs nothing, and one with another last step that
// step only. A RUN that fails, a cancelled build and the agent's death leave nothing.
func TestDockerfile(t *testing.T) {
	a := startAgent(t, "--on-shutdown=leave")
	build := func(text string, want bool) (out string, took time.Duration) {
		t.Helper()
		began := time.Now()
		out, err := a.cli(t, "template", "build", "-t", "app", "--build-arg", "WHO=you", contextDir(t, text))
		if took = time.Since(began); (err == nil) != want {
			t.Fatalf("build: %v\n%s", err, out)
		}
		return out, took
	}
	out, took := build(everything, true)
	t.Logf("the first build took %v:\n%s", took, out)

	b := a.create(t, &hostagentv1.CreateSandboxRequest{Template: "app"})
	if got := b.sh(`echo "$(id -un) $(pwd) $GREETING $(cat /tmp/as) $(cat data/a.txt 2>/dev/null) $(ls /tmp/up)"`); strings.TrimSpace(got) !=
		"daemon /srv/app in  daemon A /tmp/up" {
		t.Errorf("a sandbox says %q", got)
	}
	if err := b.destroy(); err != nil {
		t.Fatal(err)
	}

	out, took = build(everything, true)
	t.Logf("the second build took %v", took)
	if took > 2*time.Second || !strings.Contains(out, "CACHED") || strings.Contains(out, "build sandbox") {
		t.Errorf("the second build took %v:\n%s", took, out)
	}
	last := strings.Replace(everything, "id -un >/tmp/as", "echo only this; id -un >/tmp/as", 1)
	if out, took = build(last, true); !strings.Contains(out, "only this") || !strings.Contains(out, "CACHED [stage-1 8/14] RUN") {
		t.Errorf("with another last step:\n%s", out)
	}
	t.Logf("with another last step it took %v", took)

	out, _ = build(strings.Replace(last, "only this; id", "broken; exit 7; id", 1), false)
	if !strings.Contains(out, "broken; exit 7; id -un >/tmp/as': exit status 7") {
		t.Errorf("a RUN that fails:\n%s", out)
	}
	a.killedInABuild(t)
}

// killedInABuild ends the agent while a RUN runs.
func (a *agent) killedInABuild(t *testing.T) {
	t.Helper()
	done := make(chan string, 1)
	dir := contextDir(t, "FROM minimal\nRUN echo it runs; sleep 1000\n")
	go func() {
		out, err := a.cli(t, "template", "build", "-t", "killed", dir)
		done <- fmt.Sprint(err, "\n", out)
	}()
	logs := filepath.Join(a.stateDir, "builds/logs/*/*")
	waitFor(t, "the RUN", func() bool {
		paths, _ := filepath.Glob(logs)
		for _, path := range paths {
			if text, _ := os.ReadFile(path); bytes.Contains(text, []byte(`"it runs"`)) {
				return true
			}
		}
		return false
	})
	if err := a.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	t.Logf("its client says: %s", <-done)
	if err := a.start("--on-shutdown=destroy", "--max-template-disk=64"); err != nil {
		t.Fatal(err)
	}
	// minimal alone takes more than that.
	out, err := a.cli(t, "template", "build", "-t", "refused", dir)
	if err == nil || !strings.Contains(out, "--max-template-disk allows 64 MiB") || strings.Contains(out, "it runs") {
		t.Errorf("a build past --max-template-disk: %v\n%s", err, out)
	}
	out, err = a.cli(t, "template", "ls", "-a")
	if err != nil || !strings.Contains(out, "error") {
		t.Errorf("template ls: %v\n%s", err, out)
	}
	for _, pattern := range []string{"builds/work/*", "builds/cache/.*", "templates/.*build*"} {
		if left, _ := filepath.Glob(filepath.Join(a.stateDir, pattern)); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	}
	waitFor(t, "the end of the build sandbox", func() bool {
		left, _ := filepath.Glob(filepath.Join(a.stateDir, "sandboxes/sb-*"))
		return len(left) == 0
	})
}
