// Package internal_test holds the table of which room may import which.
package internal_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "git.omukk.dev/wrenn/sandbox/"

// rooms says what each package may import of this module; a "/..." at the end
// of a room covers the packages below it. "*" is everything.
var rooms = map[string][]string{
	"cmd/wrenn": {"*"},
	"cmd/envd":  {"internal/envd", "internal/guestapi"},

	"api/...": {"api/..."},

	"internal/errdefs":         {},
	"internal/errdefs/errhttp": {"internal/errdefs"},
	"internal/undo":            {},
	"internal/osthread":        {},
	"internal/atomicfile":      {},
	"internal/splice":          {},
	"internal/digest":          {},
	"internal/guestapi":        {},
	"internal/vmm":             {"internal/guestapi", "internal/errdefs"},
	"internal/vmm/snapfile":    {"internal/vmm", "internal/digest", "internal/errdefs"},
	"internal/vmm/launch":      {"internal/vmm", "internal/osthread", "internal/errdefs", "internal/undo"},
	"internal/vmm/kvm":         {"internal/vmm", "internal/digest", "internal/guestapi", "internal/undo", "internal/atomicfile"},
	"internal/vmm/qemu":        {"internal/vmm", "internal/vmm/snapfile", "internal/vmm/launch", "internal/vmm/kvm", "internal/errdefs", "internal/undo"},
	"internal/vmm/firecracker": {"internal/vmm", "internal/vmm/snapfile", "internal/vmm/launch", "internal/vmm/kvm", "internal/errdefs", "internal/undo"},
	"internal/vmm/vmmtest":     {"internal/vmm", "internal/errdefs"},
	"internal/egress":          {"internal/errdefs"},
	"internal/network":         {"internal/egress", "internal/osthread", "internal/errdefs", "internal/undo", "internal/atomicfile"},
	"internal/tool":            {"internal/errdefs"},
	"internal/progress":        {},
	"internal/diskfree":        {},
	"internal/template":        {"internal/vmm/snapfile", "internal/digest", "internal/tool", "internal/errdefs"},
	"internal/setup":           {"internal/template", "internal/tool", "internal/progress", "internal/diskfree", "internal/digest", "internal/errdefs"},
	"internal/guest":           {"api/...", "internal/guestapi", "internal/errdefs"},
	"internal/envd":            {"api/...", "internal/guestapi", "internal/atomicfile", "internal/splice"},
	"internal/sandbox":         {"internal/vmm", "internal/network", "internal/template", "internal/guest", "internal/guestapi", "internal/errdefs", "internal/undo", "internal/atomicfile"},
	"internal/host":            {"internal/setup", "internal/diskfree", "internal/vmm", "internal/digest", "internal/osthread", "internal/network", "internal/template", "internal/errdefs"},
	"internal/network/networktest": {
		"internal/network", "internal/errdefs",
	},
	"internal/agent": {
		"internal/atomicfile",
		"internal/gateway", "internal/server", "internal/host", "internal/sandbox", "internal/network", "internal/template",
		"internal/guest", "internal/guestapi", "internal/vmm", "internal/vmm/kvm", "internal/vmm/launch", "internal/vmm/qemu",
		"internal/vmm/firecracker", "internal/errdefs",
	},
	"internal/server":       {"internal/sandbox", "api/...", "internal/errdefs", "internal/errdefs/errhttp"},
	"internal/gateway":      {"internal/sandbox", "internal/guestapi", "internal/errdefs", "internal/errdefs/errhttp", "internal/splice"},
	"internal/testenv":      {},
	"internal/testenv/liar": {"api/..."},

	"internal/client":            {"api/...", "internal/guest", "internal/guestapi", "internal/errdefs", "internal/errdefs/errhttp"},
	"internal/client/clienttest": {"api/..."},
}

// foreign are packages that a room must not import, though they are not ours.
var foreign = map[string][]string{
	"internal/sandbox":  {"net/http", "connectrpc.com/connect", "internal/atomicfile"},
	"internal/network":  {"os/exec", "internal/atomicfile"},
	"internal/guestapi": {"net/http", "encoding/json"},
	"internal/client":   {"github.com/spf13/cobra", "flag"},
}

type pkg struct {
	ImportPath string
	Dir        string
	Imports    []string
	Doc        string
	GoFiles    []string
}

func TestImportTable(t *testing.T) {
	for _, p := range listPackages(t) {
		room := strings.TrimPrefix(p.ImportPath, module)
		if len(p.GoFiles) == 0 {
			continue // tests only
		}
		allowed, ok := lookup(room)
		if !ok {
			t.Errorf("%s is not a room of the house: add it to the table with what it may import, or move its code", room)
			continue
		}
		for _, imp := range p.Imports {
			if slices.Contains(foreign[room], imp) {
				t.Errorf("%s imports %s, which is not its business", room, imp)
			}
			if target, ours := strings.CutPrefix(imp, module); ours && !covers(allowed, target) {
				t.Errorf("%s imports %s: the table does not allow it", room, target)
			}
		}
		if p.Doc == "" && !strings.HasPrefix(room, "api/") {
			t.Errorf("%s has no package comment", room)
		}
	}
}

// TestNoDefaultClient: the default client follows what an answer says, through
// the proxy that the environment names. No program of ours uses it.
func TestNoDefaultClient(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, name := range p.GoFiles {
			source, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			for _, word := range []string{
				"http.DefaultClient", "http.DefaultTransport", "http.Get(", "http.Head(", "http.Post(", "http.PostForm(",
				"http.ProxyFromEnvironment",
			} {
				if strings.Contains(string(source), word) {
					t.Errorf("%s uses %s", filepath.Join(p.ImportPath, name), word)
				}
			}
		}
	}
}

func lookup(room string) ([]string, bool) {
	for name, allowed := range rooms {
		if covers([]string{name}, room) {
			return allowed, true
		}
	}
	return nil, false
}

func covers(patterns []string, room string) bool {
	for _, p := range patterns {
		prefix, tree := strings.CutSuffix(p, "/...")
		if p == "*" || p == room || tree && strings.HasPrefix(room, prefix+"/") {
			return true
		}
	}
	return false
}

func listPackages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,Doc,GoFiles", module+"...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}
