package e2b

import (
	"errors"
	"fmt"
	"net/http"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs/errhttp"
	"git.omukk.dev/wrenn/sandbox/internal/idempotency"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// refusal is an error that says its own status.
type refusal struct {
	status int
	// word is for programs, and may be empty.
	word    string
	message string
}

func (e *refusal) Error() string { return e.message }

// refuse returns an error with a status and a text for the caller.
func refuse(status int, format string, args ...any) error {
	return &refusal{status: status, message: fmt.Sprintf(format, args...)}
}

// Words for programs, as E2B's clients know them.
const (
	wordCapacity   = "sandbox_capacity_unavailable"
	wordSlow       = "sandbox_placement_timeout"
	wordNotCreated = "sandbox_create_failed"
	wordInternal   = "internal_server_error"
	wordSilent     = "sandbox_snapshot_guest_agent_unresponsive"
	wordInProgress = "idempotency_in_progress"
	wordMismatch   = "idempotency_request_mismatch"
	wordUnknown    = "idempotency_outcome_unknown"
)

// special are errors whose status or word is not that of their class.
var special = []struct {
	err    error
	status int
	word   string
}{
	{idempotency.ErrInProgress, http.StatusConflict, wordInProgress},
	{idempotency.ErrMismatch, http.StatusUnprocessableEntity, wordMismatch},
	{idempotency.ErrUnknown, http.StatusConflict, wordUnknown},
	{sandbox.ErrGuestSilent, http.StatusConflict, wordSilent},
}

// describe returns the body of the answer to an error; its code is the status.
func (s *server) describe(asked string, err error) api.Error {
	var own *refusal
	if errors.As(err, &own) {
		return api.Error{Code: own.status, Message: own.message, ErrorCode: some(own.word)}
	}
	for _, known := range special {
		if errors.Is(err, known.err) {
			return api.Error{Code: known.status, Message: err.Error(), ErrorCode: some(known.word)}
		}
	}
	row, told := errhttp.Tell(s.Log, asked, err)
	body := api.Error{Code: row.Status, Message: told.Error()}
	switch {
	case errdefs.ClassOf(err) == errdefs.Unsupported: // what is not built is a bad request to this host
		body.Code = http.StatusBadRequest
	case row.Status == http.StatusInternalServerError:
		body.ErrorCode = some(wordInternal)
	}
	return body
}

// fail answers a request with an error.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	body := s.describe(r.Method+" "+r.URL.Path, err)
	if errors.Is(err, idempotency.ErrInProgress) {
		w.Header().Set("Should-Retry", "true")
	}
	writeJSON(w, body.Code, body)
}

// notCreated adds to the error of a create what programs go by.
func (s *server) notCreated(err error) error {
	body := s.describe("create sandbox", err)
	if body.ErrorCode != nil || body.Code < http.StatusTooManyRequests {
		return err
	}
	word := wordNotCreated
	switch body.Code {
	case http.StatusTooManyRequests:
		word = wordCapacity
	case http.StatusGatewayTimeout:
		word = wordSlow
	}
	return &refusal{status: body.Code, word: word, message: body.Message}
}

// busyAs gives an operation that another one got in the way of a status.
func busyAs(status int, err error) error {
	if errdefs.ClassOf(err) == errdefs.Busy {
		return refuse(status, "%s", err)
	}
	return err
}

// wrongStateAs gives a sandbox in the wrong state a status.
func wrongStateAs(status int, err error) error {
	if errdefs.ClassOf(err) == errdefs.WrongState {
		return refuse(status, "%s", err)
	}
	return err
}

// What this host does not have.
var (
	errVolumes  = refuse(http.StatusBadRequest, "this host has no volumes")
	errSecrets  = refuse(http.StatusBadRequest, "this host has no secrets")
	errIAM      = refuse(http.StatusBadRequest, "this host issues no identity tokens (iam)")
	errWebhooks = refuse(http.StatusBadRequest, "this host has no webhooks; GET /events/sandboxes lists events")
	errBuilds   = refuse(http.StatusBadRequest, "this host builds no templates yet")
	errPushed   = refuse(http.StatusBadRequest, "this host builds templates of steps, POST /v3/templates, and not of a pushed image")
)
