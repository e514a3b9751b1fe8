package envd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// maxModule bounds an unpacked module, in bytes.
const maxModule = 64 << 20

// Modprobe is the modprobe of guests that have none, called with the arguments of the
// program. It returns the exit status. It knows what the kernel, scripts and documents
// call it with: -q, -r, -a, -v, -s, -b, a name or alias, and parameters.
func Modprobe(args []string, errOut io.Writer) int {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		fmt.Fprintln(errOut, "modprobe:", err)
		return 1
	}
	dir := filepath.Join(modulesTop, unix.ByteSliceToString(uts.Release[:]))
	call, err := parseModprobe(args)
	if err == nil {
		for _, name := range call.names {
			err = errors.Join(err, call.do(dir, name))
		}
	}
	if err == nil {
		return 0
	}
	if !call.quiet {
		fmt.Fprintln(errOut, "modprobe:", err)
	}
	return 1
}

// modprobe is one call of Modprobe.
type modprobe struct {
	quiet, remove bool
	names         []string
	params        string
}

func parseModprobe(args []string) (modprobe, error) {
	var m modprobe
	all := false
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		word := args[0]
		args = args[1:]
		if word == "--" {
			break
		}
		switch word {
		case "-q", "--quiet", "-qb", "-bq":
			m.quiet = true
		case "-r", "--remove":
			m.remove = true
		case "-a", "--all":
			all = true
		case "-v", "--verbose", "-s", "--syslog", "-b", "--use-blacklist":
		default:
			return m, fmt.Errorf("option %s: the package kmod has a modprobe that knows more", word)
		}
	}
	if len(args) == 0 {
		return m, errors.New("no module is named")
	}
	m.names = args
	if !all && !m.remove {
		m.names, m.params = args[:1], strings.Join(args[1:], " ")
	}
	return m, nil
}

func (m modprobe) do(dir, name string) error {
	chains, err := findModules(dir, name)
	if err != nil {
		return err
	}
	for _, files := range chains {
		last := files[len(files)-1]
		if m.remove {
			if err := unix.DeleteModule(moduleOf(last), unix.O_NONBLOCK); err != nil {
				return fmt.Errorf("remove module %s: %w", moduleOf(last), err)
			}
			continue
		}
		for _, file := range files {
			params := ""
			if file == last {
				params = m.params
			}
			if err := loadPacked(filepath.Join(dir, file), params); err != nil {
				return fmt.Errorf("load module %s: %w", moduleOf(file), err)
			}
		}
	}
	return nil
}

// loadPacked loads a module that xz packed. One that is loaded already is no error.
func loadPacked(file, params string) error {
	if _, err := os.Stat(filepath.Join("/sys/module", moduleOf(file), "initstate")); err == nil {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := xz.NewReader(bufio.NewReader(f))
	if err != nil {
		return err
	}
	image, err := io.ReadAll(io.LimitReader(r, maxModule))
	if err != nil {
		return err
	}
	if err := unix.InitModule(image, params); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// moduleOf is the name of the module in a file.
func moduleOf(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return plainName(name)
}

// plainName spells a module or alias as the kernel does.
func plainName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// findModules returns the modules in dir that a name or an alias stands for: of each, the
// files to load, in their order. A module that is built into the kernel has none. A name
// that stands for nothing is an error.
func findModules(dir, name string) ([][]string, error) {
	want := map[string]bool{plainName(name): true}
	chains, err := chainsOf(dir, want)
	if err != nil || len(chains) > 0 {
		return chains, err
	}
	builtin := false
	err = eachLine(filepath.Join(dir, "modules.builtin"), func(line string) {
		builtin = builtin || moduleOf(line) == plainName(name)
	})
	if err != nil || builtin {
		return nil, err
	}
	clear(want)
	err = eachLine(filepath.Join(dir, "modules.alias"), func(line string) {
		// alias pattern module
		if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" && matchesAlias(f[1], name) {
			want[plainName(f[2])] = true
		}
	})
	if err == nil {
		chains, err = chainsOf(dir, want)
	}
	if err == nil && len(chains) == 0 {
		err = fmt.Errorf("module %s not found in directory %s", name, dir)
	}
	return chains, err
}

// matchesAlias says whether a name matches a pattern of a shell. A slash is a character
// as any other.
func matchesAlias(pattern, name string) bool {
	flat := strings.NewReplacer("/", "\x01", "-", "_")
	ok, _ := path.Match(flat.Replace(pattern), flat.Replace(name))
	return ok
}

// chainsOf returns the files to load for each of the modules, in their order.
func chainsOf(dir string, want map[string]bool) ([][]string, error) {
	var chains [][]string
	err := eachLine(filepath.Join(dir, "modules.dep"), func(line string) {
		// file: the files that it needs, the last to be loaded first
		file, needs, ok := strings.Cut(line, ":")
		if !ok || !want[moduleOf(file)] {
			return
		}
		files := strings.Fields(needs)
		slices.Reverse(files)
		chains = append(chains, append(files, file))
	})
	return chains, err
}

func eachLine(file string, do func(line string)) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		do(strings.TrimSpace(lines.Text()))
	}
	return lines.Err()
}
