package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// store keeps the records: one directory per sandbox with its record, overlay
// and console. Names with a leading dot are garbage.
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

func openStore(dir string) (store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return store{}, fmt.Errorf("make sandbox directory: %w", err)
	}
	return store{dir: dir}, nil
}

func (s store) path(id ID, elem ...string) string {
	return filepath.Join(append([]string{s.dir, string(id)}, elem...)...)
}

func (s store) overlay(id ID) string { return s.path(id, "overlay.ext4") }
func (s store) console(id ID) string { return s.path(id, "console.log") }
func (s store) record(id ID) string  { return s.path(id, "record.json") }

// reserve makes the directory of a new sandbox; fs.ErrExist says that the ID
// is taken.
func (s store) reserve(id ID) error {
	if err := s.at("reserve"); err != nil {
		return err
	}
	return errdefs.DiskFull(os.Mkdir(s.path(id), 0o700))
}

// save replaces the record atomically and durably.
func (s store) save(r Record) (err error) {
	defer func() { err = errdefs.DiskFull(err) }()
	data, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = s.at("save " + string(r.State))
	}
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	f, err := os.CreateTemp(s.path(r.ID), ".record-*")
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	defer os.Remove(f.Name()) // gone after the rename
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil && !r.LastActiveAt.IsZero() {
		err = os.Chtimes(f.Name(), time.Time{}, r.LastActiveAt)
	}
	if err == nil {
		err = os.Rename(f.Name(), s.record(r.ID))
	}
	if err == nil {
		err = syncDir(s.path(r.ID))
	}
	if err == nil {
		err = s.at("saved " + string(r.State))
	}
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// touch notes on disk that the sandbox was active. It survives the agent, and
// that is all it must do: no sandbox with a clock running survives the host.
func (s store) touch(id ID, at time.Time) error {
	return os.Chtimes(s.record(id), time.Time{}, at)
}

// load reads one record.
func (s store) load(id ID) (Record, error) {
	f, err := os.Open(s.record(id))
	if err != nil {
		return Record{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Record{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return Record{}, err
	}
	r, err := decodeRecord(data)
	if err != nil {
		return Record{}, err
	}
	if r.ID != id {
		return Record{}, fmt.Errorf("record of %q is in the directory of %q", r.ID, id)
	}
	r.LastActiveAt = info.ModTime().UTC()
	return r, nil
}

func decodeRecord(data []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return Record{}, fmt.Errorf("decode record: %w", err)
	}
	return r, r.validate()
}

// loadAll reads every record and clears garbage away. Directories whose record
// cannot be read are set aside and come back by name in bad, with the error.
func (s store) loadAll() (records []Record, bad map[string]error, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read sandbox directory: %w", err)
	}
	bad = map[string]error{}
	for _, e := range entries {
		name := e.Name()
		switch {
		case strings.HasPrefix(name, ".bad-"):
			// Kept for whoever wants to know; holds no disk.
		case strings.HasPrefix(name, "."):
			if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
				return nil, nil, fmt.Errorf("clear garbage: %w", err)
			}
		case idPattern.MatchString(name):
			r, err := s.load(ID(name))
			if err == nil {
				records = append(records, r)
				continue
			}
			bad[name] = err
			if err := s.setAside(ID(name)); err != nil {
				return nil, nil, err
			}
		}
	}
	return records, bad, nil
}

// setAside keeps what remains of an unreadable record but frees its disk.
func (s store) setAside(id ID) error {
	if err := remove(s.overlay(id)); err != nil {
		return fmt.Errorf("free disk of unreadable record: %w", err)
	}
	aside := filepath.Join(s.dir, ".bad-"+string(id))
	if err := os.RemoveAll(aside); err != nil {
		return fmt.Errorf("set record aside: %w", err)
	}
	if err := os.Rename(s.path(id), aside); err != nil {
		return fmt.Errorf("set record aside: %w", err)
	}
	return nil
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

// remove deletes a file; that it is not there is as good.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
