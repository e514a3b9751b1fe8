package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Usage is what a sandbox uses, in bytes and percent, and what runs in it.
type Usage struct {
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"`
	MemTotal   int64   `json:"mem_total"`
	MemUsed    int64   `json:"mem_used"`
	MemCache   int64   `json:"mem_cache"`
	DiskUsed   int64   `json:"disk_used"`
	DiskTotal  int64   `json:"disk_total"`

	Processes []Process `json:"processes"`
}

// Process is a command that was started in a sandbox from outside.
type Process struct {
	PID  uint32   `json:"pid"`
	Tag  string   `json:"tag,omitempty"`
	Cmd  string   `json:"cmd"`
	Args []string `json:"args"`
}

// Usage asks the sandbox what it uses. All of the answer is the guest's word.
func (s *Sandbox) Usage(ctx context.Context) (*Usage, error) {
	ctx, cancel := context.WithTimeout(ctx, guestPatience)
	defer cancel()
	u := &Usage{Processes: []Process{}}
	if err := s.getJSON(ctx, guestapi.PathMetrics, "metrics", 1<<20, u); err != nil {
		return nil, err
	}
	list, err := call(ctx, s.processes("").List, &process.ListRequest{})
	if err != nil {
		return nil, err
	}
	for _, p := range list.Processes {
		u.Processes = append(u.Processes, Process{p.Pid, p.GetTag(), p.GetConfig().GetCmd(), p.GetConfig().GetArgs()})
	}
	return u, nil
}

// getJSON asks the sandbox for what it says of itself in JSON, of which it reads limit bytes
// at most into v.
func (s *Sandbox) getJSON(ctx context.Context, path, what string, limit int64, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.host.base.String()+path, nil)
	if err != nil {
		return err
	}
	resp, err := s.request(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, limit)).Decode(v); err != nil {
		return fmt.Errorf("read the sandbox's %s: %w", what, err)
	}
	return nil
}
