package template

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

const (
	// DefaultName is the template that a sandbox gets when none is named.
	DefaultName = "minimal"
	// baseName is what E2B's clients ask for if they are told no template. It is
	// the default template unless a template has the name.
	baseName = "base"
	// DefaultTag is the tag of a reference that has none.
	DefaultTag = "default"
)

// Info is what is known of a template without its contents. A snapshot that a user
// made is a template, too. Slices are not to be changed.
type Info struct {
	// ID is 20 of a-z and 0-9, and never changes.
	ID string `json:"id"`
	// Project is empty for the host's own templates, which every project may use.
	Project string `json:"project,omitempty"`
	// Public templates may be used by every project.
	Public bool `json:"public,omitempty"`
	// Names are unique in their project; a snapshot may have none.
	Names []string `json:"names,omitempty"`
	// Source is the sandbox that a snapshot was made of at last; empty for other
	// templates.
	Source string `json:"source,omitempty"`
	// Builds are newest first, at least one.
	Builds    []Build   `json:"builds"`
	Tags      []Tag     `json:"tags"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`

	// Spawned is how many sandboxes were made from it, SpawnedAt when the last one was.
	Spawned   int64     `json:"-"`
	SpawnedAt time.Time `json:"-"`
}

// Build is one content of a template.
type Build struct {
	// ID is a UUID.
	ID string `json:"id"`
	// Status is one of StatusWaiting, StatusBuilding, StatusReady and StatusError.
	Status     string    `json:"status"`
	CreatedAt  time.Time `json:"created_at"`
	UpdatedAt  time.Time `json:"updated_at"`
	FinishedAt time.Time `json:"finished_at,omitzero"`

	// What a sandbox has if its creator says nothing else.
	VCPUs   int `json:"vcpus"`
	MemMiB  int `json:"mem_mib"`
	DiskMiB int `json:"disk_mib"`
	// EnvdVersion is of the guest in a snapshot's memory; empty for what boots.
	EnvdVersion string `json:"envd_version,omitempty"`
	// Base is the digest of the layers: of the build's own, or of those that the disk
	// of a snapshot is mounted over, which are of the template Over. It is empty while
	// there are none.
	Base string `json:"base,omitempty"`
	Over string `json:"over,omitempty"`

	// Reason is why the build is an error.
	Reason *Reason `json:"reason,omitempty"`
	// Wants are the tags that are to lead to a build that is waiting or building, and
	// Owner is the process that makes it: see claim.
	Wants []string `json:"wants,omitempty"`
	Owner int64    `json:"owner,omitempty"`
}

// Tag leads to a build of its template.
type Tag struct {
	Name      string    `json:"name"`
	Build     string    `json:"build"`
	CreatedAt time.Time `json:"created_at"`
}

// Name is the first name, or the id of a template that has none.
func (t Info) Name() string {
	if len(t.Names) > 0 {
		return t.Names[0]
	}
	return t.ID
}

// Is says whether the template has that id or name of its own. What "base" leads to where no
// template has the name is not base.
func (t Info) Is(name string) bool { return t.ID == name || slices.Contains(t.Names, name) }

// BuildOf returns the build that a tag, or a build's own id, leads to. No tag is
// DefaultTag.
func (t Info) BuildOf(tag string) (Build, bool) {
	id := tag
	if !uuidPattern.MatchString(tag) {
		i := slices.IndexFunc(t.Tags, func(have Tag) bool { return have.Name == cmp.Or(tag, DefaultTag) })
		if i < 0 {
			return Build{}, false
		}
		id = t.Tags[i].Build
	}
	i := slices.IndexFunc(t.Builds, func(b Build) bool { return b.ID == id })
	if i < 0 {
		return Build{}, false
	}
	return t.Builds[i], true
}

var (
	namePattern = regexp.MustCompile(`^[a-z0-9_-][a-z0-9._-]{0,127}$`)
	twoDots     = regexp.MustCompile(`\.\.`)
	tagPattern  = regexp.MustCompile(`^[a-z0-9_.-]{1,128}$`)
	uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	idPattern   = regexp.MustCompile(`^[a-z0-9]{20}$`)
)

// ParseName checks a template's name: 1 to 128 of a-z, 0-9, dot, underscore
// and dash, the first no dot, no two dots in a row. Any other name is
// errdefs.InvalidArgument.
func ParseName(name string) (string, error) { return parseName("template", name) }

func parseName(what, name string) (string, error) {
	if !namePattern.MatchString(name) || twoDots.MatchString(name) {
		return "", errdefs.InvalidArgument.Errorf(
			"%s name %s: want 1 to 128 of a-z, 0-9, '.', '_', '-', without a dot at the beginning and without '..'", what, shown(name))
	}
	return name, nil
}

// ParseTag checks the name of a tag, which must not look like a build's id. Any
// other text is errdefs.InvalidArgument.
func ParseTag(tag string) (string, error) {
	if !tagPattern.MatchString(tag) || uuidPattern.MatchString(tag) {
		return "", errdefs.InvalidArgument.Errorf("tag %s: want up to 128 of a-z, 0-9, '_', '.' and '-', and no UUID", shown(tag))
	}
	return tag, nil
}

// shown is a caller's text in an error.
func shown(text string) string {
	if len(text) > 80 {
		text = strings.ToValidUTF8(text[:80], "") + "…"
	}
	return strconv.Quote(text)
}

// Reference is what a caller writes for a template: [project/]name[:tag], where the
// name may be an id and the tag a build's id. Without a tag it is empty.
type Reference struct {
	Project, Name, Tag string
}

// ParseReference reads a reference, in which space around it and the case of letters do
// not count. What is none is errdefs.InvalidArgument.
func ParseReference(text string) (Reference, error) {
	rest := strings.ToLower(strings.TrimSpace(text))
	var r Reference
	if project, name, ok := strings.Cut(rest, "/"); ok {
		r.Project, rest = project, name
		if !namePattern.MatchString(project) {
			return r, errdefs.InvalidArgument.Errorf("template %s: a namespace has a-z, 0-9, _ and -", shown(text))
		}
	}
	name, tag, hasTag := strings.Cut(rest, ":")
	if _, err := ParseName(name); err != nil {
		return r, err
	}
	if hasTag && !tagPattern.MatchString(tag) {
		return r, errdefs.InvalidArgument.Errorf("template %s: a tag has up to 128 of a-z, 0-9, _, . and -", shown(text))
	}
	r.Name, r.Tag = name, tag
	return r, nil
}

// Visible says whether a project may use the template.
func (t Info) Visible(project string) bool {
	return t.Project == project || t.Project == "" || t.Public
}

// Lookup returns the template that a reference names to a project: by id, by a name of
// the project's, by a name of the host's, in this order. "base" is the default template
// unless another has that name. errdefs.NotFound if the project has and sees none.
func Lookup(all []Info, project, text string) (Info, Reference, error) {
	ref, err := ParseReference(text)
	if err != nil {
		return Info{}, ref, err
	}
	named := func(project, name string) func(Info) bool {
		return func(t Info) bool { return t.Project == project && slices.Contains(t.Names, name) }
	}
	var ways []func(Info) bool
	if ref.Project == "" {
		ways = append(ways, func(t Info) bool { return t.ID == ref.Name }, named(project, ref.Name))
	} else {
		ways = append(ways, named(ref.Project, ref.Name))
	}
	if ref.Project == "" || ref.Project == project { // the host's own may be written with the caller's project
		ways = append(ways, named("", ref.Name))
		if ref.Name == baseName {
			ways = append(ways, named("", DefaultName))
		}
	}
	for _, way := range ways {
		if i := slices.IndexFunc(all, func(t Info) bool { return t.Visible(project) && way(t) }); i >= 0 {
			return all[i], ref, nil
		}
	}
	return Info{}, ref, notFound(text)
}

func notFound(text string) error {
	return errdefs.NotFound.Errorf("template '%s' not found", strings.Trim(shown(text), `"`))
}

// Resolve returns the template and the build that a sandbox is made from if a project
// says text: see Lookup. Without a tag, a template that was never tagged is its newest
// ready build, or its newest. errdefs.NotFound if there is no such template or tag, errdefs.WrongState if
// the build is not ready.
func Resolve(all []Info, project, text string) (Info, Build, error) {
	t, ref, err := Lookup(all, project, text)
	if err != nil {
		return Info{}, Build{}, err
	}
	b, ok := t.BuildOf(ref.Tag)
	switch {
	case !ok && ref.Tag == "" && len(t.Tags) == 0 && len(t.Builds) > 0:
		b = t.Builds[max(0, slices.IndexFunc(t.Builds, func(b Build) bool { return b.Status == StatusReady }))]
	case !ok:
		return Info{}, Build{}, errdefs.NotFound.Errorf("tag '%s' does not exist for template '%s'",
			cmp.Or(ref.Tag, DefaultTag), strings.Trim(shown(text), `"`))
	}
	if b.Status != StatusReady {
		return Info{}, Build{}, errdefs.WrongState.Errorf("build %s of template '%s' is %s, not ready",
			b.ID, strings.Trim(shown(text), `"`), b.Status)
	}
	return t, b, nil
}
