package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/internal/client"
)

func newCp(c *cli) *cobra.Command {
	var x client.Copy
	cmd := &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy files and directories into and out of a sandbox",
		Long: `Copy a file or a directory with all that is in it into a running sandbox or out
of it. One of SRC and DST is ID:PATH; a relative PATH begins at the user's home.

If DST is a directory, the source is copied into it; DIR/. copies what is in DIR.
Modes are kept, holes of sparse files and names that lead to one file, too; -p also
keeps times and the set-user-ID, set-group-ID and sticky bits. Owners are not kept: a
copy belongs to the user who makes it, in the sandbox to --user, or to --chown. To copy
a directory, the sandbox needs tar.

The other of SRC and DST may be -, for stdin or stdout. That is the content of a file.
If ID:PATH is a directory, it is an archive of tar: of the directory, or one to be
unpacked there.

A copy out of a sandbox writes only into the directory that DST names. Links on the
way to that directory are followed, links in it are not. A file or a link of the
sandbox replaces what has its name there, except a directory; a directory replaces
nothing. A DST that is neither a file nor a directory is refused. Only files,
directories and links are copied. The sandbox chooses what is in a copy out of it:
think before you use -p as root.`,
		Example: `  wrenn cp main.py 3fa:/root/
  wrenn cp -p --chown www-data ./site 3fa:/var/www
  wrenn cp 3fa:/var/log ./logs
  wrenn cp 3fa:results.csv - | head
  git archive HEAD | wrenn cp - 3fa:/src/`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, to := parsePlace(args[0]), parsePlace(args[1])
			if (from.ref == "") == (to.ref == "") {
				return errors.New("one of SRC and DST must be ID:PATH, and one must not; a local name with a colon is written ./a:b")
			}
			s, err := c.find(cmd.Context(), from.ref+to.ref)
			if err != nil {
				return err
			}
			p := startMeter()
			defer p.stop()
			p.tell(&x)
			if to.ref != "" {
				return copyIn(cmd, s, x, from.path, to.path)
			}
			if x.Chown != "" {
				return errors.New("--chown is of a copy into a sandbox")
			}
			return copyOut(cmd, s, x, from.path, to.path)
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&x.User, "user", "u", "", "user in the sandbox who makes or reads the files")
	flags.BoolVarP(&x.Preserve, "preserve", "p", false, "keep times and set-user-ID, set-group-ID and sticky bits")
	flags.StringVar(&x.Chown, "chown", "", "owner of the copy in the sandbox, as USER[:GROUP], by name or number")
	return cmd
}

// place is one end of a copy: in the sandbox that ref names, or here.
type place struct{ ref, path string }

func parsePlace(s string) place {
	ref, path, ok := strings.Cut(s, ":")
	if !ok || ref == "" || strings.ContainsAny(ref, "/.") {
		return place{path: s}
	}
	return place{ref, path}
}

func copyIn(cmd *cobra.Command, s *client.Sandbox, x client.Copy, from, to string) error {
	if from != "-" {
		return s.CopyIn(cmd.Context(), x, from, to)
	}
	if to == "" {
		return errors.New("what comes from stdin has no name: let DST end with one, or, for an archive, with a slash")
	}
	return s.WriteFile(cmd.Context(), x, os.Stdin, to)
}

func copyOut(cmd *cobra.Command, s *client.Sandbox, x client.Copy, from, to string) error {
	switch to {
	case "":
		return errors.New("DST is empty")
	case "-":
		err := s.ReadFile(cmd.Context(), x, from, os.Stdout)
		if errors.As(err, new(*client.DirectoryError)) {
			if term.IsTerminal(int(os.Stdout.Fd())) {
				return fmt.Errorf("%w: it would be written as an archive; redirect that, or name a DST", err)
			}
			return s.ReadArchive(cmd.Context(), x, from, os.Stdout)
		}
		return err
	}
	return s.CopyOut(cmd.Context(), x, from, to)
}
