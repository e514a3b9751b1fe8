package sandbox

import "git.omukk.dev/wrenn/sandbox/internal/errdefs"

// Quota bounds what the sandboxes of a project take together; 0 is no bound. A
// hibernated sandbox counts for Sandboxes and DiskMiB alone.
type Quota struct {
	Sandboxes int
	VCPUs     int
	// MemMiB is of the guests' memory, without what their VMMs take.
	MemMiB int
	// DiskMiB is of the disks' full sizes.
	DiskMiB int
}

// overQuota is the error of a sandbox that its project's quota does not allow. It is
// errdefs.Exhausted, and no other project's sandbox can make way.
type overQuota struct{ error }

func (e overQuota) Unwrap() error { return e.error }

// exceeded says which bound of a quota is in the way of so much more.
func (q Quota) exceeded(project string, takes, more Resources) error {
	for _, of := range []struct {
		what                string
		takes, more, allows int
	}{
		{"sandboxes", takes.Sandboxes, more.Sandboxes, q.Sandboxes},
		{"vcpus", takes.VCPUs, more.VCPUs, q.VCPUs},
		{"MiB of memory", takes.guestMiB, more.guestMiB, q.MemMiB},
		{"MiB of disk", takes.DiskMiB, more.DiskMiB, q.DiskMiB},
	} {
		if of.allows > 0 && of.more > 0 && of.takes+of.more > of.allows {
			return overQuota{errdefs.Exhausted.Errorf("the quota of project %s is used up: its sandboxes have %d of %d %s, %d more asked",
				project, of.takes, of.allows, of.what, of.more)}
		}
	}
	return nil
}

// quotaOf is the quota of a project. Sandboxes without a project have none.
func (h *host) quotaOf(project string) Quota {
	if project == "" || h.cfg.Quota == nil {
		return Quota{}
	}
	return h.cfg.Quota(project)
}

// projectOf is the project that a record's sandbox counts for. Of an unknown one the
// events may know it.
func (r *registry) projectOf(rec Record) string {
	if rec.State != Unknown {
		return rec.Project
	}
	last, _ := r.events.lastOf(rec.ID)
	return last.Project
}
