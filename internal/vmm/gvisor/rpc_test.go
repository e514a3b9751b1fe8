package gvisor

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// TestTypesAreGVisors: each field that the driver writes is one of gVisor's, with the
// same kind. A test of cmd sentry's module checks that the golden file is true.
func TestTypesAreGVisors(t *testing.T) {
	data, err := os.ReadFile("testdata/rpc.txt")
	if err != nil {
		t.Fatal(err)
	}
	theirs := strings.Split(strings.TrimSpace(string(data)), "\n")
	for _, c := range []struct {
		method string
		arg    reflect.Type
	}{
		{methodSetNetwork, reflect.TypeFor[networkArgs]()},
		{methodStart, reflect.TypeFor[string]()},
		{methodPause, reflect.TypeFor[struct{}]()},
		{methodResume, reflect.TypeFor[struct{}]()},
		{methodCheckpoint, reflect.TypeFor[saveOpts]()},
		{methodRestore, reflect.TypeFor[restoreOpts]()},
		{methodState, reflect.TypeFor[string]()},
		{methodStacks, reflect.TypeFor[struct{}]()},
	} {
		for _, line := range describe(c.method, c.arg) {
			if !slices.Contains(theirs, line) {
				t.Errorf("gVisor has no %q", line)
			}
		}
	}
	for _, line := range []string{"state creating 1", "state running 2"} {
		if !slices.Contains(theirs, line) {
			t.Errorf("gVisor has no %q", line)
		}
	}
	if stateCreating != 1 || stateRunning != 2 {
		t.Error("other states")
	}
}

// describe lists the fields of a type as JSON has them, as the test of cmd sentry does.
func describe(path string, t reflect.Type) []string {
	text := reflect.TypeFor[interface{ MarshalText() ([]byte, error) }]()
	switch {
	case t.Implements(text):
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
		name := f.Tag.Get("json")
		if name == "" {
			name = f.Name
		}
		lines = append(lines, describe(path+"."+name, f.Type)...)
	}
	return lines
}
