package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

func newTemplate(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "template",
		Aliases: []string{"templates", "image"},
		Short:   "Make templates of images and Dockerfiles, list and remove them",
		Long: `Make templates of images and Dockerfiles, list and remove them. Sandboxes are made
from templates: 'wrenn create NAME' or 'wrenn create NAME:TAG'.

A template has builds. A tag leads to one of them; without a tag a name means the tag
"default". A new build takes over its tags when it is ready, and sandboxes that were
made before keep the build that they have.`,
		Example: `  wrenn template pull python:3.12-slim
  wrenn template build -t app:v1 .
  wrenn template ls
  wrenn create app:v1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newTemplatePull(c), newTemplateImport(c), newTemplateBuild(c), newTemplateLs(c), newTemplateInspect(c),
		newTemplateHistory(c), newTemplateRm(c), newTemplateTag(c), newTemplateUntag(c), newTemplateExport(c), newTemplatePrune(c))
	return cmd
}

// noSuchTemplate adds the next step to an error about a template that does not exist.
func noSuchTemplate(err error) error {
	if connect.CodeOf(err) == connect.CodeNotFound {
		return fmt.Errorf("%w; `wrenn template ls` lists them", err)
	}
	return err
}

func newTemplateLs(c *cli) *cobra.Command {
	var all, quiet, asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List templates with their builds",
		Long: `List templates with their builds. SIZE is what would be free without the build, SHARED
what it has in common with others. A build that is under way or failed has no size yet.
Snapshots are listed by 'wrenn snapshots'.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := c.host.Templates().List(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), resp)
			}
			return printTemplates(cmd, resp.Templates, all, quiet)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also list builds without a tag and builds that failed")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only names; the id of a template that has none")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the answer as JSON")
	return cmd
}

// printTemplates prints a line for each build, or with names only one for each template.
func printTemplates(cmd *cobra.Command, templates []*hostagentv1.Template, all, namesOnly bool) error {
	if namesOnly {
		for _, t := range templates {
			fmt.Fprintln(cmd.OutOrStdout(), templateName(t))
		}
		return nil
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
	row(w, "NAME", "TAGS", "BUILD", "STATUS", "SIZE", "SHARED", "CREATED", "SANDBOXES")
	for _, t := range templates {
		tags := tagsOf(t)
		for _, b := range t.Builds {
			if len(tags[b.Build]) == 0 && !all && b.Status != "building" && b.Status != "waiting" && len(b.Sandboxes) == 0 {
				continue
			}
			own, shared := "-", "-"
			if b.Status == "ready" {
				own, shared = bytesText(b.OwnBytes), bytesText(b.SharedBytes)
			}
			row(w, templateName(t), cmp.Or(strings.Join(tags[b.Build], ","), "<none>"), shortBuild(b.Build), b.Status, own, shared,
				ago(b.CreatedAt), len(b.Sandboxes))
		}
	}
	return w.Flush()
}

// templateName is the first name of a template, behind its project for one that is not the
// caller's own or the host's.
func templateName(t *hostagentv1.Template) string {
	name := t.TemplateId
	if len(t.Names) > 0 {
		name = t.Names[0]
	}
	if t.Project != "" {
		name = t.Project + "/" + name
	}
	return name
}

// tagsOf are the tags that lead to each build, "default" first.
func tagsOf(t *hostagentv1.Template) map[string][]string {
	tags := map[string][]string{}
	for _, tag := range t.Tags {
		tags[tag.Build] = append(tags[tag.Build], tag.Name)
	}
	for _, names := range tags {
		slices.SortFunc(names, func(a, b string) int {
			return cmp.Or(order(a != "default", b != "default"), cmp.Compare(a, b))
		})
	}
	return tags
}

// order sorts what is false before what is true.
func order(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// shortBuild is a build's id as lists show it.
func shortBuild(id string) string { return id[:min(len(id), 8)] }

// ago is how long a time is past.
func ago(at *timestamppb.Timestamp) string {
	if at == nil {
		return "-"
	}
	return rough(time.Since(at.AsTime())) + " ago"
}

func newTemplateInspect(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "inspect NAME[:TAG]...",
		Short:   "Print all that the host knows of templates, as JSON",
		Example: "  wrenn template inspect app:v1",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			var errs []error
			for _, ref := range refs {
				resp, err := c.host.Templates().Get(cmd.Context(), ref)
				if err != nil {
					errs = append(errs, noSuchTemplate(err))
					continue
				}
				if err := printJSON(cmd.OutOrStdout(), resp); err != nil {
					return err
				}
			}
			return all(errs)
		},
	}
}

func newTemplateHistory(c *cli) *cobra.Command {
	var full, asJSON bool
	cmd := &cobra.Command{
		Use:   "history NAME[:TAG]",
		Short: "Print the steps that made a template, the newest first",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			resp, err := c.host.Templates().Get(cmd.Context(), args[0])
			if err != nil {
				return noSuchTemplate(err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), &hostagentv1.GetTemplateResponse{Build: resp.Build, History: resp.History})
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
			row(w, "CREATED", "SIZE", "CREATED BY")
			for _, h := range slices.Backward(resp.History) {
				by := h.CreatedBy
				if !full {
					by = shortened(by, 80)
				}
				row(w, ago(h.CreatedAt), bytesText(h.Bytes), by)
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&full, "no-trunc", false, "do not cut long steps")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the steps as JSON, the oldest first")
	return cmd
}

// shortened is the first line of a text, cut to n runes.
func shortened(text string, n int) string {
	line, _, more := strings.Cut(strings.TrimSpace(text), "\n")
	if runes := []rune(line); len(runes) > n {
		line, more = string(runes[:n-1]), true
	}
	if more {
		line += "…"
	}
	return line
}

func newTemplateRm(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm NAME[:TAG]...",
		Aliases: []string{"delete"},
		Short:   "Remove templates with all their builds, or single tags",
		Long: `Remove templates with all their builds. With a TAG, that tag alone is removed; the
template goes with its last one. A template that sandboxes or snapshots use is not
removed. One that another template was built on can be: both have what they share.`,
		Example: "  wrenn template rm app\n  wrenn template rm app:v1",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			var errs []error
			for _, ref := range refs {
				err := c.removeTemplate(cmd, ref)
				if err != nil && !(force && connect.CodeOf(err) == connect.CodeNotFound) {
					errs = append(errs, noSuchTemplate(err))
					continue
				}
				fmt.Fprintln(cmd.OutOrStdout(), ref)
			}
			return all(errs)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not fail for a template that does not exist")
	return cmd
}

// removeTemplate removes a template, or one of its tags if it has others.
func (c *cli) removeTemplate(cmd *cobra.Command, ref string) error {
	templates := c.host.Templates()
	name, tag, tagged := strings.Cut(ref, ":")
	if tagged {
		have, err := templates.Get(cmd.Context(), ref)
		if err != nil {
			return err
		}
		others := slices.ContainsFunc(have.Template.Tags, func(t *hostagentv1.TemplateTag) bool { return t.Name != tag })
		if others {
			return templates.Untag(cmd.Context(), name, tag)
		}
	}
	freed, err := templates.Delete(cmd.Context(), name)
	if err == nil && freed > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "%s freed\n", bytesText(freed))
	}
	return err
}

func newTemplateTag(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "tag NAME[:TAG] NEWTAG...",
		Short: "Make tags lead to a build",
		Long: `Make tags lead to a build, wherever they led before. The build is that of a tag, of
"default" without one, or with its id as the tag any build of the template.`,
		Example: "  wrenn template tag app:v2 stable default",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var tags []string
			name, _, _ := strings.Cut(args[0], ":")
			for _, tag := range args[1:] {
				// As docker has it, the target may name the template again.
				if of, rest, ok := strings.Cut(tag, ":"); ok {
					if of != name {
						return fmt.Errorf("tag %q is of another template than %q: a tag leads to a build of its own template", tag, name)
					}
					tag = rest
				}
				tags = append(tags, tag)
			}
			build, err := c.host.Templates().Tag(cmd.Context(), args[0], tags...)
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), build)
			}
			return noSuchTemplate(err)
		},
	}
}

func newTemplateUntag(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "untag NAME TAG...",
		Short:   "Remove tags of a template; its builds stay",
		Long:    `Remove tags of a template. Builds without a tag stay until 'wrenn template prune'.`,
		Example: "  wrenn template untag app v1 v2",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return noSuchTemplate(c.host.Templates().Untag(cmd.Context(), args[0], args[1:]...))
		},
	}
}

func newTemplatePrune(c *cli) *cobra.Command {
	var everything, dryRun bool
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove builds of templates that nothing uses",
		Long: `Remove builds of templates to which no tag leads and which no sandbox and no snapshot
uses, and what is remembered of builds that failed. With --all, templates that no
sandbox and no snapshot uses are removed, too, except "minimal". What is removed is
printed, and how much that frees.`,
		Example: "  wrenn template prune --dry-run\n  wrenn template prune --all",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			removed, err := c.host.Templates().Prune(cmd.Context(), everything, dryRun)
			if err != nil {
				return err
			}
			return printGarbage(cmd, removed, dryRun)
		},
	}
	cmd.Flags().BoolVarP(&everything, "all", "a", false, "also remove templates that nothing uses")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "remove nothing, and print what would be removed")
	return cmd
}

func newGC(c *cli) *cobra.Command {
	var everything, dryRun bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what this host can make or fetch again",
		Long: `Remove what this host can make or fetch again, and what it only remembers: steps in the
cache of builds, uploaded files and layers of images that were not used for a week,
builds of templates that nothing uses, and records of sandboxes that have ended. With
--all what was used within a week goes, too: the next build runs all of its steps.
Templates, snapshots and sandboxes stay. What is removed is printed, and how much that
frees.`,
		Example: "  wrenn gc --dry-run\n  wrenn gc --all",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			removed, err := c.host.Templates().CollectGarbage(cmd.Context(), everything, dryRun)
			if err != nil {
				return err
			}
			return printGarbage(cmd, removed, dryRun)
		},
	}
	cmd.Flags().BoolVarP(&everything, "all", "a", false, "also remove what was used within a week")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "remove nothing, and print what would be removed")
	return cmd
}

// printGarbage prints what was removed, and how much that has freed.
func printGarbage(cmd *cobra.Command, removed []*hostagentv1.Garbage, dryRun bool) error {
	var total int64
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
	if len(removed) > 0 {
		row(w, "KIND", "NAME", "SIZE")
	}
	for _, g := range removed {
		total += g.Bytes
		row(w, g.Kind, g.Name, bytesText(g.Bytes))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	said := map[bool]string{false: "freed: %s\n", true: "would be freed: %s\n"}
	fmt.Fprintf(cmd.OutOrStdout(), said[dryRun], bytesText(total))
	return nil
}
