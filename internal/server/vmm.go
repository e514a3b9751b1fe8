package server

import (
	"slices"
	"strings"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// checkVMM refuses a driver that this host does not have, or cannot use. The message has all
// drivers, since the next thing to try is another.
func (s *service) checkVMM(name string) error {
	if name == "" {
		return nil
	}
	at := slices.IndexFunc(s.version.VMMs, func(v VMM) bool { return v.Name == name })
	switch {
	case at < 0:
		return errdefs.InvalidArgument.Errorf("no vmm is called %.40q; this host has %s", name, s.vmms())
	case s.version.VMMs[at].Unusable != "":
		return errdefs.Unavailable.Errorf("vmm %s is not usable on this host, which has %s", name, s.vmms())
	}
	return nil
}

// vmms lists the drivers in a sentence, and why some are not usable.
func (s *service) vmms() string {
	var names []string
	for _, v := range s.version.VMMs {
		text := v.Name
		if v.Unusable != "" {
			text += " (not usable: " + validText(v.Unusable) + ")"
		}
		names = append(names, text)
	}
	return strings.Join(names, ", ")
}

// whyVMM says why a driver runs the sandbox of a request.
func (s *service) whyVMM(req *pb.CreateSandboxRequest, name string) string {
	switch {
	case req.Vmm != "":
		return "the request names it"
	case len(s.version.VMMs) > 0 && s.version.VMMs[0].Name == name:
		return s.version.VMMs[0].Why
	case req.Isolation != "":
		return "the first that isolates as the request asks"
	}
	return "the first that can run the template or the snapshot"
}
