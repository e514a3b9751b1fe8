package template

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Phase is how far a step is.
type Phase int

const (
	// Began is the step's first event.
	Began Phase = iota
	// Going carries progress.
	Going
	// Did is the last event of a step that made something.
	Did
	// Kept is the last event of a step that found all there.
	Kept
)

// Event tells what setup is doing.
type Event struct {
	Step  string
	Phase Phase
	// Detail is what is done just now, in a few words; may be empty.
	Detail string
	// Done and Total count bytes; Total is 0 when nobody knows it.
	Done, Total int64
}

// Progress receives the events of one setup, one at a time. It is called
// often and must return quickly. nil is allowed: nobody is told.
type Progress func(Event)

// step is one thing that setup does, as its progress is told.
type step struct {
	name string
	to   Progress
}

func (p Progress) begin(name string) step {
	s := step{name, p}
	s.tell(Event{Phase: Began})
	return s
}

func (s step) tell(e Event) {
	if s.to != nil {
		e.Step = s.name
		s.to(e)
	}
}

func (s step) detail(text string) { s.tell(Event{Phase: Going, Detail: text}) }
func (s step) bytes(text string, done, total int64) {
	s.tell(Event{Phase: Going, Detail: text, Done: done, Total: total})
}
func (s step) did(format string, args ...any) {
	s.tell(Event{Phase: Did, Detail: fmt.Sprintf(format, args...)})
}
func (s step) kept(format string, args ...any) {
	s.tell(Event{Phase: Kept, Detail: fmt.Sprintf(format, args...)})
}

// DebianKernel as Options.Kernel asks for Debian's cloud kernel.
const DebianKernel = "debian"

// Options of Setup.
type Options struct {
	// Envd is the path of the guest daemon that the initrd carries.
	Envd string
	// Kernel is DebianKernel, or the path of a vmlinux or bzImage; empty
	// keeps the kernel that is there and fetches Debian's if there is none.
	Kernel string
	// Modules is the directory of that kernel's modules, such as
	// /lib/modules/RELEASE; empty if all that the guest needs is built in.
	// Only with a path in Kernel.
	Modules string
}

// Setup makes what is missing: guest kernel, initrd, the template "minimal",
// and the seed of its overlays. What is complete is kept, so that it can be
// called again at any time; an interrupted call leaves nothing half-made in
// use. Two calls at once on one directory take turns. Wants root for the
// template, and the host's apt.
func Setup(ctx context.Context, s *Store, o Options, progress Progress) error {
	if o.Modules != "" && (o.Kernel == "" || o.Kernel == DebianKernel) {
		return errdefs.InvalidArgument.Errorf("modules are given without the kernel that they belong to")
	}
	if err := s.setupKernel(ctx, o, progress); err != nil {
		return fmt.Errorf("set up guest kernel: %w", err)
	}
	if err := s.setupMinimal(ctx, progress); err != nil {
		return fmt.Errorf("set up template %s: %w", DefaultName, err)
	}
	st := progress.begin("overlay seed")
	made, err := s.ensureSeed(ctx, DefaultOverlayMiB)
	if err != nil {
		return fmt.Errorf("set up overlay seed: %w", err)
	}
	if made {
		st.did("%d MiB", DefaultOverlayMiB)
	} else {
		st.kept("%d MiB", DefaultOverlayMiB)
	}
	return nil
}

// lockFor takes dir's lock for a step and removes what others left there.
func lockFor(ctx context.Context, dir string, st step) (*lock, error) {
	l, err := waitLock(ctx, dir, func() { st.detail("waiting for another setup to end") })
	if err != nil {
		return nil, err
	}
	if err := removeGarbage(dir); err != nil {
		l.unlock()
		return nil, err
	}
	return l, nil
}

// needSpace is errdefs.Exhausted unless dir's file system has that much free.
func needSpace(dir string, mib int64, what string) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look for free space: %w", err)
	}
	free := int64(st.Bavail) * st.Bsize >> 20
	if free < mib {
		return errdefs.Exhausted.Errorf("%s needs %d MiB of disk for a while and %d MiB are free: free some, or choose another --state-dir", what, mib, free)
	}
	return nil
}

func tempDir(parent, name string) (string, error) {
	return os.MkdirTemp(parent, "."+name+"-")
}
