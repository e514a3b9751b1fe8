package e2b

import (
	"context"
	"errors"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
)

func buildEntry(e BuildEntry) api.BuildLogEntry {
	out := api.BuildLogEntry{Timestamp: api.At(e.At), Message: e.Message, Level: api.LevelInfo, Step: some(e.Step)}
	if slices.Contains(levels, e.Level) {
		out.Level = api.Level(e.Level)
	}
	return out
}

// leastLevel reads the level that entries must have at least.
func leastLevel(text *string) (string, error) {
	level := value(text, levels[0])
	if !slices.Contains(levels, level) {
		return "", refuse(http.StatusBadRequest, "level must be one of %s", strings.Join(levels, ", "))
	}
	return level, nil
}

// buildLog returns entries of a build's log; there is none without builds.
func (s *server) buildLog(t Template, b Build, offset, limit int, level string) ([]BuildEntry, error) {
	if s.Builds == nil {
		return nil, nil
	}
	return s.Builds.Log(t.ID, b.ID, offset, limit, level)
}

// stepName is what clients call the step of an error: they know numbers and two names.
func stepName(step string) string {
	if _, err := strconv.Atoi(step); err == nil || step == "" || step == "base" {
		return step
	}
	return "finalize"
}

// GetBuildStatus looks at the status before it reads the log: one that is final has all
// of its log.
func (s *server) GetBuildStatus(ctx context.Context, r api.GetBuildStatusRequestObject) (api.GetBuildStatusResponseObject, error) {
	limit, offset := value(r.Params.Limit, maxPage), value(r.Params.LogsOffset, 0)
	if limit < 1 || limit > maxPage || offset < 0 {
		return nil, refuse(http.StatusBadRequest, "limit must be between 1 and %d, logsOffset not negative", maxPage)
	}
	level, err := leastLevel(r.Params.Level)
	if err != nil {
		return nil, err
	}
	t, b, err := s.ownBuild(ctx, r.TemplateID, r.BuildID)
	if err != nil {
		return nil, err
	}
	entries, err := s.buildLog(t, b, offset, limit, level)
	answer := api.GetBuildStatus200JSONResponse{
		TemplateID: t.ID, BuildID: b.ID, Status: api.BuildState(b.Status), Logs: []string{}, LogEntries: []api.BuildLogEntry{},
	}
	for _, e := range entries {
		answer.Logs = append(answer.Logs, e.Message)
		answer.LogEntries = append(answer.LogEntries, buildEntry(e))
	}
	if b.Reason != nil {
		answer.Reason = &api.BuildReason{Message: b.Reason.Message, Step: some(stepName(b.Reason.Step))}
		last, e := s.lastOfStep(t, b)
		err = errors.Join(err, e)
		answer.Reason.LogEntries = &last
	}
	return answer, err
}

// maxReasonEntries is how much of the log the reason of an error has.
const maxReasonEntries = 20

// lastOfStep are the last entries of the step at which a build ended with an error.
func (s *server) lastOfStep(t Template, b Build) ([]api.BuildLogEntry, error) {
	entries, err := s.buildLog(t, b, 0, math.MaxInt, levels[0])
	last := []api.BuildLogEntry{}
	for _, e := range entries {
		if e.Step == b.Reason.Step {
			last = append(last, buildEntry(e))
		}
	}
	return last[max(0, len(last)-maxReasonEntries):], err
}

// GetBuildLogs returns entries from a time on, or up to one, newest first.
func (s *server) GetBuildLogs(ctx context.Context, r api.GetBuildLogsRequestObject) (api.GetBuildLogsResponseObject, error) {
	limit, err := checkLimit(r.Params.Limit, maxPage)
	if err != nil {
		return nil, err
	}
	level, err := leastLevel(r.Params.Level)
	if err != nil {
		return nil, err
	}
	direction := value(r.Params.Direction, "backward")
	if direction != "backward" && direction != "forward" {
		return nil, refuse(http.StatusBadRequest, "direction must be forward or backward")
	}
	t, b, err := s.ownBuild(ctx, r.TemplateID, r.BuildID)
	if err != nil {
		return nil, err
	}
	entries, err := s.buildLog(t, b, 0, math.MaxInt, level)
	if err != nil {
		return nil, err
	}
	cursor := r.Params.Cursor
	entries = slices.DeleteFunc(entries, func(e BuildEntry) bool {
		return cursor != nil && (direction == "forward" && e.At.UnixMilli() < *cursor || direction == "backward" && e.At.UnixMilli() > *cursor)
	})
	if direction == "backward" {
		slices.Reverse(entries)
	}
	answer := api.GetBuildLogs200JSONResponse{Logs: []api.BuildLogEntry{}}
	for _, e := range entries[:min(limit, len(entries))] {
		answer.Logs = append(answer.Logs, buildEntry(e))
	}
	return answer, nil
}
