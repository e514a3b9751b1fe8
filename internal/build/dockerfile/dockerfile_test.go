package dockerfile

import (
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func parse(t *testing.T, text string, o Options) *File {
	t.Helper()
	f, err := Parse(strings.NewReader(text), o)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestInstructions: each instruction becomes the step that the engine runs.
func TestInstructions(t *testing.T) {
	f := parse(t, `# syntax=docker/dockerfile:1
ARG TAG=3.12
FROM --platform=linux/`+runtime.GOARCH+` python:${TAG}-slim AS build
ARG TAG
ARG NAME="a b"
ENV A=1 B="x $A" C='$A'
ENV OLD form with spaces
LABEL who="me"
SHELL ["/bin/bash", "-c"]
RUN echo hi \
  && echo there
RUN ["echo", "$A"]
RUN <<EOF
echo one
echo two
EOF
RUN <<-EOF
	#!/usr/bin/env python3
	print("x")
EOF
RUN cat <<A > /a && cat <<B
of a
A
of b
B
WORKDIR /srv
USER app:app
COPY --chown=1:2 --chmod=0755 *.py lib/ /srv/
COPY <<"X" /srv/x
$not expanded
X
EXPOSE 80 443/tcp
HEALTHCHECK --interval=1s CMD curl -f localhost
ENTRYPOINT ["python3"]
CMD ["-m", "http.server"]
`, Options{})
	want := build.Stage{Name: "build", From: build.Source{Image: "python:3.12-slim", Either: true}, Steps: []build.Step{
		{Kind: "ARG", Args: []string{"TAG", "'3.12'"}},
		{Kind: "ARG", Args: []string{"NAME", `"a b"`}},
		{Kind: "ENV", Args: []string{"A", "1", "B", `"x $A"`, "C", "'$A'"}},
		{Kind: "ENV", Args: []string{"OLD", "form with spaces"}},
		{Kind: "LABEL", Args: []string{"who", `"me"`}},
		{Kind: "SHELL", Args: []string{"/bin/bash", "-c"}, Exec: true},
		{Kind: "RUN", Args: []string{"echo hi   && echo there"}},
		{Kind: "RUN", Args: []string{"echo", "$A"}, Exec: true},
		{Kind: "RUN", Args: []string{"echo one\necho two\n"}},
		{Kind: "RUN", Args: []string{"#!/usr/bin/env python3\nprint(\"x\")\n"}, Script: true},
		{Kind: "RUN", Args: []string{"cat <<A > /a && cat <<B\nof a\nA\nof b\nB"}},
		{Kind: "WORKDIR", Args: []string{"/srv"}},
		{Kind: "USER", Args: []string{"app:app"}},
		{Kind: "COPY", Src: []string{"*.py", "lib"}, Dst: "/srv/", Owner: "1:2", Mode: "0755"},
		{Kind: "COPY", Src: []string{"X"}, Dst: "/srv/x"},
		{Kind: "EXPOSE", Args: []string{"443/tcp", "80"}},
		{Kind: "HEALTHCHECK", Args: []string{"curl -f localhost"}},
		{Kind: "ENTRYPOINT", Args: []string{"python3"}, Exec: true},
		{Kind: "CMD", Args: []string{"-m", "http.server"}, Exec: true},
	}}
	got := f.Stages[0]
	for i := range got.Steps {
		if got.Steps[i].Line == 0 || got.Steps[i].Text == "" {
			t.Errorf("step %d has no line or text", i)
		}
		got.Steps[i].Line, got.Steps[i].Text = 0, ""
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if f.ReadyInterval.Seconds() != 1 || len(f.Warnings) != 0 {
		t.Errorf("interval %v, warnings %v", f.ReadyInterval, f.Warnings)
	}
}

// TestStages: only the stages that the target needs are kept, and refer to each other
// by their places.
func TestStages(t *testing.T) {
	const text = `FROM alpine AS unused
FROM golang AS build
RUN make
FROM build AS test
RUN make test
FROM scratch
COPY --from=build /out /
COPY --from=busybox:1 /bin/busybox /bin/
COPY --from=1 /x /
`
	f := parse(t, text, Options{})
	if len(f.Stages) != 2 || !f.Stages[1].From.Scratch {
		t.Fatalf("got %+v", f.Stages)
	}
	steps := f.Stages[1].Steps
	if steps[0].FromStage != "0" || steps[1].FromImage != "busybox:1" || steps[2].FromStage != "0" {
		t.Errorf("got %+v", steps)
	}
	f = parse(t, text, Options{Target: "test"})
	if len(f.Stages) != 2 || f.Stages[1].From.Stage != "0" || f.Stages[0].Name != "build" {
		t.Errorf("got %+v", f.Stages)
	}
	if _, err := Parse(strings.NewReader(text), Options{Target: "none"}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("a target that is not there: %v", err)
	}
}

// TestBuildArgs: a --build-arg goes before the default, word for word; one that the file
// does not know is a warning.
func TestBuildArgs(t *testing.T) {
	f := parse(t, "ARG V=1\nFROM x:$V\nARG V\nARG W=$V-w\nARG NONE\nCOPY $W /\n",
		Options{Args: map[string]string{"V": "it's $2", "TYPO": "x"}})
	if got := f.Stages[0].From.Image; got != "x:it's $2" {
		t.Errorf("image %q", got)
	}
	s := f.Stages[0].Steps
	if s[0].Args[1] != `'it'"'"'s $2'` || s[1].Args[1] != "$V-w" || len(s[2].Args) != 1 || s[3].Src[0] != "it's $2-w" {
		t.Errorf("steps %+v", s)
	}
	if len(f.Warnings) != 1 || !strings.Contains(f.Warnings[0], "TYPO") {
		t.Errorf("warnings %q", f.Warnings)
	}
}

// TestRefused: what is not supported is refused with the file and the line.
func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"":                      "Dockerfile: file with no instructions",
		"RUN x":                 "Dockerfile:1: RUN before the first FROM",
		"FROM x\nNOPE y":        "Dockerfile:2: unknown instruction: NOPE",
		"FROM x\nVOLUME /x":     "Dockerfile:2: VOLUME is not supported",
		"FROM x\nSTOPSIGNAL 9":  "Dockerfile:2: STOPSIGNAL is not supported",
		"FROM x\nONBUILD RUN y": "Dockerfile:2: ONBUILD is not supported",
		"FROM x\n\nRUN --mount=type=cache,target=/x y":     "Dockerfile:3: RUN --mount is not supported",
		"FROM x\nRUN --network=none y":                     "Dockerfile:2: RUN --network is not supported",
		"FROM x\nRUN --security=insecure y":                "Dockerfile:2: RUN --security is not supported",
		"FROM x\nADD http://h/x /":                         "Dockerfile:2: ADD of a URL is not supported",
		"FROM x\nADD git@h:x.git /":                        "Dockerfile:2: ADD of a URL is not supported",
		"FROM x\nCOPY --parents a /":                       "Dockerfile:2: COPY --parents is not supported",
		"FROM x\nCOPY --exclude=b a /":                     "Dockerfile:2: COPY --exclude is not supported",
		"FROM x\nCOPY ../a /":                              "Dockerfile:2: COPY ../a: it is outside of the context",
		"FROM x\nCOPY $HOME/a /":                           "Dockerfile:2: COPY $HOME/a: the value of HOME is not set",
		"FROM x\nENV P=$PATH:/x\nCOPY $P /":                "Dockerfile:3: COPY $P: the value of P is not set",
		"FROM x\nCOPY a b c":                               "Dockerfile:2: COPY of several sources: the destination c must end with /",
		"FROM x AS a\nCOPY --from=a y /":                   "Dockerfile:2: COPY --from=a names its own stage",
		"FROM x AS a\nFROM y AS A":                         "Dockerfile:2: the stage",
		"FROM --platform=linux/s390x x":                    "Dockerfile:1: FROM --platform=linux/s390x is not supported",
		"FROM $NONE":                                       "Dockerfile:1: FROM $NONE names no image",
		"# escape=`\nFROM x":                               "Dockerfile:1: the directive escape is not supported",
		"# syntax=other/front:1\nFROM x":                   `Dockerfile:1: syntax "other/front:1" is not supported`,
		"FROM x\nRUN":                                      "Dockerfile:2: RUN has no command",
		"FROM x\nENV A":                                    "Dockerfile:2: ",
		"FROM x\nRUN <<EOF\nnever ends":                    "Dockerfile:2: unterminated heredoc",
		"FROM x\nCMD <<EOF\nx\nEOF":                        "Dockerfile:",
		"FROM x\n" + strings.Repeat("RUN y\n", maxSteps+1): "more than 1000 instructions",
		strings.Repeat("# x\n", maxBytes/4+1):              "has more than",
	} {
		_, err := Parse(strings.NewReader(text), Options{})
		if !errors.Is(err, errdefs.InvalidArgument) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: got %v, want %q", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("FROM x\nRUN <<A\n#!x\nA\nCOPY --chown=$U a b/\n")
	f.Add("ARG A=${B:-${C}}\nFROM $A AS b\nHEALTHCHECK CMD [\"x\"]\nFROM b\nADD x y")
	f.Fuzz(func(t *testing.T, text string) {
		file, err := Parse(strings.NewReader(text), Options{})
		if err != nil && !errors.Is(err, errdefs.InvalidArgument) {
			t.Errorf("an error without a class: %v", err)
		}
		if err == nil && len(file.Stages) == 0 {
			t.Error("no stage, and no error")
		}
	})
}
