package e2b

import (
	"errors"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// managerErrors are what the manager's methods can answer, and what that is to
// clients.
var managerErrors = []struct {
	request string
	call    string
	err     error
	status  int
	word    string
}{
	{"POST /v2/sandboxes", "create", errdefs.Exhausted.Errorf("full"), 429, "sandbox_capacity_unavailable"},
	{"POST /v2/sandboxes", "create", errdefs.TimedOut.Errorf("slow"), 504, "sandbox_placement_timeout"},
	{"POST /v2/sandboxes", "create", errdefs.Unavailable.Errorf("no boot"), 503, "sandbox_create_failed"},
	{"POST /v2/sandboxes", "create", errdefs.InvalidArgument.Errorf("bad"), 400, ""},
	{"POST /v2/sandboxes", "create", errdefs.Denied.Errorf("no"), 403, ""},
	{"POST /v2/sandboxes", "create", errdefs.NotFound.Errorf("gone"), 404, ""},
	{"POST /v2/sandboxes", "create", errdefs.Unsupported.Errorf("not built"), 400, ""},
	{"POST /v2/sandboxes", "create", errors.New("internal secret"), 500, "internal_server_error"},
	{"DELETE /sandboxes/ID", "destroy", errdefs.Busy.Errorf("busy"), 409, ""},
	{"DELETE /sandboxes/ID", "destroy", errdefs.NotFound.Errorf("gone"), 404, ""},
	{"DELETE /sandboxes/ID", "destroy", errors.New("internal secret"), 500, "internal_server_error"},
	{"POST /sandboxes/ID/pause", "pause", errdefs.Busy.Errorf("busy"), 503, ""},
	{"POST /sandboxes/ID/pause", "pause", errdefs.WrongState.Errorf("paused"), 409, ""},
	{"POST /sandboxes/ID/pause", "pause", sandbox.ErrGuestSilent, 409, "sandbox_snapshot_guest_agent_unresponsive"},
	{"POST /sandboxes/ID/pause", "pause", errdefs.Corrupt.Errorf("disk"), 500, "internal_server_error"},
	{"POST /v2/sandboxes/ID/connect", "connect", errdefs.NotFound.Errorf("gone"), 404, ""},
	{"POST /v2/sandboxes/ID/connect", "connect", errdefs.WrongState.Errorf("in transition"), 409, ""},
	{"POST /v2/sandboxes/ID/connect", "connect", errdefs.Exhausted.Errorf("full"), 429, ""},
	{"POST /sandboxes/ID/timeout", "set end", errdefs.WrongState.Errorf("paused"), 404, ""},
	{"PUT /sandboxes/ID/network", "network", errdefs.InvalidArgument.Errorf("bad"), 400, ""},
	{"POST /sandboxes/ID/fork", "fork", errdefs.WrongState.Errorf("paused"), 409, ""},
	{"POST /sandboxes/ID/fork", "fork", errdefs.Unavailable.Errorf("no room"), 503, "sandbox_create_failed"},
	{"POST /sandboxes/ID/snapshots", "snapshot", errdefs.Busy.Errorf("busy"), 503, ""},
	{"POST /sandboxes/ID/snapshots", "snapshot", errdefs.Exhausted.Errorf("disk"), 429, ""},
	{"GET /sandboxes/ID/metrics", "metrics", errdefs.Unavailable.Errorf("silent"), 503, ""},
	{"GET /sandboxes/ID/logs", "logs", errdefs.Unavailable.Errorf("silent"), 503, ""},
	{"GET /events/sandboxes", "events", errdefs.Unavailable.Errorf("silent"), 503, ""},
	{"GET /templates", "templates", errdefs.Corrupt.Errorf("disk"), 500, "internal_server_error"},
}
