package e2b

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// maxLines bounds an answer with log lines; it is also the default.
const maxLines = 1000

func metric(m Metric) api.Metric {
	return api.Metric{
		Timestamp: api.At(m.At), TimestampUnix: m.At.Unix(), CpuCount: m.VCPUs, CpuUsedPct: m.CPUUsedPct,
		MemUsed: m.MemUsed, MemTotal: m.MemTotal, MemCache: m.MemCache, DiskUsed: m.DiskUsed, DiskTotal: m.DiskTotal,
	}
}

// unixSeconds reads a time that a query gives in seconds; none is the zero time.
func unixSeconds(name string, seconds *int64) (time.Time, error) {
	if seconds == nil {
		return time.Time{}, nil
	}
	if *seconds < 0 || *seconds > forever.Unix() {
		return time.Time{}, refuse(http.StatusBadRequest, "%s is no time in seconds", name)
	}
	return time.Unix(*seconds, 0), nil
}

func (s *server) GetSandboxMetrics(ctx context.Context, r api.GetSandboxMetricsRequestObject,
) (api.GetSandboxMetricsResponseObject, error) {
	start, err := unixSeconds("start", r.Params.Start)
	if err != nil {
		return nil, err
	}
	end, err := unixSeconds("end", r.Params.End)
	if err != nil {
		return nil, err
	}
	if !end.IsZero() {
		end = end.Add(time.Second - 1) // all of that second
		if end.Before(start) {
			return nil, refuse(http.StatusBadRequest, "end is before start")
		}
	}
	sb, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	samples, err := s.Manager.Metrics(sb.ID, start, end)
	answer := api.GetSandboxMetrics200JSONResponse{}
	for _, m := range samples {
		answer = append(answer, metric(m))
	}
	return answer, err
}

func (s *server) ListSandboxMetrics(ctx context.Context, r api.ListSandboxMetricsRequestObject,
) (api.ListSandboxMetricsResponseObject, error) {
	ids := list(&r.Params.SandboxIds)
	if len(ids) > maxPage {
		return nil, refuse(http.StatusBadRequest, "%d ids, at most %d are possible", len(ids), maxPage)
	}
	answer := api.ListSandboxMetrics200JSONResponse{Sandboxes: map[string]api.Metric{}}
	for _, id := range ids {
		sb, err := s.find(ctx, id)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		samples, err := s.Manager.Metrics(sb.ID, time.Time{}, time.Time{})
		if err != nil {
			return nil, err
		}
		if len(samples) > 0 {
			answer.Sandboxes[sb.ID.Short()] = metric(samples[len(samples)-1])
		}
	}
	return answer, nil
}

// levels are in the order of their weight.
var levels = []string{"debug", "info", "warn", "error"}

// lines are the log lines of the caller's sandbox that from and to, in Unix
// milliseconds, have between them; both are included.
func (s *server) lines(ctx context.Context, id string, from, to int64) ([]LogLine, error) {
	sb, err := s.find(ctx, id)
	if err != nil {
		return nil, err
	}
	all, err := s.Manager.Logs(sb.ID)
	return slices.DeleteFunc(all, func(l LogLine) bool { return l.At.UnixMilli() < from || l.At.UnixMilli() > to }), err
}

func checkLimit(limit *int, most int) (int, error) {
	n := value(limit, most)
	if n < 1 || n > most {
		return 0, refuse(http.StatusBadRequest, "limit must be between 1 and %d", most)
	}
	return n, nil
}

// GetSandboxLogsV1 gives each line as JSON too: the CLI parses it.
func (s *server) GetSandboxLogsV1(ctx context.Context, r api.GetSandboxLogsV1RequestObject,
) (api.GetSandboxLogsV1ResponseObject, error) {
	limit, err := checkLimit(r.Params.Limit, maxLines)
	if err != nil {
		return nil, err
	}
	lines, err := s.lines(ctx, r.SandboxID, value(r.Params.Start, 0), math.MaxInt64)
	if err != nil {
		return nil, err
	}
	answer := api.GetSandboxLogsV1200JSONResponse{Logs: []api.LogLine{}, LogEntries: []api.LogEntry{}}
	for _, l := range lines[:min(limit, len(lines))] {
		entry := logEntry(l)
		fields := map[string]string{}
		maps.Copy(fields, entry.Fields)
		fields["level"], fields["message"] = string(entry.Level), entry.Message
		line, _ := json.Marshal(fields) // strings
		answer.Logs = append(answer.Logs, api.LogLine{Timestamp: entry.Timestamp, Line: string(line)})
		answer.LogEntries = append(answer.LogEntries, entry)
	}
	return answer, nil
}

func (s *server) GetSandboxLogsV2(ctx context.Context, r api.GetSandboxLogsV2RequestObject,
) (api.GetSandboxLogsV2ResponseObject, error) {
	limit, err := checkLimit(r.Params.Limit, maxLines)
	if err != nil {
		return nil, err
	}
	direction, least := value(r.Params.Direction, "backward"), value(r.Params.Level, levels[0])
	if direction != "backward" && direction != "forward" || !slices.Contains(levels, least) {
		return nil, refuse(http.StatusBadRequest, "direction must be forward or backward, level one of %s", strings.Join(levels, ", "))
	}
	from, to := int64(0), value(r.Params.Cursor, math.MaxInt64)
	if direction == "forward" {
		from, to = value(r.Params.Cursor, 0), math.MaxInt64
	}
	lines, err := s.lines(ctx, r.SandboxID, from, to)
	if err != nil {
		return nil, err
	}
	lines = slices.DeleteFunc(lines, func(l LogLine) bool {
		return slices.Index(levels, string(logEntry(l).Level)) < slices.Index(levels, least) ||
			!strings.Contains(l.Message, value(r.Params.Search, ""))
	})
	if direction == "backward" {
		slices.Reverse(lines)
	}
	answer := api.GetSandboxLogsV2200JSONResponse{Logs: []api.LogEntry{}}
	for _, l := range lines[:min(limit, len(lines))] {
		answer.Logs = append(answer.Logs, logEntry(l))
	}
	return answer, nil
}

func logEntry(l LogLine) api.LogEntry {
	e := api.LogEntry{Timestamp: api.At(l.At), Message: l.Message, Level: api.LevelInfo, Fields: api.StringMap{}}
	if slices.Contains(levels, l.Level) {
		e.Level = api.Level(l.Level)
	}
	maps.Copy(e.Fields, l.Fields)
	return e
}

// eventPrefix comes before each type of event.
const eventPrefix = "sandbox.lifecycle."

func (s *server) ListEvents(ctx context.Context, r api.ListEventsRequestObject) (api.ListEventsResponseObject, error) {
	events, err := s.events(ctx, "", eventQuery(r.Params))
	return api.ListEvents200JSONResponse(events), err
}

func (s *server) ListSandboxEvents(ctx context.Context, r api.ListSandboxEventsRequestObject,
) (api.ListSandboxEventsResponseObject, error) {
	id, ok := sandbox.ParseLooseID(r.SandboxID)
	if !ok {
		return nil, notFound(r.SandboxID)
	}
	events, err := s.events(ctx, id, eventQuery(r.Params))
	return api.ListSandboxEvents200JSONResponse(events), err
}

// eventQuery is what both lists of events are asked for.
type eventQuery struct {
	Offset   *int
	Limit    *int
	OrderAsc *bool
	Types    *[]string
}

func (s *server) events(ctx context.Context, id sandbox.ID, q eventQuery) ([]api.Event, error) {
	limit, err := checkLimit(cmp.Or(q.Limit, some(10)), maxPage)
	if err != nil {
		return nil, err
	}
	offset := value(q.Offset, 0)
	if offset < 0 {
		return nil, refuse(http.StatusBadRequest, "offset must not be negative")
	}
	team := caller(ctx).Project
	all, err := s.Manager.Events(team.Name, id)
	if err != nil {
		return nil, err
	}
	if types := list(q.Types); len(types) > 0 {
		all = slices.DeleteFunc(all, func(e Event) bool { return !slices.Contains(types, eventPrefix+e.Type) })
	}
	if !value(q.OrderAsc, false) {
		slices.Reverse(all)
	}
	out := []api.Event{}
	all = all[min(offset, len(all)):]
	for _, e := range all[:min(limit, len(all))] {
		data := e.Data
		if data == nil {
			data = map[string]any{}
		}
		out = append(out, api.Event{
			Version: "v2", Id: strconv.FormatUint(e.ID, 10), Type: eventPrefix + e.Type, Timestamp: api.At(e.At), EventData: data,
			SandboxId: e.Sandbox.Short(), SandboxTemplateId: e.Template, SandboxBuildId: some(e.Build), SandboxTeamId: team.ID,
		})
	}
	return out, nil
}
