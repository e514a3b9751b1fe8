package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/build/dockerfile"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

const (
	// beginTime bounds the call that begins a build, which does not wait for it.
	beginTime = time.Minute
	// cancelTime bounds what is waited for when a build is cancelled.
	cancelTime = 20 * time.Second
)

// making holds the flags of the commands that make a template.
type making struct {
	name         string
	tags         []string
	vcpus        int32
	memory, disk string
	progress     string
	quiet        bool
}

func (m *making) flags(cmd *cobra.Command, name string) {
	f := cmd.Flags()
	f.StringVarP(&m.name, "name", "n", "", "name of the template, with a tag if wanted (default "+name+")")
	f.Int32Var(&m.vcpus, "vcpus", 0, "virtual CPUs of a sandbox whose creator names no number (default 1)")
	f.StringVarP(&m.memory, "memory", "m", "", "memory of a sandbox whose creator names none: 512m, 2g (default 512)")
	f.StringVar(&m.disk, "disk", "", "disk of its sandboxes: 4g (default the host's)")
	f.StringVar(&m.progress, "progress", "auto", "auto, plain (every line of the log) or tty (steps, and a line that changes)")
	f.BoolVarP(&m.quiet, "quiet", "q", false, "print the id of template and build alone")
}

// request begins the request, for a template that is named so unless the flags name it.
func (m *making) request(name string, tags ...string) (*hostagentv1.BuildTemplateRequest, error) {
	names := m.tags
	if m.name != "" {
		names = append([]string{m.name}, names...)
	}
	for i, text := range names {
		of, tag, tagged := strings.Cut(text, ":")
		switch {
		case of == "":
			return nil, fmt.Errorf("template %q has no name", text)
		case i > 0 && of != name:
			return nil, fmt.Errorf("two templates are named: %q and %q; a build has one, with any number of tags", name, of)
		case i == 0:
			name, tags = of, nil
		}
		if tagged {
			tags = append(tags, tag)
		}
	}
	req := &hostagentv1.BuildTemplateRequest{Name: name, Tags: tags, Vcpus: m.vcpus}
	for _, size := range []struct {
		text string
		to   *int32
	}{{m.memory, &req.MemoryMb}, {m.disk, &req.DiskMb}} {
		if size.text == "" {
			continue
		}
		var err error
		if *size.to, err = parseMiB(size.text); err != nil {
			return nil, err
		}
	}
	return req, nil
}

// run builds a template and shows how that goes, until it is ready. fill, if not nil,
// brings what the build needs to the host first.
func (m *making) run(
	cmd *cobra.Command, c *cli, req *hostagentv1.BuildTemplateRequest, fill func(context.Context, *buildView) error,
) error {
	view, err := newBuildView(cmd.ErrOrStderr(), m.progress, m.quiet)
	if err != nil {
		return err
	}
	began := time.Now()
	end, made, err := m.watched(cmd.Context(), c, req, view, fill)
	view.close()
	if err != nil {
		return err
	}
	ref := req.Name
	if len(req.Tags) > 0 {
		ref += ":" + req.Tags[0]
	}
	if m.quiet {
		fmt.Fprintf(cmd.OutOrStdout(), "%s:%s\n", made.TemplateId, made.Build)
		return nil
	}
	fmt.Fprintln(cmd.OutOrStdout(), ref)
	fmt.Fprintf(cmd.ErrOrStderr(), "ready in %.1fs: build %s, %s of its own, %s shared; `wrenn create %s` makes a sandbox of it\n",
		time.Since(began).Seconds(), shortBuild(made.Build), bytesText(end.OwnBytes), bytesText(end.SharedBytes), ref)
	return nil
}

// watched begins a build and returns when it is ready. A build whose caller is told to end
// is cancelled.
func (m *making) watched(ctx context.Context, c *cli, req *hostagentv1.BuildTemplateRequest, view *buildView,
	fill func(context.Context, *buildView) error,
) (*hostagentv1.BuildEnd, *hostagentv1.BuildTemplateResponse, error) {
	if fill != nil {
		if err := fill(ctx, view); ctx.Err() != nil {
			return nil, nil, errors.New("cancelled before the build had begun")
		} else if err != nil {
			return nil, nil, err
		}
	}
	// Without its answer the build could not be cancelled.
	begin, stop := context.WithTimeout(context.WithoutCancel(ctx), beginTime)
	defer stop()
	made, err := c.host.Templates().Build(begin, req)
	if err != nil {
		return nil, nil, err
	}
	for resp, err := range c.host.Templates().Watch(ctx, made.TemplateId, made.Build, 0) {
		switch {
		case ctx.Err() != nil:
			return nil, nil, c.cancelBuild(ctx, req.Name, made)
		case err != nil:
			return nil, nil, fmt.Errorf("%w; build %s may go on: `wrenn template inspect %s` says how it ended",
				err, shortBuild(made.Build), made.TemplateId)
		case resp.Entry != nil:
			view.entry(resp.Entry)
		case resp.Progress != nil:
			view.progress(resp.Progress)
		case resp.End != nil && resp.End.Status == template.StatusReady:
			view.finished()
			return resp.End, made, nil
		case resp.End != nil:
			view.failed()
			return nil, nil, buildFailed(resp.End)
		}
	}
	if ctx.Err() != nil {
		return nil, nil, c.cancelBuild(ctx, req.Name, made)
	}
	return nil, nil, fmt.Errorf("the host did not say how build %s ended: `wrenn template inspect %s` does",
		shortBuild(made.Build), made.TemplateId)
}

// buildFailed is the error of a build that ended.
func buildFailed(end *hostagentv1.BuildEnd) error {
	reason := cmp.Or(end.Reason, "the host did not say why")
	if n := end.FailedStep; n != "" && strings.Trim(n, "0123456789") == "" {
		return fmt.Errorf("build failed at step %s: %s", n, reason)
	}
	return fmt.Errorf("build failed: %s", reason)
}

// cancelBuild cancels a build whose caller was told to end.
func (c *cli) cancelBuild(ctx context.Context, name string, made *hostagentv1.BuildTemplateResponse) error {
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer stop()
	if err := c.host.Templates().Cancel(end, made.TemplateId, made.Build); err != nil {
		return fmt.Errorf("build %s of %s was not cancelled, it goes on or has ended: %s", shortBuild(made.Build), name, explain(err))
	}
	return fmt.Errorf("build %s of %s is cancelled; nothing of it is kept, except steps in the cache", shortBuild(made.Build), name)
}

func newTemplatePull(c *cli) *cobra.Command {
	var m making
	var user string
	var fromStdin bool
	cmd := &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Make a template of an image from a registry",
		Long: `Make a template of an image from a registry, by tag or by digest. Without --name the
template is called as the image is, without registry and namespace, and the image's tag
and "default" lead to it. What the host has of the image already is not fetched again.
An interrupted pull goes on where it was when it is called again.`,
		Example: `  wrenn template pull python:3.12-slim
  wrenn template pull --name py registry.example.com/team/python@sha256:…
  wrenn template pull --user me --password-stdin registry.example.com/private:v1 <token`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, tags := imageName(args[0])
			req, err := m.request(name, tags...)
			if err != nil {
				return err
			}
			source := &hostagentv1.BuildSource{Image: args[0], Pull: true, Username: user}
			if source.Password, err = password(cmd, user, fromStdin); err != nil {
				return err
			}
			req.Stages = []*hostagentv1.BuildStage{{From: source}}
			return m.run(cmd, c, req, nil)
		},
	}
	m.flags(cmd, "the image's")
	cmd.Flags().StringVarP(&user, "user", "u", "", "account at the registry; the password is asked for on a terminal")
	cmd.Flags().BoolVar(&fromStdin, "password-stdin", false, "read the password from stdin")
	return cmd
}

// password is that of an account at a registry: from stdin, or from the terminal.
func password(cmd *cobra.Command, user string, fromStdin bool) (string, error) {
	switch {
	case user == "" && fromStdin:
		return "", errors.New("--password-stdin needs --user")
	case user == "":
		return "", nil
	case fromStdin:
		text, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), 64<<10))
		return strings.TrimRight(string(text), "\r\n"), err
	case !term.IsTerminal(int(os.Stdin.Fd())):
		return "", errors.New("--user needs a password: give it on stdin, with --password-stdin")
	}
	fmt.Fprint(os.Stderr, "Password: ")
	text, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(os.Stderr)
	return string(text), err
}

var (
	notInNames = regexp.MustCompile(`[^a-z0-9._-]+|\.\.+`)
	isTag      = regexp.MustCompile(`^[a-z0-9_.-]{1,128}$`)
)

// imageName is what a template is called that is made of an image, and its tags.
func imageName(ref string) (name string, tags []string) {
	ref, _, _ = strings.Cut(ref, "@")
	name, tag, _ := strings.Cut(ref[strings.LastIndex(ref, "/")+1:], ":")
	if tag = strings.ToLower(tag); isTag.MatchString(tag) {
		tags = append(tags, tag)
	}
	return nameOf(name), append(tags, "default")
}

// nameOf makes a text a template's name.
func nameOf(text string) string {
	return strings.Trim(notInNames.ReplaceAllString(strings.ToLower(text), "-"), ".-")
}

func newTemplateImport(c *cli) *cobra.Command {
	var m making
	cmd := &cobra.Command{
		Use:   "import FILE|-",
		Short: "Make a template of an archive of an image",
		Long: `Make a template of an archive of an image: what 'docker save' writes, an OCI layout in a
tar, or what 'wrenn template export' wrote. It may be compressed. A single - is stdin.`,
		Example: `  docker save app:v1 | wrenn template import --name app:v1 -
  wrenn template import app.tar`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if args[0] != "-" {
				name, _, _ = strings.Cut(filepath.Base(args[0]), ".")
			}
			req, err := m.request(nameOf(name))
			if err != nil {
				return err
			}
			if req.Name == "" {
				return errors.New("the template has no name: --name gives one")
			}
			a, err := openArchive(cmd, args[0])
			if err != nil {
				return err
			}
			defer a.close()
			req.Stages = []*hostagentv1.BuildStage{{From: &hostagentv1.BuildSource{Archive: a.hash}}}
			return m.run(cmd, c, req, func(ctx context.Context, v *buildView) error { return a.send(ctx, c, v) })
		},
	}
	m.flags(cmd, "the file's, up to its first dot")
	return cmd
}

// archive is an archive of an image that is to be sent to the host.
type archive struct {
	from  io.Reader
	close func() error
	hash  string
	size  int64 // 0: not known
	again bool  // the host may have it
}

// openArchive opens a file, and stands for its content by its digest. What comes from
// stdin has a random name: it is read once.
func openArchive(cmd *cobra.Command, path string) (*archive, error) {
	if path == "-" {
		name := make([]byte, sha256.Size)
		rand.Read(name) // never fails
		return &archive{from: cmd.InOrStdin(), hash: hex.EncodeToString(name), close: func() error { return nil }}, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("read archive: %w", err)
	}
	return &archive{from: f, close: f.Close, hash: hex.EncodeToString(h.Sum(nil)), size: n, again: true}, nil
}

// send brings the archive to the host, unless it is there.
func (a *archive) send(ctx context.Context, c *cli, v *buildView) error {
	if a.again {
		if has, err := c.host.Templates().Has(ctx, a.hash); err != nil || has {
			return err
		}
	}
	p := &hostagentv1.BuildProgress{Stage: "sending the archive", Total: a.size}
	return c.host.Templates().Upload(ctx, a.hash, a.from, func(n int) { v.moved(p, n) })
}

// dockerBuild holds the flags of build.
type dockerBuild struct {
	making
	file, target string
	args         []string
	start, ready string
	noCache      bool
}

func newTemplateBuild(c *cli) *cobra.Command {
	var b dockerBuild
	cmd := &cobra.Command{
		Use:   "build DIR",
		Short: "Make a template of a Dockerfile and a directory",
		Long: `Make a template of the Dockerfile in a directory, whose files COPY and ADD take. Files
that .dockerignore names stay out. Each RUN runs in a sandbox, with the host's rules
of what sandboxes may reach. A step that ran before with the same files is not run
again. FROM names a template of this host, or an image.

ENV, USER, WORKDIR and the exposed command hold in sandboxes as they do in containers:
CMD and ENTRYPOINT are the start command, HEALTHCHECK is the ready command. --start and
--ready name others. Sandboxes start with that program running.

Ctrl-C cancels the build.`,
		Example: `  wrenn template build .
  wrenn template build -t app:v1 -t app:stable --build-arg VERSION=3 ./app
  wrenn template build --start 'python3 -m http.server 80' --ready 'curl -sf localhost' .`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, archives, closed, err := b.read(cmd, args[0])
			if err != nil {
				return err
			}
			defer closed()
			return b.run(cmd, c, req, func(ctx context.Context, v *buildView) error { return sendAll(ctx, c, v, archives) })
		},
	}
	b.flags(cmd, "the directory's")
	f := cmd.Flags()
	f.StringArrayVarP(&b.tags, "tag", "t", nil, "NAME or NAME:TAG of the template; may be repeated with other tags")
	f.StringVarP(&b.file, "file", "f", "", "the Dockerfile, - for stdin (default DIR/Dockerfile)")
	f.StringArrayVar(&b.args, "build-arg", nil, "NAME=VALUE for an ARG, or NAME to pass on your variable; may be repeated")
	f.StringVar(&b.target, "target", "", "the stage that becomes the template (default the last one)")
	f.StringVar(&b.start, "start", "", "shell command that runs in each sandbox from its start on")
	f.StringVar(&b.ready, "ready", "", "shell command that succeeds when the program of --start is ready")
	f.BoolVar(&b.noCache, "no-cache", false, "run all steps, also those that ran before")
	return cmd
}

// read reads the Dockerfile and lists the context.
func (b *dockerBuild) read(cmd *cobra.Command, dir string) (
	req *hostagentv1.BuildTemplateRequest, archives []dockerfile.Archive, closed func(), err error,
) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	if req, err = b.request(nameOf(filepath.Base(abs))); err != nil {
		return nil, nil, nil, err
	}
	if req.Name == "" {
		return nil, nil, nil, errors.New("the template has no name: -t gives one")
	}
	file, err := b.parse(cmd, dir)
	if err != nil {
		return nil, nil, nil, err
	}
	for _, warning := range file.Warnings {
		complain("%s", warning)
	}
	ignore, err := b.ignored(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	files, err := dockerfile.OpenContext(dir, ignore)
	if err != nil {
		return nil, nil, nil, err
	}
	if archives, err = file.Archives(files); err != nil {
		files.Close()
		return nil, nil, nil, err
	}
	req.Stages = stagesOf(file.Stages)
	req.StartCommand, req.ReadyCommand, req.NoCache = b.start, b.ready, b.noCache
	req.ReadyIntervalSec = int32(file.ReadyInterval / time.Second)
	return req, archives, func() { files.Close() }, nil
}

// path is that of the Dockerfile; - for stdin.
func (b *dockerBuild) path(dir string) string {
	return cmp.Or(b.file, filepath.Join(dir, "Dockerfile"))
}

func (b *dockerBuild) parse(cmd *cobra.Command, dir string) (*dockerfile.File, error) {
	args, err := (&vars{pairs: b.args}).read()
	if err != nil {
		return nil, fmt.Errorf("--build-arg needs NAME=VALUE, or NAME to pass on a variable")
	}
	text, name, err := b.text(cmd, dir)
	if err != nil {
		return nil, err
	}
	return dockerfile.Parse(bytes.NewReader(text), dockerfile.Options{Name: name, Args: args, Target: b.target})
}

// text is that of the Dockerfile, and its name for errors.
func (b *dockerBuild) text(cmd *cobra.Command, dir string) (text []byte, name string, err error) {
	path := b.path(dir)
	if path == "-" {
		text, err = io.ReadAll(io.LimitReader(cmd.InOrStdin(), 2<<20))
		return text, "Dockerfile", err
	}
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
		return nil, "", cmp.Or(err, fmt.Errorf("%s is no directory: name the one that COPY takes from, and the Dockerfile with -f", dir))
	}
	text, err = os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("there is no %s: -f names the Dockerfile", path)
	}
	return text, path, err
}

// ignored is the text of the file that says what stays out of the context; nil without one.
func (b *dockerBuild) ignored(dir string) ([]byte, error) {
	exists := func(path string) bool { _, err := os.Stat(path); return err == nil }
	text, err := os.ReadFile(dockerfile.IgnoreFile(b.path(dir), dir, exists))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return text, err
}

// sendAll brings the archives to the host that it does not have.
func sendAll(ctx context.Context, c *cli, v *buildView, archives []dockerfile.Archive) error {
	p := &hostagentv1.BuildProgress{Stage: "sending files"}
	var missing []*dockerfile.Archive
	for i := range archives {
		has, err := c.host.Templates().Has(ctx, archives[i].Hash)
		if err != nil {
			return err
		}
		if !has {
			missing = append(missing, &archives[i])
			p.Total += archives[i].Bytes
		}
	}
	for _, a := range missing {
		r, w := io.Pipe()
		written := make(chan struct{})
		go func() { defer close(written); w.CloseWithError(a.Write(w)) }()
		err := c.host.Templates().Upload(ctx, a.Hash, r, nil)
		r.CloseWithError(errors.New("the upload has ended"))
		<-written
		if err != nil {
			return err
		}
		v.moved(p, int(a.Bytes))
	}
	return nil
}

// stagesOf are the stages of a Dockerfile as the host's API has them.
func stagesOf(stages []build.Stage) []*hostagentv1.BuildStage {
	var all []*hostagentv1.BuildStage
	for _, s := range stages {
		stage := &hostagentv1.BuildStage{Name: s.Name, From: &hostagentv1.BuildSource{
			Image: s.From.Image, Pull: s.From.Image != "" && !s.From.Either, Username: s.From.Credentials.Username,
			Password: s.From.Credentials.Password, Template: s.From.Template, Archive: s.From.Archive, Stage: s.From.Stage,
			Scratch: s.From.Scratch,
		}}
		for _, step := range s.Steps {
			stage.Steps = append(stage.Steps, &hostagentv1.BuildStep{
				Kind: step.Kind, Args: step.Args, User: step.User, Files: step.Files, Src: step.Src, Dst: step.Dst, Owner: step.Owner,
				Mode: step.Mode, FromStage: step.FromStage, Force: step.Force, Line: int32(step.Line), Text: step.Text, Exec: step.Exec,
				Script: step.Script, FromImage: step.FromImage, Extract: step.Extract,
			})
		}
		all = append(all, stage)
	}
	return all
}
