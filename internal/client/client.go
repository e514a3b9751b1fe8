// Package client is the client of a host agent: its own calls, and through it
// the commands, files and ports of its sandboxes.
//
// A Host is an agent, a Sandbox is one of its sandboxes. Errors of the agent's
// calls are *connect.Error, with the code of their class.
//
// An answer may be the word of a guest, which is not trusted: every request goes
// to the agent and nowhere else (no redirect, no proxy), what is kept of an
// answer is bounded, and the text of an error is escaped and cut. What a caller
// asks for byte by byte, the output of a command or a file, is passed on as it is.
package client

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Host is a host agent. It is safe for concurrent use.
type Host struct {
	base      *url.URL
	path      string // of the agent's Unix socket; empty for TCP
	rpc       hostagentv1connect.HostAgentServiceClient
	templates Templates
	guest     http.RoundTripper // for what the agent passes on to guests
	grace     time.Duration     // termGrace, except in tests

	mu   sync.Mutex        // guards kept
	kept map[string]tokens // by sandbox; those that were asked for
}

// New returns the host agent at a URL, such as http://127.0.0.1:50051, or
// unix:///run/wrenn/agent.sock for its Unix socket. key is the API key that the agent's
// own calls show, unless it is empty; guests do not see it. New does not connect: an
// agent that is not there is an error of the first call.
func New(addr, key string) (*Host, error) {
	base, err := url.Parse(strings.TrimRight(addr, "/"))
	if err != nil {
		return nil, err
	}
	h := &Host{base: base, grace: termGrace, kept: make(map[string]tokens)}
	switch {
	case base.Scheme == "unix" && base.Host == "" && base.Path != "":
		h.path, h.base = base.Path, &url.URL{Scheme: "http", Host: "localhost"}
	case base.Scheme != "http" && base.Scheme != "https" || base.Hostname() == "":
		return nil, fmt.Errorf("%q is not a URL such as http://127.0.0.1:50051 or unix:///run/wrenn/agent.sock", addr)
	}
	h.guest = h.transport(guestPatience)
	own := onlyTo(withKey{key, h.transport(0)})
	h.rpc = hostagentv1connect.NewHostAgentServiceClient(own, h.base.String(), agentOptions())
	h.templates.rpc = hostagentv1connect.NewTemplateServiceClient(own, h.base.String(), agentOptions())
	return h, nil
}

// Address is where clients reach the agent over TCP.
type Address struct {
	// URL has no slash at its end.
	URL string
	// Domain is what the names of ports end with, with a port if the URL has one.
	Domain string
	// CAFile is the file of the agent's own authority, on its host; empty without one.
	CAFile string
}

// Address asks the agent where it is.
func (h *Host) Address(ctx context.Context) (Address, error) {
	v, err := h.Version(ctx)
	if err != nil {
		return Address{}, err
	}
	if v.Url != "" {
		return Address{v.Url, v.Domain, v.CaFile}, nil
	}
	// An agent of an earlier version is where it was asked, and has no domain.
	domain := "localhost"
	if p := h.base.Port(); p != "" {
		domain += ":" + p
	}
	return Address{URL: h.base.String(), Domain: domain}, nil
}

// call makes a call that has one answer.
func call[Req, Resp any](
	ctx context.Context, method func(context.Context, *connect.Request[Req]) (*connect.Response[Resp], error), req *Req,
) (*Resp, error) {
	resp, err := method(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// messages are the answers of a stream. The stream is closed when the loop
// over them ends.
func messages[Resp any](stream *connect.ServerStreamForClient[Resp], err error) iter.Seq2[*Resp, error] {
	return func(yield func(*Resp, error) bool) {
		if err != nil {
			yield(nil, err)
			return
		}
		defer stream.Close()
		for stream.Receive() {
			if !yield(stream.Msg(), nil) {
				return
			}
		}
		if err := stream.Err(); err != nil {
			yield(nil, err)
		}
	}
}

// About returns what the host may give to sandboxes, and what is in use.
func (h *Host) About(ctx context.Context) (*hostagentv1.GetHostResponse, error) {
	return call(ctx, h.rpc.GetHost, &hostagentv1.GetHostRequest{})
}

// Drain lets the agent take no more sandboxes, hibernates those that are there or waits for
// their end, and ends the agent, after timeout in any case. It returns how many still have
// a VM.
func (h *Host) Drain(ctx context.Context, hibernate bool, timeout time.Duration) (left int, err error) {
	resp, err := call(ctx, h.rpc.DrainHost, &hostagentv1.DrainHostRequest{Hibernate: hibernate, TimeoutSec: int64(timeout / time.Second)})
	return int(resp.GetLeft()), err
}

// Version returns the agent's version and its VMM's.
func (h *Host) Version(ctx context.Context) (*hostagentv1.GetVersionResponse, error) {
	return call(ctx, h.rpc.GetVersion, &hostagentv1.GetVersionRequest{})
}

// Create makes a sandbox and returns when commands can run in it.
func (h *Host) Create(ctx context.Context, req *hostagentv1.CreateSandboxRequest) (*hostagentv1.CreateSandboxResponse, error) {
	resp, err := call(ctx, h.rpc.CreateSandbox, req)
	if err == nil {
		// A sandbox of this call has public ports.
		h.keepTokens(resp.SandboxId, tokens{access: resp.AccessToken})
	}
	return resp, err
}

// List returns the sandboxes of the host; with ended, also those that ended by
// themselves and are still remembered; only those whose metadata has these pairs.
func (h *Host) List(ctx context.Context, ended bool, metadata map[string]string) ([]*hostagentv1.SandboxInfo, error) {
	resp, err := call(ctx, h.rpc.ListSandboxes, &hostagentv1.ListSandboxesRequest{All: ended, Metadata: metadata})
	return resp.GetSandboxes(), err
}

// fullID is the length of a sandbox's ID as this version makes them.
const fullID = len("sb-0123456789abcdef")

// Find returns the sandbox that ref names: its name, an ID or the unambiguous beginning
// of one, with or without "sb-". A name goes before the beginning of an ID, and a sandbox
// that has not ended before one that has. That there is none is errdefs.NotFound. A whole
// ID is not looked up: the calls of the Sandbox say whether it exists.
func (h *Host) Find(ctx context.Context, ref string) (*Sandbox, error) {
	if strings.HasPrefix(ref, "sb-") && len(ref) >= fullID || ref == "" {
		return h.Sandbox(ref), nil
	}
	sandboxes, err := h.List(ctx, true, nil)
	if err != nil {
		return nil, err
	}
	named := called(sandboxes, ref)
	if len(named) == 1 {
		return h.Sandbox(named[0]), nil
	}
	if len(named) > 1 {
		return nil, errdefs.InvalidArgument.Errorf("%q is the name of %d sandboxes: %s", ref, len(named), strings.Join(named, " "))
	}
	var ids []string
	for _, s := range sandboxes {
		if strings.HasPrefix(s.SandboxId, ref) || strings.HasPrefix(s.SandboxId, "sb-"+ref) {
			ids = append(ids, s.SandboxId)
		}
	}
	switch len(ids) {
	case 0:
		return nil, errdefs.NotFound.Errorf("no sandbox has the name %q or an id that begins so", ref)
	case 1:
		return h.Sandbox(ids[0]), nil
	default:
		return nil, errdefs.InvalidArgument.Errorf("%q is the beginning of %d ids: %s", ref, len(ids), strings.Join(ids, " "))
	}
}

// called are the IDs of the sandboxes with a name, which have not ended; if all have, of the
// last one of them.
func called(sandboxes []*hostagentv1.SandboxInfo, name string) (ids []string) {
	last := ""
	for _, s := range sandboxes { // oldest first
		switch {
		case s.Name != name:
		case s.Status == "stopped" || s.Status == "stopping":
			last = s.SandboxId
		default:
			ids = append(ids, s.SandboxId)
		}
	}
	if len(ids) == 0 && last != "" {
		ids = []string{last}
	}
	return ids
}

// Sandbox returns the sandbox with an ID, which is not looked up.
func (h *Host) Sandbox(id string) *Sandbox { return &Sandbox{host: h, ID: id} }

// Snapshots returns the named snapshots of the host.
func (h *Host) Snapshots(ctx context.Context) (*hostagentv1.ListSnapshotsResponse, error) {
	return call(ctx, h.rpc.ListSnapshots, &hostagentv1.ListSnapshotsRequest{})
}

// DeleteSnapshot deletes a named snapshot of a project; of the caller's own if that is
// empty. Sandboxes that were made from it
// go on.
func (h *Host) DeleteSnapshot(ctx context.Context, project, name string) error {
	_, err := call(ctx, h.rpc.DeleteSnapshot, &hostagentv1.DeleteSnapshotRequest{Project: project, Name: name})
	return err
}

// Events returns changes of state as they happen, until ctx ends.
func (h *Host) Events(ctx context.Context, req *hostagentv1.WatchEventsRequest) iter.Seq2[*hostagentv1.WatchEventsResponse, error] {
	return messages(h.rpc.WatchEvents(ctx, connect.NewRequest(req)))
}

// Verify compares what sandboxes start from with its digests; without names,
// all of it.
func (h *Host) Verify(ctx context.Context, names ...string) iter.Seq2[*hostagentv1.VerifyResponse, error] {
	return messages(h.rpc.Verify(ctx, connect.NewRequest(&hostagentv1.VerifyRequest{Names: names})))
}
