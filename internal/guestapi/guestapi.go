// Package guestapi is the contract between the host and a guest's envd: port,
// paths, headers, bodies and the kernel command line. Both sides build on it,
// so that none of these is written twice.
//
// Host and guest are of different ages: a guest that was restored from a
// snapshot runs the envd of the agent that took it. Each side therefore passes
// over what it does not know: fields of bodies, headers, keys of the command
// line. A change that an older guest must not pass over raises Protocol, and
// the host then refuses guests of another version.
package guestapi

import "time"

// Port is the TCP port that envd serves on in a guest.
const Port = 49983

// Protocol is the version of what host and guest agree on besides E2B's
// protocol. The guest states it in HeaderProtocol of each answer to an
// initialisation; the host refuses a guest of another version.
const Protocol = "1"

// E2BVersion is the version of E2B's daemon whose protocol envd speaks.
const E2BVersion = "0.6.4"

// Paths of envd's plain HTTP endpoints.
const (
	// PathHealth answers 204 as soon as envd serves, without a token.
	PathHealth = "/health"
	// PathInit, PathQuiesce and PathFreeze are the host's alone. The body of
	// PathInit is an InitRequest; the other two have none. All answer 204.
	PathInit    = "/init"
	PathQuiesce = "/quiesce"
	PathFreeze  = "/freeze"
	// PathUnpack puts the entries of the tar stream in its body below the directory
	// QueryPath, PathPack answers with what is at QueryPath as a tar stream. Both are
	// the host's alone.
	PathUnpack = "/unpack"
	PathPack   = "/pack"

	// PathMetrics answers with Metrics, PathEnvs with the variables of every
	// process as a JSON object.
	PathMetrics = "/metrics"
	PathEnvs    = "/envs"
	// PathProcesses answers with a Processes.
	PathProcesses = "/processes"
	// PathFiles reads and writes files, PathCompose joins some into one.
	PathFiles   = "/files"
	PathCompose = "/files/compose"
)

// OutOfMemory is what the error of a command's end begins with when the guest's
// kernel has killed a process of the command because there was no memory. The limit may
// follow, as MemoryLimit has it, and the status of the command.
const OutOfMemory = "out of memory: "

// MemoryLimit is how much memory all programs of the guest may take together, in MiB, as
// it stands in the error of a command's end behind OutOfMemory.
const MemoryLimit = "limit %d MiB: "

// QueryQuiet makes PathQuiesce wait until the guest has nothing to do: "?quiet=1".
const QueryQuiet = "quiet"

// Of PathUnpack and PathPack: QueryPath is an absolute path. QueryOwner, as in
// "user:group", names the owner of all that is unpacked; without it each entry belongs
// to the ids that it says.
const (
	QueryPath  = "path"
	QueryOwner = "owner"
)

// HostOnly returns the paths that a guest serves for the host agent alone, and
// those that E2B's daemon keeps for its own host.
func HostOnly() []string {
	return []string{PathInit, PathQuiesce, PathFreeze, PathUnpack, PathPack, "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse", "/upgrade"}
}

// Headers of requests, in canonical form.
const (
	// HeaderToken shows the sandbox's access token.
	HeaderToken = "X-Access-Token"
	// HeaderLifetime on a Start with the value LifetimeStream binds the process
	// and all its descendants to the stream: they end with it, whether a time
	// limit, the client's leaving or the client's death ends it.
	HeaderLifetime = "Wrenn-Process-Lifetime"
	LifetimeStream = "stream"
	// LifetimeCommand is LifetimeStream, and the descendants end with the process, too.
	LifetimeCommand = "command"
	// LifetimeDetached keeps the end of the process, and the last of its output, for
	// those who ask later, until KeptDetached others have ended.
	LifetimeDetached = "detached"
	// HeaderOffset on a Connect says how many bytes of each stream the client
	// has seen, as in "stdout=120,stderr=0".
	HeaderOffset = "Wrenn-Output-Offset"
	// HeaderFollow on a Connect with the value FollowNot ends the stream when it has told
	// what is held, though the process runs.
	HeaderFollow = "Wrenn-Output-Follow"
	FollowNot    = "no"
	// HeaderKeepalive is the interval, in seconds, of keepalive messages on a
	// stream of output.
	HeaderKeepalive = "Keepalive-Ping-Interval"
)

// Headers that name a sandbox, and a port in it, to the host's data plane.
// Without HeaderSandboxPort the request is for Port.
const (
	HeaderSandboxID   = "E2b-Sandbox-Id"
	HeaderSandboxPort = "E2b-Sandbox-Port"
	// HeaderTraffic shows the traffic token of a sandbox whose servers are not public.
	HeaderTraffic = "E2b-Traffic-Access-Token"
)

// SandboxNotFound is what the host's data plane says of a sandbox that does not run,
// whatever the reason. The words are E2B's; its clients look for them.
const SandboxNotFound = "The sandbox was not found"

// Headers of the answer to an initialisation, in canonical form.
const (
	HeaderProtocol   = "Wrenn-Guest-Protocol"
	HeaderE2BVersion = "X-Envd-Version"
	// HeaderClock is the guest's time, in nanoseconds since 1970.
	HeaderClock = "Wrenn-Guest-Clock"
	// HeaderMissing says what a refused initialisation asked for in vain:
	// MissingUser.
	HeaderMissing = "Wrenn-Missing"
	MissingUser   = "user"
)

// HeaderStill of the answer to PathFreeze is for how many milliseconds the
// programs have stood still.
const HeaderStill = "Wrenn-Guest-Still"

// KeptDetached is how many detached processes that have ended can be asked about.
const KeptDetached = 32

// Processes are the processes of a guest, without those of its kernel and envd, oldest
// first.
type Processes struct {
	Processes []Process `json:"processes"`
}

// Process is a process of a guest, or a detached one that has ended: then Ended says
// how, and only PID, Started, Args and Command are set.
type Process struct {
	PID  int    `json:"pid"`
	PPID int    `json:"ppid,omitempty"`
	User string `json:"user,omitempty"`
	// Started is in seconds since 1970.
	Started int64 `json:"started"`
	// CPU is the time that it has used, in milliseconds, Memory what it has in memory, in
	// bytes.
	CPU    int64 `json:"cpu_ms"`
	Memory int64 `json:"memory_bytes"`
	// Args are cut at 4 KiB. A process without any has its name there, in brackets.
	Args []string `json:"args"`
	// Command says that it was started from outside, so that it can be attached to.
	Command bool   `json:"command,omitempty"`
	Ended   string `json:"ended,omitempty"`
}

// MaxEntropy bounds the bytes of InitRequest.Entropy.
const MaxEntropy = 4096

// InitRequest is the body of PathInit. Fields up to CABundle are E2B's, the
// others ours. A guest passes over fields that it does not know.
type InitRequest struct {
	// Timestamp is the wall clock. A request whose Timestamp is not later than
	// that of the last one changes nothing, unless it says Restored.
	Timestamp *time.Time `json:"timestamp"`
	// EnvVars are variables for every process; null keeps the previous ones.
	EnvVars map[string]string `json:"envVars"`
	// AccessToken is what every later request must show; empty for none.
	AccessToken string `json:"accessToken"`
	// DefaultUser and DefaultWorkdir are for requests that name none; empty
	// keeps the previous ones.
	DefaultUser    string `json:"defaultUser"`
	DefaultWorkdir string `json:"defaultWorkdir"`
	// CABundle holds certificates in PEM that the guest trusts from then on.
	CABundle string `json:"caBundle,omitempty"`

	Hostname  string `json:"hostname"`
	SandboxID string `json:"sandboxId"`
	// Entropy is credited to the guest's random generator.
	Entropy []byte `json:"entropy"`
	// Restored says that the guest was restored from a snapshot: it drops the
	// connections of before, and sets its clock however little it is off.
	Restored bool `json:"restored"`
	// NewBootID gives the guest another boot id, because another machine may
	// have read the one in the snapshot.
	NewBootID bool `json:"newBootId"`
	// CloneKey is the SHA-256 of the key that opens, in the token's place, the
	// first initialisation of a guest restored from a snapshot of this one.
	// Empty keeps the previous one.
	CloneKey []byte `json:"cloneKey"`
}

// Metrics is the answer of PathMetrics. Sizes are in bytes where the name does
// not say otherwise.
type Metrics struct {
	Timestamp   int64   `json:"ts"`
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
}

// Error is the body of a refusal by envd's plain HTTP endpoints.
type Error struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}
