package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/client"
)

func newCp(c *cli) *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy files and directories into and out of a sandbox",
		Long: `Copy a file or a directory with all that is in it into a running sandbox or out
of it. One of SRC and DST is ID:PATH; a relative PATH begins at the user's home. The
other may be -, for stdin or stdout.

If DST is a directory, the source is copied into it; DIR/. copies what is in DIR.
Modes are kept, owners are not: a copy belongs to the user who makes it, in the
sandbox to --user. To copy a directory, the sandbox needs tar.

A copy out of a sandbox writes only into the directory that DST names. Links on the
way to that directory are followed, links in it are not. A file or a link of the
sandbox replaces what has its name there, except a directory; a directory replaces
nothing. A DST that is neither a file nor a directory is refused. Only files,
directories and links are copied.`,
		Example: "  wrenn cp main.py 3fa:/root/\n  wrenn cp 3fa:/var/log ./logs\n  wrenn cp 3fa:results.csv - | head",
		Args:    cobra.ExactArgs(2),
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
			if to.ref != "" {
				return copyIn(cmd, s, p.copy(user), from.path, to.path)
			}
			return copyOut(cmd, s, p.copy(user), from.path, to.path)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user in the sandbox that files belong to")
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
	if to == "" || strings.HasSuffix(to, "/") {
		return errors.New("what comes from stdin has no name: let DST end with one")
	}
	return s.WriteFile(cmd.Context(), x, os.Stdin, to)
}

func copyOut(cmd *cobra.Command, s *client.Sandbox, x client.Copy, from, to string) error {
	switch to {
	case "":
		return errors.New("DST is empty")
	case "-":
		err := s.ReadFile(cmd.Context(), x, from, os.Stdout)
		var dir *client.DirectoryError
		if errors.As(err, &dir) {
			return fmt.Errorf("%w; `wrenn exec %s -- tar -c -C %s .` writes it as an archive", err, s.ID, dir.Path)
		}
		return err
	}
	return s.CopyOut(cmd.Context(), x, from, to)
}
