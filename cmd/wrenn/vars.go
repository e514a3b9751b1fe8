package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// vars are flags that name variables: --env and --env-file.
type vars struct{ pairs, files []string }

func (v *vars) flags(cmd *cobra.Command, of string) {
	cmd.Flags().StringArrayVarP(&v.pairs, "env", "e", nil, "set NAME=VALUE for "+of+", or NAME to pass on your variable; may be repeated")
	cmd.Flags().StringArrayVar(&v.files, "env-file", nil,
		"read such lines from a file, # begins a comment; --env wins over it; may be repeated")
}

// read returns the variables. Those of files come first, in their order.
func (v *vars) read() (map[string]string, error) {
	env := map[string]string{}
	for _, path := range v.files {
		if err := readVars(path, env); err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
	}
	for _, pair := range v.pairs {
		if !setVar(pair, env) {
			return nil, errors.New("--env needs NAME=VALUE, or NAME to pass on a variable")
		}
	}
	return env, nil
}

// readVars reads the variables of a file as docker does: the value is the rest of the
// line as it is, quotes included.
func readVars(path string, env map[string]string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimLeft(strings.TrimSuffix(lines.Text(), "\r"), " \t")
		if n == 1 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		if line == "" || line[0] == '#' {
			continue
		}
		name, _, _ := strings.Cut(line, "=")
		if strings.ContainsAny(name, " \t") || !setVar(line, env) {
			return fmt.Errorf("%s, line %d: want NAME=VALUE, or NAME to pass on a variable", path, n)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// setVar sets what NAME=VALUE says, or NAME for a variable of this program, whose value
// then stands in no list of processes; false if there is no name.
func setVar(pair string, env map[string]string) bool {
	name, value, ok := strings.Cut(pair, "=")
	if !ok {
		value, ok = os.LookupEnv(name)
	}
	if ok {
		env[name] = value
	}
	return name != ""
}
