package build

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestProvisionScript: each package manager is asked for what is missing, by the names of
// its distribution, and what it does not bring is told. The managers are stubs, which make
// the tools that they are asked for.
func TestProvisionScript(t *testing.T) {
	install := `#!/bin/sh
echo "$0 $*" >>"$LOG"
for word; do
  case $word in
  iproute2|iproute2-ss|iproute) word=ss;; procps|procps-ng) word=pgrep;; broken) exit 1;;
  bash|sudo|curl|git) ;; *) continue;;
  esac
  [ $word = "$LACKS" ] || { echo '#!/bin/sh' >"$BIN/$word"; /bin/chmod +x "$BIN/$word"; }
done
`
	for _, c := range []struct {
		manager, has, lacks string
		want                string
		status              int
	}{
		{manager: "apt-get", want: "apt-get -q -o Acquire::http::Timeout=20 update|" +
			"apt-get -q -y --no-install-recommends install bash sudo curl git iproute2 procps"},
		{manager: "apt-get", has: "bash curl pgrep", want: "apt-get -q -o Acquire::http::Timeout=20 update|" +
			"apt-get -q -y --no-install-recommends install sudo git iproute2"},
		{manager: "apk", want: "apk add --no-cache bash sudo curl git iproute2-ss procps"},
		{manager: "dnf", want: "dnf -q -y install bash sudo curl git iproute procps-ng"},
		{manager: "pacman", want: "pacman -Sy --noconfirm --needed bash sudo curl git iproute2 procps-ng"},
		{manager: "apk", lacks: "sudo", status: 3, want: "apk add --no-cache bash sudo curl git iproute2-ss procps|missing: sudo"},
		{has: "bash sudo curl git ss pgrep"},
		{has: "bash", status: 3, want: "the image has no package manager that is known|missing: sudo curl git ss pgrep"},
	} {
		dir := t.TempDir()
		bin, log := filepath.Join(dir, "bin"), filepath.Join(dir, "log")
		if err := os.Mkdir(bin, 0o755); err != nil {
			t.Fatal(err)
		}
		programs := map[string]string{c.manager: install}
		for _, tool := range strings.Fields(c.has) {
			programs[tool] = "#!/bin/sh\n"
		}
		delete(programs, "")
		for name, text := range programs {
			if err := os.WriteFile(filepath.Join(bin, name), []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command("/bin/sh", "-c", provisionScript, "sh")
		cmd.Env = []string{"PATH=" + bin, "BIN=" + bin, "LOG=" + log, "LACKS=" + c.lacks}
		out, _ := cmd.CombinedOutput() // its status is looked at
		ran, err := os.ReadFile(log)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		got := strings.ReplaceAll(strings.TrimSpace(string(ran)+string(out)), bin+"/", "")
		if got = strings.ReplaceAll(got, "\n", "|"); got != c.want || cmd.ProcessState.ExitCode() != c.status {
			t.Errorf("%s, with %q: status %d, ran %q; want %d, %q", c.manager, c.has, cmd.ProcessState.ExitCode(), got, c.status, c.want)
		}
	}
}
