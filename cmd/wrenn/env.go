package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/certs"
)

func newEnv(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "env",
		Short: "Print what E2B's clients need to use this host",
		Long: `Print the variables by which E2B's clients use this host, for a shell to evaluate:
E2B_API_KEY, E2B_API_URL, E2B_SANDBOX_URL and E2B_DOMAIN; with --tls-self-signed also
those by which Python and Node trust the agent's authority.

It asks the agent of --state-dir, as root. The key is one of the project "default"
that is made at the first call, and kept for later ones in the file env-key of the
state directory. From then on every client over TCP must show a key.
'wrenn key rm wrenn-env' revokes it; the next call makes another.`,
		Example:           `  eval "$(wrenn env)"`,
		Args:              cobra.NoArgs,
		PersistentPreRunE: c.connect,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !strings.HasPrefix(c.addr, "unix://") {
				return errors.New("the agent's Unix socket cannot be opened: run this as root on the host, " +
					"while `wrenn serve` runs, with the agent's --state-dir")
			}
			at, err := c.host.Address(cmd.Context())
			if err != nil {
				return err
			}
			var key string
			if err := (&keyring{c}).use(func(store *auth.Store) (err error) {
				key, err = store.KeptKey()
				return err
			}); err != nil {
				return err
			}
			vars := [][2]string{
				{"E2B_API_KEY", key}, {"E2B_API_URL", at.URL}, {"E2B_SANDBOX_URL", at.URL}, {"E2B_DOMAIN", at.Domain},
			}
			if at.CAFile != "" {
				// The first replaces what the host trusts, the second adds to it.
				vars = append(vars, [2]string{"SSL_CERT_FILE", certs.BundleFile(filepath.Dir(at.CAFile))},
					[2]string{"NODE_EXTRA_CA_CERTS", at.CAFile})
			}
			for _, v := range vars {
				fmt.Fprintf(cmd.OutOrStdout(), "export %s='%s'\n", v[0], strings.ReplaceAll(v[1], "'", `'\''`))
			}
			return nil
		},
	}
}
