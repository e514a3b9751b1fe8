package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// spoil changes the record of a sandbox on disk.
func (r *rig) spoil(id ID, change func([]byte) []byte) {
	r.t.Helper()
	path := filepath.Join(r.dir, "state", "sandboxes", string(id), "record.json")
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, change(data), 0o600)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// wantLeftAlone fails the test unless all that a running sandbox has is there.
func (r *rig) wantLeftAlone(id ID, slot network.Slot) {
	r.t.Helper()
	if !slices.Contains(r.host.Live(), string(id)) {
		r.t.Errorf("the VM of %s was killed", id)
	}
	for _, path := range []string{r.store.overlay(id), filepath.Join(r.dir, "run", string(id))} {
		if _, err := os.Stat(path); err != nil {
			r.t.Errorf("%v", err)
		}
	}
	r.net.mu.Lock()
	defer r.net.mu.Unlock()
	if !r.net.open[slot] || !r.net.taken[slot] {
		r.t.Errorf("slot %d is open: %v, taken: %v", slot, r.net.open[slot], r.net.taken[slot])
	}
}

func (r *rig) slot(id ID) network.Slot {
	r.t.Helper()
	b, err := r.find(id)
	if err != nil {
		r.t.Fatal(err)
	}
	return b.record().Slot
}

// What has an unusable record keeps all that it has, whatever is wrong with the
// record, until somebody decides: to mend it, or to destroy the sandbox.
func TestUnusableRecordDestroysNothing(t *testing.T) {
	newer := func(data []byte) []byte {
		return bytes.Replace(data[sealed.Len:], []byte(`"version": 1`), []byte(`"version": 7`), 1)
	}
	for name, c := range map[string]struct {
		spoil  func([]byte) []byte
		reason Reason
		detail string
	}{
		"newer":   {func(d []byte) []byte { return append([]byte("{"), newer(d)...) }, NotUnderstood, "record version 7 is newer than this agent's 1"},
		"torn":    {func(d []byte) []byte { return d[:len(d)/2] }, NotUnderstood, "record is damaged"},
		"empty":   {func([]byte) []byte { return nil }, NotUnderstood, "record is damaged"},
		"flipped": {func(d []byte) []byte { d = slices.Clone(d); d[len(d)/2] ^= 1; return d }, NotUnderstood, "its checksum does not match"},
	} {
		for _, mend := range []bool{true, false} {
			t.Run(name+map[bool]string{true: " and mended", false: " and destroyed"}[mend], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t)
					id, other := r.create(), r.create()
					slot := r.slot(id)
					before := r.taken()
					r.die()
					good, err := os.ReadFile(r.store.record(id))
					if err != nil {
						t.Fatal(err)
					}
					r.spoil(id, c.spoil)
					if err := os.Remove(r.store.previous(id)); err != nil {
						t.Fatal(err)
					}
					r.start()
					time.Sleep(2 * reconcileEvery)
					synctest.Wait()
					info := r.wantState(id, Unknown)
					if info.Reason != c.reason || !strings.Contains(info.Detail, c.detail) {
						t.Errorf("reason %s, detail %q", info.Reason, info.Detail)
					}
					r.wantLeftAlone(id, slot)
					if now := r.taken(); now.Sandboxes != before.Sandboxes || now.MemMiB != before.MemMiB {
						t.Errorf("capacity in use is %+v, was %+v", now, before)
					}
					r.wantState(other, Running)
					if fresh := r.create(); r.slot(fresh) == slot {
						t.Error("its slot was handed out")
					} else if err := r.Destroy(t.Context(), fresh); err != nil {
						t.Error(err)
					}
					wantClass(t, r.Pause(t.Context(), id), errdefs.WrongState)
					if _, err := r.Recover(t.Context(), id); err == nil {
						t.Error("recovered by nothing")
					}
					r.wantLeftAlone(id, slot)
					if mend {
						r.spoil(id, func([]byte) []byte { return good })
						if _, err := r.Recover(t.Context(), id); err != nil {
							t.Fatal(err)
						}
						r.wantState(id, Running)
						r.wantConsistent()
						if _, err := r.Exec(t.Context(), id, Command{Cmd: "x"}); err != nil {
							t.Error(err)
						}
					}
					for _, id := range []ID{id, other} {
						if err := r.Destroy(t.Context(), id); err != nil {
							t.Error(err)
						}
					}
					r.wantNothing()
					r.wantLegalHistory(t)
				})
			})
		}
	}
}

// A record that cannot be read at this moment is read again, and then the sandbox
// is what it was.
func TestUnreadableRecordIsReadAgain(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EACCES} {
		t.Run(errno.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				id := r.create()
				paused := r.create()
				if err := r.Pause(t.Context(), paused); err != nil {
					t.Fatal(err)
				}
				slot := r.slot(id)
				r.die()
				r.faults.on("record load", func(context.Context) error { return &os.PathError{Op: "open", Path: "/secret", Err: errno} })
				r.start()
				time.Sleep(2 * reconcileEvery)
				synctest.Wait()
				info := r.wantState(id, Unknown)
				if want := "read record: " + errno.Error(); info.Reason != Unreadable || info.Detail != want {
					t.Errorf("reason %s, detail %q, want %q", info.Reason, info.Detail, want)
				}
				r.wantLeftAlone(id, slot)
				r.faults.on("record load", nil)
				time.Sleep(2 * retryMost)
				synctest.Wait()
				r.wantState(id, Running)
				r.wantState(paused, Paused)
				r.wantConsistent()
				r.wantLegalHistory(t)
			})
		})
	}
}

// While it is not known which network an unknown sandbox has, none is removed.
func TestNetworksAreKeptForTheUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.create()
		slot := r.slot(id)
		r.die()
		r.spoil(id, func([]byte) []byte { return []byte("{") })
		if err := os.Remove(r.store.previous(id)); err != nil {
			t.Fatal(err)
		}
		const stray = network.Slot(4711)
		r.net.open[stray] = true
		r.faults.on("proc netns", func(context.Context) error { return syscall.EMFILE })
		r.start()
		time.Sleep(2 * reconcileEvery)
		synctest.Wait()
		r.wantLeftAlone(id, slot)
		if fresh := r.create(); r.slot(fresh) == slot {
			t.Error("its slot was handed out")
		}
		r.faults.on("proc netns", nil)
		time.Sleep(2 * reconcileEvery)
		synctest.Wait()
		r.wantLeftAlone(id, slot)
		if r.net.open[stray] || r.net.taken[stray] {
			t.Error("the stray slot is still there")
		}
		for _, info := range r.List(true) {
			if err := r.Destroy(t.Context(), info.ID); err != nil {
				t.Error(err)
			}
		}
		r.wantNothing()
	})
}

// The directory of the sandboxes is all that says which there are.
func TestUnreadableDirectoryStopsTheStart(t *testing.T) {
	r := newRig(t)
	id := r.create()
	slot := r.slot(id)
	r.die()
	r.faults.on("record list", func(context.Context) error { return syscall.EIO })
	if err := r.tryStart(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("the start ended with %v", err)
	}
	r.faults.on("record list", nil)
	r.net.mu.Lock()
	clear(r.net.taken) // of the agent that did not start
	r.net.mu.Unlock()
	r.start()
	r.wantState(id, Running)
	r.wantLeftAlone(id, slot)
}

// What an earlier agent set aside comes back, for somebody to decide about.
func TestRecordsThatWereSetAside(t *testing.T) {
	r := newRig(t)
	r.die()
	const id = ID("sb-0123456789abcdef")
	aside := filepath.Join(r.dir, "state", "sandboxes", ".bad-"+string(id))
	if err := errors.Join(os.Mkdir(aside, 0o700), os.WriteFile(filepath.Join(aside, "record.json"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.wantState(id, Unknown)
	if err := r.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	r.wantNothing()
}

// The previous record is believed only of a VM that is there.
func TestPreviousRecord(t *testing.T) {
	for _, dead := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			id := r.create()
			r.die()
			r.spoil(id, func(d []byte) []byte { return d[:len(d)-20] })
			if dead {
				r.host.Die(string(id))
			}
			r.start()
			want := Running
			if dead {
				want = Unknown
			}
			r.wantState(id, want)
			if _, err := os.Stat(r.store.overlay(id)); err != nil {
				t.Error(err)
			}
			if _, err := (store{dir: r.store.dir}).load(id); (err == nil) == dead {
				t.Errorf("its record: %v", err)
			}
		})
	}
}

// ruin makes an agent with a sandbox in each state, ends it, lets damage change one
// file, and starts the next. files are those there are, by what they are of; the
// file is one of them, or empty.
func ruin(t *testing.T, file string, damage func([]byte) []byte) (files []string) {
	r := newRig(t)
	running, paused, asleep := r.create(), r.create(), r.create()
	_, err := r.Snapshot(t.Context(), running, SnapshotRequest{Name: "snap", New: true})
	if err := errors.Join(err, r.Pause(t.Context(), paused), r.Hibernate(t.Context(), asleep, Hibernation{})); err != nil {
		t.Fatal(err)
	}
	told := map[uint64]Event{}
	highest := uint64(0)
	read := func() {
		t.Helper()
		last := uint64(0)
		if err := r.Events(t.Context(), 0, false, func(e Event) error {
			if was, ok := told[e.Cursor]; e.Cursor <= last || ok && !reflect.DeepEqual(was, e) {
				t.Errorf("event %+v after %d; told before was %+v", e, last, was)
			}
			if _, ok := told[e.Cursor]; !ok && e.Cursor <= highest {
				t.Errorf("event %+v is new, though %d was given", e, highest)
			}
			last, told[e.Cursor] = e.Cursor, e
			return nil
		}); err != nil {
			t.Errorf("events: %v", err)
		}
		for c := range told {
			highest = max(highest, c)
		}
	}
	read()
	r.die()
	roles := strings.NewReplacer(string(running), "running", string(paused), "paused", string(asleep), "asleep")
	var path string
	if err := filepath.WalkDir(r.dir, func(at string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		if info, err := e.Info(); err == nil && info.Size() > 0 {
			name := roles.Replace(strings.TrimPrefix(at, r.dir+"/"))
			if name = sameEachTime(name); name == file {
				path = at
			}
			files = append(files, name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if path == "" {
		r.start()
		return files
	}
	good, err := os.ReadFile(path)
	if err := errors.Join(err, os.Chmod(path, 0o600), os.WriteFile(path, damage(good), 0o600)); err != nil {
		t.Fatal(err)
	}
	r.start()
	time.Sleep(2 * time.Minute)
	synctest.Wait()
	read()

	for id, may := range map[ID][]State{running: {Running, Unknown}, paused: {Paused, Running, Unknown}, asleep: {Hibernated, Unknown}} {
		info, err := r.Get(id)
		if err != nil || !slices.Contains(may, info.State) {
			t.Errorf("%s became %+v, %v", id, info, err)
		}
		if id != asleep && !slices.Contains(r.host.Live(), string(id)) {
			t.Errorf("the VM of %s is gone", id)
		}
		if id == asleep {
			if _, err := os.Stat(filepath.Join(r.store.snapshot(id), snapshotOverlay)); err != nil {
				t.Errorf("the disk of a hibernated sandbox: %v", err)
			}
			if err := r.Resume(t.Context(), id); err != nil && errdefs.ClassOf(err) == nil {
				t.Errorf("resume: %v", err)
			}
			continue
		}
		if _, err := os.Stat(r.store.overlay(id)); err != nil {
			t.Errorf("the disk of %s: %v", id, err)
		}
	}
	if _, err := r.Create(t.Context(), CreateRequest{Template: "snap"}); err != nil && errdefs.ClassOf(err) == nil {
		t.Errorf("create from the snapshot: %v", err)
	}
	read()
	// Mended, all is what it was.
	for id, want := range map[ID]State{running: Running, paused: Paused, asleep: Hibernated} {
		if info, err := r.Get(id); err != nil || info.State != Unknown {
			continue
		}
		err := os.WriteFile(path, good, 0o600)
		if err == nil {
			_, err = r.Recover(t.Context(), id)
		}
		if err != nil {
			t.Errorf("recover: %v", err)
		}
		r.wantState(id, want)
	}
	for _, info := range r.List(true) {
		if err := r.Destroy(t.Context(), info.ID); err != nil {
			t.Errorf("destroy: %v", err)
		}
	}
	r.wantNothing()
	return files
}

// sameEachTime replaces what is another at each time in the name of a file.
func sameEachTime(name string) string {
	name = templateIDs.ReplaceAllString(readyKeys.ReplaceAllString(name, "ready/key/"), "templates/id/")
	return buildIDs.ReplaceAllString(name, "/build/")
}

// What is another at each time, in the names of files.
var (
	readyKeys   = regexp.MustCompile(`^ready/[^/]+/`)
	templateIDs = regexp.MustCompile(`templates/[a-z0-9]{20}/`)
	buildIDs    = regexp.MustCompile(`/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/`)
)

const (
	eventsFile = "state/events.jsonl"
	// eventLinesOfRuin is how many lines ruin's first agent writes into it.
	eventLinesOfRuin = 10
)

// flipLine flips a bit in one line of a file, whose others stay as they are.
func flipLine(t *testing.T, n int) func([]byte) []byte {
	return func(data []byte) []byte {
		lines := bytes.SplitAfter(slices.Clone(data), []byte("\n"))
		if len(lines) != eventLinesOfRuin+1 {
			t.Errorf("there are %d lines, not %d", len(lines)-1, eventLinesOfRuin)
		}
		lines[n][len(lines[n])/2] ^= 1
		return bytes.Join(lines, nil)
	}
}

// TestDamageAnywhere flips and cuts every file of the state directory at random,
// starts an agent on it, and demands of every sandbox that it is what it was, an
// older state of itself, or that a clear error says why not; and that it is what
// it was when the file is mended. No cursor of the events is given twice. Each line of
// the events is flipped, wherever in the file the line is.
func TestDamageAnywhere(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	rounds := 2
	if n, err := strconv.Atoi(os.Getenv("WRENN_TEST_DAMAGE")); err == nil {
		rounds = n
	}
	var files []string
	synctest.Test(t, func(t *testing.T) { files = ruin(t, "", nil) })
	if len(files) < 10 {
		t.Errorf("there are only the files %v", files)
	}
	for i := range eventLinesOfRuin {
		t.Run(fmt.Sprintf("%s/line %d", eventsFile, i), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { ruin(t, eventsFile, flipLine(t, i)) })
		})
	}
	for _, file := range files {
		for n := range rounds {
			// The file is another one each time, so the place is relative.
			where, bit := rnd.Float64(), rnd.IntN(8)
			for kind, damage := range map[string]func([]byte) []byte{
				"cut": func(d []byte) []byte { return d[:int(where*float64(len(d)))] },
				"flip": func(d []byte) []byte {
					d = slices.Clone(d)
					d[int(where*float64(len(d)))] ^= 1 << bit
					return d
				},
				"garble": func(d []byte) []byte {
					d = slices.Clone(d)
					from := int(where * float64(len(d)))
					for i := from; i < min(len(d), from+512); i++ {
						d[i] = byte(i * 7)
					}
					return d
				},
				"empty": func([]byte) []byte { return nil },
			} {
				if kind == "empty" && n > 0 {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s %d %.4f bit %d", file, kind, n, where, bit), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { ruin(t, file, damage) })
				})
			}
		}
	}
}
