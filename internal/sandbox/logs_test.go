package sandbox

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// The lines of a console have time, level and source, for as long as the sandbox is
// known.
func TestLogs(t *testing.T) {
	r := newRig(t)
	id := r.create()
	if logs, err := r.Logs(id); err != nil || len(logs) != 0 {
		t.Errorf("without a console: %v, %v", logs, err)
	}
	text := "[    0.000000] Linux version\r\n\r\n" +
		"[   12.345678] Kernel panic - not syncing: x\n" +
		"time=2026-11-27T10:00:00.000Z level=WARN msg=\"x\"\n" +
		"time=2026-11-27T10:00:00.000Z level=INFO+1 msg=\"x\"\n" +
		"\xff says hello \x1b[31m\n"
	at := time.UnixMilli(1_700_000_000_123).UTC()
	err := errors.Join(os.WriteFile(r.store.console(id), []byte(text), 0o600),
		os.WriteFile(r.store.console(id)+vmm.TimesSuffix, vmm.Stamp{Size: int64(len(text)), At: at}.Append(nil), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	want := []LogLine{
		{at, "debug", "kernel", "[    0.000000] Linux version"},
		{at, "error", "kernel", "[   12.345678] Kernel panic - not syncing: x"},
		{at, "warn", "envd", `time=2026-11-27T10:00:00.000Z level=WARN msg="x"`},
		{at, "info", "envd", `time=2026-11-27T10:00:00.000Z level=INFO+1 msg="x"`},
		{at, "info", "console", "\ufffd says hello \x1b[31m"},
	}
	for _, what := range []string{"first", "after a restart"} {
		if logs, err := r.Logs(id); err != nil || !slices.Equal(logs, want) {
			t.Errorf("%s: got %q, %v", what, logs, err)
		}
		r.die()
		r.start()
	}
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	_, err = r.Logs(id)
	wantClass(t, err, errdefs.NotFound)
	if strings.Contains(err.Error(), r.dir) {
		t.Errorf("%v names a path", err)
	}
}
