package client

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// Sandbox is one sandbox of a host. Its calls say whether it exists.
type Sandbox struct {
	ID   string
	host *Host
}

// Info returns what the agent knows of the sandbox.
func (s *Sandbox) Info(ctx context.Context) (*hostagentv1.SandboxInfo, error) {
	resp, err := s.get(ctx)
	return resp.GetSandbox(), err
}

func (s *Sandbox) get(ctx context.Context) (*hostagentv1.GetSandboxResponse, error) {
	resp, err := call(ctx, s.host.rpc.GetSandbox, &hostagentv1.GetSandboxRequest{SandboxId: s.ID})
	if err == nil {
		s.host.keepTokens(s.ID, tokens{resp.AccessToken, resp.TrafficToken})
	}
	return resp, err
}

// tokens are the secrets of a sandbox: what its daemon demands of its callers, and what
// its other ports do; empty if the sandbox has ended, or the ports are public.
type tokens struct{ access, traffic string }

// Token returns the access token that the sandbox's daemon demands of its
// callers; empty if the sandbox has ended. The agent is asked for it once.
func (s *Sandbox) Token(ctx context.Context) (string, error) {
	t, err := s.tokens(ctx)
	return t.access, err
}

func (s *Sandbox) tokens(ctx context.Context) (tokens, error) {
	s.host.mu.Lock()
	kept := s.host.kept[s.ID]
	s.host.mu.Unlock()
	if kept.access != "" {
		return kept, nil
	}
	resp, err := s.get(ctx)
	return tokens{resp.GetAccessToken(), resp.GetTrafficToken()}, err
}

func (h *Host) keepTokens(id string, t tokens) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kept[id] = t
}

// Pause stops the vCPUs. The detail says what the agent noticed, if anything.
func (s *Sandbox) Pause(ctx context.Context) (detail string, err error) {
	return s.pause(ctx, &hostagentv1.PauseSandboxRequest{SandboxId: s.ID})
}

// Hibernate ends the VM and keeps memory and files on the host's disk, or with filesOnly
// the files alone. The detail says what the agent noticed, if anything.
func (s *Sandbox) Hibernate(ctx context.Context, filesOnly bool) (detail string, err error) {
	return s.pause(ctx, &hostagentv1.PauseSandboxRequest{SandboxId: s.ID, ToDisk: true, FilesOnly: filesOnly})
}

func (s *Sandbox) pause(ctx context.Context, req *hostagentv1.PauseSandboxRequest) (detail string, err error) {
	resp, err := call(ctx, s.host.rpc.PauseSandbox, req)
	return resp.GetDetail(), err
}

// Resume lets a paused or hibernated sandbox go on. One that was hibernated without memory
// boots, and so does any hibernated one with filesOnly.
func (s *Sandbox) Resume(ctx context.Context, filesOnly bool) error {
	_, err := call(ctx, s.host.rpc.ResumeSandbox, &hostagentv1.ResumeSandboxRequest{SandboxId: s.ID, FilesOnly: filesOnly})
	return err
}

// Recover has the agent look again at a sandbox that is unknown or unreachable.
func (s *Sandbox) Recover(ctx context.Context) error {
	_, err := call(ctx, s.host.rpc.RecoverSandbox, &hostagentv1.RecoverSandboxRequest{SandboxId: s.ID})
	return err
}

// Destroy ends the sandbox with all that it has.
func (s *Sandbox) Destroy(ctx context.Context) error {
	_, err := call(ctx, s.host.rpc.DestroySandbox, &hostagentv1.DestroySandboxRequest{SandboxId: s.ID})
	return err
}

// Fork makes count new sandboxes from the present state of this one.
func (s *Sandbox) Fork(ctx context.Context, count int32) (*hostagentv1.ForkSandboxResponse, error) {
	return call(ctx, s.host.rpc.ForkSandbox, &hostagentv1.ForkSandboxRequest{SandboxId: s.ID, Count: count})
}

// Snapshot keeps the present state under a name, or with filesOnly the disk alone; the
// agent makes a name up where it is empty.
func (s *Sandbox) Snapshot(ctx context.Context, name string, filesOnly bool) (*hostagentv1.SnapshotSandboxResponse, error) {
	req := &hostagentv1.SnapshotSandboxRequest{SandboxId: s.ID, Name: name, FilesOnly: filesOnly}
	return call(ctx, s.host.rpc.SnapshotSandbox, req)
}

// SetTimeout sets the idle timeout in seconds; 0 is never.
func (s *Sandbox) SetTimeout(ctx context.Context, seconds int32) (*hostagentv1.SetTimeoutResponse, error) {
	return call(ctx, s.host.rpc.SetTimeout, &hostagentv1.SetTimeoutRequest{SandboxId: s.ID, TimeoutSec: seconds})
}

// SetDeadline sets when the sandbox ends, whatever happens in it; the zero time is
// never. What happens then is destroy or hibernate, as before when empty.
func (s *Sandbox) SetDeadline(ctx context.Context, at time.Time, then string) error {
	req := &hostagentv1.SetDeadlineRequest{SandboxId: s.ID, OnDeadline: then}
	if !at.IsZero() {
		req.Deadline = timestamppb.New(at)
	}
	_, err := call(ctx, s.host.rpc.SetDeadline, req)
	return err
}

// SetNetwork replaces the policy; nil is the host's settings.
func (s *Sandbox) SetNetwork(ctx context.Context, policy *hostagentv1.NetworkPolicy) error {
	_, err := call(ctx, s.host.rpc.UpdateNetwork, &hostagentv1.UpdateNetworkRequest{SandboxId: s.ID, Network: policy})
	return err
}

// Denials returns what the network policy refused of late, the newest first.
func (s *Sandbox) Denials(ctx context.Context) ([]*hostagentv1.Denial, error) {
	resp, err := call(ctx, s.host.rpc.ListDenials, &hostagentv1.ListDenialsRequest{SandboxId: s.ID})
	return resp.GetDenials(), err
}

// Console returns the end of the guest's console, at most tail bytes; 0 is the
// agent's default. It is what the guest wrote, byte by byte, or with timestamps line by
// line behind the time at which the host read it.
func (s *Sandbox) Console(ctx context.Context, tail int32, timestamps bool) ([]byte, error) {
	req := &hostagentv1.GetConsoleRequest{SandboxId: s.ID, TailBytes: tail, Timestamps: timestamps}
	resp, err := call(ctx, s.host.rpc.GetConsole, req)
	return resp.GetConsole(), err
}

// StatusText is the state of a sandbox, with the reason if it has one, or with what was
// kept of it if that is not all.
func StatusText(s *hostagentv1.SandboxInfo) string {
	switch {
	case s.GetReason() != "":
		return s.GetStatus() + " (" + s.GetReason() + ")"
	case s.GetFilesOnly():
		return s.GetStatus() + " (files only)"
	}
	return s.GetStatus()
}
