// Package server answers the control plane's RPCs: it decodes, validates, calls
// the sandbox manager and maps errors.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// Bounds of a request.
const (
	maxMessageBytes = 4 << 20
	maxArgs         = 4096
	// maxArgBytes is Linux's limit of one argument, 32 pages.
	maxArgBytes    = 128 << 10
	maxArgsBytes   = 1 << 20
	maxPathBytes   = 4096
	maxExecTimeout = 24 * time.Hour
	execTimeout    = 30 * time.Second
	maxOutputBytes = 8 << 20
	// maxErrorOutput and maxHeaderOutput bound the output in an error; clients of
	// gRPC take some 8 KiB of headers.
	maxErrorOutput  = 1 << 20
	maxHeaderOutput = 2 << 10
	maxConsoleBytes = 1 << 20
	consoleBytes    = 64 << 10
)

// Version says what this agent is, and what guests run on.
type Version struct {
	Version string
	// VMMs are the drivers, those that are usable first; the first is that of sandboxes
	// that name none.
	VMMs []VMM
	// URL is that of the TCP listener, Domain what names of ports end with, CAFile the
	// agent's own authority, if it has one.
	URL, Domain, CAFile string
}

// VMM is what is said of a driver.
type VMM struct {
	Name string
	// Version, Accel, CPU, Isolation and Speed are those of vmm.Report.
	Version, Accel, CPU, Isolation, Speed string
	// Why gives the reason for Accel, and for the first driver that it is the first.
	Why string
	// Unusable gives the reason why it runs no new sandboxes; empty if it does.
	Unusable string
}

// version is that of the VMM with its acceleration.
func (v VMM) version() string { return v.Version + " (" + v.Accel + ")" }

type service struct {
	manager *sandbox.Manager
	keys    *auth.Store
	version Version
	// templates returns the names of the host's templates.
	templates func() ([]string, error)
	// draining says that a drain has begun, which calls end when it is done.
	draining atomic.Bool
	publish  func([]sandbox.Publish) (opened []sandbox.Publish, keep func(sandbox.ID), drop func(), err error)
	end      func()
	log      *slog.Logger
}

// Of the control plane's calls.
type (
	request[T any]  = connect.Request[T]
	response[T any] = connect.Response[T]
)

var _ hostagentv1connect.HostAgentServiceHandler = (*service)(nil)

// NameCounts counts what sandboxes asked of the way out by name since the agent
// started.
type NameCounts struct {
	Open     int    // connections that are open
	Accepted uint64 // connections
	Refused  uint64 // connections, requests and questions
	// Denied are those of them that a policy refused, and packets, by kind.
	Denied map[string]uint64
}

// Config says what the control plane answers for.
type Config struct {
	Manager *sandbox.Manager
	// Keys knows who calls, Limiter how often each key may.
	Keys    *auth.Store
	Limiter *auth.Limiter
	// Keyless lets callers from loopback command the host while there is no key. It is
	// for an agent that listens on loopback.
	Keyless bool
	Version Version
	// Templates returns the names of the host's templates.
	Templates func() ([]string, error)
	// Store keeps the templates, Builds makes them of Images; without Builds none is made.
	// DiskMiB is the size of a disk of which nothing else is said.
	Store   *template.Store
	Builds  Builds
	Images  Images
	DiskMiB int
	// Export reads templates; nil where none is built.
	Export Export
	// Publish listens for ports of a sandbox that is to be made. keep carries what comes
	// there to the sandbox until it has ended, drop listens no more.
	Publish func([]sandbox.Publish) (opened []sandbox.Publish, keep func(sandbox.ID), drop func(), err error)
	// End ends the agent, after a drain.
	End func()
	// Slots counts the network's slots by state, Refused the connections that were
	// closed because there were too many.
	Slots   func() map[string]int
	Refused func() int64
	// Names counts what sandboxes asked of the way out by name.
	Names func() NameCounts
	// Panics counts what handlers panicked with.
	Panics *atomic.Int64
	Log    *slog.Logger
}

// Register adds the agent's own endpoints to mux: the control plane's calls,
// /healthz, /readyz and /metrics. Every other path is left to the caller.
//
// A request over a Unix socket commands the host. Over TCP, all except /healthz and
// /readyz demand a key as soon as there is one.
func Register(mux *http.ServeMux, c Config) {
	access := access{c, connect.NewErrorWriter()}
	path, calls := handler(c)
	mux.Handle(path, access.demand(calls))
	path, calls = templateHandler(c)
	mux.Handle(path, access.demand(calls))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", ready(c.Manager))
	mux.Handle("GET /metrics", access.demand(metricsHandler(c)))
}

// handler returns the path and the handler of the control plane's calls, which find
// their caller in the context.
func handler(c Config) (string, http.Handler) {
	return hostagentv1connect.NewHostAgentServiceHandler(
		&service{manager: c.Manager, keys: c.Keys, version: c.Version, templates: c.Templates, publish: c.Publish, end: c.End, log: c.Log},
		options(c),
	)
}

// templateHandler is handler for the calls of templates.
func templateHandler(c Config) (string, http.Handler) {
	return hostagentv1connect.NewTemplateServiceHandler(
		&templates{store: c.Store, builds: c.Builds, images: c.Images, manager: c.Manager,
			diskMiB: c.DiskMiB, export: c.Export, keys: c.Keys, log: c.Log},
		options(c),
	)
}

// options are those of all calls.
func options(c Config) connect.HandlerOption {
	return connect.WithHandlerOptions(
		connect.WithReadMaxBytes(maxMessageBytes),
		withStrictCodecs(),
		connect.WithInterceptors(mapErrors{c.Log}, projects{c.Manager}, actors{}),
		connect.WithRecover(func(_ context.Context, _ connect.Spec, _ http.Header, p any) error {
			c.Panics.Add(1)
			return fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}),
	)
}

// ready answers GET /readyz: 503 while the agent is drained or shuts down and takes no
// more sandboxes, or while the host reaches none of its guests.
func ready(manager *sandbox.Manager) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if manager.Draining() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		if fault := manager.HostFault(); fault != "" {
			http.Error(w, fault, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	}
}

func (s *service) CreateSandbox(ctx context.Context, req *request[pb.CreateSandboxRequest]) (*response[pb.CreateSandboxResponse], error) {
	end, err := deadline(req.Msg.Deadline)
	if err != nil {
		return nil, err
	}
	if err := s.checkVMM(req.Msg.Vmm); err != nil {
		return nil, err
	}
	ports, err := publishOf(ctx, req.Msg.Publish)
	if err != nil {
		return nil, err
	}
	keep := func(sandbox.ID) {}
	if len(ports) > 0 {
		if s.publish == nil {
			return nil, errdefs.Unsupported.Errorf("this agent publishes no ports")
		}
		opened, serve, drop, err := s.publish(ports)
		if err != nil {
			return nil, err
		}
		ports, keep = opened, serve
		defer drop() // what is kept stays
	}
	owner, _ := project(ctx)
	created, err := s.manager.Create(ctx, sandbox.CreateRequest{
		Publish:  ports,
		Busy:     sandbox.Busy(req.Msg.Busy),
		Template: req.Msg.Template,
		VCPUs:    int(req.Msg.Vcpus),
		MemMiB:   int(req.Msg.MemoryMb),
		DiskMiB:  int(req.Msg.DiskMb),
		Timeout:  time.Duration(req.Msg.TimeoutSec) * time.Second,

		OnTimeout: sandbox.OnTimeout(req.Msg.OnTimeout),
		EndAt:     end,
		OnEnd:     sandbox.OnTimeout(req.Msg.OnDeadline),
		Network:   policyOf(req.Msg.Network),
		Login:     sandbox.Login{User: req.Msg.User, Workdir: req.Msg.Workdir, Env: req.Msg.Envs},
		VMM:       req.Msg.Vmm,
		Isolation: sandbox.Isolation(req.Msg.Isolation),
		Labels:    sandbox.Labels{Project: owner, Name: req.Msg.Name, OwnerKey: req.Msg.OwnerKey, Metadata: req.Msg.Metadata},

		AutoResume: req.Msg.AutoResume,
	})
	if err != nil {
		return nil, err
	}
	keep(created.ID)
	tokens, err := s.tokens(created.ID)
	if err != nil {
		return nil, err
	}
	resp := &pb.CreateSandboxResponse{
		Publish:   publishedPorts(created.Publish),
		SandboxId: string(created.ID), Status: string(created.State), HostIp: addrText(created.HostIP),
		StartedFrom: created.From, Why: validText(created.Why), AccessToken: tokens.Envd,
		Vmm: created.VMM, Isolation: string(created.Isolation), VmmWhy: validText(s.whyVMM(req.Msg, created.VMM)),
	}
	for _, p := range created.Phases {
		resp.Phases = append(resp.Phases, &pb.Phase{Name: p.Name, Ms: float64(p.Took.Microseconds()) / 1000})
	}
	return connect.NewResponse(resp), nil
}

func (s *service) DestroySandbox(
	ctx context.Context, req *request[pb.DestroySandboxRequest],
) (*response[pb.DestroySandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.DestroySandboxResponse{}), s.manager.Destroy(ctx, id)
}

func (s *service) RecoverSandbox(
	ctx context.Context, req *request[pb.RecoverSandboxRequest],
) (*response[pb.RecoverSandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	info, err := s.manager.Recover(ctx, id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.RecoverSandboxResponse{Sandbox: sandboxInfo(info)}), nil
}

func (s *service) PauseSandbox(ctx context.Context, req *request[pb.PauseSandboxRequest]) (*response[pb.PauseSandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	if req.Msg.ToDisk || req.Msg.FilesOnly {
		if err := s.manager.Hibernate(ctx, id, sandbox.Hibernation{FilesOnly: req.Msg.FilesOnly}); err != nil {
			return nil, err
		}
		info, _ := s.manager.Get(id) // it may have been destroyed since
		return connect.NewResponse(&pb.PauseSandboxResponse{Detail: info.Detail}), nil
	}
	return connect.NewResponse(&pb.PauseSandboxResponse{}), s.manager.Pause(ctx, id)
}

func (s *service) ResumeSandbox(ctx context.Context, req *request[pb.ResumeSandboxRequest]) (*response[pb.ResumeSandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	if req.Msg.FilesOnly {
		_, _, err = s.manager.Connect(ctx, id, sandbox.ConnectRequest{FilesOnly: true, PausedOnly: true})
	} else {
		err = s.manager.Resume(ctx, id)
	}
	return connect.NewResponse(&pb.ResumeSandboxResponse{}), err
}

func (s *service) ForkSandbox(ctx context.Context, req *request[pb.ForkSandboxRequest]) (*response[pb.ForkSandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	count := int(req.Msg.Count)
	if count == 0 {
		count = 1
	}
	began := time.Now()
	forked, err := s.manager.Fork(ctx, id, sandbox.ForkRequest{Count: count})
	if err != nil {
		return nil, err
	}
	resp := &pb.ForkSandboxResponse{PausedMs: forked.Paused.Milliseconds(), TookMs: time.Since(began).Milliseconds()}
	for _, info := range forked.Sandboxes {
		resp.Sandboxes = append(resp.Sandboxes, sandboxInfo(info))
	}
	return connect.NewResponse(resp), nil
}

func (s *service) SnapshotSandbox(
	ctx context.Context, req *request[pb.SnapshotSandboxRequest],
) (*response[pb.SnapshotSandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	name, tag, _ := strings.Cut(req.Msg.Name, ":")
	if req.Msg.Name == "" {
		name = sandbox.SnapshotName()
	}
	owner, _ := project(ctx)
	made, err := s.manager.Snapshot(ctx, id, sandbox.SnapshotRequest{
		Project: owner, Name: name, Tag: tag, New: true, FilesOnly: req.Msg.FilesOnly,
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.SnapshotSandboxResponse{
		Snapshot: snapshotInfo(made.Snapshot), PausedMs: made.Paused.Milliseconds(), TookMs: time.Since(began).Milliseconds(),
	}), nil
}

func (s *service) ListSnapshots(ctx context.Context, _ *request[pb.ListSnapshotsRequest]) (*response[pb.ListSnapshotsResponse], error) {
	own, all := project(ctx)
	owners := []string{own}
	if all {
		projects, err := s.keys.Projects()
		if err != nil {
			return nil, err
		}
		for _, p := range projects {
			owners = append(owners, p.Name)
		}
	}
	resp := &pb.ListSnapshotsResponse{}
	for _, owner := range owners {
		snapshots, err := s.manager.Snapshots(owner)
		if err != nil {
			return nil, err
		}
		for _, snapshot := range snapshots {
			info := snapshotInfo(snapshot)
			if all {
				info.Project = owner
			}
			resp.Snapshots = append(resp.Snapshots, info)
		}
	}
	return connect.NewResponse(resp), nil
}

func (s *service) DeleteSnapshot(
	ctx context.Context, req *request[pb.DeleteSnapshotRequest],
) (*response[pb.DeleteSnapshotResponse], error) {
	owner, all := project(ctx)
	if other := req.Msg.Project; other != "" && other != owner {
		if !all {
			return nil, errdefs.NotFound.Errorf("snapshot %.70q does not exist", req.Msg.Name)
		}
		owner = other
	}
	return connect.NewResponse(&pb.DeleteSnapshotResponse{}), s.manager.DeleteSnapshot(ctx, owner, req.Msg.Name)
}

func snapshotInfo(s sandbox.Snapshot) *pb.Snapshot {
	return &pb.Snapshot{
		Name: s.Name, SandboxId: string(s.Source), Template: s.Template,
		Vcpus: int32(s.VCPUs), MemoryMb: int32(s.MemMiB), CreatedAtUnix: s.CreatedAt.Unix(), SizeBytes: s.Bytes,
		TemplateId: s.TemplateID, Build: s.Build,
	}
}

func (s *service) Exec(ctx context.Context, req *request[pb.ExecRequest]) (*response[pb.ExecResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	cmd, err := command(req.Msg)
	if err != nil {
		return nil, err
	}
	result, err := s.manager.Exec(ctx, id, cmd)
	if err != nil {
		return nil, withOutput(err, result, req.Peer().Protocol)
	}
	return connect.NewResponse(&pb.ExecResponse{
		Stdout: result.Stdout, Stderr: result.Stderr, ExitCode: int32(result.ExitCode),
		Signal: int32(result.Signal), OutOfMemory: result.OutOfMemory,
		MemoryLimitMb: int32(result.MemoryLimit),
	}), nil
}

// withOutput adds to the error of a command what it had written, if anything.
func withOutput(err error, result sandbox.Result, protocol string) error {
	if len(result.Stdout)+len(result.Stderr) == 0 {
		return err
	}
	limit := maxErrorOutput
	if protocol != connect.ProtocolConnect {
		limit = maxHeaderOutput
	}
	return &detailed{err, &pb.ExecOutput{
		Stdout: beginning(result.Stdout, "stdout", limit), Stderr: beginning(result.Stderr, "stderr", limit),
	}}
}

// beginning is what an error has of an output.
func beginning(output []byte, name string, limit int) []byte {
	missing := len(output) - limit
	if missing <= 0 {
		return output
	}
	return fmt.Appendf(nil, "%s\n[wrenn: %d bytes of %s are missing]\n", output[:limit], missing, name)
}

// command returns the command that a request says, if it is one.
func command(req *pb.ExecRequest) (sandbox.Command, error) {
	timeout := time.Duration(req.TimeoutSec) * time.Second
	if timeout == 0 {
		timeout = execTimeout
	}
	err := checkArgs(req)
	switch {
	case err != nil:
	case timeout < 0 || timeout > maxExecTimeout:
		err = fmt.Errorf("timeout_sec is %d, must be 0 (the default, %d) to %d",
			req.TimeoutSec, execTimeout/time.Second, maxExecTimeout/time.Second)
	case len(req.Cwd) > maxPathBytes || strings.ContainsRune(req.Cwd, 0):
		err = errors.New("cwd is no path")
	default:
		err = cmp.Or(sandbox.CheckUser(req.User), sandbox.CheckEnv(req.Envs))
	}
	if err != nil {
		return sandbox.Command{}, errdefs.InvalidArgument.Errorf("%w", err)
	}
	return sandbox.Command{
		Cmd: req.Cmd, Args: req.Args, User: req.User, Env: req.Envs, Cwd: req.Cwd,
		Timeout: timeout, MaxOutput: maxOutputBytes,
	}, nil
}

// checkArgs returns what no program can be started with; argument 0 is cmd.
func checkArgs(req *pb.ExecRequest) error {
	switch {
	case req.Cmd == "":
		return errors.New("cmd is empty")
	case len(req.Args) > maxArgs:
		return fmt.Errorf("%d arguments, at most %d are possible", len(req.Args), maxArgs)
	}
	size := 0
	for i, arg := range append([]string{req.Cmd}, req.Args...) {
		size += len(arg)
		switch {
		case strings.ContainsRune(arg, 0):
			return fmt.Errorf("argument %d has a NUL byte", i)
		case len(arg) > maxArgBytes:
			return fmt.Errorf("argument %d is %d bytes long, at most %d are possible", i, len(arg), maxArgBytes)
		}
	}
	if size > maxArgsBytes {
		return fmt.Errorf("the arguments are %d bytes long, at most %d are possible", size, maxArgsBytes)
	}
	return nil
}

func (s *service) UpdateNetwork(ctx context.Context, req *request[pb.UpdateNetworkRequest]) (*response[pb.UpdateNetworkResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	policy := policyOf(req.Msg.Network)
	return connect.NewResponse(&pb.UpdateNetworkResponse{}), s.manager.UpdateNetwork(ctx, id, policy.Egress, &policy.Limits)
}

func policyOf(p *pb.NetworkPolicy) sandbox.Policy {
	if p == nil {
		return sandbox.Policy{}
	}
	var dns []string
	if p.NameServers != nil {
		dns = append([]string{}, p.NameServers.Addresses...)
	}
	return sandbox.Policy{
		// An empty list is not told from an absent one.
		Egress: sandbox.Egress{
			AllowInternet: p.AllowInternet, Allow: append([]string(nil), p.AllowOut...), Deny: append([]string(nil), p.DenyOut...), DNS: dns,
		},
		Limits: sandbox.NetworkLimits{
			InBytes: p.InBytesPerSec, OutBytes: p.OutBytesPerSec,
			InPackets: p.InPacketsPerSec, OutPackets: p.OutPacketsPerSec,
			Connections: int(p.MaxConnections),
		},
	}
}

func (s *service) ListDenials(ctx context.Context, req *request[pb.ListDenialsRequest]) (*response[pb.ListDenialsResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	denied, err := s.manager.Denied(ctx, id)
	if err != nil {
		return nil, err
	}
	resp := &pb.ListDenialsResponse{}
	for _, d := range denied {
		resp.Denials = append(resp.Denials, &pb.Denial{
			TimeUnixMs: d.Time.UnixMilli(), Kind: d.Kind, Name: d.Name, Address: addrText(d.Addr.Addr()), Port: int32(d.Addr.Port()),
			Rule: d.Rule, Count: d.Count,
		})
	}
	return connect.NewResponse(resp), nil
}

func networkPolicy(p sandbox.Policy) *pb.NetworkPolicy {
	if p.IsZero() {
		return nil
	}
	var dns *pb.NameServers
	if p.DNS != nil {
		dns = &pb.NameServers{Addresses: p.DNS}
	}
	return &pb.NetworkPolicy{
		AllowInternet: p.AllowInternet, AllowOut: p.Allow, DenyOut: p.Deny, NameServers: dns,
		InBytesPerSec: p.Limits.InBytes, OutBytesPerSec: p.Limits.OutBytes,
		InPacketsPerSec: p.Limits.InPackets, OutPacketsPerSec: p.Limits.OutPackets,
		MaxConnections: int32(p.Limits.Connections),
	}
}

// addTraffic fills in the counters. Without them the answer is still of use.
func (s *service) addTraffic(ctx context.Context, infos ...*pb.SandboxInfo) {
	traffic, err := s.manager.Traffic(ctx)
	if err != nil {
		s.log.Warn("traffic not counted", "err", err)
		return
	}
	for _, info := range infos {
		if c, ok := traffic[sandbox.ID(info.SandboxId)]; ok {
			info.Traffic = &pb.NetworkTraffic{InBytes: c.InBytes, InPackets: c.InPackets, OutBytes: c.OutBytes, OutPackets: c.OutPackets}
		}
	}
}

func (s *service) ListSandboxes(ctx context.Context, req *request[pb.ListSandboxesRequest]) (*response[pb.ListSandboxesResponse], error) {
	resp := &pb.ListSandboxesResponse{}
	filter := sandbox.Filter{Stopped: req.Msg.All, Metadata: req.Msg.Metadata}
	if own, all := project(ctx); !all {
		filter.Project = &own
	}
	for _, info := range s.manager.Select(filter) {
		resp.Sandboxes = append(resp.Sandboxes, sandboxInfo(info))
	}
	s.addTraffic(ctx, resp.Sandboxes...)
	return connect.NewResponse(resp), nil
}

// validText makes UTF-8 of a text that may quote a VMM, whose log may have any
// bytes. A single field that is not UTF-8 makes the whole answer an error.
func validText(text string) string { return strings.ToValidUTF8(text, "\ufffd") }

// addrText is empty for no address.
func addrText(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	return addr.String()
}

func sandboxInfo(info sandbox.Info) *pb.SandboxInfo {
	out := &pb.SandboxInfo{
		SandboxId: string(info.ID), Status: string(info.State), Template: info.Template, Snapshot: info.Snapshot,
		Vcpus: int32(info.VCPUs), MemoryMb: int32(info.MemMiB), Cpu: info.CPU, OnTimeout: string(info.OnTimeout),
		CreatedAtUnix: info.CreatedAt.Unix(), LastActiveAtUnix: info.LastActiveAt.Unix(),
		TimeoutSec: int32(info.Timeout / time.Second),
		Reason:     string(info.Reason), Detail: validText(info.Detail), Network: networkPolicy(info.Network),
		User: info.User, Metadata: info.Labels.Metadata, OnDeadline: string(info.OnEnd),
		Name: info.Labels.Name, Workdir: info.Workdir, Publish: publishedPorts(info.Publish), Busy: string(info.Busy),
		DiskMb:   int32(info.DiskMiB),
		OwnerKey: info.Labels.OwnerKey, AutoResume: info.AutoResume, HostIp: addrText(info.HostIP),
		FilesOnly: info.FilesOnly, EnvdVersion: info.EnvdVersion, TemplateId: info.TemplateID, Build: info.Build,
		Vmm: info.VMM, Isolation: string(info.Isolation),
	}
	if !info.StartedAt.IsZero() {
		out.StartedAt = timestamppb.New(info.StartedAt)
	}
	if !info.PausedAt.IsZero() {
		out.PausedAt = timestamppb.New(info.PausedAt)
	}
	if !info.EndAt.IsZero() {
		out.Deadline = timestamppb.New(info.EndAt)
	}
	if !info.ExpiresAt.IsZero() {
		out.ExpiresAtUnix = info.ExpiresAt.Unix()
	}
	return out
}

// tokens returns the secrets of a sandbox; one that has ended has none.
func (s *service) tokens(id sandbox.ID) (sandbox.Tokens, error) {
	tokens, err := s.manager.Tokens(id)
	if errdefs.ClassOf(err) == errdefs.NotFound {
		err = nil
	}
	return tokens, err
}

func (s *service) GetSandbox(ctx context.Context, req *request[pb.GetSandboxRequest]) (*response[pb.GetSandboxResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	info, err := s.manager.Get(id)
	if err != nil {
		return nil, err
	}
	tokens, err := s.tokens(id)
	if err != nil {
		return nil, err
	}
	found := sandboxInfo(info)
	s.addTraffic(ctx, found)
	return connect.NewResponse(&pb.GetSandboxResponse{
		Sandbox: found, AccessToken: tokens.Envd, TrafficToken: tokens.Traffic,
	}), nil
}

func (s *service) SetTimeout(ctx context.Context, req *request[pb.SetTimeoutRequest]) (*response[pb.SetTimeoutResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	info, err := s.manager.SetTimeout(ctx, id, time.Duration(req.Msg.TimeoutSec)*time.Second)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.SetTimeoutResponse{ExpiresAtUnix: sandboxInfo(info).ExpiresAtUnix}), nil
}

func (s *service) SetDeadline(ctx context.Context, req *request[pb.SetDeadlineRequest]) (*response[pb.SetDeadlineResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	end, err := deadline(req.Msg.Deadline)
	if err != nil {
		return nil, err
	}
	info, err := s.manager.SetDeadline(ctx, id, end, sandbox.OnTimeout(req.Msg.OnDeadline))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.SetDeadlineResponse{Sandbox: sandboxInfo(info)}), nil
}

// deadline is the time that a request names; zero if it names none.
func deadline(t *timestamppb.Timestamp) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, errdefs.InvalidArgument.Errorf("deadline: %w", err)
	}
	if t.Seconds < 0 { // one of these is Go's zero time
		return time.Time{}, errdefs.InvalidArgument.Errorf("deadline is before 1970")
	}
	return t.AsTime(), nil
}

func (s *service) WatchEvents(
	ctx context.Context, req *request[pb.WatchEventsRequest], stream *connect.ServerStream[pb.WatchEventsResponse],
) error {
	var only sandbox.ID
	if req.Msg.SandboxId != "" {
		if err := (projects{s.manager}).resolve(ctx, req.Msg); err != nil {
			return err
		}
		id, err := sandbox.ParseID(req.Msg.SandboxId)
		if err != nil {
			return err
		}
		only = id
	}
	// The headers go out at once, so that the caller knows that it watches.
	if err := stream.Send(&pb.WatchEventsResponse{}); err != nil {
		return err
	}
	own, all := project(ctx)
	return s.manager.Events(ctx, req.Msg.After, !req.Msg.NoFollow, func(e sandbox.Event) error {
		if !all && e.Labels.Project != own {
			return nil
		}
		if only != "" && e.ID != only {
			return nil
		}
		return stream.Send(&pb.WatchEventsResponse{Event: &pb.Event{
			Cursor: e.Cursor, TimeUnixMs: e.Time.UnixMilli(), SandboxId: string(e.ID),
			From: string(e.From), To: string(e.To), Reason: string(e.Reason),
			Metadata: e.Metadata, OwnerKey: e.OwnerKey, Actor: actor(e.Actor), Kind: string(e.Kind), Project: e.Project,
			Detail: e.Detail,
		}})
	})
}

func (s *service) GetConsole(_ context.Context, req *request[pb.GetConsoleRequest]) (*response[pb.GetConsoleResponse], error) {
	id, err := sandbox.ParseID(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	n := int64(req.Msg.TailBytes)
	switch {
	case n == 0:
		n = consoleBytes
	case n < 0 || n > maxConsoleBytes:
		return nil, errdefs.InvalidArgument.Errorf("tail_bytes is %d, must be 0 (the default, %d) to %d",
			n, consoleBytes, maxConsoleBytes)
	}
	if req.Msg.Timestamps {
		logs, err := s.manager.Logs(id)
		return connect.NewResponse(&pb.GetConsoleResponse{Console: lastLines(logs, int(n))}), err
	}
	console, err := s.manager.Console(id, n)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.GetConsoleResponse{Console: console}), nil
}

// lastLines is as many of the last lines as n bytes hold, each with its time.
func lastLines(logs []sandbox.LogLine, n int) (text []byte) {
	first := len(logs)
	for ; first > 0; first-- {
		if n -= len(lineTime) + len(" \n") + len(logs[first-1].Message); n < 0 {
			break
		}
	}
	for _, l := range logs[first:] {
		text = fmt.Appendf(text, "%s %s\n", l.At.UTC().Format(lineTime), l.Message)
	}
	return text
}

// lineTime is the layout of a line's time.
const lineTime = "2006-01-02T15:04:05.000Z"

func (s *service) Verify(ctx context.Context, req *request[pb.VerifyRequest], stream *connect.ServerStream[pb.VerifyResponse]) error {
	return s.manager.Verify(ctx, req.Msg.Names, func(v sandbox.Verified) error {
		resp := &pb.VerifyResponse{Kind: string(v.Kind), Name: v.Name, Bytes: v.Bytes}
		switch {
		case v.Err != nil && errdefs.ClassOf(v.Err) == nil:
			s.log.Error("not verified", "kind", v.Kind, "name", v.Name, "err", v.Err)
			resp.Problem = "it could not be read now; the agent's log says why"
		case v.Err != nil:
			resp.Problem = v.Err.Error()
		}
		return stream.Send(resp)
	})
}

func (s *service) GetVersion(context.Context, *request[pb.GetVersionRequest]) (*response[pb.GetVersionResponse], error) {
	resp := &pb.GetVersionResponse{
		Version: s.version.Version, Url: s.version.URL, Domain: s.version.Domain, CaFile: s.version.CAFile,
	}
	if len(s.version.VMMs) > 0 {
		v := s.version.VMMs[0]
		resp.Vmm, resp.VmmVersion, resp.Isolation, resp.Speed, resp.Why = v.Name, v.version(), v.Isolation, v.Speed, v.Why
	}
	return connect.NewResponse(resp), nil
}
