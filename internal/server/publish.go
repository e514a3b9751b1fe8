package server

import (
	"context"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// publishOf are the ports that a request names. Ports of the host are given to callers
// that command it.
func publishOf(ctx context.Context, asked []*pb.PublishedPort) (ports []sandbox.Publish, err error) {
	if _, all := project(ctx); len(asked) > 0 && !all {
		return nil, errdefs.Denied.Errorf("no key may publish ports on the host; the data plane reaches every port of a sandbox")
	}
	if len(asked) > sandbox.MaxPublish {
		return nil, errdefs.InvalidArgument.Errorf("publish has %d ports, at most %d are possible", len(asked), sandbox.MaxPublish)
	}
	for _, p := range asked {
		if p.GetPort() < 1 || p.Port > 65535 || p.HostPort < 0 || p.HostPort > 65535 {
			return nil, errdefs.InvalidArgument.Errorf("publish: port %d at port %d of the host cannot be", p.GetPort(), p.GetHostPort())
		}
		ports = append(ports, sandbox.Publish{Port: uint16(p.Port), HostPort: uint16(p.HostPort)})
	}
	return ports, nil
}

func publishedPorts(ports []sandbox.Publish) (out []*pb.PublishedPort) {
	for _, p := range ports {
		out = append(out, &pb.PublishedPort{Port: int32(p.Port), HostPort: int32(p.HostPort)})
	}
	return out
}
