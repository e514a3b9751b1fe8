package main

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/sentry/control"
	"gvisor.dev/gvisor/runsc/boot"
)

// golden holds the types of gVisor whose JSON the driver writes and reads. A test of the
// driver compares its own types with it.
const golden = "../internal/vmm/gvisor/testdata/rpc.txt"

// TestCallsAreGVisors: the golden file describes the types of the gVisor that this
// program is built from.
func TestCallsAreGVisors(t *testing.T) {
	var out strings.Builder
	for _, c := range []struct {
		method string
		arg    reflect.Type
	}{
		{boot.ContMgrSetNetworkArgs, reflect.TypeFor[boot.CreateLinksAndRoutesArgs]()},
		{boot.ContMgrRootContainerStart, reflect.TypeFor[string]()},
		{boot.ContMgrPause, reflect.TypeFor[struct{}]()},
		{boot.ContMgrResume, reflect.TypeFor[struct{}]()},
		{boot.ContMgrCheckpoint, reflect.TypeFor[control.SaveOpts]()},
		{boot.ContMgrRestore, reflect.TypeFor[boot.RestoreOpts]()},
		{boot.ContMgrContainerRuntimeState, reflect.TypeFor[string]()},
		{boot.DebugStacks, reflect.TypeFor[struct{}]()},
	} {
		for _, line := range describe(c.method, c.arg) {
			fmt.Fprintln(&out, line)
		}
	}
	fmt.Fprintf(&out, "state creating %d\nstate running %d\n", boot.RuntimeStateCreating, boot.RuntimeStateRunning)
	if os.Getenv("WRENN_UPDATE") != "" {
		if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != out.String() {
		t.Errorf("%s is not what this gVisor has (%v)", golden, err)
		t.Error("run WRENN_UPDATE=1 go test -trimpath in sentry, and change internal/vmm/gvisor/rpc.go")
	}
}

// describe lists the fields of a type as JSON has them, one line each: the path and the
// kind.
func describe(path string, t reflect.Type) []string {
	text := reflect.TypeFor[interface{ MarshalText() ([]byte, error) }]()
	switch {
	case t.Implements(text) || reflect.PointerTo(t).Implements(text):
		return []string{path + " string"}
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Uint8:
		return []string{path + " bytes"}
	case t.Kind() == reflect.Slice:
		return describe(path+"[]", t.Elem())
	case t.Kind() != reflect.Struct:
		return []string{path + " " + t.Kind().String()}
	}
	lines := []string{path + " struct"}
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-" || !f.IsExported():
		case f.Anonymous: // its fields are the outer type's
			lines = append(lines, slices.DeleteFunc(describe(path, f.Type), func(line string) bool { return line == path+" struct" })...)
		case name == "":
			lines = append(lines, describe(path+"."+f.Name, f.Type)...)
		default:
			lines = append(lines, describe(path+"."+name, f.Type)...)
		}
	}
	return lines
}
