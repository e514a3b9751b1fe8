package server

import (
	"context"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
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
		if state != sandbox.Waiting {
			resp.Sandboxes[string(state)] = int32(n)
		}
	}
	for i, d := range host.Drivers {
		driver := &pb.HostDriver{Name: d.Name, SnapshotKey: d.SnapshotKey}
		if i == 0 {
			driver.Version, driver.Acceleration, driver.Cpu = s.version.VMMVersion, s.version.Accel, s.version.CPU
			driver.Isolation, driver.Speed = s.version.Isolation, s.version.Speed
		}
		resp.Drivers = append(resp.Drivers, driver)
	}
	return connect.NewResponse(resp), nil
}

func hostResources(r sandbox.Resources) *pb.HostResources {
	return &pb.HostResources{Sandboxes: int32(r.Sandboxes), Vcpus: int32(r.VCPUs), MemoryMb: int64(r.MemMiB), DiskMb: int64(r.DiskMiB)}
}
