package e2b

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	images "git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

const (
	// maxBuilds bounds the builds of a project that have not ended.
	maxBuilds = 20
	// staleAfter is when a build that was not started counts no more: the address of an
	// upload is valid for uploadTime, and clients give an upload an hour.
	staleAfter = 2 * time.Hour
	// maxSteps bounds the steps of a build.
	maxSteps = 1000
	// maxTags bounds the tags of a build.
	maxTags = 32
	// What clients leave out.
	defaultCPUs, defaultMemMiB = 2, 1024
	minMemMiB                  = 128
	// defaultReady is the ready command of a start command that has none.
	defaultReady = "sleep 20"
)

// hostImages are the images of E2B's that this host has as templates of its own.
var hostImages = map[string]string{"e2bdev/base": "base", "e2bdev/code-interpreter": "code-interpreter-v1"}

// archiveHash is what clients call a file set by.
var archiveHash = regexp.MustCompile(`^[0-9a-f]{64}$`)

// makes returns what builds templates.
func (s *server) makes() (Builds, error) {
	if s.Builds == nil {
		return nil, errBuilds
	}
	return s.Builds, nil
}

// sizes returns what a request for a template asks for. All sandboxes of a host have a
// disk of the same size, diskMiB, and what a template has is not on it.
func sizes(r api.TemplateRequest, diskMiB int) (vcpus, mem int, err error) {
	vcpus, mem = value(r.CpuCount, defaultCPUs), value(r.MemoryMB, defaultMemMiB)
	disk := value(r.MinFreeDiskMb, 0)
	switch {
	case vcpus < 1:
		err = refuse(http.StatusBadRequest, "CPU count must be at least 1")
	case vcpus > sandbox.MaxVCPUs:
		err = refuse(http.StatusBadRequest, "CPU count must be at most %d", sandbox.MaxVCPUs)
	case vcpus > 1 && vcpus%2 != 0:
		err = refuse(http.StatusBadRequest, "CPU count must be 1 or divisible by 2")
	case mem < minMemMiB:
		err = refuse(http.StatusBadRequest, "Memory must be at least %d MiB", minMemMiB)
	case mem > sandbox.MaxMemMiB:
		err = refuse(http.StatusBadRequest, "Memory must be at most %d MiB", sandbox.MaxMemMiB)
	case mem%2 != 0:
		err = refuse(http.StatusBadRequest, "Memory must be divisible by 2")
	case disk < 0 || disk > diskMiB:
		err = refuse(http.StatusBadRequest, "minFreeDiskMb must be 0 to %d, which is the disk of each sandbox of this host", diskMiB)
	}
	return vcpus, mem, err
}

// wanted reads the name and the tags of a template that is to be built.
func wanted(project string, r api.TemplateRequest) (name string, tags []string, err error) {
	text := cmp.Or(value(r.Name, ""), value(r.Alias, ""))
	if strings.TrimSpace(text) == "" {
		return "", nil, refuse(http.StatusBadRequest, "name is missing")
	}
	ref, err := template.ParseReference(text)
	if err != nil {
		return "", nil, err
	}
	if ref.Project != "" && ref.Project != project {
		return "", nil, refuse(http.StatusForbidden, "template %.140q: the namespace of your names is %s", text, project)
	}
	if !snapshotName.MatchString(ref.Name) {
		return "", nil, refuse(http.StatusBadRequest, "template %.140q: a name has up to 128 of a-z, 0-9, _ and -", text)
	}
	if ref.Tag != "" {
		tags = append(tags, ref.Tag)
	}
	tags = append(tags, value(r.Tags, nil)...)
	if len(tags) == 0 {
		tags = []string{defaultTag}
	}
	if len(tags) > maxTags {
		return "", nil, refuse(http.StatusBadRequest, "%d tags, at most %d are possible", len(tags), maxTags)
	}
	tags, err = checkTags(tags)
	slices.Sort(tags)
	return ref.Name, slices.Compact(tags), err
}

// newBuild adds a build that waits for its steps.
func (s *server) newBuild(ctx context.Context, r api.TemplateRequest) (Template, Build, []string, error) {
	fail := func(err error) (Template, Build, []string, error) { return Template{}, Build{}, nil, err }
	builds, err := s.makes()
	if err != nil {
		return fail(err)
	}
	if err := checkTeam(ctx, r.TeamID); err != nil {
		return fail(err)
	}
	project := projectOf(ctx)
	name, tags, err := wanted(project, r)
	if err != nil {
		return fail(err)
	}
	vcpus, mem, err := sizes(r, s.DiskMiB)
	if err != nil {
		return fail(err)
	}
	all, err := s.Templates.List()
	if err != nil {
		return fail(err)
	}
	if i := slices.IndexFunc(all, func(t Template) bool { return t.ID == name }); i >= 0 && all[i].Project != project {
		// The id of a template that the caller may see is no secret.
		if all[i].Visible(project) {
			return fail(refuse(http.StatusForbidden, "template '%s' is not of your project", name))
		}
		return fail(refuse(http.StatusConflict, "template name %s is taken", name))
	}
	s.makingMu.Lock()
	defer s.makingMu.Unlock()
	if err := s.admitBuild(ctx, all, name); err != nil {
		return fail(err)
	}
	t, b, err := builds.New(ctx, NewBuild{Project: project, Name: name, Tags: tags, VCPUs: vcpus, MemMiB: mem, DiskMiB: s.DiskMiB})
	if err == nil {
		s.Log.Info("template build added", "template", t.ID, "build", b.ID, "project", project, "key", caller(ctx).KeyID)
	}
	return t, b, tags, err
}

// admitBuild refuses a build of a project that has too many which have not ended. Those
// of name that wait are replaced by the new one. Called with makingMu held.
func (s *server) admitBuild(ctx context.Context, all []Template, name string) error {
	project := projectOf(ctx)
	n := 0
	for _, t := range all {
		if t.Project != project {
			continue
		}
		for _, b := range t.Builds {
			switch {
			case b.Status == template.StatusBuilding:
				n++
			case b.Status != template.StatusWaiting:
			case time.Since(b.CreatedAt) > staleAfter:
				if err := s.Builds.Cancel(ctx, t.ID, b.ID); !hasEnded(err) {
					return err
				}
			case !slices.Contains(t.Names, name) && t.ID != name:
				n++
			}
		}
	}
	if n >= maxBuilds {
		return refuse(http.StatusTooManyRequests, "%d template builds of your project have not ended, which is as many as there may be", n)
	}
	return nil
}

func (s *server) CreateTemplateV3(ctx context.Context, r api.CreateTemplateV3RequestObject) (api.CreateTemplateV3ResponseObject, error) {
	t, b, tags, err := s.newBuild(ctx, *r.Body)
	return api.CreateTemplateV3202JSONResponse{
		TemplateID: t.ID, BuildID: b.ID, Public: t.Public, Names: names(t), Tags: tags, Aliases: append([]string{}, t.Names...),
	}, err
}

func (s *server) CreateTemplateV2(ctx context.Context, r api.CreateTemplateV2RequestObject) (api.CreateTemplateV2ResponseObject, error) {
	t, _, _, err := s.newBuild(ctx, *r.Body)
	if err != nil {
		return nil, err
	}
	return api.CreateTemplateV2202JSONResponse(s.template(t)), nil
}

// ownBuild returns a build of a template of the caller's project.
func (s *server) ownBuild(ctx context.Context, text, id string) (Template, Build, error) {
	t, _, err := s.own(ctx, text)
	if err != nil {
		return t, Build{}, err
	}
	b, err := buildOf(t, id, text)
	return t, b, err
}

// GetTemplateFiles tells where an archive is put, also when it is there: a client may
// want to replace it.
func (s *server) GetTemplateFiles(ctx context.Context, r api.GetTemplateFilesRequestObject) (api.GetTemplateFilesResponseObject, error) {
	builds, err := s.makes()
	if err != nil {
		return nil, err
	}
	if !archiveHash.MatchString(r.Hash) {
		return nil, refuse(http.StatusBadRequest, "hash %.70q is not 64 of 0-9 and a-f", r.Hash)
	}
	t, _, err := s.own(ctx, r.TemplateID)
	if err != nil {
		return nil, err
	}
	present, err := builds.Upload(t.Project, r.Hash)
	url := baseOf(ctx) + s.uploads.path(caller(ctx).KeyID, t.Project, r.Hash, time.Now())
	return api.GetTemplateFiles201JSONResponse{Present: present, Url: &url}, err
}

func (s *server) StartBuild(ctx context.Context, r api.StartBuildRequestObject) (api.StartBuildResponseObject, error) {
	builds, err := s.makes()
	if err != nil {
		return nil, err
	}
	t, b, err := s.ownBuild(ctx, r.TemplateID, r.BuildID)
	if err != nil {
		return nil, err
	}
	if b.Status != template.StatusWaiting {
		return nil, refuse(http.StatusBadRequest, "build is not in waiting state")
	}
	spec, err := s.spec(ctx, *r.Body)
	if err != nil {
		return nil, err
	}
	spec.Project, spec.Template, spec.Build, spec.Tags = t.Project, t.ID, b.ID, b.Wants
	key := caller(ctx).KeyID
	spec.KeyID, spec.Revoked = key, func() bool { return s.Keys.Revoked(key) }
	for i, step := range spec.Stages[0].Steps {
		if step.Files == "" {
			continue
		}
		present, err := builds.Upload(t.Project, step.Files)
		if err != nil {
			return nil, err
		}
		if !present {
			return nil, refuse(http.StatusBadRequest, "step %d: the files %s were not uploaded", i+1, step.Files)
		}
	}
	err = builds.Start(ctx, spec)
	switch errdefs.ClassOf(err) {
	case errdefs.WrongState:
		err = refuse(http.StatusBadRequest, "build is not in waiting state")
	}
	return startedBuild{}, err
}

// startedBuild is a 202 that says that it has no body. The gateway sends the head of an
// answer before the end of a body that came in chunks, and a client that is not told the
// length reads JSON.
type startedBuild struct{}

func (startedBuild) VisitStartBuildResponse(w http.ResponseWriter) error {
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// spec reads what a build is made of.
func (s *server) spec(ctx context.Context, r api.BuildRequest) (BuildSpec, error) {
	from, err := s.source(ctx, r)
	if err != nil {
		return BuildSpec{}, err
	}
	stage := build.Stage{From: from}
	all := value(r.Steps, nil)
	if len(all) > maxSteps {
		return BuildSpec{}, refuse(http.StatusBadRequest, "%d steps, at most %d are possible", len(all), maxSteps)
	}
	for i, step := range all {
		read, err := readStep(step)
		if err != nil {
			return BuildSpec{}, refuse(http.StatusBadRequest, "step %d: %s", i+1, err)
		}
		stage.Steps = append(stage.Steps, read)
	}
	spec := BuildSpec{
		Stages: []build.Stage{stage}, Start: value(r.StartCmd, ""), Ready: value(r.ReadyCmd, ""), Force: value(r.Force, false), E2B: true,
	}
	if spec.Start != "" && spec.Ready == "" {
		spec.Ready = defaultReady
	}
	return spec, nil
}

// source reads what a build stands on. What a template's name means is decided here, for
// the caller's project.
func (s *server) source(ctx context.Context, r api.BuildRequest) (build.Source, error) {
	image, from := strings.TrimSpace(value(r.FromImage, "")), strings.TrimSpace(value(r.FromTemplate, ""))
	switch {
	case image == "" && from == "":
		return build.Source{}, refuse(http.StatusBadRequest, "either fromImage or fromTemplate must be given")
	case image != "" && from != "":
		return build.Source{}, refuse(http.StatusBadRequest, "fromImage and fromTemplate cannot both be given")
	case from != "" && r.FromImageRegistry != nil:
		return build.Source{}, refuse(http.StatusBadRequest, "fromImageRegistry is for fromImage only")
	case from != "":
		t, b, err := s.resolve(ctx, from)
		return build.Source{Template: t.ID + ":" + b}, err
	}
	if name, ok := hostImages[strings.TrimSuffix(image, ":latest")]; ok && r.FromImageRegistry == nil {
		all, err := s.Templates.List()
		if err != nil {
			return build.Source{}, err
		}
		t, b, err := template.Resolve(all, "", name)
		if err == nil {
			return build.Source{Template: t.ID + ":" + b.ID}, nil
		}
		if !isNotFound(err) {
			return build.Source{}, wrongStateAs(http.StatusBadRequest, err)
		}
	}
	if !s.LocalImages && images.IsLocal(image) {
		return build.Source{}, refuse(http.StatusForbidden, "image %.140q: no key has this agent speak to its own host", image)
	}
	who, err := s.credentials(ctx, image, r.FromImageRegistry)
	return build.Source{Image: image, Credentials: who}, err
}

// readStep reads a step as it travels.
func readStep(step api.BuildStep) (build.Step, error) {
	args := value(step.Args, nil)
	out := build.Step{Kind: strings.ToUpper(step.Type), Args: args, Force: value(step.Force, false)}
	out.Text = strings.Join(append([]string{out.Kind}, args...), " ")
	wrong := func(want string) (build.Step, error) {
		return out, fmt.Errorf("%s has %d arguments, want %s", out.Kind, len(args), want)
	}
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return ""
	}
	switch out.Kind {
	case build.Run:
		if len(args) < 1 || len(args) > 2 || arg(0) == "" {
			return wrong("a command, and perhaps a user")
		}
		out.Args, out.User, out.Text = args[:1], arg(1), build.Run+" "+arg(0)
	case build.Copy:
		if len(args) < 2 || len(args) > 4 || arg(0) == "" || arg(1) == "" {
			return wrong("a source, a destination, and perhaps owner and mode")
		}
		out.Args, out.Src, out.Dst, out.Owner, out.Mode = nil, args[:1], arg(1), arg(2), arg(3)
		out.Text = strings.Join([]string{build.Copy, arg(0), arg(1)}, " ")
		out.Files = value(step.FilesHash, "")
		if !archiveHash.MatchString(out.Files) {
			return out, fmt.Errorf("filesHash %.70q is not 64 of 0-9 and a-f", out.Files)
		}
		if out.Mode != "" && !octal.MatchString(out.Mode) {
			return out, fmt.Errorf("mode %.20q is not up to 4 octal digits", out.Mode)
		}
	case build.Env:
		if len(args) == 0 || len(args)%2 != 0 {
			return wrong("names and values in turn")
		}
	case build.Workdir, build.User:
		if len(args) != 1 || arg(0) == "" {
			return wrong("one")
		}
	default:
		return out, fmt.Errorf("there are RUN, COPY, ENV, WORKDIR and USER, and not %.40q", step.Type)
	}
	return out, nil
}

var octal = regexp.MustCompile(`^0?[0-7]{1,4}$`)

// The first version of builds has the client push an image.
func (*server) CreateTemplateV1(context.Context, api.CreateTemplateV1RequestObject) (api.CreateTemplateV1ResponseObject, error) {
	return nil, errPushed
}

func (*server) RebuildTemplateV1(context.Context, api.RebuildTemplateV1RequestObject) (api.RebuildTemplateV1ResponseObject, error) {
	return nil, errPushed
}

// endBuilds cancels the builds of a template that was deleted.
func (s *server) endBuilds(ctx context.Context, t Template) {
	for _, b := range t.Builds {
		if s.Builds == nil || b.Status != template.StatusWaiting && b.Status != template.StatusBuilding {
			continue
		}
		if err := s.Builds.Cancel(context.WithoutCancel(ctx), t.ID, b.ID); !hasEnded(err) {
			s.Log.Error("build of a deleted template not cancelled", "template", t.ID, "build", b.ID, "error", err)
		}
	}
}

// hasEnded says of the error of a cancel whether the build has ended, be it by another's
// doing.
func hasEnded(err error) bool {
	return err == nil || isNotFound(err) || errdefs.ClassOf(err) == errdefs.WrongState
}

// putArchive stores what was uploaded.
func (s *server) putArchive(ctx context.Context, project, hash string, r io.Reader) error {
	builds, err := s.makes()
	if err != nil {
		return err
	}
	return builds.Put(ctx, project, hash, r)
}
