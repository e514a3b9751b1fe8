package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Bounds of a build.
const (
	maxStages       = 32
	maxSteps        = 1000
	maxStepArgs     = 1024
	maxStepText     = 128 << 10
	maxReadySeconds = 600
	maxUploadPart   = 1 << 20
	progressEach    = 200 * time.Millisecond
)

var uploadHash = regexp.MustCompile(`^[0-9a-f]{64}$`)

func checkHash(what, hash string) error {
	if !uploadHash.MatchString(hash) {
		return errdefs.InvalidArgument.Errorf("%s %.70q is not 64 lower-case hexadecimal digits", what, hash)
	}
	return nil
}

func (s *templates) BuildTemplate(ctx context.Context, req *request[pb.BuildTemplateRequest]) (*response[pb.BuildTemplateResponse], error) {
	if s.builds == nil {
		return nil, errNoBuilds
	}
	spec, err := specOf(req.Msg)
	if err != nil {
		return nil, err
	}
	owner, host := project(ctx)
	if err := checkRegistries(spec); err != nil && !host {
		return nil, err
	}
	t, b, err := s.store.NewBuild(ctx, template.NewBuild{
		Project: owner, Name: req.Msg.Name, Tags: req.Msg.Tags, VCPUs: cmp.Or(int(req.Msg.Vcpus), 1),
		MemMiB: cmp.Or(int(req.Msg.MemoryMb), 512), DiskMiB: cmp.Or(int(req.Msg.DiskMb), s.diskMiB),
	})
	if err != nil {
		return nil, err
	}
	spec.Project, spec.Template, spec.Build, spec.Tags = owner, t.ID, b.ID, req.Msg.Tags
	caller, _ := auth.CallerOf(ctx)
	if spec.KeyID = caller.KeyID; !host {
		spec.Revoked = func() bool { return s.keys.Revoked(caller.KeyID) }
	}
	if err := s.builds.Start(ctx, spec); err != nil {
		reason := &template.Reason{Message: err.Error()}
		return nil, errors.Join(err, s.store.SetBuild(context.WithoutCancel(ctx), t.ID, b.ID, template.StatusError, reason))
	}
	return connect.NewResponse(&pb.BuildTemplateResponse{TemplateId: t.ID, Build: b.ID}), nil
}

// checkRegistries refuses images from registries on the host itself, whose services no key
// may have the agent speak to.
func checkRegistries(spec build.Spec) error {
	for _, stage := range spec.Stages {
		refs := []string{stage.From.Image}
		for _, step := range stage.Steps {
			refs = append(refs, step.FromImage)
		}
		if i := slices.IndexFunc(refs, image.IsLocal); i >= 0 {
			return errdefs.Denied.Errorf("image %.140q: registries on the host itself are for callers that command it", refs[i])
		}
	}
	return nil
}

// specOf checks a request and converts it.
func specOf(req *pb.BuildTemplateRequest) (build.Spec, error) {
	spec := build.Spec{
		Start: req.StartCommand, Ready: req.ReadyCommand, ReadyInterval: time.Duration(req.ReadyIntervalSec) * time.Second,
		Force: req.NoCache, KeepEnv: true,
	}
	if err := checkBuild(req); err != nil {
		return spec, errdefs.InvalidArgument.Errorf("%w", err)
	}
	steps := 0
	for i, stage := range req.Stages {
		source, err := sourceOf(stage.GetFrom())
		if err != nil {
			return spec, errdefs.InvalidArgument.Errorf("stage %d: %w", i, err)
		}
		to := build.Stage{Name: stage.Name, From: source}
		for _, step := range stage.Steps {
			if steps++; steps > maxSteps {
				return spec, errdefs.InvalidArgument.Errorf("more than %d steps", maxSteps)
			}
			if err := checkStep(step); err != nil {
				return spec, errdefs.InvalidArgument.Errorf("step %d: %w", steps, err)
			}
			to.Steps = append(to.Steps, build.Step{
				Kind: step.Kind, Args: step.Args, Exec: step.Exec, Script: step.Script, User: step.User, Files: step.Files,
				FromStage: step.FromStage, FromImage: step.FromImage, Src: step.Src, Dst: step.Dst, Owner: step.Owner, Mode: step.Mode,
				Extract: step.Extract, Force: step.Force, Line: int(step.Line), Text: step.Text,
			})
		}
		spec.Stages = append(spec.Stages, to)
	}
	return spec, spec.Check()
}

// checkBuild returns what is wrong with the fields of a request beside its stages.
func checkBuild(req *pb.BuildTemplateRequest) error {
	if _, err := template.ParseName(req.Name); err != nil {
		return fmt.Errorf("name: %w", err)
	}
	if len(req.Tags) > 0 {
		if _, err := tagsOf(req.Tags); err != nil {
			return err
		}
	}
	between := func(what string, n, low, high int) error {
		if n != 0 && (n < low || n > high) {
			return fmt.Errorf("%s is %d, must be %d to %d, or 0 for the default", what, n, low, high)
		}
		return nil
	}
	err := errors.Join(
		between("vcpus", int(req.Vcpus), 1, sandbox.MaxVCPUs),
		between("memory_mb", int(req.MemoryMb), sandbox.MinMemMiB, sandbox.MaxMemMiB),
		between("disk_mb", int(req.DiskMb), template.MinOverlayMiB, template.MaxOverlayMiB),
		between("ready_interval_sec", int(req.ReadyIntervalSec), 1, maxReadySeconds),
	)
	switch {
	case err != nil:
		return err
	case len(req.Stages) == 0 || len(req.Stages) > maxStages:
		return fmt.Errorf("%d stages, must be 1 to %d", len(req.Stages), maxStages)
	}
	return cmp.Or(checkText("start_command", req.StartCommand, maxStepText), checkText("ready_command", req.ReadyCommand, maxStepText))
}

func checkText(what, text string, limit int) error {
	switch {
	case len(text) > limit:
		return fmt.Errorf("%s is %d bytes long, at most %d are possible", what, len(text), limit)
	case strings.ContainsRune(text, 0):
		return fmt.Errorf("%s has a NUL byte", what)
	}
	return nil
}

// sourceOf converts what a stage stands on, which is one thing.
func sourceOf(from *pb.BuildSource) (build.Source, error) {
	given := 0
	for _, text := range []string{from.GetImage(), from.GetTemplate(), from.GetArchive(), from.GetStage()} {
		if text != "" {
			given++
		}
	}
	if from.GetScratch() != (given == 0) || given > 1 {
		return build.Source{}, errors.New("from needs one of image, template, archive, stage and scratch")
	}
	for what, text := range map[string]string{
		"image": from.Image, "template": from.Template, "stage": from.Stage, "username": from.Username,
	} {
		if err := checkText(what, text, 1024); err != nil {
			return build.Source{}, err
		}
	}
	err := checkText("password", from.Password, 64<<10)
	if from.Archive != "" {
		err = cmp.Or(err, checkHash("archive", from.Archive))
	}
	if from.Pull && from.Image != "" {
		err = cmp.Or(err, image.ParseReference(from.Image))
	}
	if from.Template != "" {
		_, wrong := template.ParseReference(from.Template)
		err = cmp.Or(err, wrong)
	}
	return build.Source{
		Image: from.Image, Either: from.Image != "" && !from.Pull, Template: from.Template, Archive: from.Archive, Stage: from.Stage,
		Scratch: from.Scratch, Credentials: build.Credentials{Username: from.Username, Password: from.Password},
	}, err
}

// kinds are those of steps.
var kinds = []string{
	build.Run, build.Copy, build.Env, build.Arg, build.Workdir, build.User, build.Shell, build.Label, build.Cmd, build.Entrypoint,
	build.Expose, build.Healthcheck,
}

// checkStep returns what is wrong with a step, whatever it means.
func checkStep(step *pb.BuildStep) error {
	if !slices.Contains(kinds, step.GetKind()) {
		return fmt.Errorf("kind %.40q is unknown; known are %s", step.GetKind(), strings.Join(kinds, ", "))
	}
	if n := len(step.Args) + len(step.Src); n > maxStepArgs {
		return fmt.Errorf("%d words, at most %d are possible", n, maxStepArgs)
	}
	size := 0
	for _, text := range append(append([]string{step.Text}, step.Args...), step.Src...) {
		if err := checkText("a word", text, maxStepText); err != nil {
			return err
		}
		size += len(text)
	}
	if size > maxArgsBytes {
		return fmt.Errorf("%d bytes, at most %d are possible", size, maxArgsBytes)
	}
	for what, text := range map[string]string{
		"user": step.User, "dst": step.Dst, "owner": step.Owner, "mode": step.Mode, "from_stage": step.FromStage, "from_image": step.FromImage,
	} {
		if err := checkText(what, text, maxPathBytes); err != nil {
			return err
		}
	}
	if step.Line < 0 {
		return fmt.Errorf("line is %d", step.Line)
	}
	if step.Files != "" {
		return checkHash("files", step.Files)
	}
	return nil
}

// ownBuild returns a build that the caller may watch and cancel.
func (s *templates) ownBuild(ctx context.Context, text, id string) (template.Info, template.Build, error) {
	if s.builds == nil {
		return template.Info{}, template.Build{}, errNoBuilds
	}
	t, _, err := s.own(ctx, text, false)
	if err != nil {
		return t, template.Build{}, err
	}
	i := slices.IndexFunc(t.Builds, func(b template.Build) bool { return b.ID == id })
	if i < 0 {
		return t, template.Build{}, errdefs.NotFound.Errorf("build %.70q of template '%s' does not exist", id, t.Name())
	}
	return t, t.Builds[i], nil
}

func (s *templates) WatchBuild(
	ctx context.Context, req *request[pb.WatchBuildRequest], stream *connect.ServerStream[pb.WatchBuildResponse],
) error {
	if req.Msg.From < 0 {
		return errdefs.InvalidArgument.Errorf("from is %d, must not be negative", req.Msg.From)
	}
	t, b, err := s.ownBuild(ctx, req.Msg.Template, req.Msg.Build)
	if err != nil {
		return err
	}
	// The headers go out at once, so that the caller knows that it watches.
	if err := stream.Send(&pb.WatchBuildResponse{}); err != nil {
		return err
	}
	w := &watcher{stream: stream}
	stop := w.tell(ctx, s.builds, t.ID, b.ID)
	err = s.builds.Watch(ctx, t.ID, b.ID, int(req.Msg.From), func(e build.Entry) error {
		return w.send(&pb.WatchBuildResponse{Entry: &pb.BuildLogEntry{
			Time: timestamppb.New(e.At), Level: e.Level, Step: e.Step, Message: validText(e.Message),
		}})
	})
	stop()
	if err != nil {
		return err
	}
	end, err := s.end(ctx, t.ID, b.ID)
	if err != nil {
		return err
	}
	return w.send(&pb.WatchBuildResponse{End: end})
}

// end says how a build has ended.
func (s *templates) end(ctx context.Context, id, build string) (*pb.BuildEnd, error) {
	_, b, err := s.ownBuild(ctx, id, build)
	if err != nil {
		return nil, err
	}
	end := &pb.BuildEnd{Status: b.Status}
	if b.Reason != nil {
		end.Reason, end.FailedStep = validText(b.Reason.Message), validText(b.Reason.Step)
	}
	end.OwnBytes, end.SharedBytes = s.store.Sizes(id, build)
	return end, nil
}

type progress = build.Progress

// watcher is a stream to which several send.
type watcher struct {
	mu     sync.Mutex
	stream *connect.ServerStream[pb.WatchBuildResponse]
}

func (w *watcher) send(m *pb.WatchBuildResponse) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stream.Send(m)
}

// tell sends how far a build has come, each time that this has changed, until stop.
func (w *watcher) tell(ctx context.Context, builds Builds, id, build string) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		tick := time.NewTicker(progressEach)
		defer tick.Stop()
		var last progress
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			p, ok := builds.Progress(id, build)
			if !ok || p == last {
				continue
			}
			last = p
			// An error of the stream is the watcher's, too.
			_ = w.send(&pb.WatchBuildResponse{Progress: &pb.BuildProgress{
				Stage: p.Stage, Done: p.Done, Total: p.Total, Detail: validText(p.Detail),
			}})
		}
	}()
	return func() { cancel(); <-gone }
}

func (s *templates) CancelBuild(ctx context.Context, req *request[pb.CancelBuildRequest]) (*response[pb.CancelBuildResponse], error) {
	t, b, err := s.ownBuild(ctx, req.Msg.Template, req.Msg.Build)
	if err != nil {
		return nil, err
	}
	err = s.builds.Cancel(ctx, t.ID, b.ID)
	if errdefs.ClassOf(err) == errdefs.NotFound {
		err = errdefs.WrongState.Errorf("build %s of template '%s' has ended", b.ID, t.Name())
	}
	return connect.NewResponse(&pb.CancelBuildResponse{}), err
}

func (s *templates) GetUpload(ctx context.Context, req *request[pb.GetUploadRequest]) (*response[pb.GetUploadResponse], error) {
	if err := checkHash("hash", req.Msg.Hash); err != nil {
		return nil, err
	}
	if s.builds == nil {
		return nil, errNoBuilds
	}
	owner, _ := project(ctx)
	present, err := s.builds.Upload(owner, req.Msg.Hash)
	return connect.NewResponse(&pb.GetUploadResponse{Present: present}), err
}

func (s *templates) PutUpload(
	ctx context.Context, stream *connect.ClientStream[pb.PutUploadRequest],
) (*response[pb.PutUploadResponse], error) {
	if !stream.Receive() {
		return nil, cmp.Or(stream.Err(), error(errdefs.InvalidArgument.Errorf("hash is missing")))
	}
	first := stream.Msg()
	if err := checkHash("hash", first.Hash); err != nil {
		return nil, err
	}
	if s.builds == nil {
		return nil, errNoBuilds
	}
	owner, _ := project(ctx)
	u := &upload{stream: stream, hash: first.Hash}
	if err := u.take(first); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.PutUploadResponse{}), s.builds.Put(ctx, owner, first.Hash, u)
}

// upload reads the parts of an archive.
type upload struct {
	stream *connect.ClientStream[pb.PutUploadRequest]
	hash   string
	rest   []byte
}

// take checks a message and makes its part the next that is read.
func (u *upload) take(m *pb.PutUploadRequest) error {
	switch {
	case m.Hash != "" && m.Hash != u.hash:
		return errdefs.InvalidArgument.Errorf("hash changes within the upload")
	case len(m.Data) > maxUploadPart:
		return errdefs.InvalidArgument.Errorf("data of %d bytes in a message, at most %d are possible", len(m.Data), maxUploadPart)
	}
	u.rest = m.Data
	return nil
}

func (u *upload) Read(p []byte) (int, error) {
	for len(u.rest) == 0 {
		if !u.stream.Receive() {
			return 0, cmp.Or(u.stream.Err(), io.EOF)
		}
		if err := u.take(u.stream.Msg()); err != nil {
			return 0, err
		}
	}
	n := copy(p, u.rest)
	u.rest = u.rest[n:]
	return n, nil
}

// Export writes the root file system of a build to w, as a tar.
type Export func(ctx context.Context, project string, root template.Template, w io.Writer) error

// ExportBy reads templates in build sandboxes of a manager: nothing of a template is mounted
// on the host.
func ExportBy(manager *sandbox.Manager) Export {
	return func(ctx context.Context, project string, root template.Template, w io.Writer) (err error) {
		builders := manager.Builders()
		id, err := builders.Create(ctx, sandbox.BuilderRequest{Root: root, Project: project})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, builders.Destroy(context.WithoutCancel(ctx), id)) }()
		guest, err := builders.Guest(id)
		if err != nil {
			return err
		}
		return guest.Pack(ctx, "/", w)
	}
}

func (s *templates) ExportTemplate(
	ctx context.Context, req *request[pb.ExportTemplateRequest], stream *connect.ServerStream[pb.ExportTemplateResponse],
) error {
	t, ref, err := s.lookup(ctx, req.Msg.Template)
	if err != nil {
		return err
	}
	b, err := buildOf(t, ref.Tag)
	switch {
	case err != nil:
		return err
	case t.Source != "":
		return errdefs.WrongState.Errorf("'%s' is a snapshot: the state of a sandbox is not exported", t.Name())
	case b.Status != template.StatusReady:
		return errdefs.WrongState.Errorf("build %s of template '%s' is %s, not ready", b.ID, t.Name(), b.Status)
	case s.export == nil:
		return errNoBuilds
	}
	root, err := s.store.Root(t, b)
	if err != nil {
		return err
	}
	about, err := s.about(ctx, t, b)
	if err != nil {
		return err
	}
	if err := stream.Send(&pb.ExportTemplateResponse{About: about}); err != nil {
		return err
	}
	owner, _ := project(ctx)
	return s.export(ctx, owner, root, exported{stream})
}

// exported sends what is written to it.
type exported struct {
	stream *connect.ServerStream[pb.ExportTemplateResponse]
}

func (e exported) Write(p []byte) (int, error) {
	for part := range slices.Chunk(p, maxUploadPart) {
		if err := e.stream.Send(&pb.ExportTemplateResponse{Data: part}); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}
