package server

import (
	"context"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// access decides who calls the control plane, by the connection and the key that a
// request shows.
type access struct {
	Config
	errors *connect.ErrorWriter
}

// callerOf returns who sent a request. The Unix socket lets through only who may
// command the host. A TCP connection needs a key, except on loopback while there is
// none.
func (a access) callerOf(r *http.Request) (auth.Caller, error) {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if _, ok := local.(*net.UnixAddr); ok {
		return auth.Caller{KeyID: "socket", Host: true}, nil
	}
	if key := auth.KeyOf(r.Header); key != "" {
		return a.Keys.Lookup(key)
	}
	keys, err := a.Keys.Any()
	if err != nil {
		return auth.Caller{}, err
	}
	if keys || !a.Keyless || !onLoopback(r) {
		return auth.Caller{}, errdefs.Unauthenticated.Errorf("this host agent demands an API key, in the header X-API-KEY or as a bearer token")
	}
	return auth.Caller{KeyID: "loopback", Host: true}, nil
}

func onLoopback(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	ip := net.ParseIP(host)
	return err == nil && ip != nil && ip.IsLoopback()
}

// demand lets a request through to next if its caller is known and calls not too
// often. next finds the caller in the context.
func (a access) demand(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := a.callerOf(r)
		if err == nil && !caller.Host {
			d := a.Limiter.Take(caller.KeyID, starts[r.URL.Path], time.Now())
			d.Tell(w.Header())
			if !d.Allowed {
				err = errdefs.Exhausted.Errorf("this key calls too often")
			}
		}
		if err != nil {
			row, told := errhttp.Tell(a.Log, r.URL.Path, err)
			_ = a.errors.Write(w, r, connect.NewError(row.Code, told))
			return
		}
		ctx := sandbox.WithActor(auth.WithCaller(r.Context(), caller), actorOf(r, caller))
		still := func() error { _, err := a.callerOf(r); return err }
		next.ServeHTTP(w, r.WithContext(context.WithValue(ctx, stillKey{}, still)))
	})
}

// stillKey is the key of a func() error in the context of a request, which says why its
// caller would not be let in any more.
type stillKey struct{}

// actorOf is what the events of a call say of its caller.
func actorOf(r *http.Request, caller auth.Caller) sandbox.Actor {
	actor := sandbox.Actor{KeyID: caller.KeyID, Project: caller.Project.Name}
	if _, ok := r.Context().Value(http.LocalAddrContextKey).(*net.UnixAddr); !ok {
		actor.Address = r.RemoteAddr
	}
	return actor
}

// rule says what the holder of a key may do with a call. A caller that commands the
// host may make every call.
type rule int

const (
	// hostOnly: no key may.
	hostOnly rule = iota + 1
	// anyKey: the answer says nothing of projects.
	anyKey
	// ofSandbox: the sandbox that the request names in sandbox_id must be of the key's
	// project. Any other does not exist for it.
	ofSandbox
	// byProject: the method acts on what is the project's, see project.
	byProject
)

// rules has every call. One that is missing is refused.
var rules = map[string]rule{
	hostagentv1connect.HostAgentServiceCreateSandboxProcedure:   byProject,
	hostagentv1connect.HostAgentServiceRecoverSandboxProcedure:  ofSandbox,
	hostagentv1connect.HostAgentServiceDestroySandboxProcedure:  ofSandbox,
	hostagentv1connect.HostAgentServicePauseSandboxProcedure:    ofSandbox,
	hostagentv1connect.HostAgentServiceResumeSandboxProcedure:   ofSandbox,
	hostagentv1connect.HostAgentServiceForkSandboxProcedure:     ofSandbox,
	hostagentv1connect.HostAgentServiceSnapshotSandboxProcedure: ofSandbox,
	hostagentv1connect.HostAgentServiceListSnapshotsProcedure:   byProject,
	hostagentv1connect.HostAgentServiceDeleteSnapshotProcedure:  byProject,
	hostagentv1connect.HostAgentServiceUpdateNetworkProcedure:   ofSandbox,
	hostagentv1connect.HostAgentServiceListDenialsProcedure:     ofSandbox,
	hostagentv1connect.HostAgentServiceExecProcedure:            ofSandbox,
	hostagentv1connect.HostAgentServiceListSandboxesProcedure:   byProject,
	hostagentv1connect.HostAgentServiceGetSandboxProcedure:      ofSandbox,
	hostagentv1connect.HostAgentServiceSetTimeoutProcedure:      ofSandbox,
	hostagentv1connect.HostAgentServiceSetDeadlineProcedure:     ofSandbox,
	hostagentv1connect.HostAgentServiceWatchEventsProcedure:     byProject,
	hostagentv1connect.HostAgentServiceGetConsoleProcedure:      ofSandbox,
	hostagentv1connect.HostAgentServiceVerifyProcedure:          hostOnly,
	hostagentv1connect.HostAgentServiceGetVersionProcedure:      anyKey,
	hostagentv1connect.HostAgentServiceDrainHostProcedure:       hostOnly,
	hostagentv1connect.HostAgentServiceGetHostProcedure:         anyKey,

	hostagentv1connect.TemplateServiceListTemplatesProcedure:  byProject,
	hostagentv1connect.TemplateServiceGetTemplateProcedure:    byProject,
	hostagentv1connect.TemplateServiceBuildTemplateProcedure:  byProject,
	hostagentv1connect.TemplateServiceWatchBuildProcedure:     byProject,
	hostagentv1connect.TemplateServiceCancelBuildProcedure:    byProject,
	hostagentv1connect.TemplateServiceGetUploadProcedure:      byProject,
	hostagentv1connect.TemplateServicePutUploadProcedure:      byProject,
	hostagentv1connect.TemplateServiceDeleteTemplateProcedure: byProject,
	hostagentv1connect.TemplateServiceTagTemplateProcedure:    byProject,
	hostagentv1connect.TemplateServiceUntagTemplateProcedure:  byProject,
	hostagentv1connect.TemplateServiceExportTemplateProcedure: byProject,
	hostagentv1connect.TemplateServicePruneTemplatesProcedure: byProject,
	hostagentv1connect.TemplateServiceCollectGarbageProcedure: hostOnly,
}

// starts are the calls that begin a VM, which count as creates.
var starts = map[string]bool{
	hostagentv1connect.HostAgentServiceCreateSandboxProcedure: true,
	hostagentv1connect.HostAgentServiceForkSandboxProcedure:   true,
	hostagentv1connect.TemplateServiceBuildTemplateProcedure:  true,
	hostagentv1connect.TemplateServiceExportTemplateProcedure: true,
}

// projects holds each caller to its rule.
type projects struct{ manager *sandbox.Manager }

// check returns why a caller may not make a call; msg is its request, nil for that
// of a stream.
func (p projects) check(ctx context.Context, spec connect.Spec, msg any) error {
	caller, ok := auth.CallerOf(ctx)
	if !ok {
		return errdefs.Unauthenticated.Errorf("the caller is not known")
	}
	rule, ok := rules[spec.Procedure]
	switch {
	case !ok:
		return errdefs.Denied.Errorf("%s is not to be called", spec.Procedure)
	case caller.Host, rule == anyKey, rule == byProject:
		return nil
	case rule == ofSandbox:
		named, ok := msg.(interface{ GetSandboxId() string })
		if !ok {
			return errdefs.Denied.Errorf("%s is not to be called with a key", spec.Procedure)
		}
		return p.own(caller, named.GetSandboxId())
	default:
		name := spec.Procedure[strings.LastIndex(spec.Procedure, "/")+1:]
		return errdefs.Denied.Errorf("%s concerns the whole host, which no key commands: call it over the agent's Unix socket", name)
	}
}

// own returns the manager's error for a sandbox that does not exist unless the
// sandbox is the caller's.
func (p projects) own(caller auth.Caller, text string) error {
	id, err := sandbox.ParseID(text)
	if err != nil {
		return err
	}
	info, err := p.manager.Get(id)
	if err != nil {
		return err
	}
	if info.Labels.Project != caller.Project.Name {
		return errdefs.NotFound.Errorf("sandbox %s does not exist", id)
	}
	return nil
}

// project returns the project to which a caller is held; all is true for one that
// commands the host.
func project(ctx context.Context) (name string, all bool) {
	caller, _ := auth.CallerOf(ctx)
	return caller.Project.Name, caller.Host
}

// resolve puts the id of a sandbox into a request that has its name in place of that. A
// name means a sandbox of the caller's project, or of any for a caller that commands the
// host and has none of that name.
func (p projects) resolve(ctx context.Context, msg any) error {
	m, ok := msg.(proto.Message)
	if !ok {
		return nil
	}
	field := m.ProtoReflect().Descriptor().Fields().ByName("sandbox_id")
	if field == nil {
		return nil
	}
	name := m.ProtoReflect().Get(field).String()
	if _, known := auth.CallerOf(ctx); !known || !sandbox.IsName(name) {
		return nil
	}
	own, all := project(ctx)
	id, err := p.manager.Named(&own, name)
	if all && errdefs.ClassOf(err) == errdefs.NotFound {
		id, err = p.manager.Named(nil, name)
	}
	if err != nil {
		return err
	}
	m.ProtoReflect().Set(field, protoreflect.ValueOfString(string(id)))
	return nil
}

func (p projects) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := p.resolve(ctx, req.Any()); err != nil {
			return nil, err
		}
		if err := p.check(ctx, req.Spec(), req.Any()); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

func (p projects) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := p.check(ctx, conn.Spec(), nil); err != nil {
			return err
		}
		if still, ok := ctx.Value(stillKey{}).(func() error); ok {
			conn = letIn{conn, still}
		}
		return next(ctx, conn)
	}
}

// letIn is a stream that ends with the next message once its caller's key is revoked, or
// a key is made where there was none.
type letIn struct {
	connect.StreamingHandlerConn
	still func() error
}

func (l letIn) Send(msg any) error {
	if err := l.still(); err != nil {
		return err
	}
	return l.StreamingHandlerConn.Send(msg)
}

func (p projects) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}
