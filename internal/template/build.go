package template

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// The statuses of a build. It begins as waiting and ends as ready or as error.
const (
	StatusWaiting  = "waiting"
	StatusBuilding = "building"
	// StatusReady is the status of a build that sandboxes are made from.
	StatusReady = "ready"
	StatusError = "error"
)

// The reasons of builds that are not made any more.
const (
	reasonSuperseded  = "build was superseded by a newer one"
	reasonNeverBegun  = "the build was never started"
	reasonNotBegun    = "the host agent ended before the build was started"
	reasonInterrupted = "the host agent ended while the template was being built: build it again"
)

const (
	// maxFailed is how many builds that ended with an error a template lists.
	maxFailed = 20
	// maxWaiting is for how long a build may wait.
	maxWaiting = 24 * time.Hour
	// keepFailed is for how long Prune keeps them.
	keepFailed = 24 * time.Hour
)

// Reason says why a build ended with an error.
type Reason struct {
	Message string `json:"message"`
	// Step is where it happened: a step's number, counted from 1, or a name of a phase.
	Step string `json:"step,omitempty"`
}

// NewBuild is what is known of a build before it is made.
type NewBuild struct {
	// Project is empty for a template of the host's own.
	Project string
	// Name is that of a template of the project's, which may be new, or its id.
	Name string
	// Tags are to lead to the build when it is ready; DefaultTag if there are none.
	Tags []string

	VCPUs, MemMiB, DiskMiB int
}

// NewBuild adds a waiting build to a template, which it makes if there is none of the
// name. Builds of the template that wait for one of the same tags, or for a day, become
// error. A name that is a snapshot's is errdefs.WrongState, the id of another template
// errdefs.AlreadyExists. The build ends with Finish, or with SetBuild; with this process
// it becomes error.
func (s *Store) NewBuild(ctx context.Context, n NewBuild) (t Info, b Build, err error) {
	if _, err := ParseName(n.Name); err != nil {
		return t, b, err
	}
	if len(n.Tags) == 0 {
		n.Tags = []string{DefaultTag}
	}
	for _, tag := range n.Tags {
		if _, err := ParseTag(tag); err != nil {
			return t, b, err
		}
	}
	owner, err := s.claim()
	if err != nil {
		return t, b, fmt.Errorf("begin build: %w", err)
	}
	now := time.Now().UTC()
	b = Build{
		ID: newUUID(), Status: StatusWaiting, CreatedAt: now, UpdatedAt: now, Wants: slices.Compact(slices.Sorted(slices.Values(n.Tags))),
		VCPUs: n.VCPUs, MemMiB: n.MemMiB, DiskMiB: n.DiskMiB, Owner: owner,
	}
	err = s.change(ctx, func() error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		have, fresh, err := s.placeBuild(n)
		if err != nil {
			return err
		}
		t = have
		t.supersede(b, now)
		t.Builds = append([]Build{b}, t.Builds...)
		if t.dropFailed(maxFailed, time.Time{}); !fresh {
			return s.write(t)
		}
		t.CreatedAt = now
		return s.writeNew(t)
	})
	return t, b, noSpace("begin build", err)
}

// placeBuild returns the template that gets a build, and whether it is new. Called within
// change.
func (s *Store) placeBuild(n NewBuild) (t Info, fresh bool, err error) {
	all, _, err := s.load()
	if err != nil {
		return t, false, err
	}
	t = Info{ID: newTemplateID(), Project: n.Project, Names: []string{n.Name}}
	if n.Project == "" {
		t.ID = HostID(n.Name)
	}
	for _, have := range all {
		mine := have.Project == n.Project
		switch named := mine && slices.Contains(have.Names, n.Name); {
		case named && have.Source != "":
			return t, false, errdefs.WrongState.Errorf("%q is the name of a snapshot", n.Name)
		case have.ID == n.Name && (!mine || have.Source != ""):
			return t, false, errdefs.AlreadyExists.Errorf("%q is the id of another template", n.Name)
		case named, have.ID == n.Name:
			// What other processes wrote since, and it is not to be shared with readers.
			t, err := s.readInfo(have.ID)
			return t, false, err
		}
	}
	if missing(s.templateDir(t.ID)) {
		return t, true, nil
	}
	// It is damaged, and takes what is there of it.
	t.CreatedAt, t.Builds = time.Now().UTC(), s.foundBuilds(t.ID)
	return t, false, nil
}

// supersede ends the builds that wait for a tag of b's, and those that wait for too long.
func (t *Info) supersede(b Build, at time.Time) {
	t.Builds = slices.Clone(t.Builds)
	for i := range t.Builds {
		old := &t.Builds[i]
		switch {
		case old.Status != StatusWaiting:
		case slices.ContainsFunc(old.Wants, func(tag string) bool { return slices.Contains(b.Wants, tag) }):
			old.fail(Reason{Message: reasonSuperseded}, at)
		case at.Sub(old.CreatedAt) > maxWaiting:
			old.fail(Reason{Message: reasonNeverBegun}, at)
		}
	}
}

// fail makes a build an error.
func (b *Build) fail(why Reason, at time.Time) {
	b.Status, b.Reason, b.UpdatedAt, b.FinishedAt = StatusError, &why, at, at
	b.Base, b.Owner, b.Wants = "", 0, nil
}

// dropFailed forgets builds that ended with an error before a time, and those that are
// too many. At least one build stays.
func (t *Info) dropFailed(limit int, before time.Time) {
	var kept []Build
	failed := 0
	for _, b := range t.Builds {
		if b.Status == StatusError {
			failed++
			if len(kept) > 0 && (failed > limit || b.FinishedAt.Before(before)) {
				continue
			}
		}
		kept = append(kept, b)
	}
	t.Builds = kept
}

// editBuild changes one build of a template, and brings that to the disk.
func (s *Store) editBuild(ctx context.Context, id, build string, fn func(*Info, *Build) error) error {
	if _, err := s.buildDir(id, build); err != nil {
		return err
	}
	return s.change(ctx, func() error {
		t, err := s.readInfo(id)
		if errors.Is(err, fs.ErrNotExist) {
			return notFound(id)
		}
		if err != nil {
			return err
		}
		i := slices.IndexFunc(t.Builds, func(b Build) bool { return b.ID == build })
		if i < 0 || t.Source != "" {
			return errdefs.NotFound.Errorf("build %s of template %s does not exist", build, id)
		}
		b := &t.Builds[i]
		b.UpdatedAt = time.Now().UTC()
		if err := fn(&t, b); err != nil {
			return err
		}
		return s.write(t)
	})
}

// SetBuild moves a build from waiting to building, or to error, which removes its files.
// An error stays what it is, with its first reason. Every other move is
// errdefs.WrongState: Finish makes a build ready.
func (s *Store) SetBuild(ctx context.Context, id, build, status string, reason *Reason) error {
	failed := false
	err := s.editBuild(ctx, id, build, func(_ *Info, b *Build) error {
		switch {
		case status == StatusBuilding && b.Status == StatusWaiting:
			b.Status = StatusBuilding
		case status == StatusError && b.Status == StatusError:
		case status == StatusError && b.Status != StatusReady:
			why := Reason{Message: "the build failed"}
			if reason != nil {
				why = *reason
			}
			b.fail(why, b.UpdatedAt)
			failed = true
		default:
			return errdefs.WrongState.Errorf("build %s is %s and cannot become %.20q", build, b.Status, status)
		}
		return nil
	})
	if err == nil && failed {
		return s.dropBuild(id, build)
	}
	return noSpace("set status of build", err)
}

// dropBuild removes the files of a build that is no more. What stays is garbage for Open.
func (s *Store) dropBuild(id, build string) error {
	dir := filepath.Join(s.templateDir(id), build)
	if missing(dir) {
		return nil
	}
	s.forgetChecks(dir)
	return dropDir(dir)
}

// Finish makes a published build ready and has tags lead to it: those that NewBuild was
// told if there are none here.
func (s *Store) Finish(ctx context.Context, id, build string, tags []string) error {
	err := s.editBuild(ctx, id, build, func(t *Info, b *Build) error {
		if b.Status != StatusBuilding || b.Base == "" {
			return errdefs.WrongState.Errorf("build %s is %s, and has nothing to be ready with", build, b.Status)
		}
		if len(tags) == 0 {
			tags = b.Wants
		}
		for _, tag := range tags {
			if _, err := ParseTag(tag); err != nil {
				return err
			}
			t.lead(tag, build, b.UpdatedAt)
		}
		b.Status, b.FinishedAt, b.Owner, b.Wants = StatusReady, b.UpdatedAt, 0, nil
		return nil
	})
	return noSpace("finish build", err)
}

// claim returns the number by which other processes see that this one is alive. It is the
// position of a lock in the file of indexLock, which ends with the process and leaves
// nothing. An flock of the same file is another lock.
func (s *Store) claim() (int64, error) {
	s.ownerMu.Lock()
	defer s.ownerMu.Unlock()
	if s.owner != 0 {
		return s.owner, nil
	}
	f, err := os.OpenFile(filepath.Join(s.templates(), indexLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	at := 1 + rand.Int64N(1<<62)
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1})
	if err != nil {
		f.Close()
		return 0, fmt.Errorf("claim builds: %w", err)
	}
	s.owner, s.ownerFile = at, f
	return at, nil
}

// alive says whether the process that a number was given to is still there.
func (s *Store) alive(owner int64) bool {
	if owner <= 0 {
		return false
	}
	f, err := os.OpenFile(filepath.Join(s.templates(), indexLock), os.O_RDWR, 0)
	if err != nil {
		return true // not known
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: owner, Len: 1}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock)
	return err != nil || lock.Type != unix.F_UNLCK
}

// Close gives up the builds that this Store began and that are not finished: the next
// Open makes them an error, as after the end of the process.
func (s *Store) Close() error {
	s.ownerMu.Lock()
	defer s.ownerMu.Unlock()
	if s.ownerFile == nil {
		return nil
	}
	err := s.ownerFile.Close()
	s.owner, s.ownerFile = 0, nil
	return err
}

// failInterrupted makes builds an error whose process is gone, and removes their files.
// Called within change.
func (s *Store) failInterrupted() error {
	all, _, err := s.load()
	if err != nil {
		return err
	}
	var errs []error
	now := time.Now().UTC()
	for _, t := range all {
		var failed []string
		t.Builds = slices.Clone(t.Builds)
		for i := range t.Builds {
			b := &t.Builds[i]
			switch {
			case b.Status == StatusWaiting && !s.alive(b.Owner):
				b.fail(Reason{Message: reasonNotBegun}, now)
			case b.Status == StatusBuilding && !s.alive(b.Owner):
				b.fail(Reason{Message: reasonInterrupted}, now)
			default:
				continue
			}
			failed = append(failed, b.ID)
		}
		if len(failed) == 0 {
			continue
		}
		if err := s.write(t); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, build := range failed {
			s.log.Info("interrupted build", "template", t.ID, "build", build)
			errs = append(errs, s.dropBuild(t.ID, build))
		}
	}
	return errors.Join(errs...)
}

// Made is what the manifest of a build says.
type Made struct {
	Making
	Layers []Layer
}

// Inspect returns how a build was made: errdefs.NotFound if it has no files, as the state
// of a sandbox has none of these.
func (s *Store) Inspect(id, build string) (Made, error) {
	dir, err := s.buildDir(id, build)
	if err != nil {
		return Made{}, err
	}
	var m buildManifest
	err = readManifest(dir, manifestFile, &m, &m.manifest)
	_, lowest := m.Files[baseImage]
	if errors.Is(err, fs.ErrNotExist) && missing(dir) || err == nil && !lowest {
		return Made{}, errdefs.NotFound.Errorf("build %s of template %s has no layers", build, id)
	}
	layers, e := layersOf(dir, m.manifest)
	if err = cmp.Or(err, e); err != nil {
		return Made{}, damage(err)
	}
	return Made{Making: m.Making, Layers: layers}, nil
}

// Sizes is what a build takes on the disk with its boot snapshots, of a template's build
// or of all builds of it if build is empty: own is what becomes free with it, shared
// what other builds, or the cache of images, use too.
func (s *Store) Sizes(id, build string) (own, shared int64) {
	if !idPattern.MatchString(id) || build != "" && !uuidPattern.MatchString(build) {
		return 0, 0
	}
	type file struct {
		bytes int64
		left  uint64 // names of it that were not met
	}
	files := map[uint64]file{}
	_ = filepath.WalkDir(filepath.Join(s.templateDir(id), build), func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err != nil || !d.Type().IsRegular() || unix.Lstat(path, &st) != nil {
			return nil // it was removed
		}
		f, ok := files[st.Ino]
		if !ok {
			f = file{st.Blocks * 512, uint64(st.Nlink)}
		}
		f.left--
		files[st.Ino] = f
		return nil
	})
	for _, f := range files {
		if f.left == 0 {
			own += f.bytes
		} else {
			shared += f.bytes
		}
	}
	return own, shared
}
