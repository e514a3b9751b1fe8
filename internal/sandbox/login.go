package sandbox

import (
	"fmt"
	"regexp"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Login is what the programs of a sandbox begin with.
type Login = template.Login

// Bounds of the variables of a sandbox, and of those of a command.
const (
	MaxEnv = 1024
	// MaxEnvBytes is of all names and values together.
	MaxEnvBytes = 64 << 10
)

// userPattern is what useradd(8) lets through, or a uid; a gid may follow.
var userPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:[0-9]{1,10})?$`)

// CheckUser says whether there can be such a user; none is fine.
func CheckUser(name string) error {
	if name != "" && !userPattern.MatchString(name) {
		return fmt.Errorf("user %.40q is no user name: want 1 to 32 letters, digits, '_', '.', '-', or a uid; :GID may follow", name)
	}
	return nil
}

// MaxWorkdir bounds the length of a directory, in bytes.
const MaxWorkdir = 4096

func checkWorkdir(dir string) error {
	if len(dir) > MaxWorkdir || strings.ContainsRune(dir, 0) {
		return fmt.Errorf("workdir %.40q is no path", dir)
	}
	return nil
}

// CheckEnv says whether a program can be given these variables. Its error names
// none of their values.
func CheckEnv(env map[string]string) error {
	if len(env) > MaxEnv {
		return fmt.Errorf("%d variables, at most %d are possible", len(env), MaxEnv)
	}
	size := 0
	for name, value := range env {
		size += len(name) + len(value)
		switch {
		case name == "" || strings.ContainsAny(name, "=\x00"):
			return fmt.Errorf("%.40q is no name of a variable", name)
		case strings.ContainsRune(value, 0):
			return fmt.Errorf("variable %.40q has a NUL byte", name)
		}
	}
	if size > MaxEnvBytes {
		return fmt.Errorf("the variables are %d bytes long, at most %d are possible", size, MaxEnvBytes)
	}
	return nil
}
