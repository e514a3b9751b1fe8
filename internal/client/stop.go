package client

import (
	"context"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// Stop ends the programs of the sandbox and its VM, and keeps its disk, from which Resume
// boots it. A running sandbox's programs get SIGTERM first, and grace to end. The detail
// says what the agent noticed, if anything.
func (s *Sandbox) Stop(ctx context.Context, grace time.Duration) (detail string, err error) {
	info, err := s.Info(ctx)
	if err != nil {
		return "", err
	}
	if info.GetVmm() == "gvisor" { // before its programs end for nothing
		return "", errdefs.Unsupported.Errorf(
			"sandbox %s runs with gVisor, which keeps its disk in its memory: pause --to-disk keeps both", s.ID)
	}
	if info.GetStatus() == "running" && grace > 0 {
		s.endPrograms(ctx, grace)
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return s.Hibernate(ctx, true)
}

// stopPoll is how often it is looked whether programs have ended.
const stopPoll = 100 * time.Millisecond

// endPrograms sends SIGTERM to all programs and waits until none is left, or grace is
// over. A guest that does not help loses its programs all the same.
func (s *Sandbox) endPrograms(ctx context.Context, grace time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	// To all but the first process, which is envd, and the shell itself.
	if _, err := s.Exec(ctx, Command{Cmd: "sh", Args: []string{"-c", "kill -s TERM -- -1"}, User: "root", StartWithin: grace}); err != nil {
		return
	}
	for {
		list, err := s.Processes(ctx)
		if err != nil || !anyRuns(list) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(stopPoll):
		}
	}
}

func anyRuns(list []guestapi.Process) bool {
	for _, p := range list {
		if p.Ended == "" {
			return true
		}
	}
	return false
}
