package server

import (
	"context"
	"time"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

func (s *service) GetHost(ctx context.Context, _ *request[pb.GetHostRequest]) (*response[pb.GetHostResponse], error) {
	host, err := s.manager.Host(ctx)
	if err != nil {
		return nil, err
	}
	templates, err := s.templates()
	if err != nil {
		return nil, err
	}
	resp := &pb.GetHostResponse{
		Version: s.version.Version, Limit: hostResources(host.Limit), Used: hostResources(host.Reserved),
		DiskFreeBytes: host.DiskFree, DiskKeptBytes: host.DiskKept, Sandboxes: map[string]int32{}, Templates: templates,
		Warm: int32(host.Warm), WarmWanted: int32(host.WarmWanted), Draining: host.Draining, Fault: host.Fault,
	}
	for state, n := range host.States {
		if state != sandbox.Waiting && state != sandbox.Building {
			resp.Sandboxes[string(state)] = int32(n)
		}
	}
	keys := map[string]string{}
	for _, d := range host.Drivers {
		keys[d.Name] = d.SnapshotKey
	}
	for _, v := range s.version.VMMs {
		driver := &pb.HostDriver{
			Name: v.Name, SnapshotKey: keys[v.Name], Acceleration: v.Accel, Cpu: v.CPU, Isolation: v.Isolation, Speed: v.Speed,
			Why: v.Why, Unusable: v.Unusable,
		}
		if v.Unusable == "" {
			driver.Version = v.version()
		}
		resp.Drivers = append(resp.Drivers, driver)
	}
	return connect.NewResponse(resp), nil
}

// Bounds of a drain.
const (
	drainTimeout    = 10 * time.Minute
	maxDrainTimeout = 24 * time.Hour
)

// DrainHost goes on when its caller does not.
func (s *service) DrainHost(ctx context.Context, req *request[pb.DrainHostRequest]) (*response[pb.DrainHostResponse], error) {
	timeout := time.Duration(req.Msg.TimeoutSec) * time.Second
	if timeout == 0 {
		timeout = drainTimeout
	}
	if timeout < 0 || timeout > maxDrainTimeout || req.Msg.TimeoutSec > int64(maxDrainTimeout/time.Second) {
		return nil, errdefs.InvalidArgument.Errorf("timeout_sec is %d, must be 0 to %d", req.Msg.TimeoutSec, maxDrainTimeout/time.Second)
	}
	if !s.draining.CompareAndSwap(false, true) {
		return nil, errdefs.Busy.Errorf("the host is being drained")
	}
	s.log.Info("host is drained", "hibernate", req.Msg.Hibernate, "timeout", timeout)
	drained := make(chan int, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		drained <- s.manager.Drain(ctx, req.Msg.Hibernate)
		s.end()
	}()
	select {
	case left := <-drained:
		return connect.NewResponse(&pb.DrainHostResponse{Left: int32(left)}), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func hostResources(r sandbox.Resources) *pb.HostResources {
	return &pb.HostResources{Sandboxes: int32(r.Sandboxes), Vcpus: int32(r.VCPUs), MemoryMb: int64(r.MemMiB), DiskMb: int64(r.DiskMiB)}
}
