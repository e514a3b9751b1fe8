package build

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// The engine's directories. A name with a leading dot is half-made.
const (
	cacheDir   = "cache"
	resultsDir = "results"
	uploadsDir = "uploads"
	logsDir    = "logs"
	workDir    = "work"
)

// keyVersion tells keys apart that other code made of the same steps.
const keyVersion = "wrenn build 1"

// keyOf is the key of a step after the one with the key before.
func keyOf(before string, parts ...string) string {
	sum := sha256.New()
	for _, part := range append([]string{before}, parts...) {
		fmt.Fprintf(sum, "%d:%s\n", len(part), part)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// cache keeps what steps changed: of each the blocks of the disk that differ from those
// after the step before. Entries are immutable, and used for as long as they are pinned.
type cache struct {
	dir string

	mu     sync.Mutex
	pinned map[string]int
}

// entry is what an entry's file says.
type entryInfo struct {
	// ID tells entries of one key apart: a step that is run again makes another disk.
	ID string `json:"id"`
	// Before and BeforeID are those of the entry that this one differs from; empty for
	// none.
	Before   string `json:"before,omitempty"`
	BeforeID string `json:"before_id,omitempty"`
	Text     string `json:"text"`
	Bytes    int64  `json:"bytes"`
}

func (c *cache) path(key string) string { return filepath.Join(c.dir, cacheDir, key) }

// pin keeps entries, which need not be there yet, until the returned function is called.
func (c *cache) pin(keys []string) (release func()) {
	keys = slices.Compact(slices.Sorted(slices.Values(keys)))
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range keys {
		c.pinned[key]++
	}
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, key := range keys {
			if c.pinned[key]--; c.pinned[key] == 0 {
				delete(c.pinned, key)
			}
		}
	})
}

func (c *cache) isPinned(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pinned[key] > 0
}

// read returns an entry whose files are there.
func (c *cache) read(key string) (entryInfo, bool) {
	var info entryInfo
	text, err := os.ReadFile(filepath.Join(c.path(key), "entry.json"))
	if err != nil || json.Unmarshal(text, &info) != nil {
		return info, false
	}
	st, err := os.Stat(filepath.Join(c.path(key), "diff"))
	return info, err == nil && st.Mode().IsRegular()
}

// touch says that an entry was used.
func (c *cache) touch(key string) {
	now := time.Now()
	_ = os.Chtimes(c.path(key), now, now) // a guess is as good
}

// put makes an entry of how newer differs from older. Where there is one, it stays unless
// it is to be replaced and no other build uses it: made says which.
func (c *cache) put(ctx context.Context, key string, info entryInfo, older, newer string, again bool) (id string, made bool, err error) {
	if _, ok := c.read(key); ok && !again {
		return "", false, nil
	}
	tmp, err := os.MkdirTemp(filepath.Join(c.dir, cacheDir), ".entry-")
	if err != nil {
		return "", false, fmt.Errorf("keep step: %w", errdefs.DiskFull(err))
	}
	defer os.RemoveAll(tmp)
	diff := filepath.Join(tmp, "diff")
	if err := template.Diff(ctx, diff, older, newer); err != nil {
		return "", false, fmt.Errorf("keep step: %w", errdefs.DiskFull(err))
	}
	info.ID, info.Bytes = rand.Text(), taken(diff)
	text, err := json.Marshal(info)
	if err == nil {
		err = os.WriteFile(filepath.Join(tmp, "entry.json"), text, 0o600)
	}
	if err == nil {
		made, err = c.place(tmp, key)
	}
	if err != nil {
		return "", false, fmt.Errorf("keep step: %w", errdefs.DiskFull(err))
	}
	return info.ID, made, nil
}

// place makes the directory tmp an entry. One that another build uses stays.
func (c *cache) place(tmp, key string) (made bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, there := c.read(key)
	if there && c.pinned[key] > 1 {
		return false, nil
	}
	old := tmp + "-old"
	if err := os.Rename(c.path(key), old); err == nil {
		defer os.RemoveAll(old)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, os.Rename(tmp, c.path(key))
}

// restore makes the new file dst the disk after the last of the entries, which follow
// each other.
func (c *cache) restore(ctx context.Context, dst string, keys []string) error {
	for _, key := range keys {
		if err := template.Patch(ctx, dst, filepath.Join(c.path(key), "diff")); err != nil {
			return fmt.Errorf("restore step: %w", errors.Join(errdefs.DiskFull(err), os.Remove(dst)))
		}
		c.touch(key)
	}
	return nil
}

// result is a published build with the disk of a step on top of its layers.
type result struct{ Template, Build string }

// result returns the build that was published with the disk after a step.
func (c *cache) result(key string) (result, bool) {
	var r result
	path := filepath.Join(c.dir, resultsDir, key)
	text, err := os.ReadFile(path)
	ok := err == nil && json.Unmarshal(text, &r) == nil
	if ok {
		now := time.Now()
		_ = os.Chtimes(path, now, now)
	}
	return r, ok
}

func (c *cache) setResult(key string, r result) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(c.dir, resultsDir, key), text, 0o600)
}

// items lists the entries.
func (c *cache) items() ([]Item, error) {
	entries, err := os.ReadDir(filepath.Join(c.dir, cacheDir))
	if err != nil {
		return nil, err
	}
	var items []Item
	for _, e := range entries {
		st, err := e.Info()
		if strings.HasPrefix(e.Name(), ".") || err != nil {
			continue
		}
		info, _ := c.read(e.Name())
		items = append(items, Item{
			Kind: KindCache, Name: info.Text, Bytes: taken(filepath.Join(c.path(e.Name()), "diff")), UsedAt: st.ModTime(), path: e.Name(),
		})
	}
	return items, nil
}

// remove removes an entry, and says whether it did: one that is pinned stays.
func (c *cache) remove(key string) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pinned[key] > 0 {
		return false, nil
	}
	old := filepath.Join(c.dir, cacheDir, ".old-"+key) // no half of an entry is seen
	if err := os.Rename(c.path(key), old); err != nil {
		return false, err
	}
	return true, os.RemoveAll(old)
}

// orphans are entries that follow one which is gone: nothing can use them.
func (c *cache) orphans(items []Item) map[string]bool {
	gone := map[string]bool{}
	there := func(key string) bool {
		return !gone[key] && slices.ContainsFunc(items, func(it Item) bool { return it.path == key })
	}
	for found := true; found; {
		found = false
		for _, it := range items {
			info, ok := c.read(it.path)
			if it.Kind == KindCache && !gone[it.path] && (!ok || info.Before != "" && !there(info.Before)) {
				gone[it.path], found = true, true
			}
		}
	}
	return gone
}

// taken is what a file takes of the disk.
func taken(path string) int64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}
