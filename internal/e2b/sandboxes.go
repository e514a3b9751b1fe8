package e2b

import (
	"context"
	"net/http"
	"time"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// forever is the end of a sandbox that has none: clients demand one.
var forever = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

func notFound(id string) error {
	return refuse(http.StatusNotFound, "Sandbox \"%.70s\" doesn't exist or you don't have access to it", id)
}

// find returns a sandbox of the caller's project that runs or is paused. All
// others are not found, those of other projects too.
func (s *server) find(ctx context.Context, text string) (Sandbox, error) {
	id, ok := sandbox.ParseLooseID(text)
	if !ok {
		return Sandbox{}, notFound(text)
	}
	sb, err := s.Manager.Get(id)
	if errdefs.ClassOf(err) == errdefs.NotFound || err == nil && (sb.Project != projectOf(ctx) || shown(sb) == "") {
		return Sandbox{}, notFound(text)
	}
	return sb, err
}

// shown is the state as clients know it: one of two, or none for a sandbox that
// they do not see.
func shown(sb Sandbox) api.State {
	switch {
	case sb.State == sandbox.Running && !sb.Pausing:
		return api.Running
	case sb.State == sandbox.Running, sb.State == sandbox.Paused, sb.State == sandbox.Hibernated:
		return api.Paused
	}
	return ""
}

// end is the end as clients know it.
func end(sb Sandbox) api.Timestamp {
	switch {
	case shown(sb) == api.Paused && !sb.PausedAt.IsZero():
		return api.At(sb.PausedAt)
	case sb.EndAt.IsZero():
		return api.At(forever)
	}
	return api.At(sb.EndAt)
}

func (s *server) GetSandbox(ctx context.Context, r api.GetSandboxRequestObject) (api.GetSandboxResponseObject, error) {
	sb, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	tokens, err := s.Manager.Tokens(sb.ID)
	if err != nil {
		return nil, err
	}
	detail := api.GetSandbox200JSONResponse{
		TemplateID: sb.Template, SandboxID: sb.ID.Short(), ClientID: clientID, StartedAt: api.At(sb.StartedAt), EndAt: end(sb),
		EnvdVersion: sb.EnvdVersion, CpuCount: sb.VCPUs, MemoryMB: sb.MemMiB, DiskSizeMB: sb.DiskMiB, State: shown(sb),
		Alias: some(sb.Alias), EnvdAccessToken: some(tokens.Envd), AllowInternetAccess: sb.Egress.AllowInternet,
		Domain: some(s.Domain), Metadata: stringMap(sb.Metadata), Network: network(sb.Egress, sb.Ingress),
		Lifecycle: &api.Lifecycle{AutoResume: sb.AutoResume, OnTimeout: api.Pause},
	}
	if sb.OnEnd == Kill || sb.OnEnd == "" {
		detail.Lifecycle.OnTimeout = api.Kill
	}
	if detail.State == api.Paused {
		detail.PauseMode = some(api.Full)
		if sb.FilesOnly {
			detail.PauseMode = some(api.Filesystem)
		}
	}
	return detail, nil
}

func (s *server) KillSandbox(ctx context.Context, r api.KillSandboxRequestObject) (api.KillSandboxResponseObject, error) {
	sb, err := s.find(ctx, r.SandboxID)
	if err == nil {
		err = s.Manager.Destroy(ctx, sb.ID)
	}
	return api.KillSandbox204Response{}, err
}

func (s *server) ConnectSandboxV1(ctx context.Context, r api.ConnectSandboxV1RequestObject,
) (api.ConnectSandboxV1ResponseObject, error) {
	if r.Body.Timeout == nil {
		return nil, refuse(http.StatusBadRequest, "timeout is missing")
	}
	sb, resumed, err := s.connect(ctx, r.SandboxID, api.ConnectRequest(*r.Body))
	if err != nil {
		return nil, err
	}
	if resumed {
		return api.ConnectSandboxV1201JSONResponse(sb), nil
	}
	return api.ConnectSandboxV1200JSONResponse{SandboxJSONResponse: api.SandboxJSONResponse(sb)}, nil
}

func (s *server) ConnectSandboxV2(ctx context.Context, r api.ConnectSandboxV2RequestObject,
) (api.ConnectSandboxV2ResponseObject, error) {
	sb, resumed, err := s.connect(ctx, r.SandboxID, value(r.Body, api.ConnectRequest{}))
	if err != nil {
		return nil, err
	}
	if resumed {
		return api.ConnectSandboxV2201JSONResponse(sb), nil
	}
	return api.ConnectSandboxV2200JSONResponse{SandboxJSONResponse: api.SandboxJSONResponse(sb)}, nil
}

func (s *server) connect(ctx context.Context, id string, body api.ConnectRequest) (api.Sandbox, bool, error) {
	timeout, err := s.timeout(value(body.Timeout, defaultTimeoutV2), 1)
	if err != nil {
		return api.Sandbox{}, false, err
	}
	return s.wake(ctx, id, ConnectRequest{Timeout: timeout, FilesOnly: !value(body.Memory, true)})
}

// wake makes sure that a sandbox runs.
func (s *server) wake(ctx context.Context, text string, req ConnectRequest) (api.Sandbox, bool, error) {
	if s.stopping(ctx, text) {
		return api.Sandbox{}, false, refuse(http.StatusConflict, "Sandbox %.70s is being killed", text)
	}
	sb, err := s.find(ctx, text)
	if err != nil {
		return api.Sandbox{}, false, err
	}
	sb, resumed, err := s.Manager.Connect(ctx, sb.ID, req)
	if errdefs.ClassOf(err) == errdefs.NotFound {
		return api.Sandbox{}, false, notFound(text)
	}
	if err != nil {
		return api.Sandbox{}, false, err
	}
	answer, err := s.started(sb)
	return answer, resumed, err
}

// stopping says whether a sandbox of the caller's is about to be gone.
func (s *server) stopping(ctx context.Context, text string) bool {
	id, ok := sandbox.ParseLooseID(text)
	if !ok {
		return false
	}
	sb, err := s.Manager.Get(id)
	return err == nil && sb.Project == projectOf(ctx) && sb.State == sandbox.Stopping
}

func (s *server) ResumeSandbox(ctx context.Context, r api.ResumeSandboxRequestObject) (api.ResumeSandboxResponseObject, error) {
	body := value(r.Body, api.ResumeRequest{})
	timeout, err := s.timeout(value(body.Timeout, defaultTimeoutV1), 1)
	if err != nil {
		return nil, err
	}
	req := ConnectRequest{Timeout: timeout, FilesOnly: !value(body.Memory, true), PausedOnly: true}
	if body.AutoPause != nil {
		req.OnEnd = Kill
		if *body.AutoPause {
			req.OnEnd = Pause
		}
	}
	sb, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if shown(sb) == api.Running {
		return nil, refuse(http.StatusConflict, "Sandbox %s is already running", sb.ID.Short())
	}
	answer, _, err := s.wake(ctx, r.SandboxID, req)
	return api.ResumeSandbox201JSONResponse{SandboxJSONResponse: api.SandboxJSONResponse(answer)}, err
}

func (s *server) PauseSandbox(ctx context.Context, r api.PauseSandboxRequestObject) (api.PauseSandboxResponseObject, error) {
	body := value(r.Body, api.PauseRequest{})
	sb, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if shown(sb) == api.Paused && !sb.Pausing {
		return nil, refuse(http.StatusConflict, "Error pausing sandbox - sandbox '%s' is already paused", sb.ID.Short())
	}
	err = s.Manager.Pause(ctx, sb.ID, PauseRequest{
		FilesOnly: !value(body.Memory, true), HealthyGuest: value(body.RequireHealthyGuest, false),
	})
	return api.PauseSandbox204Response{}, busyAs(http.StatusServiceUnavailable, err)
}

func (s *server) SetSandboxTimeout(ctx context.Context, r api.SetSandboxTimeoutRequestObject,
) (api.SetSandboxTimeoutResponseObject, error) {
	if r.Body.Timeout == nil {
		return nil, refuse(http.StatusBadRequest, "timeout is missing")
	}
	timeout, err := s.timeout(*r.Body.Timeout, 0)
	if err == nil {
		err = s.setEnd(ctx, r.SandboxID, timeout, false)
	}
	return api.SetSandboxTimeout204Response{}, err
}

func (s *server) RefreshSandbox(ctx context.Context, r api.RefreshSandboxRequestObject) (api.RefreshSandboxResponseObject, error) {
	duration := max(value(value(r.Body, api.RefreshRequest{}).Duration, 0), defaultRefresh)
	timeout, err := s.timeout(duration, 1)
	if err == nil {
		err = s.setEnd(ctx, r.SandboxID, timeout, true)
	}
	return api.RefreshSandbox204Response{}, err
}

// setEnd moves the end of a running sandbox. Clients take a paused one for one
// that does not exist.
func (s *server) setEnd(ctx context.Context, text string, timeout time.Duration, extend bool) error {
	sb, err := s.find(ctx, text)
	if err != nil {
		return err
	}
	if shown(sb) != api.Running {
		return refuse(http.StatusNotFound, "Sandbox \"%s\" is paused", sb.ID.Short())
	}
	err = s.Manager.SetEnd(ctx, sb.ID, time.Now().Add(timeout), extend)
	return wrongStateAs(http.StatusNotFound, err)
}

// maxForks bounds one fork.
const maxForks = 100

func (s *server) ForkSandbox(ctx context.Context, r api.ForkSandboxRequestObject) (api.ForkSandboxResponseObject, error) {
	body := value(r.Body, api.ForkRequest{})
	count := value(body.Count, 1)
	if count < 1 || count > maxForks {
		return nil, refuse(http.StatusBadRequest, "count must be between 1 and %d", maxForks)
	}
	timeout, err := s.timeout(value(body.Timeout, defaultTimeoutV1), 1)
	if err != nil {
		return nil, err
	}
	sb, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if shown(sb) != api.Running {
		return nil, refuse(http.StatusConflict, "sandbox %s is paused and cannot be forked; resume it first", sb.ID.Short())
	}
	forks, err := s.Manager.Fork(ctx, sb.ID, count, timeout)
	if err != nil {
		return nil, s.notCreated(err)
	}
	answer := make(api.ForkSandbox201JSONResponse, 0, len(forks))
	for _, fork := range forks {
		one, err := s.started(fork)
		if err != nil { // it has ended already
			body := s.describe("fork sandbox", err)
			answer = append(answer, api.Forked{Error: &body})
			continue
		}
		answer = append(answer, api.Forked{Sandbox: &one})
	}
	return answer, nil
}
