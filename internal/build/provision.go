package build

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
)

// provisionVersion tells bases apart that were provisioned otherwise.
const provisionVersion = "2"

// provisionTimeout bounds the installation of packages.
const provisionTimeout = 20 * time.Minute

// provisionScript installs what E2B's clients and ready commands ask of a template and
// an image lacks. It names what is missing at its end.
const provisionScript = `
missing() { for t in bash sudo curl git ss pgrep; do command -v $t >/dev/null 2>&1 || echo $t; done; [ -d /etc/ssl/certs ] || echo ca; }
m=$(missing)
[ -n "$m" ] || exit 0
packages() { for t in $m; do case $t in ss) echo $1;; pgrep) echo $2;; ca) echo ca-certificates;; *) echo $t;; esac; done; }
if command -v apt-get >/dev/null 2>&1; then
  export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
  apt-get -q -o Acquire::http::Timeout=20 update && apt-get -q -y --no-install-recommends install $(packages iproute2 procps)
elif command -v apk >/dev/null 2>&1; then apk add --no-cache $(packages iproute2-ss procps)
elif command -v dnf >/dev/null 2>&1; then dnf -q -y install $(packages iproute procps-ng)
elif command -v pacman >/dev/null 2>&1; then pacman -Sy --noconfirm --needed $(packages iproute2 procps-ng)
else echo "the image has no package manager that is known"
fi
m=$(missing)
[ -z "$m" ] || { echo "missing:" $m; exit 3; }
`

// finalizeScript sets the modes that E2B's templates have. $1 is the account.
const finalizeScript = `
mkdir -p /code /usr/local && chmod 777 /code || exit 1
if command -v find >/dev/null 2>&1; then find /usr/local -xdev -type d ! -perm 777 -exec chmod 777 {} +; else chmod 777 /usr/local; fi
[ ! -d "/home/$1" ] || chown -R "$1:$1" "/home/$1"
`

// provision makes an image what E2B's templates are. A tool that cannot be installed is a
// warning: the step that needs it fails.
func (j *job) provision(g Guest) error {
	if err := j.ensureUser(g, e2bUser); err != nil {
		return err
	}
	err := unpackFiles(j.ctx, g, "/",
		file{name: "etc/sudoers.d", mode: 0o750, dir: true},
		file{name: "etc/sudoers.d/" + e2bUser, mode: 0o440, data: []byte(e2bUser + " ALL=(ALL:ALL) NOPASSWD: ALL\n")})
	if err != nil {
		return fmt.Errorf("write sudoers: %w", err)
	}
	if err := j.asRoot(g, provisionScript, provisionTimeout, "[base]", baseStep); err != nil {
		return err
	}
	return j.ensureBash(g)
}

// ensureBash makes /bin/bash of another shell where there is none, for E2B's commands name
// it.
func (j *job) ensureBash(g Guest) error {
	var out bytes.Buffer
	_, err := g.Exec(j.ctx, guest.Command{
		Cmd: "/bin/sh", Args: []string{"-c", "[ -x /bin/bash ] || { ln -s sh /bin/bash && echo made; }"}, Cwd: "/", Timeout: time.Minute,
	}, func(_ bool, data []byte) { out.Write(data[:min(len(data), 64)]) })
	if strings.Contains(out.String(), "made") {
		j.log.say(Warn, baseStep, "[base] the image has no bash: its sh takes the place")
	}
	return j.notFatal(err, baseStep, "[base] look for bash")
}

// asRoot runs a script of the engine's. That it fails is a warning.
func (j *job) asRoot(g Guest, script string, limit time.Duration, head, step string, args ...string) error {
	out := &lines{log: j.log, step: step, head: head, maxed: maxLine}
	result, err := g.Exec(j.ctx, guest.Command{
		Cmd: "/bin/sh", Args: append([]string{"-c", script, "sh"}, args...), Env: map[string]string{"PATH": standardPath, "HOME": "/root"},
		Cwd: "/", Timeout: limit,
	}, out.write)
	out.flush()
	if err == nil && result.ExitCode != 0 {
		j.log.say(Warn, step, "%s not all could be prepared: exit status %d", head, result.ExitCode)
	}
	return j.notFatal(err, step, head)
}

// notFatal makes an error of the engine's own commands a warning, unless the build has
// ended or its guest is gone.
func (j *job) notFatal(err error, step, what string) error {
	if err == nil || j.ctx.Err() != nil || errors.Is(err, errdefs.Unavailable) {
		return err
	}
	j.log.say(Warn, step, "%s: %s", what, sentence(err))
	return nil
}

// finalize gives the template what E2B's have at the end.
func (j *job) finalize(g Guest, st *state) error {
	about := fmt.Sprintf("TEMPLATE_ID=%s\nBUILD_ID=%s\n", j.spec.Template, j.spec.Build)
	if err := unpackFiles(j.ctx, g, "/", file{name: ".e2b", mode: 0o644, data: []byte(about)}); err != nil {
		return fmt.Errorf("write /.e2b: %w", err)
	}
	if err := j.ensureUser(g, e2bUser); err != nil {
		return err
	}
	return j.asRoot(g, finalizeScript, provisionTimeout, "[finalize]", finalizeStep, e2bUser)
}
