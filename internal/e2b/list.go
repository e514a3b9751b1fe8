package e2b

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
)

// Orders of a list, by the time of its entries.
const (
	ascending  = "asc"
	descending = "desc"
)

// maxPage bounds a page; it is also the default.
const maxPage = 100

// position is where a page begins: after the entry with this time and name. Kind
// and order bind it to its list.
type position struct {
	Kind  string `json:"k"`
	Order string `json:"o"`
	Milli int64  `json:"t"`
	Name  string `json:"n"`
}

// page is one page of a list that is sorted by time, and by name where times are
// equal to the millisecond.
type page struct {
	kind, order string
	limit       int
	after       *position
}

// parsePage reads what a caller says of paging.
func parsePage(kind string, order *string, limit *int, token *string) (page, error) {
	p := page{kind: kind, order: value(order, descending), limit: value(limit, maxPage)}
	if p.order != ascending && p.order != descending {
		return page{}, refuse(http.StatusBadRequest, "order must be asc or desc")
	}
	if p.limit < 1 || p.limit > maxPage {
		return page{}, refuse(http.StatusBadRequest, "limit must be between 1 and %d", maxPage)
	}
	if token == nil || *token == "" {
		return p, nil
	}
	data, err := base64.RawURLEncoding.DecodeString(*token)
	if err == nil {
		err = json.Unmarshal(data, &p.after)
	}
	if err != nil || p.after == nil || p.after.Kind != p.kind || p.after.Order != p.order {
		return page{}, refuse(http.StatusBadRequest, "Invalid next token")
	}
	return p, nil
}

// compare orders two entries as the list is ordered.
func (p page) compare(a, b position) int {
	byTime := cmp.Compare(a.Milli, b.Milli)
	if p.order == descending {
		byTime = -byTime
	}
	return cmp.Or(byTime, strings.Compare(a.Name, b.Name))
}

// cut sorts entries and returns those of the page, and the token of the next one
// if there is one.
func cut[T any](p page, entries []T, at func(T) (time.Time, string)) (onPage []T, next *string) {
	where := func(e T) position {
		t, name := at(e)
		return position{Kind: p.kind, Order: p.order, Milli: t.UnixMilli(), Name: name}
	}
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b T) int { return p.compare(where(a), where(b)) })
	if p.after != nil {
		first := slices.IndexFunc(entries, func(e T) bool { return p.compare(where(e), *p.after) > 0 })
		if first < 0 {
			return nil, nil
		}
		entries = entries[first:]
	}
	if len(entries) <= p.limit {
		return entries, nil
	}
	entries = entries[:p.limit]
	data, _ := json.Marshal(where(entries[p.limit-1])) // strings and a number
	token := base64.RawURLEncoding.EncodeToString(data)
	return entries, &token
}

// filter says which sandboxes a list has.
type filter struct {
	metadata map[string]string
	states   []api.State
	after    time.Time
	// template is an id; none that does not exist.
	template *string
}

func (f filter) matches(sb Sandbox) bool {
	if !slices.Contains(f.states, shown(sb)) || sb.StartedAt.Truncate(time.Millisecond).Before(f.after) {
		return false
	}
	if f.template != nil && sb.Template != *f.template {
		return false
	}
	for k, v := range f.metadata {
		if got, ok := sb.Metadata[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// parseMetadata reads pairs key=value joined by &. The query was decoded once; the
// pairs are encoded once more as a whole, and once more each. Simple words that
// are encoded less read the same.
func parseMetadata(text *string) (map[string]string, error) {
	if text == nil || *text == "" {
		return nil, nil
	}
	whole, err := unescape(*text)
	if err != nil {
		return nil, err
	}
	pairs := map[string]string{}
	for _, pair := range strings.Split(whole, "&") {
		key, val, ok := strings.Cut(pair, "=")
		if !ok || strings.Contains(val, "=") {
			return nil, refuse(http.StatusBadRequest, "metadata %.70q: want key=value", pair)
		}
		if key, err = unescape(key); err != nil {
			return nil, err
		}
		if pairs[key], err = unescape(val); err != nil {
			return nil, err
		}
	}
	return pairs, nil
}

func parseStates(values *[]string) ([]api.State, error) {
	words := list(values)
	if len(words) == 0 {
		return []api.State{api.Running, api.Paused}, nil
	}
	var states []api.State
	for _, word := range words {
		state := api.State(word)
		if !state.Valid() {
			return nil, refuse(http.StatusBadRequest, "state %.70q: want running or paused", word)
		}
		states = append(states, state)
	}
	return states, nil
}

// parseFilter reads what a list of sandboxes is asked for.
func (s *server) parseFilter(ctx context.Context, p api.ListSandboxesV2Params) (f filter, err error) {
	if f.metadata, err = parseMetadata(p.Metadata); err != nil {
		return f, err
	}
	if f.states, err = parseStates(p.State); err != nil {
		return f, err
	}
	if p.StartedAfter != nil {
		if f.after, err = time.Parse(time.RFC3339, *p.StartedAfter); err != nil {
			return f, refuse(http.StatusBadRequest, "startedAfter %.70q is no RFC 3339 time", *p.StartedAfter)
		}
		f.after = f.after.Truncate(time.Millisecond)
	}
	if p.Template != nil && *p.Template != "" {
		id, err := s.templateFilter(ctx, *p.Template)
		if err != nil {
			return f, err
		}
		f.template = &id
	}
	return f, nil
}

func listed(sb Sandbox) api.ListedSandbox {
	return api.ListedSandbox{
		TemplateID: sb.Template, SandboxID: sb.ID.Short(), ClientID: clientID, StartedAt: api.At(sb.StartedAt), EndAt: end(sb),
		EnvdVersion: sb.EnvdVersion, CpuCount: sb.VCPUs, MemoryMB: sb.MemMiB, DiskSizeMB: sb.DiskMiB, State: shown(sb),
		Alias: some(sb.Alias), Metadata: stringMap(sb.Metadata),
	}
}

// matching returns the caller's sandboxes that a filter lets through.
func (s *server) matching(ctx context.Context, f filter) []Sandbox {
	var some []Sandbox
	for _, sb := range s.Manager.List(projectOf(ctx)) {
		if f.matches(sb) {
			some = append(some, sb)
		}
	}
	return some
}

func startOf(sb Sandbox) (time.Time, string) { return sb.StartedAt, string(sb.ID) }

func (s *server) ListSandboxesV2(ctx context.Context, r api.ListSandboxesV2RequestObject) (api.ListSandboxesV2ResponseObject, error) {
	p, err := parsePage("sandboxes", r.Params.Order, r.Params.Limit, r.Params.NextToken)
	if err != nil {
		return nil, err
	}
	f, err := s.parseFilter(ctx, r.Params)
	if err != nil {
		return nil, err
	}
	all := s.matching(ctx, f)
	answer := api.ListSandboxesV2200JSONResponse{Body: []api.ListedSandbox{}}
	if slices.Contains(f.states, api.Running) {
		running := 0
		for _, sb := range all {
			if shown(sb) == api.Running {
				running++
			}
		}
		answer.Headers.XTotalRunning = &running
	}
	var onPage []Sandbox
	onPage, answer.Headers.XNextToken = cut(p, all, startOf)
	for _, sb := range onPage {
		answer.Body = append(answer.Body, listed(sb))
	}
	return answer, nil
}

func (s *server) ListSandboxesV1(ctx context.Context, r api.ListSandboxesV1RequestObject) (api.ListSandboxesV1ResponseObject, error) {
	metadata, err := parseMetadata(r.Params.Metadata)
	if err != nil {
		return nil, err
	}
	all := s.matching(ctx, filter{metadata: metadata, states: []api.State{api.Running}})
	sorted, _ := cut(page{order: descending, limit: len(all)}, all, startOf)
	answer := api.ListSandboxesV1200JSONResponse{}
	for _, sb := range sorted {
		answer = append(answer, listed(sb))
	}
	return answer, nil
}
