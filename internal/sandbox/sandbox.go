// Package sandbox is the domain of the host agent: the sandboxes of one
// machine, their records, states and lives.
//
// A sandbox is a record: everything that the host does for it can be derived
// from, and freed by, one small file. Manager is the only writer.
package sandbox

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// ID names a sandbox for ever: "sb-" and 16 lower-case hexadecimal digits.
type ID string

var idPattern = regexp.MustCompile(`^sb-[0-9a-f]{16,32}$`)

// ParseID checks an ID that came from outside.
func ParseID(s string) (ID, error) {
	switch {
	case s == "":
		return "", errdefs.InvalidArgument.Errorf("sandbox_id is empty")
	case !idPattern.MatchString(s):
		return "", errdefs.InvalidArgument.Errorf("sandbox_id %.40q is not of the form sb-0123456789abcdef", s)
	}
	return ID(s), nil
}

var loosePattern = regexp.MustCompile(`^sb-?([0-9a-f]{16,32})(-[A-Za-z0-9_-]*)?$`)

// ParseLooseID reads an ID as E2B's clients write it: with or without the dash
// after sb, and with what older clients append after another dash. ok is false for a
// text that is no sandbox's ID.
func ParseLooseID(text string) (id ID, ok bool) {
	m := loosePattern.FindStringSubmatch(text)
	if m == nil {
		return "", false
	}
	return ID("sb-" + m[1]), true
}

// Short is the ID without its dash, at which E2B's clients would cut it.
func (id ID) Short() string { return strings.Replace(string(id), "-", "", 1) }

// State of a sandbox. An operation in progress is not a state.
type State string

const (
	Creating   State = "creating"
	Running    State = "running"
	Paused     State = "paused"
	Hibernated State = "hibernated"
	Stopping   State = "stopping"
	Stopped    State = "stopped"

	// Waiting is the state of a guest that is restored ahead of use and has no identity
	// yet, or is about to be. No list shows it, no call reaches it, and a restart frees
	// it.
	Waiting State = "waiting"

	// Building is the state of a build sandbox, which is made for the steps of a template's
	// build. No list and no event shows it, no call reaches it, and a restart frees it.
	Building State = "building"

	// Unknown is the state of a sandbox whose record cannot be used. All that it
	// has is left alone until the record can be used, or until it is destroyed.
	// No record says so.
	Unknown State = "unknown"
)

// States returns all states, in the order of a sandbox's life.
func States() []State {
	return []State{Waiting, Building, Creating, Running, Paused, Hibernated, Stopping, Stopped, Unknown}
}

// hidden says whether the state is of what is no sandbox to callers.
func (s State) hidden() bool { return s == Waiting || s == Building }

// moves says which state may follow which. A sandbox that is unknown no more is
// what its record says; see install.
var moves = map[State][]State{
	Waiting:    {Running},
	Building:   {},
	Creating:   {Running, Stopping},
	Running:    {Paused, Hibernated, Stopping},
	Paused:     {Running, Hibernated, Stopping},
	Hibernated: {Running, Stopping},
	Stopping:   {Stopped},
	Stopped:    {},
	Unknown:    {Stopping},
}

// Operation is something a caller asks of a sandbox.
type Operation string

const (
	OpPause Operation = "pause"
	// OpHibernate is a pause to disk.
	OpHibernate Operation = "hibernate"
	OpFork      Operation = "fork"
	OpSnapshot  Operation = "snapshot"
	OpResume    Operation = "resume"
	OpCall      Operation = "exec"
	OpTimeout   Operation = "a timeout"
	OpDeadline  Operation = "a deadline"
	OpEnd       Operation = "another end"
	OpConnect   Operation = "connect"
	OpNetwork   Operation = "a network policy"
	OpRecover   Operation = "recover"
	OpDestroy   Operation = "destroy"
)

// allowed says in which states an operation may begin.
var allowed = map[Operation][]State{
	OpPause:     {Running},
	OpHibernate: {Running, Paused},
	OpFork:      {Running, Paused},
	OpSnapshot:  {Running, Paused},
	OpResume:    {Paused, Hibernated},
	OpCall:      {Running},
	OpTimeout:   {Running, Paused, Hibernated},
	OpDeadline:  {Running, Paused, Hibernated},
	OpEnd:       {Running},
	OpConnect:   {Running, Paused, Hibernated},
	OpNetwork:   {Running, Paused, Hibernated},
	OpRecover:   {Running, Paused, Hibernated, Unknown},
	OpDestroy:   {Creating, Running, Paused, Hibernated, Stopping, Stopped, Unknown},
}

// check says whether op may begin in state, naming the state if not.
func check(id ID, op Operation, state State) error {
	if slices.Contains(allowed[op], state) {
		return nil
	}
	var names []string
	for _, s := range allowed[op] {
		names = append(names, string(s))
	}
	return errdefs.WrongState.Errorf("sandbox %s is %s; %s needs it %s", id, state, op, strings.Join(names, " or "))
}

// Reason says why a sandbox is stopping, stopped or unknown, or why one that runs
// or is paused does not work as it should. The set is closed.
type Reason string

const (
	Destroyed    Reason = "destroyed"
	Expired      Reason = "expired"
	CreateFailed Reason = "create_failed"
	VMExited     Reason = "vm_exited"
	// OutOfMemory: the VMM needed more memory than its cgroup has.
	OutOfMemory Reason = "out_of_memory"
	// Lost: its VM was gone when the agent started.
	Lost Reason = "lost"
)

// The reasons that pass: the sandbox goes on when what they name is over.
const (
	// DiskFull: the guest wrote what the host's disk has no room for. Its VM
	// stands still until there is room.
	DiskFull Reason = "disk_full"
	// Unreachable: the VM is there, but it or its guest does not answer, or what
	// leads to it is broken. It is tried again and again.
	Unreachable Reason = "unreachable"
)

// The reasons of a sandbox that is unknown.
const (
	// Unreadable: its record cannot be read at this moment. That is tried again.
	Unreadable Reason = "unreadable"
	// NotUnderstood: its record is damaged, or a newer agent wrote it. A person
	// decides.
	NotUnderstood Reason = "not_understood"
)

// passes says whether a sandbox with this reason still has its VM.
func (r Reason) passes() bool { return slices.Contains(Marks(), r) }

// Marks returns the reasons that pass.
func Marks() []Reason { return []Reason{DiskFull, Unreachable} }

// Reasons returns all reasons that a sandbox can have ended for.
func Reasons() []Reason {
	return []Reason{Destroyed, Expired, CreateFailed, VMExited, OutOfMemory, Lost}
}

// Record is all that is known of a sandbox, as it is kept on disk.
type Record struct {
	Version int    `json:"version"`
	ID      ID     `json:"id"`
	State   State  `json:"state"`
	Reason  Reason `json:"reason,omitempty"`
	// Detail says more about the reason: the error, the console's last lines.
	Detail string `json:"detail,omitempty"`

	// Template is the name of the template that the disk is laid over, or its id if it has
	// none. TemplateID and Build are its ids, empty if an earlier version made the sandbox.
	// Forks have their source's, sandboxes from a snapshot those of the snapshot's source.
	Template   string `json:"template"`
	TemplateID string `json:"templateID,omitempty"`
	Build      string `json:"build,omitempty"`
	// Snapshot is what the snapshot is called that the sandbox, or the one that it is
	// a fork of, was made from. It may be deleted by now.
	Snapshot string `json:"snapshot,omitempty"`
	VCPUs    int    `json:"vcpus"`
	MemMiB   int    `json:"memMiB"`
	DiskMiB  int    `json:"diskMiB"`
	// Timeout is the inactivity after which the sandbox expires; 0 is never.
	Timeout time.Duration `json:"timeout"`

	// OnTimeout is what happens when it expires; empty is destroy.
	OnTimeout OnTimeout `json:"onTimeout,omitempty"`
	// EndAt is the deadline, when the sandbox ends whatever happens in it; zero is none.
	// Create, SetDeadline, SetEnd, Connect and Wake move it, activity does not. A resume
	// without a life drops one that has passed.
	EndAt time.Time `json:"endAt,omitzero"`
	// OnEnd is what happens then; empty is destroy.
	OnEnd OnTimeout `json:"onEnd,omitempty"`
	// Life is the time that the create gave the sandbox; 0 is none.
	Life time.Duration `json:"life,omitempty"`
	// AutoResume: traffic resumes the sandbox while it is hibernated.
	AutoResume bool `json:"autoResume,omitempty"`
	// Base is the digest of the base image that the disk is laid over.
	Base string `json:"base,omitempty"`

	// VMM is the name of the driver that runs the VM, or did; empty if an earlier agent
	// wrote the record. Isolation is as in vmm.Report.
	VMM       string        `json:"vmm,omitempty"`
	Isolation vmm.Isolation `json:"isolation,omitempty"`
	// RootImage is the digest of the one image that the disk is laid over where the driver
	// is flat (vmm.Needs): the disk is in the VM's memory then.
	RootImage string `json:"rootImage,omitempty"`

	// Network is what it may reach.
	Network Policy `json:"network,omitzero"`
	// Ingress is how its servers are reached.
	Ingress Ingress `json:"ingress,omitzero"`

	// Login is what its programs begin with. Its variables may be secret.
	Login Login `json:"login,omitzero"`

	// Busy is what counts as activity beside calls and connections.
	Busy Busy `json:"busy,omitempty"`
	// Publish are ports that the host listens for, each with the host's own.
	Publish []Publish `json:"publish,omitempty"`

	Labels
	// RequestDigest is of the request that made the sandbox, if it had an owner key.
	RequestDigest string `json:"requestDigest,omitempty"`

	// Slot is 0, and HostIP invalid, while the sandbox is hibernated and all
	// that it had of the host is free.
	Slot   network.Slot `json:"slot"`
	HostIP netip.Addr   `json:"hostIP"`
	// Token is what the guest demands of its callers. Secret.
	Token string `json:"token"`
	// TrafficToken is what callers of the sandbox's servers show; empty if these are
	// public. Secret.
	TrafficToken string `json:"trafficToken,omitempty"`
	// CloneKey opens a guest that is restored from a named snapshot of this
	// sandbox, which knows its digest. Secret.
	CloneKey string `json:"cloneKey,omitempty"`
	// VM is set from the start of the VMM until the sandbox is stopped.
	VM *vmm.Handle `json:"vm,omitempty"`
	// Restored says that the VM came from a snapshot and was not booted. The host itself
	// does not read it.
	Restored bool `json:"restored,omitempty"`
	// EnvdVersion is of E2B's daemon that the guest last said to be; empty if it said none.
	EnvdVersion string `json:"envdVersion,omitempty"`
	// FilesOnly says that a hibernated sandbox's snapshot has no memory.
	FilesOnly bool `json:"filesOnly,omitempty"`
	// BootKey is, in state waiting, the key of the boot snapshot that the guest comes
	// from.
	BootKey string `json:"warm,omitempty"`

	CreatedAt time.Time `json:"createdAt"`
	// StateAt is when State was entered.
	StateAt time.Time `json:"stateAt"`
	// StartedAt is when the sandbox last began to run; zero if an earlier agent wrote the
	// record, or if it never ran.
	StartedAt time.Time `json:"startedAt,omitzero"`
	// PausedAt is when the pause was asked for by which the sandbox is paused or
	// hibernated; zero in other states, and if an earlier agent wrote the record.
	PausedAt time.Time `json:"pausedAt,omitzero"`
	// LastActiveAt is when the last call or stream ended. On disk it is the
	// record file's modification time, so that it costs no rewrite.
	LastActiveAt time.Time `json:"-"`
}

const recordVersion = 1

// validate says whether a record read from disk can be believed.
func (r Record) validate() error {
	if r.Version != recordVersion {
		return fmt.Errorf("record version %d does not exist", r.Version)
	}
	if !idPattern.MatchString(string(r.ID)) {
		return fmt.Errorf("record id %.40q is malformed", r.ID)
	}
	if !slices.Contains(States(), r.State) || r.State == Unknown {
		return fmt.Errorf("record state %.40q does not exist", r.State)
	}
	if r.Slot < 0 || r.Slot > network.MaxSlot {
		return fmt.Errorf("record slot %d is out of range", r.Slot)
	}
	if (r.State == Running || r.State == Paused) && (r.VM == nil || r.Slot == 0) {
		return fmt.Errorf("record of a %s sandbox names no vm or no network slot", r.State)
	}
	return nil
}

// Info is a copy of what callers may know of a sandbox.
type Info struct {
	ID       ID
	State    State
	Reason   Reason
	Detail   string
	Template string
	// TemplateID and Build are of the template; the build is empty if an earlier version
	// made the sandbox.
	TemplateID string
	Build      string
	Snapshot   string
	VCPUs      int
	MemMiB     int
	DiskMiB    int
	VMM        string // the driver's name; empty if that is not known
	Isolation  vmm.Isolation
	CPU        string // as vmm.Handle has it; empty without a VM
	Timeout    time.Duration
	OnTimeout  OnTimeout
	EndAt      time.Time
	OnEnd      OnTimeout
	Network    Policy
	Ingress    Ingress
	User       string
	Workdir    string // empty for the user's home
	HostIP     netip.Addr
	FilesOnly  bool // hibernated without memory
	// EnvdVersion is that of the guest that runs, or ran last; this host's if the guest
	// did not say.
	EnvdVersion  string
	Labels       Labels
	Publish      []Publish
	Busy         Busy
	CreatedAt    time.Time
	StateAt      time.Time
	StartedAt    time.Time // zero if it never ran
	PausedAt     time.Time // zero unless it is pausing, paused or hibernated
	LastActiveAt time.Time
	// ExpiresAt is zero for a sandbox that does not expire.
	ExpiresAt time.Time

	Life       time.Duration
	AutoResume bool
	// Pausing: the sandbox is not hibernated yet, and will be as soon as that can be: a
	// pause has begun, or its deadline has passed.
	Pausing bool
}

// user is the one that programs run as if a call names none.
func (r Record) user() string { return cmp.Or(r.Login.User, "root") }

// flat says whether the sandbox's disk is in its VM's memory, and in the memory of its
// snapshots: there is no disk by itself that could be copied or booted.
func (r Record) flat() bool { return r.RootImage != "" }

// vmm is the name of the driver, as far as it is known.
func (r Record) vmm() string {
	if r.VMM == "" && r.VM != nil {
		return r.VM.Driver
	}
	return r.VMM
}

// started is StartedAt, as far as it is known.
func (r Record) started() time.Time {
	if r.StartedAt.IsZero() && r.State == Running {
		return r.StateAt
	}
	return r.StartedAt
}

// paused is PausedAt, as far as it is known.
func (r Record) paused() time.Time {
	if r.PausedAt.IsZero() && (r.State == Paused || r.State == Hibernated) {
		return r.StateAt
	}
	return r.PausedAt
}

// templateID is the id of the template. Earlier versions had only the host's own.
func (r Record) templateID() string { return cmp.Or(r.TemplateID, template.HostID(r.Template)) }

func (r Record) info() Info {
	info := Info{
		ID: r.ID, State: r.State, Reason: r.Reason, Detail: r.Detail,
		Template: r.Template, TemplateID: r.templateID(), Build: r.Build, Snapshot: r.Snapshot,
		VCPUs: r.VCPUs, MemMiB: r.MemMiB, DiskMiB: r.DiskMiB, Timeout: r.Timeout, OnTimeout: r.OnTimeout,
		EndAt: r.EndAt, OnEnd: r.OnEnd, Life: r.Life, AutoResume: r.AutoResume,
		Network: r.Network.clone(), Ingress: r.Ingress.clone(), User: r.user(), Workdir: r.Login.Workdir,
		HostIP: r.HostIP, Labels: r.Labels.clone(),
		FilesOnly: r.FilesOnly, Publish: slices.Clone(r.Publish), Busy: r.Busy, EnvdVersion: cmp.Or(r.EnvdVersion, guestapi.E2BVersion),
		CreatedAt: r.CreatedAt, StateAt: r.StateAt, LastActiveAt: r.LastActiveAt,
		StartedAt: r.started(), PausedAt: r.paused(),
		VMM: r.vmm(), Isolation: r.Isolation,
	}
	if r.VM != nil {
		info.CPU = r.VM.CPU
	}
	if r.Timeout > 0 && r.State == Running {
		info.ExpiresAt = r.LastActiveAt.Add(r.Timeout)
	}
	if at := r.endsAt(); !at.IsZero() && (info.ExpiresAt.IsZero() || at.Before(info.ExpiresAt)) {
		info.ExpiresAt = at
	}
	return info
}
