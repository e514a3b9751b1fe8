package template

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// The files of a template's directory beside those of its builds.
const (
	infoFile    = "template.json"
	spawnedFile = "spawned"
)

// indexLock is the name of the file whose lock a change of what is known of templates
// holds. Changes take no longer than a few writes.
const indexLock = "index.lock"

// index is what a Store has read of its templates. The directory's modification time
// says whether it is still so: each change sets it.
type index struct {
	mu    sync.Mutex
	read  bool
	at    time.Time // of the directory, when it was read
	all   []Info    // ordered by id
	bad   []string  // ids of those that cannot be read
	spawn map[string]spawned
}

// spawned counts the sandboxes of a template.
type spawned struct {
	Count int64     `json:"count"`
	At    time.Time `json:"at"`
}

// newTemplateID returns an id that no template has.
func newTemplateID() string { return strings.ToLower(rand.Text())[:20] }

// newUUID returns a random UUID.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return uuidOf(b, 4)
}

func uuidOf(b [16]byte, version byte) string {
	b[6], b[8] = b[6]&0x0f|version<<4, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// digestID and digestUUID are the ids of what older versions made without ids: the same
// each time that it is asked.
func digestID(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:20]
}

func digestUUID(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return uuidOf([16]byte(sum[:16]), 8)
}

// HostID is the id of the host's own template of that name. It is the same on all hosts.
func HostID(name string) string { return digestID("template", name) }

func (s *Store) templateDir(id string) string { return filepath.Join(s.templates(), id) }

// buildDir is the directory of a build. Both ids are checked: they may come from a
// record.
func (s *Store) buildDir(id, build string) (string, error) {
	if !idPattern.MatchString(id) || !uuidPattern.MatchString(build) {
		return "", errdefs.InvalidArgument.Errorf("template id %.40q or build id %.40q is malformed", id, build)
	}
	return filepath.Join(s.templates(), id, build), nil
}

// List returns what is known of all templates of all projects, ordered by id. A damaged
// one is left out and logged.
func (s *Store) List() ([]Info, error) {
	all, _, err := s.load()
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	list := slices.Clone(all)
	s.index.mu.Lock()
	defer s.index.mu.Unlock()
	for i := range list {
		count := s.index.spawn[list[i].ID]
		list[i].Spawned, list[i].SpawnedAt = count.Count, count.At
	}
	return list, nil
}

// Resolve is the function Resolve on the templates of the store. errdefs.Corrupt says
// that there is none of that name, and that damaged templates may have it.
func (s *Store) Resolve(project, text string) (Info, Build, error) {
	all, bad, err := s.load()
	if err != nil {
		return Info{}, Build{}, fmt.Errorf("look for a template: %w", err)
	}
	t, b, err := Resolve(all, project, text)
	if errors.Is(err, errdefs.NotFound) && len(bad) > 0 && t.ID == "" {
		err = errdefs.Corrupt.Errorf("%s, unless it is a damaged one (%s)", err, strings.Join(bad, ", "))
	}
	return t, b, err
}

// load returns what is known of all templates, and the ids of those that are damaged.
func (s *Store) load() (all []Info, bad []string, err error) {
	ix := &s.index
	ix.mu.Lock()
	defer ix.mu.Unlock()
	dir, err := os.Stat(s.templates())
	if err != nil {
		return nil, nil, err
	}
	if ix.read && ix.at.Equal(dir.ModTime()) {
		return ix.all, ix.bad, nil
	}
	entries, err := os.ReadDir(s.templates())
	if err != nil {
		return nil, nil, err
	}
	counts := map[string]spawned{}
	for _, e := range entries {
		if !idPattern.MatchString(e.Name()) || !e.IsDir() {
			continue
		}
		t, err := s.readInfo(e.Name())
		switch {
		case errors.Is(err, fs.ErrNotExist) && missing(s.templateDir(e.Name())):
			continue // it was removed
		case errdefs.CannotRead(err):
			return nil, nil, unreadable("template "+e.Name(), err)
		case err != nil:
			s.log.Warn("template is not usable", "template", e.Name(), "error", err)
			bad = append(bad, e.Name())
			continue
		}
		all = append(all, t)
		counts[t.ID] = s.readSpawned(t.ID)
		if known := ix.spawn[t.ID]; known.Count > counts[t.ID].Count {
			counts[t.ID] = known
		}
	}
	ix.read, ix.at, ix.all, ix.bad, ix.spawn = true, dir.ModTime(), all, bad, counts
	return all, bad, nil
}

// readInfo reads what is known of a template: errdefs.Corrupt if that is not what was
// written.
func (s *Store) readInfo(id string) (Info, error) {
	var t Info
	if !idPattern.MatchString(id) {
		return t, fs.ErrNotExist
	}
	err := sealed.Read(filepath.Join(s.templateDir(id), infoFile), &t)
	if err == nil && (t.ID != id || len(t.Builds) == 0) {
		err = errdefs.Corrupt.Errorf("it is of another template, or has no build")
	}
	return t, err
}

// change lets no other change what is known of templates, in any process, while fn does.
func (s *Store) change(ctx context.Context, fn func() error) error {
	s.changeMu.Lock()
	defer s.changeMu.Unlock()
	l, err := waitFlock(ctx, filepath.Join(s.templates(), indexLock), unix.LOCK_EX, nil)
	if err != nil {
		return err
	}
	defer l.unlock()
	err = fn()
	// Also after an error, which may be of something that came after a change.
	now := time.Now()
	touched := os.Chtimes(s.templates(), now, now)
	s.index.mu.Lock()
	s.index.read = false
	s.index.mu.Unlock()
	return errors.Join(err, touched)
}

// edit changes what is known of the template with an id and brings that to the disk.
// Builds of a snapshot to which no tag leads any more are removed.
func (s *Store) edit(id string, fn func(*Info) error) error {
	return s.change(context.Background(), func() error {
		t, err := s.readInfo(id)
		if errors.Is(err, fs.ErrNotExist) {
			return notFound(id)
		}
		if err != nil {
			return err
		}
		if err := fn(&t); err != nil {
			return err
		}
		return s.write(t)
	})
}

// write replaces what is known of a template that is there, and removes the builds of a
// snapshot to which no tag leads. Called within change.
func (s *Store) write(t Info) error {
	var gone []string
	if t.Source != "" {
		t.Builds, gone = t.tagged()
	}
	t.UpdatedAt = time.Now().UTC()
	if err := sealed.Write(filepath.Join(s.templateDir(t.ID), infoFile), t); err != nil {
		return err
	}
	for _, build := range gone {
		if err := s.dropSnapshot(filepath.Join(s.templateDir(t.ID), build)); err != nil {
			s.log.Error("build without a tag not removed", "template", t.ID, "build", build, "error", err) // Open tries again
		}
	}
	return nil
}

// tagged splits the builds by whether a tag leads to them.
func (t Info) tagged() (kept []Build, gone []string) {
	for _, b := range t.Builds {
		if slices.ContainsFunc(t.Tags, func(tag Tag) bool { return tag.Build == b.ID }) {
			kept = append(kept, b)
		} else {
			gone = append(gone, b.ID)
		}
	}
	return kept, gone
}

// lead makes a tag lead to a build.
func (t *Info) lead(tag, build string, at time.Time) {
	tags := slices.DeleteFunc(slices.Clone(t.Tags), func(have Tag) bool { return have.Name == tag })
	t.Tags = append(tags, Tag{Name: tag, Build: build, CreatedAt: at})
}

// publishBuild shows the sealed directory tmp as a build of a template: of the one with
// the id t.ID, if that is there, or of the new one that t says. Called within change.
func (s *Store) publishBuild(tmp string, t Info, b Build, tag string) (Info, error) {
	now := time.Now().UTC()
	b.Status, b.UpdatedAt, b.FinishedAt = StatusReady, now, now
	dir := s.templateDir(t.ID)
	have, err := s.readInfo(t.ID)
	fresh := errors.Is(err, fs.ErrNotExist) && missing(dir)
	switch {
	case err == nil:
		have.Source = t.Source
		t = have
	case fresh:
		t.CreatedAt = now
	case errdefs.CannotRead(err):
		return t, err
	default: // it is damaged, and takes what is there of it
		t.CreatedAt, t.Builds = now, s.foundBuilds(t.ID)
	}
	t.Builds = append([]Build{b}, t.Builds...)
	t.lead(tag, b.ID, now)
	if !fresh {
		if err := add(tmp, filepath.Join(dir, b.ID)); err != nil {
			return t, err
		}
		err := s.write(t)
		if err != nil && !errors.Is(err, atomicfile.ErrReplaced) { // it is not listed
			err = errors.Join(err, dropDir(filepath.Join(dir, b.ID)))
		}
		return t, err
	}
	t.UpdatedAt = now
	return t, s.showNew(t, func(made string) error { return add(tmp, filepath.Join(made, b.ID)) })
}

// writeNew shows a template that has no files yet. Called within change.
func (s *Store) writeNew(t Info) error {
	t.UpdatedAt = t.CreatedAt
	return s.showNew(t, func(string) error { return nil })
}

// showNew shows a new template, whose directory fill fills. Called within change.
func (s *Store) showNew(t Info, fill func(made string) error) error {
	made, err := tempDir(s.templates(), "new")
	if err != nil {
		return err
	}
	defer os.RemoveAll(made) // not there any more when all went well
	err = os.Chmod(made, 0o755)
	if err == nil {
		err = fill(made)
	}
	if err == nil {
		err = sealed.Write(filepath.Join(made, infoFile), t)
	}
	if err == nil {
		err = add(made, s.templateDir(t.ID))
	}
	return err
}

// SetPublic says whether all projects may use a template.
func (s *Store) SetPublic(id string, public bool) error {
	return s.edit(id, func(t *Info) error { t.Public = public; return nil })
}

// Tag makes tags lead to a build, wherever they led before. A build of a snapshot to
// which none leads any more is removed.
func (s *Store) Tag(id, build string, tags []string) error {
	return s.edit(id, func(t *Info) error {
		if _, ok := t.BuildOf(build); !ok || !uuidPattern.MatchString(build) {
			return errdefs.NotFound.Errorf("build %.40s of template %s does not exist", build, id)
		}
		now := time.Now().UTC()
		for _, tag := range tags {
			if _, err := ParseTag(tag); err != nil {
				return err
			}
			t.lead(tag, build, now)
		}
		return nil
	})
}

// Untag removes tags, of which one that is not there is as good; DefaultTag cannot be removed. A build of
// a snapshot to which none leads any more is removed.
func (s *Store) Untag(id string, tags []string) error {
	if slices.Contains(tags, DefaultTag) {
		return errdefs.InvalidArgument.Errorf("the tag '%s' cannot be removed", DefaultTag)
	}
	return s.edit(id, func(t *Info) error {
		left := slices.DeleteFunc(slices.Clone(t.Tags), func(tag Tag) bool { return slices.Contains(tags, tag.Name) })
		if t.Source != "" && len(left) == 0 {
			return errdefs.WrongState.Errorf("these are all tags of snapshot %s: delete it", id)
		}
		t.Tags = left
		return nil
	})
}

// Delete removes a template, or with a tag that of a snapshot, and the build to which no
// other leads: errdefs.NotFound if there is none. inUse, if not nil, says why it may not
// be removed; it is asked before the template is out of sight, and again when it is.
// VMs that run from it go on.
func (s *Store) Delete(ctx context.Context, id, tag string, inUse func(Info) error) error {
	if inUse == nil {
		inUse = func(Info) error { return nil }
	}
	return s.change(ctx, func() error {
		t, err := s.readInfo(id)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return notFound(id)
		case err != nil && (tag != "" || errdefs.CannotRead(err)):
			return err
		case err != nil: // a damaged one can be deleted as a whole, if it is not needed
			t = Info{ID: id}
		}
		if tag != "" {
			left := slices.DeleteFunc(slices.Clone(t.Tags), func(have Tag) bool { return have.Name == tag })
			if len(left) == len(t.Tags) {
				return errdefs.NotFound.Errorf("tag '%s' does not exist for template '%s'", tag, t.Name())
			}
			if len(left) > 0 {
				t.Tags = left
				return s.write(t)
			}
		}
		if err := firstOf(s.neededBySnapshots(t), func() error { return inUse(t) }); err != nil {
			return err
		}
		return s.dropTemplate(t, inUse)
	})
}

// neededBySnapshots says why a template may not be removed if snapshots of its
// sandboxes are mounted over it.
func (s *Store) neededBySnapshots(t Info) error {
	all, _, err := s.load()
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.ID != t.ID && slices.ContainsFunc(other.Builds, func(b Build) bool { return b.Over == t.ID }) {
			return errdefs.WrongState.Errorf("cannot delete template '%s' because there are snapshots of sandboxes made from it", t.ID)
		}
	}
	return nil
}

// dropTemplate removes a template's directory. The rename comes first: a create that
// has looked before it sees afterwards that the template is gone, or inUse sees the
// create.
func (s *Store) dropTemplate(t Info, inUse func(Info) error) error {
	dir := s.templateDir(t.ID)
	garbage, err := tempDir(s.templates(), "old")
	if err != nil {
		return noSpace("delete template", err)
	}
	moved := filepath.Join(garbage, t.ID)
	err = os.Rename(dir, moved)
	if err == nil {
		if err = inUse(t); err != nil {
			return errors.Join(err, os.Rename(moved, dir), os.RemoveAll(garbage))
		}
		err = flush(s.templates())
	}
	s.forgetChecks(dir)
	return errors.Join(err, os.RemoveAll(garbage))
}

// Prune removes the builds of templates to which no tag leads and that needed does not
// want, and forgets those that failed a day ago. What waits or is being built stays.
// Snapshots have no such builds.
func (s *Store) Prune(ctx context.Context, needed func(Info, Build) bool) error {
	all, _, err := s.load()
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range all {
		if _, loose := t.tagged(); len(loose) == 0 || t.Source != "" {
			continue
		}
		errs = append(errs, s.change(ctx, func() error { return s.prune(t.ID, needed) }))
	}
	return errors.Join(errs...)
}

// Unused is a build that Prune would remove.
type Unused struct {
	Template Info
	Build    Build
	// Bytes is how much becomes free with it alone.
	Bytes int64
}

// Unused returns what Prune would remove.
func (s *Store) Unused(needed func(Info, Build) bool) (list []Unused, err error) {
	all, _, err := s.load()
	if err != nil {
		return nil, err
	}
	for _, t := range all {
		for _, b := range t.Builds {
			if t.unused(all, b) && !needed(t, b) {
				own, _ := s.Sizes(t.ID, b.ID)
				list = append(list, Unused{t, b, own})
			}
		}
	}
	return list, nil
}

// unused says whether a build of t is kept for no tag, snapshot or reader. all are the
// templates of the store.
func (t Info) unused(all []Info, b Build) bool {
	below := func(other Info) bool {
		return slices.ContainsFunc(other.Builds, func(o Build) bool { return o.Over == t.ID && o.Base == b.Base })
	}
	return t.Source == "" && b.Status == StatusReady && len(t.Tags) > 0 &&
		!slices.ContainsFunc(t.Tags, func(tag Tag) bool { return tag.Build == b.ID }) && !slices.ContainsFunc(all, below)
}

// prune is Prune of one template. Called within change.
func (s *Store) prune(id string, needed func(Info, Build) bool) error {
	t, err := s.readInfo(id)
	if err != nil {
		return err
	}
	all, _, err := s.load()
	if err != nil {
		return err
	}
	listed := len(t.Builds)
	t.dropFailed(maxFailed, time.Now().Add(-keepFailed))
	var kept []Build
	var gone []string
	for _, b := range t.Builds {
		if t.unused(all, b) && !needed(t, b) {
			gone = append(gone, b.ID)
		} else {
			kept = append(kept, b)
		}
	}
	if len(kept) == listed {
		return nil
	}
	t.Builds = kept
	if err := s.write(t); err != nil {
		return err
	}
	var errs []error
	for _, build := range gone {
		errs = append(errs, dropDir(filepath.Join(s.templateDir(id), build)))
	}
	s.forgetChecks(s.templateDir(id))
	return errors.Join(errs...)
}

// CountSpawn counts a sandbox that was made from a template. The count survives the
// agent; the last ones may be lost with the host's power.
func (s *Store) CountSpawn(id string) {
	if _, _, err := s.load(); err != nil {
		return
	}
	s.index.mu.Lock()
	defer s.index.mu.Unlock()
	count, ok := s.index.spawn[id]
	if !ok {
		return // it was deleted
	}
	count = spawned{Count: count.Count + 1, At: time.Now().UTC()}
	s.index.spawn[id] = count
	if err := s.writeSpawned(id, count); err != nil {
		s.log.Warn("spawn not counted", "template", id, "error", err)
	}
}

// writeSpawned writes in place: a create need not wait for a disk.
func (s *Store) writeSpawned(id string, count spawned) error {
	data, err := json.Marshal(count)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.templateDir(id), spawnedFile), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	// Fixed in length, so that no rest of a longer one follows.
	_, err = f.WriteAt(fmt.Appendf(nil, "%-"+strconv.Itoa(spawnedBytes)+"s\n", data), 0)
	return err
}

// spawnedBytes is more than a count takes.
const spawnedBytes = 120

func (s *Store) readSpawned(id string) (count spawned) {
	data, err := os.ReadFile(filepath.Join(s.templateDir(id), spawnedFile))
	if err != nil || json.Unmarshal(data, &count) != nil || count.Count < 0 {
		return spawned{} // none, or one that was torn
	}
	return count
}

// removeUnlisted removes what a change that did not end left in the directories of
// templates: builds that are not listed, and what begins with a dot. Called within
// change.
func (s *Store) removeUnlisted() error {
	all, _, err := s.load()
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range all {
		dir := s.templateDir(t.ID)
		entries, err := os.ReadDir(dir)
		errs = append(errs, err)
		for _, e := range entries {
			listed := slices.ContainsFunc(t.Builds, func(b Build) bool { return b.ID == e.Name() })
			if strings.HasPrefix(e.Name(), ".") || uuidPattern.MatchString(e.Name()) && !listed {
				errs = append(errs, removeTree(filepath.Join(dir, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}

// foundBuilds returns the builds with layers that are in a template's directory.
func (s *Store) foundBuilds(id string) (found []Build) {
	entries, _ := os.ReadDir(s.templateDir(id))
	for _, e := range entries {
		dir := filepath.Join(s.templateDir(id), e.Name())
		var m buildManifest
		if !uuidPattern.MatchString(e.Name()) || readManifest(dir, manifestFile, &m, &m.manifest) != nil {
			continue
		}
		if _, err := layersOf(dir, m.manifest); err != nil { // it is a snapshot, or of no use
			continue
		}
		found = append(found, m.build(e.Name(), modified(dir)))
	}
	return found
}

// modified is when a directory was last changed.
func modified(dir string) time.Time {
	fi, err := os.Stat(dir)
	if err != nil {
		return time.Now().UTC()
	}
	return fi.ModTime().UTC()
}
