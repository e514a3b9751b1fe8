package e2b

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"time"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/idempotency"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// Seconds of life that a call means if it does not say.
const (
	defaultTimeoutV1 = 15
	defaultTimeoutV2 = 300
	defaultRefresh   = 15
)

// defaultUser runs programs, as E2B's clients expect it, in a sandbox of the default
// template: that names root, for wrenn.
const defaultUser = "user"

var idempotencyKey = regexp.MustCompile(`^[a-z0-9-]{1,255}$`)

func (s *server) CreateSandboxV1(ctx context.Context, r api.CreateSandboxV1RequestObject) (api.CreateSandboxV1ResponseObject, error) {
	sb, err := s.create(ctx, *r.Body, r.Params.IdempotencyKey, defaultTimeoutV1)
	return api.CreateSandboxV1201JSONResponse{SandboxJSONResponse: api.SandboxJSONResponse(sb)}, err
}

func (s *server) CreateSandboxV2(ctx context.Context, r api.CreateSandboxV2RequestObject) (api.CreateSandboxV2ResponseObject, error) {
	sb, err := s.create(ctx, *r.Body, r.Params.IdempotencyKey, defaultTimeoutV2)
	return api.CreateSandboxV2201JSONResponse{SandboxJSONResponse: api.SandboxJSONResponse(sb)}, err
}

// create makes a sandbox; with a key, at most one for all requests with that key.
func (s *server) create(ctx context.Context, body api.NewSandbox, key *string, timeout int) (api.Sandbox, error) {
	req, err := s.createRequest(ctx, body, timeout)
	if err != nil {
		return api.Sandbox{}, err
	}
	if key == nil {
		return s.createNow(ctx, req, body.TemplateID)
	}
	if !idempotencyKey.MatchString(*key) {
		return api.Sandbox{}, refuse(http.StatusBadRequest, "Idempotency-Key must be 1 to 255 of a-z, 0-9 and -")
	}
	req.ID = s.Manager.NewID() // to be written down before there is a sandbox
	claim, done, err := s.Requests.Begin(idempotency.Request{
		Scope: "create " + req.Project, Key: *key, Digest: digestOf(body, timeout),
	}, string(req.ID))
	if err != nil {
		return api.Sandbox{}, err
	}
	if done != nil {
		return s.createdBefore(ctx, *done)
	}
	sb, err := s.createNow(ctx, req, body.TemplateID)
	if err != nil {
		return api.Sandbox{}, errors.Join(err, claim.Drop())
	}
	if err := claim.Done(answerWithoutSecrets(sb)); err != nil {
		s.Log.Warn("outcome of an Idempotency-Key not kept", "sandbox", req.ID, "err", err)
	}
	return sb, nil
}

// createRequest checks a request and says what it comes to, except the template:
// that may be gone when a request comes again.
func (s *server) createRequest(ctx context.Context, body api.NewSandbox, timeout int) (req CreateRequest, err error) {
	req = CreateRequest{
		Project: projectOf(ctx), OnEnd: Kill, Metadata: value(body.Metadata, nil), Env: value(body.EnvVars, nil),
		AutoResume: body.AutoResume != nil && body.AutoResume.Enabled,
	}
	if req.Timeout, err = s.timeout(value(body.Timeout, timeout), 1); err != nil {
		return req, err
	}
	if req.OnEnd, err = onEnd(body, req.AutoResume); err != nil {
		return req, err
	}
	if err := sandbox.CheckMetadata(req.Metadata); err != nil {
		return req, refuse(http.StatusBadRequest, "%s", err)
	}
	if err := sandbox.CheckEnv(req.Env); err != nil {
		return req, refuse(http.StatusBadRequest, "envVars: %s", err)
	}
	if body.VolumeMounts != nil && len(*body.VolumeMounts) > 0 {
		return req, refuse(http.StatusBadRequest, "volume '%.70s' not found: %s", (*body.VolumeMounts)[0].Name, errVolumes)
	}
	if body.Iam != nil && len(*body.Iam) > 0 {
		return req, errIAM
	}
	if req.Egress, req.Ingress, err = networkOf(value(body.Network, api.Network{}), body.AllowInternetAccess); err != nil {
		return req, err
	}
	return req, nil
}

func onEnd(body api.NewSandbox, autoResume bool) (Action, error) {
	pause, memory := value(body.AutoPause, false), value(body.AutoPauseMemory, true)
	switch {
	case !memory && !pause:
		return "", refuse(http.StatusBadRequest, "autoPauseMemory false needs autoPause true")
	case !memory && autoResume:
		return "", refuse(http.StatusBadRequest, "autoPauseMemory false and autoResume exclude each other: "+
			"traffic does not resume a sandbox without memory")
	case !memory:
		return PauseFiles, nil
	case pause:
		return Pause, nil
	}
	return Kill, nil
}

// timeout reads a life in seconds, of which there must be at least some.
func (s *server) timeout(seconds, least int) (time.Duration, error) {
	longest := int(s.MaxTimeout / time.Second)
	switch {
	case seconds < least && least > 0:
		return 0, refuse(http.StatusBadRequest, "Timeout must be greater than 0")
	case seconds < least:
		return 0, refuse(http.StatusBadRequest, "Timeout must not be negative")
	case seconds > longest:
		return 0, refuse(http.StatusBadRequest, "Timeout cannot be greater than %d seconds", longest)
	}
	return time.Duration(seconds) * time.Second, nil
}

func (s *server) createNow(ctx context.Context, req CreateRequest, templateID string) (api.Sandbox, error) {
	t, build, err := s.resolve(ctx, templateID)
	if err != nil {
		return api.Sandbox{}, err
	}
	req.Template, req.Build = t.ID, build
	if t.Project == "" && t.Source == "" && slices.Contains(t.Names, s.DefaultTemplate) {
		req.User = defaultUser
	}
	sb, err := s.Manager.Create(ctx, req)
	if err != nil {
		return api.Sandbox{}, s.notCreated(err)
	}
	answer, err := s.started(sb)
	if errdefs.ClassOf(err) == errdefs.NotFound { // it has ended already
		return api.Sandbox{}, refuse(http.StatusConflict, "sandbox %s ended while it was made", sb.ID.Short())
	}
	return answer, err
}

// createdBefore answers a create that was carried out before. The sandbox may have
// ended since; its token opens nothing then, and is left out.
func (s *server) createdBefore(ctx context.Context, done idempotency.Done) (answer api.Sandbox, err error) {
	if sb, err := s.find(ctx, done.Subject); err == nil {
		return s.started(sb)
	}
	if done.Answer == nil {
		return api.Sandbox{}, idempotency.ErrUnknown
	}
	if err := json.Unmarshal(done.Answer, &answer); err != nil {
		return api.Sandbox{}, fmt.Errorf("read answer to an Idempotency-Key: %w", err)
	}
	return answer, nil
}

func answerWithoutSecrets(sb api.Sandbox) json.RawMessage {
	sb.EnvdAccessToken, sb.TrafficAccessToken = nil, nil
	data, err := json.Marshal(sb)
	if err != nil {
		return nil
	}
	return data
}

// digestOf is the same for requests that ask the same.
func digestOf(body api.NewSandbox, timeout int) string {
	body.Timeout = some(value(body.Timeout, timeout))
	data, _ := json.Marshal(body) // strings, numbers and maps with strings, whose keys are sorted
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// started is the answer of calls after which a sandbox runs.
func (s *server) started(sb Sandbox) (api.Sandbox, error) {
	tokens, err := s.Manager.Tokens(sb.ID)
	if err != nil {
		return api.Sandbox{}, err
	}
	return api.Sandbox{
		TemplateID: sb.Template, SandboxID: sb.ID.Short(), ClientID: clientID, EnvdVersion: sb.EnvdVersion,
		Alias: some(sb.Alias), EnvdAccessToken: some(tokens.Envd), TrafficAccessToken: some(tokens.Traffic), Domain: some(s.Domain),
	}, nil
}

// clientID is what clients once appended to ids. It says nothing any more.
const clientID = "wrenn"

func stringMap(m map[string]string) *api.StringMap {
	if m == nil {
		return nil
	}
	copied := api.StringMap(maps.Clone(m))
	return &copied
}
