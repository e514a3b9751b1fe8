package sandbox

import (
	"fmt"
	"regexp"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

var (
	namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)
	// idLike is what could be meant as an ID.
	idLike = regexp.MustCompile(`(?i)^sb(-|[0-9a-f]{16})`)
)

// IsName says whether a sandbox can have that name. No name could be meant as an ID.
func IsName(name string) bool { return namePattern.MatchString(name) && !idLike.MatchString(name) }

func checkName(name string) error {
	if name != "" && !IsName(name) {
		return fmt.Errorf("name %.40q: want 1 to 63 letters, digits, '_', '.' or '-', beginning with a letter or digit and not like an id", name)
	}
	return nil
}

// holdName takes a name for a sandbox that is being made: errdefs.AlreadyExists if a
// sandbox of the project that has not ended has it. done ends the making: from then on
// the record says who has the name.
func (m *Manager) holdName(project, name string) (done func(), err error) {
	taken := owner{project, name}
	done, wait := m.names.tryHold(taken)
	if wait != nil {
		return nil, errdefs.AlreadyExists.Errorf("a sandbox with the name %s is being created", name)
	}
	if infos := m.named(name, func(l Labels) bool { return l.Project == project }); len(infos) > 0 && infos[0].State != Stopped {
		done()
		return nil, errdefs.AlreadyExists.Errorf("the name %s belongs to sandbox %s", name, infos[0].ID)
	}
	return done, nil
}

// named returns the sandboxes with a name whose labels fit: the one of each project that
// has not ended, or else the one that ended last.
func (r *registry) named(name string, fits func(Labels) bool) (found []Info) {
	byProject := map[string]int{}
	for _, info := range r.Select(Filter{Stopped: true, Name: name}) { // oldest first
		at, twice := byProject[info.Labels.Project]
		switch {
		case info.State == Stopping, !fits(info.Labels):
		case !twice:
			byProject[info.Labels.Project] = len(found)
			found = append(found, info)
		case found[at].State == Stopped:
			found[at] = info
		}
	}
	return found
}

// Named returns the ID of the sandbox that has a name in a project; in any project if that
// is nil. Of those that have the name, one that has not ended goes before the one that
// ended last. errdefs.NotFound if there is none, errdefs.InvalidArgument if several
// projects have one.
func (r *registry) Named(project *string, name string) (ID, error) {
	found := r.named(name, func(l Labels) bool { return project == nil || l.Project == *project })
	switch len(found) {
	case 0:
		return "", errdefs.NotFound.Errorf("no sandbox has the name %s", name)
	case 1:
		return found[0].ID, nil
	}
	var ids []string
	for _, info := range found {
		ids = append(ids, string(info.ID))
	}
	return "", errdefs.InvalidArgument.Errorf("sandboxes of several projects have the name %s; say an id: %s", name, strings.Join(ids, " "))
}
