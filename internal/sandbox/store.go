package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// store keeps the files of sandboxes: one directory per sandbox with its record, the
// record before that, overlay, console and, if it is hibernated, its snapshot. Names
// with a leading dot are garbage.
type store struct {
	dir string
	// hook is called before and after each change on disk; tests let it fail.
	hook func(step string) error
}

func (s store) at(step string) error {
	if s.hook == nil {
		return nil
	}
	return s.hook(step)
}

func (s store) path(id ID, elem ...string) string {
	return filepath.Join(append([]string{s.dir, string(id)}, elem...)...)
}

func (s store) overlay(id ID) string { return s.path(id, "overlay.ext4") }

// initImage is the image of init of a sandbox whose driver takes one: a name of the file
// that its guest reads, which the host's own preparation replaces by another.
func (s store) initImage(id ID) string { return s.path(id, initName) }

func (s store) console(id ID) string { return s.path(id, "console.log") }
func (s store) record(id ID) string  { return s.path(id, "record.json") }

// previous is the record that the present one replaced.
func (s store) previous(id ID) string { return s.path(id, "record.prev.json") }

// reserve makes the directory of a new sandbox; fs.ErrExist says that the ID
// is taken.
func (s store) reserve(id ID) error {
	if err := s.at("reserve"); err != nil {
		return err
	}
	return errdefs.DiskFull(os.Mkdir(s.path(id), 0o700))
}

// errUnsettled is the error of a save of which it is not known whether the record on
// disk is the old one or the new one.
var errUnsettled = errors.New("the record on disk may be either one")

// unsettled is an error that is errUnsettled, too.
type unsettled struct{ error }

func (u unsettled) Unwrap() error      { return u.error }
func (unsettled) Is(target error) bool { return target == errUnsettled }

// save replaces the record atomically and durably. The one before is kept beside
// it. On error the record is the old one, unless the error is errUnsettled.
func (s store) save(r Record) (err error) {
	defer func() {
		if err != nil {
			err = errdefs.DiskFull(fmt.Errorf("write record: %w", err))
		}
	}()
	tmp, err := s.writeRecord(r)
	if err != nil {
		return err
	}
	defer os.Remove(tmp) // gone after the rename
	if err := s.keepPrevious(r.ID); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.record(r.ID)); err != nil {
		return err
	}
	// A VM does not outlive the host: after a crash it does not matter whether the record
	// says running or paused.
	if r.State != Paused {
		err = atomicfile.SyncDir(s.path(r.ID))
	}
	if err == nil {
		err = s.at("saved " + string(r.State))
	}
	if err == nil {
		return nil
	}
	if terr := s.takeBack(r.ID); terr != nil {
		return unsettled{fmt.Errorf("%w; then take it back: %w", err, terr)}
	}
	return err
}

// writeRecord writes a record durably into a file beside the present one.
func (s store) writeRecord(r Record) (path string, err error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = s.at("save " + string(r.State))
	}
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(s.path(r.ID), ".record-*")
	if err != nil {
		return "", err
	}
	_, err = f.Write(append(sealed.Seal(data), '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil && !r.LastActiveAt.IsZero() {
		err = os.Chtimes(f.Name(), time.Time{}, r.LastActiveAt)
	}
	if err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// keepPrevious gives the present record its second name. A crash after the first
// of the two steps leaves the record itself.
func (s store) keepPrevious(id ID) error {
	if err := remove(s.previous(id)); err != nil {
		return err
	}
	if err := os.Link(s.record(id), s.previous(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// takeBack puts the previous record in the place of the present one. That takes no
// space on the disk.
func (s store) takeBack(id ID) error {
	data, _, err := readRecord(s.previous(id))
	if errors.Is(err, fs.ErrNotExist) { // it is the first record: there is none again
		return errors.Join(remove(s.record(id)), atomicfile.SyncDir(s.path(id)))
	}
	if err != nil {
		return err
	}
	if old, err := decodeRecord(data); err == nil {
		if err := s.at("save " + string(old.State)); err != nil {
			return err
		}
	}
	again := s.path(id, ".record-again")
	if err := errors.Join(remove(again), os.Link(s.previous(id), again)); err != nil {
		return err
	}
	return errors.Join(os.Rename(again, s.record(id)), atomicfile.SyncDir(s.path(id)))
}

// touch notes on disk that the sandbox was active. It survives the agent, and
// that is all it must do: no sandbox with a clock running survives the host.
func (s store) touch(id ID, at time.Time) error {
	return os.Chtimes(s.record(id), time.Time{}, at)
}

// load reads one record.
func (s store) load(id ID) (Record, error) { return s.loadFile(id, s.record(id)) }

func (s store) loadFile(id ID, path string) (Record, error) {
	if err := s.at("load"); err != nil {
		return Record{}, fmt.Errorf("read record: %w", err)
	}
	data, modified, err := readRecord(path)
	if err != nil {
		return Record{}, fmt.Errorf("read record: %w", err)
	}
	r, err := decodeRecord(data)
	if err != nil {
		return Record{}, err
	}
	if r.ID != id {
		return Record{}, fmt.Errorf("record of %q is in the directory of %q", r.ID, id)
	}
	r.LastActiveAt = modified
	if now := time.Now().UTC(); now.Before(modified) { // the clock was ahead
		r.LastActiveAt = now
	}
	return r, nil
}

// maxRecordBytes bounds what is read of a record; they have about 1 KiB.
const maxRecordBytes = 1 << 20

func readRecord(path string) (data []byte, modified time.Time, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, time.Time{}, err
	}
	data, err = io.ReadAll(io.LimitReader(f, maxRecordBytes))
	return data, info.ModTime().UTC(), err
}

// errNewer is the error of a record that a newer agent wrote.
var errNewer = errors.New("record is of a newer version")

func decodeRecord(data []byte) (Record, error) {
	data, err := unseal(data)
	if err != nil {
		return Record{}, fmt.Errorf("record is damaged: %w", err)
	}
	var v struct{ Version int }
	if json.Unmarshal(data, &v) == nil && v.Version > recordVersion {
		return Record{}, newerRecord(v.Version)
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return Record{}, fmt.Errorf("record is damaged: %w", err)
	}
	if r.BootKey != "" && (r.State == Creating || r.State == Stopping) {
		r.State = Waiting // earlier agents wrote these states, with the key as a mark
	}
	return r, r.validate()
}

type newerRecord int

func (v newerRecord) Error() string {
	return fmt.Sprintf("record version %d is newer than this agent's %d", int(v), recordVersion)
}

func (newerRecord) Is(target error) bool { return target == errNewer }

// loadAll reads every record. What stands in for one that cannot be used is
// unknown; see unknown. Garbage is cleared away, as far as that is possible:
// what was not is in left.
func (s store) loadAll() (records []Record, left, err error) {
	if err := s.at("list"); err != nil {
		return nil, nil, fmt.Errorf("read sandbox directory: %w", err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read sandbox directory: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if aside, ok := strings.CutPrefix(name, ".bad-"); ok && idPattern.MatchString(aside) {
			// Earlier agents set away what they could not read.
			if err := os.Rename(filepath.Join(s.dir, name), s.path(ID(aside))); err != nil {
				left = errors.Join(left, err) // there is another of that name
				continue
			}
			name = aside
		}
		switch {
		case strings.HasPrefix(name, "."):
			left = errors.Join(left, os.RemoveAll(filepath.Join(s.dir, name)))
		case idPattern.MatchString(name):
			r, err := s.load(ID(name))
			if errors.Is(err, fs.ErrNotExist) && s.blank(ID(name)) {
				left = errors.Join(left, s.forget(ID(name)))
				continue
			}
			if err != nil {
				r = s.unknown(ID(name), err)
			}
			records = append(records, r)
		}
	}
	return records, left, nil
}

// blank says whether a directory was made for a sandbox of which nothing else
// was: its record comes first.
func (s store) blank(id ID) bool {
	entries, err := os.ReadDir(s.path(id))
	return err == nil && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		return !strings.HasPrefix(e.Name(), ".record-")
	})
}

// unknown stands in for a record that load does not return. It is never written:
// what is on disk may be of use to a person who understands it. Its sizes are
// what can be made out, zero where nothing can.
func (s store) unknown(id ID, err error) Record {
	r := Record{Version: recordVersion, ID: id, State: Unknown, Reason: NotUnderstood, Detail: pathless(err)}
	if errdefs.CannotRead(err) {
		r.Reason = Unreadable
	}
	if info, err := os.Stat(s.path(id)); err == nil {
		r.CreatedAt = info.ModTime().UTC()
	}
	r.StateAt, r.LastActiveAt = r.CreatedAt, r.CreatedAt
	for _, path := range []string{s.previous(id), s.record(id)} {
		data, _, err := readRecord(path)
		if err != nil {
			continue
		}
		var hint struct{ VCPUs, MemMiB, DiskMiB int }
		_ = json.Unmarshal(data, &hint) // what it got is what there is
		if hint.VCPUs >= 1 && hint.VCPUs <= MaxVCPUs && hint.MemMiB >= MinMemMiB && hint.MemMiB <= MaxMemMiB &&
			hint.DiskMiB >= 0 && hint.DiskMiB <= maxHintMiB {
			r.VCPUs, r.MemMiB, r.DiskMiB = hint.VCPUs, hint.MemMiB, hint.DiskMiB
		}
	}
	return r
}

// maxHintMiB bounds the size of a disk that is believed of a record that is not.
const maxHintMiB = 16 << 20

// pathless is the text of an error without the host's paths.
func pathless(err error) string {
	text := err.Error()
	var of *fs.PathError
	if errors.As(err, &of) {
		text = strings.ReplaceAll(text, of.Error(), of.Err.Error())
	}
	return text
}

// forget removes all of a sandbox's files. The rename comes first, so that a
// crash in between leaves garbage and no half record.
func (s store) forget(id ID) error {
	if err := s.at("forget"); err != nil {
		return err
	}
	garbage := filepath.Join(s.dir, "."+string(id))
	if err := os.Rename(s.path(id), garbage); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget record: %w", err)
	}
	if err := os.RemoveAll(garbage); err != nil {
		return fmt.Errorf("forget record: %w", err)
	}
	return nil
}

// tail returns at most n bytes from the end of the sandbox's console.
func (s store) tail(id ID, n int64) ([]byte, error) {
	data, err := vmm.Tail(s.console(id), n)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read console: %w", err)
	}
	return data, nil
}

// lines returns the lines of the sandbox's console.
func (s store) lines(id ID) ([]vmm.Line, error) {
	lines, err := vmm.Lines(s.console(id))
	if err != nil {
		return nil, fmt.Errorf("read console: %w", err)
	}
	return lines, nil
}

// remove deletes a file; that it is not there is as good.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
