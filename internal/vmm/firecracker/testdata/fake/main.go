// Command fake stands for Firecracker and for its jailer, by the name that it is
// called by. It does what they do as far as a driver can see: it serves the API
// on its socket, refuses what they refuse, opens the files and the tap that it
// is told, and really changes root and user. It runs no guest: the command line
// goes to the console, and fake.exit in it ends the VM.
//
// What differs from one test to the next stands behind the marker at the end of
// the program's own file, for nothing else gets through the jailer.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

const marker = "\nFAKE-SETTINGS "

// settings say which Firecracker this is, and what goes wrong.
type settings struct {
	// Version is printed, and what the API can follows from it.
	Version string `json:"version"`
	// Fault happens to the call of that number; GET / does not count.
	Fault string `json:"fault"`
	Call  int    `json:"call"`
}

func main() {
	runtime.LockOSThread()
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		die(1, "read own settings: %v", err)
	}
	set := settings{Version: "1.12.1"}
	if i := bytes.LastIndex(program, []byte(marker)); i >= 0 {
		if err := json.Unmarshal(program[i+len(marker):], &set); err != nil {
			die(1, "own settings: %v", err)
		}
	}
	name, run := "Firecracker", firecracker
	if strings.HasPrefix(filepath.Base(os.Args[0]), "jailer") {
		name, run = "Jailer", jailer
	}
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Printf("%s v%s\n\n", name, set.Version)
		return
	}
	run(set, os.Args[1:])
}

// die ends the program as the real ones do: with a word on standard error.
func die(status int, format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(status)
}

// options parses arguments of the form "--name value"; what follows "--" is
// returned as it is. Of the names in many there may be several.
func options(args []string, allowed string, many ...string) (one map[string]string, rest []string) {
	one = map[string]string{}
	for len(args) > 0 {
		name, ok := strings.CutPrefix(args[0], "--")
		if args[0] == "--" {
			return one, args[1:]
		}
		if !ok || !strings.Contains(" "+allowed+" ", " "+name+" ") {
			die(153, "Arguments parsing error: Found argument '%s' which wasn't expected, or isn't valid in this context.", args[0])
		}
		if len(args) < 2 {
			die(153, "Arguments parsing error: The argument '%s' requires a value, but none was supplied.", args[0])
		}
		if _, twice := one[name]; twice && !strings.Contains(strings.Join(many, " "), name) {
			die(153, "Arguments parsing error: The argument '%s' was provided more than once.", args[0])
		}
		one[name] = args[1]
		args = args[2:]
	}
	return one, nil
}

func validID(id string) bool {
	if len(id) < 1 || len(id) > 64 {
		return false
	}
	for _, c := range id {
		if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}
