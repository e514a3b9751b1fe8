// Package internal_test holds what is true of all packages of this module: the
// table of what each may import, and what none may use.
package internal_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "git.omukk.dev/wrenn/sandbox/"

// mayImport says which packages of this module each package may import. A "/..."
// at the end of a path covers the packages below it. "*" is everything.
var mayImport = map[string][]string{
	"cmd/wrenn": {"*"},
	"cmd/envd":  {"internal/envd", "internal/guestapi"},

	"api/...": {"api/..."},
	// The sources of templates are data.
	"templates": {},

	"internal/errdefs":         {},
	"internal/errdefs/errhttp": {"internal/errdefs"},
	"internal/undo":            {},
	"internal/osthread":        {},
	"internal/nftgen":          {},
	"internal/atomicfile":      {},
	"internal/splice":          {},
	"internal/digest":          {},
	"internal/guestapi":        {},
	"internal/vmm":             {"internal/guestapi", "internal/errdefs"},
	"internal/vmm/snapfile":    {"internal/vmm", "internal/digest", "internal/errdefs"},
	"internal/vmm/launch":      {"internal/vmm", "internal/osthread", "internal/errdefs", "internal/undo"},
	"internal/vmm/kvm":         {"internal/vmm", "internal/digest", "internal/guestapi", "internal/undo", "internal/atomicfile"},
	"internal/vmm/qemu": {"internal/vmm", "internal/vmm/snapfile", "internal/vmm/launch", "internal/vmm/kvm",
		"internal/errdefs", "internal/undo"},
	"internal/vmm/firecracker": {"internal/vmm", "internal/vmm/snapfile", "internal/vmm/launch", "internal/vmm/kvm",
		"internal/errdefs", "internal/undo"},
	"internal/vmm/gvisor": {"internal/vmm", "internal/vmm/snapfile", "internal/vmm/launch", "internal/vmm/kvm",
		"internal/guestapi", "internal/osthread", "internal/errdefs", "internal/undo"},
	"internal/vmm/vmmtest": {"internal/vmm", "internal/errdefs"},
	"internal/egress":      {"internal/errdefs"},
	"internal/network": {"internal/vmm", "internal/egress", "internal/nftgen", "internal/osthread", "internal/errdefs", "internal/undo",
		"internal/atomicfile"},
	"internal/tool":     {"internal/errdefs"},
	"internal/progress": {},
	"internal/diskfree": {},
	"internal/template": {"internal/vmm/snapfile", "internal/sealed", "internal/atomicfile", "internal/digest", "internal/tool",
		"internal/errdefs"},
	"internal/setup": {"internal/template", "internal/tool", "internal/progress", "internal/diskfree", "internal/digest",
		"internal/errdefs"},
	"internal/image": {"internal/template", "internal/atomicfile", "internal/digest", "internal/diskfree", "internal/errdefs"},
	"internal/guest": {"api/...", "internal/guestapi", "internal/errdefs"},
	"internal/envd":  {"api/...", "internal/guestapi", "internal/atomicfile", "internal/splice"},
	"internal/sandbox": {"internal/vmm", "internal/network", "internal/template", "internal/guest", "internal/guestapi",
		"internal/errdefs", "internal/undo", "internal/atomicfile", "internal/sealed", "internal/diskfree"},
	"internal/build": {"internal/sandbox", "internal/template", "internal/image", "internal/guest", "internal/atomicfile",
		"internal/diskfree", "internal/undo", "internal/errdefs"},
	"internal/build/dockerfile": {"internal/build", "internal/errdefs"},
	"internal/host": {"internal/setup", "internal/diskfree", "internal/vmm", "internal/digest", "internal/osthread",
		"internal/network", "internal/template", "internal/errdefs"},
	"internal/network/networktest": {
		"internal/network", "internal/vmm", "internal/errdefs",
	},
	"internal/agent": {
		"internal/build", "internal/image", "internal/atomicfile", "internal/auth", "internal/certs", "internal/idempotency", "internal/e2b",
		"internal/gateway", "internal/server", "internal/host", "internal/sandbox", "internal/network", "internal/egress", "internal/template",
		"internal/guest", "internal/guestapi", "internal/vmm", "internal/vmm/kvm", "internal/vmm/launch", "internal/vmm/qemu",
		"internal/vmm/firecracker", "internal/vmm/gvisor", "internal/errdefs",
	},
	"internal/certs":       {"internal/atomicfile"},
	"internal/sealed":      {"internal/atomicfile", "internal/errdefs"},
	"internal/auth":        {"internal/sealed", "internal/errdefs"},
	"internal/idempotency": {"internal/sealed", "internal/errdefs"},
	"internal/e2b": {
		"internal/build", "internal/image", "internal/sandbox", "internal/template", "internal/auth", "internal/idempotency",
		"internal/guestapi", "api/...",
		"internal/errdefs", "internal/errdefs/errhttp",
	},
	"internal/server": {"internal/sandbox", "internal/template", "internal/build", "internal/image", "internal/auth", "api/...",
		"internal/errdefs", "internal/errdefs/errhttp"},
	"internal/gateway": {
		"internal/sandbox", "internal/auth", "internal/guestapi", "internal/errdefs", "internal/errdefs/errhttp", "internal/splice",
	},
	"internal/testenv":      {"internal/nftgen"},
	"internal/testenv/liar": {"api/..."},

	"internal/client": {"api/...", "internal/guest", "internal/guestapi", "internal/errdefs", "internal/errdefs/errhttp",
		"internal/splice"},
	"internal/client/clienttest": {"api/..."},
}

// forbidden are packages that a package must not import.
var forbidden = map[string][]string{
	"internal/sandbox":  {"net/http", "connectrpc.com/connect"},
	"internal/network":  {"os/exec"},
	"internal/guestapi": {"net/http", "encoding/json"},
	"internal/client":   {"github.com/spf13/cobra", "flag", "internal/splice"},
}

type pkg struct {
	ImportPath string
	Dir        string
	Imports    []string
	Doc        string
	GoFiles    []string

	TestGoFiles, XTestGoFiles []string
}

func TestImportTable(t *testing.T) {
	for _, p := range listPackages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		if len(p.GoFiles) == 0 {
			continue // tests only
		}
		allowed, ok := lookup(name)
		if !ok {
			t.Errorf("%s is not in the import table: add it with what it may import, or move its code", name)
			continue
		}
		for _, imp := range p.Imports {
			if slices.Contains(forbidden[name], imp) {
				t.Errorf("%s imports %s: the table of forbidden packages has it", name, imp)
			}
			if target, ours := strings.CutPrefix(imp, module); ours && !covers(allowed, target) {
				t.Errorf("%s imports %s: the import table does not allow it", name, target)
			}
		}
		if p.Doc == "" && !strings.HasPrefix(name, "api/") {
			t.Errorf("%s has no package comment", name)
		}
	}
}

// basic are the programs that every machine has on which the tests run: those
// of Debian's essential packages, and go.
var basic = []string{"cat", "cp", "go", "nsenter", "sh", "sleep", "tar", "true", "unshare"}

var (
	started  = regexp.MustCompile(`exec\.Command(?:Context\([\w.()]+, |\()"([^"/]+)"`)
	askedFor = regexp.MustCompile(`testenv\.Program\(\w+, (.*)\)`)
)

// TestProgramsAreAskedFor: the tests of a package that start a program ask
// testenv.Program for it, so that a machine without it skips them.
func TestProgramsAreAskedFor(t *testing.T) {
	for _, p := range listPackages(t) {
		var source []byte
		for _, name := range slices.Concat(p.TestGoFiles, p.XTestGoFiles) {
			text, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			source = append(source, text...)
		}
		var asked string
		for _, m := range askedFor.FindAllSubmatch(source, -1) {
			asked += string(m[1])
		}
		for _, m := range started.FindAllSubmatch(source, -1) {
			if program := string(m[1]); !slices.Contains(basic, program) && !strings.Contains(asked, strconv.Quote(program)) {
				t.Errorf("tests of %s start %s: ask for it with testenv.Program", p.ImportPath, program)
			}
		}
	}
}

// TestNoDefaultClient: no program of this module uses the default HTTP client,
// which follows redirects and uses the proxy that the environment names.
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

func lookup(name string) ([]string, bool) {
	for pattern, allowed := range mayImport {
		if covers([]string{pattern}, name) {
			return allowed, true
		}
	}
	return nil, false
}

func covers(patterns []string, name string) bool {
	for _, p := range patterns {
		prefix, tree := strings.CutSuffix(p, "/...")
		if p == "*" || p == name || tree && strings.HasPrefix(name, prefix+"/") {
			return true
		}
	}
	return false
}

func listPackages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,Doc,GoFiles,TestGoFiles,XTestGoFiles", module+"...")
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
