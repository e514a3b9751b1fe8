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
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.host.base.String()+guestapi.PathMetrics, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.request(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	u := &Usage{Processes: []Process{}}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(u); err != nil {
		return nil, fmt.Errorf("read the sandbox's metrics: %w", err)
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
