package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// The kinds of items.
const (
	KindCache  = "cache"
	KindUpload = "upload"
	KindLog    = "log"
)

// Item is a thing that builds keep on the disk.
type Item struct {
	Kind   string
	Name   string
	Bytes  int64
	UsedAt time.Time

	path string // of an entry of the cache, its key
}

// Pruning says what Prune may remove.
type Pruning struct {
	// OlderThan keeps what was used since then; zero removes all that no build uses now.
	OlderThan time.Duration
	// DryRun removes nothing.
	DryRun bool
}

// Prune removes from the cache, the uploads and the logs what no build uses, and returns
// what it removed. A log goes when its build is gone.
func (e *Engine) Prune(ctx context.Context, p Pruning) ([]Item, error) {
	items, err := e.Usage(ctx)
	if err != nil {
		return nil, err
	}
	limit := time.Now().Add(-p.OlderThan)
	orphans := e.cache.orphans(items)
	var removed []Item
	for _, it := range items {
		if err := context.Cause(ctx); err != nil {
			return removed, err
		}
		if it.UsedAt.After(limit) && !(it.Kind == KindCache && orphans[it.path]) || !e.unused(it) {
			continue
		}
		if !p.DryRun {
			gone, err := e.remove(it)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return removed, fmt.Errorf("prune builds: %w", err)
			}
			if !gone {
				continue
			}
		}
		removed = append(removed, it)
	}
	if !p.DryRun {
		e.dropResults()
	}
	return removed, nil
}

// dropResults forgets results whose builds are gone.
func (e *Engine) dropResults() {
	entries, _ := os.ReadDir(filepath.Join(e.cfg.Dir, resultsDir))
	for _, entry := range entries {
		r, ok := e.cache.result(entry.Name())
		if _, _, err := e.lookup(r.Template, r.Build); ok && errors.Is(err, errdefs.NotFound) {
			_ = os.Remove(filepath.Join(e.cfg.Dir, resultsDir, entry.Name())) // a guess that stays is no harm
		}
	}
}

// unused says whether no build uses an item.
func (e *Engine) unused(it Item) bool {
	switch it.Kind {
	case KindCache:
		return !e.cache.isPinned(it.path)
	case KindLog:
		id, build := filepath.Base(filepath.Dir(it.path)), filepath.Base(it.path)
		_, _, err := e.lookup(id, build)
		return errors.Is(err, errdefs.NotFound)
	}
	return !e.busy() // a build may be about to read it
}

func (e *Engine) remove(it Item) (bool, error) {
	if it.Kind == KindCache {
		return e.cache.remove(it.path)
	}
	err := os.Remove(it.path)
	if it.Kind == KindLog {
		_ = os.Remove(filepath.Dir(it.path)) // while it has other logs it stays
	}
	return err == nil, err
}

// Usage returns what builds keep on the disk, the least recently used first.
func (e *Engine) Usage(ctx context.Context) ([]Item, error) {
	items, err := e.cache.items()
	if err != nil {
		return nil, fmt.Errorf("measure builds: %w", err)
	}
	uploads, err := e.uploads()
	if err != nil {
		return nil, fmt.Errorf("measure builds: %w", err)
	}
	items = append(items, uploads...)
	logs, err := filepath.Glob(filepath.Join(e.cfg.Dir, logsDir, "*", "*"))
	if err != nil {
		return nil, fmt.Errorf("measure builds: %w", err)
	}
	for _, path := range logs {
		if st, err := os.Stat(path); err == nil {
			name := filepath.Base(filepath.Dir(path)) + ":" + filepath.Base(path)
			items = append(items, Item{Kind: KindLog, Name: name, Bytes: taken(path), UsedAt: st.ModTime(), path: path})
		}
	}
	slices.SortStableFunc(items, func(a, b Item) int { return a.UsedAt.Compare(b.UsedAt) })
	return items, nil
}

// Forget removes the logs of a template that is gone.
func (e *Engine) Forget(template string) error {
	path, err := e.logPath(template, "x")
	if err != nil {
		return err
	}
	return os.RemoveAll(filepath.Dir(path))
}

// uploadGrace is for how long files wait for the build that they were uploaded for.
const uploadGrace = time.Hour

// room makes room for more below MaxDisk: errdefs.Exhausted if there is none.
func (e *Engine) room(ctx context.Context) error {
	if e.cfg.MaxDisk <= 0 {
		return nil
	}
	used := e.taken()
	if used < e.cfg.MaxDisk {
		return nil
	}
	items, err := e.Usage(ctx)
	if err != nil {
		return err
	}
	for _, it := range items { // the least recently used first
		fresh := it.Kind == KindUpload && time.Since(it.UsedAt) < uploadGrace
		if it.Kind == KindLog || fresh || !e.unused(it) {
			continue
		}
		if gone, err := e.remove(it); err == nil && gone {
			used -= it.Bytes
		}
		if used < e.cfg.MaxDisk {
			return nil
		}
	}
	return errdefs.Exhausted.Errorf("templates, images and builds take %d MiB of the disk, and --max-template-disk allows %d MiB: "+
		"remove templates, or run wrenn template prune", used>>20, e.cfg.MaxDisk>>20)
}

// taken is what templates, images and builds take of the disk. A file with several names
// counts once.
func (e *Engine) taken() (sum int64) {
	seen := map[uint64]bool{}
	for _, dir := range append([]string{e.cfg.Dir}, e.cfg.Dirs...) {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			var st unix.Stat_t
			if err != nil || !d.Type().IsRegular() || unix.Lstat(path, &st) != nil || seen[st.Ino] {
				return nil // it was removed
			}
			seen[st.Ino] = true
			sum += st.Blocks * 512
			return nil
		})
	}
	return sum
}
