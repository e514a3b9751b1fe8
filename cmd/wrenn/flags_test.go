package main

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

// nowhere is an address at which no agent is.
const nowhere = "http://127.0.0.1:1"

// inProcess runs wrenn in this process and returns what it prints and its error.
func inProcess(t *testing.T, args ...string) (printed string, err error) {
	t.Helper()
	printed, _, err = executed(t, args...)
	return printed, err
}

// executed also returns the command that the arguments name.
func executed(t *testing.T, args ...string) (printed string, cmd *cobra.Command, err error) {
	t.Helper()
	var out bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	cmd, err = root.ExecuteContextC(t.Context())
	return out.String(), cmd, err
}

// commands are all commands, without those that cobra adds.
func commands() []*cobra.Command {
	var all []*cobra.Command
	var add func(*cobra.Command)
	add = func(cmd *cobra.Command) {
		for _, c := range cmd.Commands() {
			all = append(all, c)
			add(c)
		}
	}
	add(newRoot())
	return all
}

// words are the command as it is typed, without "wrenn".
func words(cmd *cobra.Command) []string { return strings.Fields(cmd.CommandPath())[1:] }

// Every command says what it does, what its flags are, and refuses a flag that
// it does not have. None of that needs an agent.
func TestEveryCommand(t *testing.T) {
	sentence := regexp.MustCompile(`^[A-Z][^.]*[^.]$`)
	for _, cmd := range commands() {
		t.Run(cmd.CommandPath(), func(t *testing.T) {
			if !sentence.MatchString(cmd.Short) {
				t.Errorf("its short text is %q", cmd.Short)
			}
			help, err := inProcess(t, append(words(cmd), "--help")...)
			if err != nil {
				t.Errorf("--help: %v", err)
			}
			for text := range strings.SplitSeq(cmd.Long+"\n"+cmd.Example, "\n") {
				if len(text) > 90 || !strings.Contains(help, text) {
					t.Errorf("--help has no such line, or it is too long: %q", text)
				}
			}
			cmd.Flags().VisitAll(func(f *pflag.Flag) {
				if f.Usage == "" || !strings.Contains(help, "--"+f.Name) {
					t.Errorf("--help does not say what --%s is", f.Name)
				}
			})
			_, err = inProcess(t, append(words(cmd), "--host", nowhere, "--no-such-flag")...)
			if err == nil || err.Error() != "unknown flag: --no-such-flag" {
				t.Errorf("an unknown flag: %v", err)
			}
		})
	}
}

var wrongArguments = []struct{ args, want string }{
	{"exec", "requires at least 2 arg(s), only received 0"},
	{"exec " + clienttest.ID, "requires at least 2 arg(s), only received 1"},
	{"exec -t " + clienttest.ID + " true", "-t needs a terminal"},
	{"exec -e =x " + clienttest.ID + " true", "--env needs NAME=VALUE"},
	{"exec -e", "flag needs an argument: 'e' in -e"},
	{"exec " + clienttest.ID + " -i cat", "flags stand before the id: wrenn exec -i … " + clienttest.ID + " COMMAND"},
	{"exec " + clienttest.ID + " --user root -- id", "flags stand before the id: wrenn exec --user … " + clienttest.ID},
	{"run --image minimal true", "unknown flag: --image; did you mean --template?"},
	{"run --cpus 2 true", "unknown flag: --cpus; did you mean --vcpus?"},
	{"create --mem 1g", "unknown flag: --mem; did you mean --memory?"},
	{"create --templates x", "unknown flag: --templates; did you mean --template?"},
	{"ps --quie", "unknown flag: --quie; did you mean --quiet?"},
	{"run", "requires at least 1 arg(s)"},
	{"run --memory much true", `memory "much" is not a size`},
	{"run -m 0 true", `memory "0" is not a size`},
	{"run --vcpus two true", `invalid argument "two" for "--vcpus"`},
	{"create --timeout 10", `invalid argument "10" for "--timeout"`},
	{"create --timeout 1500ms", "timeout 1.5s is not a whole number of seconds"},
	{"create --timeout -1s", "timeout -1s is not a whole number of seconds"},
	{"create a b", "accepts at most 1 arg(s), received 2"},
	{"create a --template b", `two templates are named: "a" and "b"`},
	{"create --label =x", `--label "=x": want NAME=VALUE`},
	{"ps -f a=b", `--filter "a=b": want label=NAME=VALUE`},
	{"ps -f label==a", `--filter "label==a": want label=NAME=VALUE`},
	{"ps -f label=", `--filter "label=": want label=NAME=VALUE`},
	{"ps -f name", `--filter "name": want label=NAME=VALUE, name=TEXT`},
	{"ps -f state=asleep", `--filter "state=asleep": want one of creating, running, paused`},
	{"create --disk much", `disk "much" is not a size`},
	{"create --env-file /no/such", "--env-file: open /no/such"},
	{"exec --env-file flags_test.go " + clienttest.ID + " true", "--env-file: flags_test.go, line 1: want NAME=VALUE"},
	{"ps -f label=a=1 -f label=a=2", "one value for each name"},
	{"create --net-in fast", `--net-in: "fast" is no rate`},
	{"create --net-connections many", `invalid argument "many"`},
	{"create --internet=perhaps", `invalid argument "perhaps"`},
	{"network " + clienttest.ID + " --reset --deny 192.0.2.1", "--reset goes with no other flag"},
	{"network", "accepts 1 arg(s), received 0"},
	{"shell", "accepts 1 arg(s), received 0"},
	{"cp a", "accepts 2 arg(s), received 1"},
	{"cp a b", "one of SRC and DST must be ID:PATH"},
	{"cp 3fa:a 3fb:b", "one of SRC and DST must be ID:PATH"},
	{"cp - " + clienttest.ID + ":", "has no name"},
	{"top", "accepts 1 arg(s), received 0"},
	{"port", "accepts between 1 and 2 arg(s), received 0"},
	{"create -p http", `--publish "http": want PORT, or HOSTPORT:PORT`},
	{"create -p 0", `--publish "0": want`},
	{"create -p 8000:", `--publish "8000:": want`},
	{"run -p 0:80 true", `--publish "0:80": want`},
	{"create -p 65536:80", `--publish "65536:80": want`},
	{"port " + clienttest.ID + " http", `port "http" is not a number from 1 to 65535`},
	{"port " + clienttest.ID + " 49983 --listen :0", "which is not forwarded"},
	{"attach " + clienttest.ID, "accepts 2 arg(s), received 1"},
	{"attach " + clienttest.ID + " x", `"x" is no PID`},
	{"attach " + clienttest.ID + " 0", `"0" is no PID`},
	{"kill", "requires at least 2 arg(s)"},
	{"kill " + clienttest.ID, "`wrenn rm " + clienttest.ID + "` destroys the sandbox"},
	{"kill " + clienttest.ID + " -1", "unknown shorthand flag"},
	{"logs -f " + clienttest.ID, "--follow needs the PID of a command"},
	{"logs -t " + clienttest.ID + " 7", "are for the console"},
	{"pause", "requires at least 1 arg(s)"},
	{"resume", "requires at least 1 arg(s)"},
	{"recover", "requires at least 1 arg(s)"},
	{"stop", "requires at least 1 arg(s)"},
	{"stop -t soon x", `invalid argument "soon"`},
	{"start", "requires at least 1 arg(s)"},
	{"rm", "requires at least 1 arg(s)"},
	{"fork", "accepts 1 arg(s), received 0"},
	{"fork -n some " + clienttest.ID, `invalid argument "some" for "-n, --count"`},
	{"timeout " + clienttest.ID, "accepts 2 arg(s), received 1"},
	{"timeout " + clienttest.ID + " soon", `"soon" is not a duration such as 90s, 30m or 2h`},
	{"timeout " + clienttest.ID + " 1ms", "is not a whole number of seconds"},
	{"deadline " + clienttest.ID, "accepts 2 arg(s), received 1"},
	{"deadline " + clienttest.ID + " soon", `deadline "soon" is neither a duration`},
	{"create --deadline -1h", `deadline "-1h" is neither a duration`},
	{"inspect", "accepts 1 arg(s), received 0"},
	{"logs", "accepts between 1 and 2 arg(s), received 0"},
	{"logs --tail-bytes lots " + clienttest.ID, `invalid argument "lots"`},
	{"events a b", "accepts at most 1 arg(s), received 2"},
	{"events --after -1", `invalid argument "-1"`},
	{"snapshot", "accepts between 1 and 2 arg(s), received 0"},
	{"snapshot rm", "requires at least 1 arg(s)"},
	{"snapshots x", "unknown command"},
	{"template x", "unknown command"},
	{"template pull", "accepts 1 arg(s), received 0"},
	{"template pull --name :v1 a", `template ":v1" has no name`},
	{"template pull --memory much a", `memory "much" is not a size`},
	{"template pull --progress fast a", `--progress "fast" is unknown`},
	{"template pull --progress tty a", "--progress tty needs a terminal"},
	{"template pull --password-stdin a", "--password-stdin needs --user"},
	{"template pull --user me a", "--user needs a password"},
	{"template import", "accepts 1 arg(s), received 0"},
	{"template import -", "--name gives one"},
	{"template import /no/such.tar", "no such file"},
	{"template build", "accepts 1 arg(s), received 0"},
	{"template build /no/such", "no such file"},
	{"template build flags_test.go", "is no directory"},
	{"template build .", "-f names the Dockerfile"},
	{"template build --build-arg =x .", "--build-arg needs NAME=VALUE"},
	{"template build -t a:1 -t b:1 .", `two templates are named: "a" and "b"`},
	{"template inspect", "requires at least 1 arg(s)"},
	{"template history", "accepts 1 arg(s), received 0"},
	{"template rm", "requires at least 1 arg(s)"},
	{"template tag a", "requires at least 2 arg(s)"},
	{"template tag a b:c", "is of another template"},
	{"template untag a", "requires at least 2 arg(s)"},
	{"template export", "accepts 1 arg(s), received 0"},
	{"template prune x", "unknown command"},
	{"gc x", "unknown command"},
	{"ps x y", "accepts at most 1 arg(s), received 2"},
	{"version x", "unknown command"},
	{"nonsense", `unknown command "nonsense" for "wrenn"`},
	{"images", "Did you mean this?\n\ttemplate"},
	{"delete x", "Did you mean this?\n\trm"},
	{"create --background", "unknown flag: --background"},
	{"exec --background x y", "unknown flag: --background; did you mean --detach?"},
	{"create --storage 1g", "unknown flag: --storage; did you mean --disk?"},
	{"ps --host 127.0.0.1:50051", "--host: parse"},
	{"ps --host localhost:50051", `--host: "localhost:50051" is not a URL such as http://127.0.0.1:50051`},
	{"ps --host http://", "is not a URL such as"},
	{"ps --host ftp://127.0.0.1", "is not a URL such as"},
}

// What a person types wrongly is refused before anything is done, with a text
// that says what is wrong.
func TestWrongArguments(t *testing.T) {
	id := clienttest.ID
	for _, c := range wrongArguments {
		args := strings.Fields(c.args)
		if !slices.Contains(args, "--host") {
			args = append([]string{"--host", nowhere}, args...)
		}
		if printed, err := inProcess(t, args...); err == nil || !strings.Contains(err.Error(), c.want) || printed != "" {
			t.Errorf("wrenn %s: %v, want %q; printed %q", c.args, err, c.want, printed)
		}
	}
	if _, err := inProcess(t, "--host", nowhere, "snapshot", id, ""); err == nil || !strings.Contains(err.Error(), "name is empty") {
		t.Errorf("a snapshot without a name: %v", err)
	}
	if _, err := inProcess(t, "--host", nowhere, "cp", id+":x", ""); err == nil || !strings.Contains(err.Error(), "DST is empty") {
		t.Errorf("a copy to no name: %v", err)
	}
}

// The examples of README.md and of --help are commands that exist, with flags
// and arguments that are taken.
func TestExamplesAreRight(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	aside := regexp.MustCompile(`(\S) {2,}\S.*`) // what a line of the overview says about its command
	for line := range strings.SplitSeq(string(readme), "\n") {
		if strings.HasPrefix(line, "    ") {
			lines = append(lines, line)
		}
	}
	for _, cmd := range commands() {
		lines = append(lines, strings.Split(cmd.Example, "\n")...)
	}
	for line := range strings.SplitSeq(newRoot().Long, "\n") {
		lines = append(lines, aside.ReplaceAllString(line, "$1"))
	}
	seen := 0
	for _, line := range lines {
		for _, args := range commandLines(line) {
			seen++
			if err := accepted(args); err != nil {
				t.Errorf("%q: %v: %q", line, err, args)
			}
		}
	}
	if seen < 50 {
		t.Errorf("%d examples were found", seen)
	}
	// In the text, a command may stand without its arguments.
	for _, quoted := range regexp.MustCompile("`wrenn ([a-z][^`A-Z]*)").FindAllStringSubmatch(string(readme), -1) {
		cmd, rest, err := newRoot().Find(strings.Fields(quoted[1]))
		if err == nil {
			err = cmd.ParseFlags(rest)
		}
		if err != nil && !strings.Contains(err.Error(), "help requested") && !strings.Contains(err.Error(), "needs an argument") {
			t.Errorf("%s: %v", quoted[0], err)
		}
	}
}

// commandLines are the arguments of each wrenn in a line of shell, without
// redirections and comments.
func commandLines(line string) (found [][]string) {
	token := regexp.MustCompile(`'[^']*'|"[^"]*"|\$\(|[|;()&<>]+|#.*|(?:[^\s'"|;()&<>$#]|\$[a-z])+`)
	var args []string
	inside := false
	end := func() {
		if inside {
			found = append(found, args)
		}
		args, inside = nil, false
	}
	for _, word := range token.FindAllString(line, -1) {
		switch {
		case strings.ContainsAny(word[:1], "|;()&<>#") || word == "$(":
			end()
		case !inside:
			inside = word == "wrenn" || word == "bin/wrenn"
		default:
			args = append(args, strings.Trim(word, `'"`))
		}
	}
	end()
	return found
}

// accepted says whether a command takes arguments, which are not acted on.
func accepted(args []string) error {
	cmd, rest, err := newRoot().Find(args)
	if err != nil {
		return err
	}
	cmd.InitDefaultHelpFlag()
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	if help, _ := cmd.Flags().GetBool("help"); help || !cmd.Runnable() {
		return nil
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}
