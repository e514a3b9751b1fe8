package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// keyring is the store of API keys that a command works on. The agent need not run:
// what is changed counts for its next request.
type keyring struct{ *cli }

func newKey(c *cli) *cobra.Command {
	k := &keyring{c}
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Make, list and revoke API keys",
		Long: `Make, list and revoke API keys. Clients over TCP show one, in the header X-API-KEY
or as a bearer token; as soon as there is one, all of them must. The key decides
which project a client acts for: it sees and touches that project's sandboxes,
snapshots and templates, and no others.

It works on the state directory, as root, also while no agent runs. A change
counts for the next request.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(newKeyCreate(k), newKeyLs(k), newKeyRm(k), newKeyQuota(k))
	return cmd
}

// use opens the store for do, and closes it.
func (k *keyring) use(do func(*auth.Store) error) error {
	if _, err := os.Stat(k.stateDir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no %s: prepare this host with `wrenn setup --state-dir %[1]s`, or name another with --state-dir",
			k.stateDir)
	}
	store, err := auth.Open(k.stateDir)
	if err == nil {
		err = errors.Join(do(store), store.Close())
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w; keys need root", err)
	}
	return err
}

// quotaFlags are the bounds of a project.
func quotaFlags(cmd *cobra.Command) *auth.Quota {
	var q auth.Quota
	f := cmd.Flags()
	f.IntVar(&q.Sandboxes, "quota-sandboxes", 0, "most sandboxes of the project at a time, paused ones among them; 0 is no bound")
	f.IntVar(&q.VCPUs, "quota-vcpus", 0, "most virtual CPUs of its running sandboxes together; 0 is no bound")
	f.IntVar(&q.MemMiB, "quota-memory", 0, "most memory of its running sandboxes together, in MiB; 0 is no bound")
	f.IntVar(&q.DiskMiB, "quota-disk", 0, "most disk of its sandboxes together, in MiB of their full sizes; 0 is no bound")
	return &q
}

func newKeyCreate(k *keyring) *cobra.Command {
	var project string
	cmd := &cobra.Command{
		Use:   "create [NAME]",
		Short: "Make an API key and print it, once",
		Long: `Make an API key and print it. It is shown this once: what is kept of it is a digest.
Of the quotas, those that are named replace the project's.`,
		Example: "  wrenn key create laptop\n  wrenn key create ci --project blue --quota-sandboxes 50",
		Args:    cobra.MaximumNArgs(1),
	}
	quota := quotaFlags(cmd)
	cmd.Flags().StringVar(&project, "project", auth.DefaultProject, "project that the key acts for; made if there is none of that name")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := ""
		if len(args) > 0 {
			name = args[0]
		}
		return k.use(func(store *auth.Store) error {
			// The quota comes first: a key never acts without it.
			if quotaNamed(cmd) {
				if err := setQuota(cmd, store, project, *quota); err != nil {
					return err
				}
			}
			secret, key, err := store.CreateKey(project, name)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), secret)
			fmt.Fprintf(cmd.ErrOrStderr(), "This is key %s of project %s. It is not shown again.\n", key.ID, key.Project)
			return nil
		})
	}
	return cmd
}

var quotaNames = []string{"quota-sandboxes", "quota-vcpus", "quota-memory", "quota-disk"}

func quotaNamed(cmd *cobra.Command) bool {
	for _, name := range quotaNames {
		if cmd.Flags().Changed(name) {
			return true
		}
	}
	return false
}

// setQuota replaces those parts of a project's quota that the flags name.
func setQuota(cmd *cobra.Command, store *auth.Store, project string, q auth.Quota) error {
	projects, err := store.Projects()
	if err != nil {
		return err
	}
	var old auth.Quota
	for _, p := range projects {
		if p.Name == project {
			old = p.Quota
		}
	}
	for name, part := range map[string]struct {
		to   *int
		from int
	}{
		"quota-sandboxes": {&q.Sandboxes, old.Sandboxes}, "quota-vcpus": {&q.VCPUs, old.VCPUs},
		"quota-memory": {&q.MemMiB, old.MemMiB}, "quota-disk": {&q.DiskMiB, old.DiskMiB},
	} {
		if !cmd.Flags().Changed(name) {
			*part.to = part.from
		}
	}
	return store.SetQuota(project, q)
}

func newKeyQuota(k *keyring) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "quota PROJECT",
		Short: "Bound what the sandboxes of a project take together",
		Long: `Bound what the sandboxes of a project take together, or print the bounds if none is
named. What the project has already stays.`,
		Example: "  wrenn key quota blue --quota-sandboxes 50 --quota-memory 65536",
		Args:    cobra.ExactArgs(1),
	}
	quota := quotaFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return k.use(func(store *auth.Store) error {
			if quotaNamed(cmd) {
				return setQuota(cmd, store, args[0], *quota)
			}
			return printQuota(cmd, store, args[0])
		})
	}
	return cmd
}

// printQuota prints the bounds of a project.
func printQuota(cmd *cobra.Command, store *auth.Store, project string) error {
	projects, err := store.Projects()
	if err != nil {
		return err
	}
	for _, p := range projects {
		if p.Name != project {
			continue
		}
		bound := func(n int, unit string) string {
			if n == 0 {
				return "no bound"
			}
			return strconv.Itoa(n) + unit
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
		row(w, "SANDBOXES", "VCPUS", "MEMORY", "DISK")
		row(w, bound(p.Quota.Sandboxes, ""), bound(p.Quota.VCPUs, ""), bound(p.Quota.MemMiB, " MiB"), bound(p.Quota.DiskMiB, " MiB"))
		return w.Flush()
	}
	return errdefs.NotFound.Errorf("project %.70q does not exist: `wrenn key create --project NAME` makes one", project)
}

func newKeyLs(k *keyring) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List API keys, with their last use",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return k.use(func(store *auth.Store) error {
				keys, err := store.Keys()
				if err != nil {
					return err
				}
				if asJSON {
					return printIndented(cmd.OutOrStdout(), keysAsJSON(keys))
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
				row(w, "KEY ID", "NAME", "PROJECT", "CREATED", "LAST USED")
				for _, key := range keys {
					used := "never"
					if !key.LastUsedAt.IsZero() {
						used = rough(time.Since(key.LastUsedAt)) + " ago"
					}
					row(w, key.ID, cmp.Or(key.Name, "-"), key.Project, rough(time.Since(key.CreatedAt))+" ago", used)
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the list as JSON")
	return cmd
}

// listedKey is a key in JSON, without its digest.
type listedKey struct {
	ID         string     `json:"id"`
	Name       string     `json:"name,omitempty"`
	Project    string     `json:"project"`
	CreatedAt  time.Time  `json:"createdAt"`
	LastUsedAt *time.Time `json:"lastUsedAt"` // null if it was never used
}

func keysAsJSON(keys []auth.Key) []listedKey {
	list := []listedKey{}
	for _, k := range keys {
		listed := listedKey{ID: k.ID, Name: k.Name, Project: k.Project, CreatedAt: k.CreatedAt}
		if !k.LastUsedAt.IsZero() {
			listed.LastUsedAt = &k.LastUsedAt
		}
		list = append(list, listed)
	}
	return list
}

func newKeyRm(k *keyring) *cobra.Command {
	return &cobra.Command{
		Use:     "rm ID|NAME...",
		Aliases: []string{"delete"},
		Short:   "Revoke API keys, at once; the sandboxes of their project go on",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var errs []error
			err := k.use(func(store *auth.Store) error {
				for _, name := range args {
					if _, err := store.RemoveKey(name); err != nil {
						errs = append(errs, err)
						continue
					}
					fmt.Fprintln(cmd.OutOrStdout(), name)
				}
				return nil
			})
			if err != nil {
				errs = append(errs, err)
			}
			return all(errs)
		},
	}
}
