package auth

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// The files of a store in its directory. Processes that change keys.json hold the
// lock; each read sees a whole file, because a change replaces it. Only the agent
// writes keys-used.json, so that a note of use never undoes a revocation.
const (
	keysFile = "keys.json"
	usedFile = "keys-used.json"
	lockFile = "keys.lock"
	// keptFile has the key of KeptKey itself, for its owner alone.
	keptFile = "env-key"
	keptName = "wrenn-env"
)

const (
	storeVersion = 1
	// maxKeys and maxProjects bound the file, which is read as a whole.
	maxKeys, maxProjects = 10_000, 10_000
	// usedEvery is how often notes of use are written.
	usedEvery = time.Minute
)

// file is what keys.json holds.
type file struct {
	Version  int       `json:"version"`
	Projects []Project `json:"projects"`
	Keys     []Key     `json:"keys"`
}

// used is what keys-used.json holds: the last use of each key by its ID.
type used struct {
	Keys map[string]time.Time `json:"keys"`
}

// Store keeps keys and projects in a directory. It is safe for concurrent use by
// goroutines and by processes: what one of them changes counts for the next
// Lookup of every other.
type Store struct {
	dir string

	mu sync.Mutex // over the fields up to the next blank line
	// stamp is that of the keys.json that table came from.
	stamp stamp
	table *table

	uses    sync.Map // key ID → *atomic.Int64, Unix nanoseconds
	notedAt atomic.Int64
	noting  sync.WaitGroup
}

// table is one content of keys.json. It never changes.
type table struct {
	file     file
	byDigest map[string]Key
	projects map[string]Project
}

// stamp tells one content of a file from another without reading it.
type stamp struct {
	exists     bool
	inode      uint64
	size       int64
	mtim, ctim syscall.Timespec
}

// Open returns the store of a directory, which must exist. No file is no key. A
// damaged file is errdefs.Corrupt: it is left alone for a person to look at.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir}
	s.notedAt.Store(time.Now().UnixNano())
	if _, err := s.current(); err != nil {
		return nil, err
	}
	return s, nil
}

// Close writes what is not written yet of the keys' last use.
func (s *Store) Close() error {
	s.noting.Wait()
	return s.noteUses()
}

// Lookup returns who holds a key. Unknown, revoked and malformed keys are all the
// same errdefs.Unauthenticated. While keys.json cannot be used every key is
// refused.
func (s *Store) Lookup(key string) (Caller, error) {
	t, err := s.current()
	if err != nil {
		return Caller{}, err
	}
	k, ok := t.find(key)
	if !ok {
		return Caller{}, errdefs.Unauthenticated.Errorf("the API key is missing or not valid")
	}
	s.use(k.ID)
	return Caller{KeyID: k.ID, Project: t.projects[k.Project], Key: key}, nil
}

// Revoked says whether there is no key with an id any more. While keys.json cannot be read
// that is not known, and no.
func (s *Store) Revoked(id string) bool {
	t, err := s.current()
	return err == nil && !slices.ContainsFunc(t.file.Keys, func(k Key) bool { return k.ID == id })
}

// Any says whether there is any key.
func (s *Store) Any() (bool, error) {
	t, err := s.current()
	return err == nil && len(t.file.Keys) > 0, err
}

// Keys returns all keys, oldest first.
func (s *Store) Keys() ([]Key, error) {
	t, err := s.current()
	if err != nil {
		return nil, err
	}
	keys := slices.Clone(t.file.Keys)
	noted := s.readUses()
	for i := range keys {
		keys[i].LastUsedAt = noted[keys[i].ID]
		if at, ok := s.uses.Load(keys[i].ID); ok {
			keys[i].LastUsedAt = time.Unix(0, at.(*atomic.Int64).Load()).UTC()
		}
	}
	return keys, nil
}

// Projects returns all projects, in the order of their names.
func (s *Store) Projects() ([]Project, error) {
	t, err := s.current()
	if err != nil {
		return nil, err
	}
	return slices.SortedFunc(maps.Values(t.projects), func(a, b Project) int { return cmp.Compare(a.Name, b.Name) }), nil
}

// CreateKey makes a key in a project, which it makes if there is none of that
// name. The store does not keep the secret and cannot show it again.
func (s *Store) CreateKey(project, name string) (secret string, key Key, err error) {
	project = cmp.Or(project, DefaultProject)
	if err := checkProjectName(project); err != nil {
		return "", Key{}, err
	}
	if name != "" && !namePattern.MatchString(name) {
		return "", Key{}, errdefs.InvalidArgument.Errorf("key name %.70q: want up to 63 letters, digits, spaces and . _ -", name)
	}
	var random [24]byte
	rand.Read(random[:]) // never fails
	secret = "e2b_" + hex.EncodeToString(random[:20])
	key = Key{
		ID: "key-" + hex.EncodeToString(random[20:]), Name: name, Project: project,
		Digest: digest(secret), CreatedAt: time.Now().UTC().Truncate(time.Millisecond),
	}
	err = s.change(func(f *file) error {
		if len(f.Keys) >= maxKeys {
			return errdefs.Exhausted.Errorf("there are %d keys already", len(f.Keys))
		}
		if slices.ContainsFunc(f.Keys, func(k Key) bool { return k.ID == key.ID || name != "" && k.Name == name }) {
			return errdefs.AlreadyExists.Errorf("there is a key %s already", cmp.Or(name, key.ID))
		}
		if _, err := f.project(project); err != nil {
			return err
		}
		f.Keys = append(f.Keys, key)
		return nil
	})
	if err != nil {
		return "", Key{}, err
	}
	return secret, key, nil
}

// KeptKey returns a key of the default project that can be shown again, for unlike any
// other it is kept in a file. It is made if it is not there or was revoked.
func (s *Store) KeptKey() (secret string, err error) {
	f, err := os.OpenFile(filepath.Join(s.dir, keptFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", fmt.Errorf("open kept key: %w", err)
	}
	defer f.Close() // which gives the lock back
	if err := errors.Join(flock(f), f.Chmod(0o600)); err != nil {
		return "", fmt.Errorf("lock kept key: %w", err)
	}
	kept, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err != nil {
		return "", fmt.Errorf("read kept key: %w", err)
	}
	secret = strings.TrimSpace(string(kept))
	if _, err := s.Lookup(secret); !errors.Is(err, errdefs.Unauthenticated) {
		return secret, err
	}
	// One that is not in the file cannot be shown again.
	if _, err := s.RemoveKey(keptName); err != nil && !errors.Is(err, errdefs.NotFound) {
		return "", err
	}
	secret, _, err = s.CreateKey(DefaultProject, keptName)
	if err != nil {
		return "", err
	}
	// What is torn here is not valid, and is made anew.
	_, err = f.WriteAt([]byte(secret+"\n"), 0)
	if err := errors.Join(err, f.Truncate(int64(len(secret)+1)), f.Sync()); err != nil {
		return "", fmt.Errorf("keep key: %w", err)
	}
	return secret, nil
}

// RemoveKey revokes the key with an ID or name. When it returns nil, the key opens
// nothing any more, in any process.
func (s *Store) RemoveKey(idOrName string) (Key, error) {
	var removed Key
	err := s.change(func(f *file) error {
		i := slices.IndexFunc(f.Keys, func(k Key) bool { return k.ID == idOrName || k.Name != "" && k.Name == idOrName })
		if i < 0 {
			return errdefs.NotFound.Errorf("key %.70q does not exist", idOrName)
		}
		removed = f.Keys[i]
		f.Keys = slices.Delete(f.Keys, i, i+1)
		return nil
	})
	return removed, err
}

// SetQuota replaces the quota of a project, which it makes if there is none of
// that name.
func (s *Store) SetQuota(project string, q Quota) error {
	if err := errors.Join(checkProjectName(project), q.check()); err != nil {
		return errdefs.InvalidArgument.Errorf("%w", err)
	}
	return s.change(func(f *file) error {
		p, err := f.project(project)
		if err == nil {
			p.Quota = q
		}
		return err
	})
}

// Quota returns the quota of a project, none for a project that does not exist. While
// keys.json cannot be used, what was read last counts.
func (s *Store) Quota(project string) Quota {
	t, err := s.current()
	if err != nil {
		s.mu.Lock()
		t = s.table
		s.mu.Unlock()
	}
	return t.projects[project].Quota
}

// project returns the project of a name, which it makes if there is none.
func (f *file) project(name string) (*Project, error) {
	i := slices.IndexFunc(f.Projects, func(p Project) bool { return p.Name == name })
	if i < 0 {
		if len(f.Projects) >= maxProjects {
			return nil, errdefs.Exhausted.Errorf("there are %d projects already", len(f.Projects))
		}
		i = len(f.Projects)
		f.Projects = append(f.Projects, Project{Name: name, ID: newUUID(), CreatedAt: time.Now().UTC().Truncate(time.Millisecond)})
	}
	return &f.Projects[i], nil
}

// change replaces keys.json with what fn makes of it, alone among all processes.
func (s *Store) change(fn func(*file) error) error {
	unlock, err := lock(filepath.Join(s.dir, lockFile))
	if err != nil {
		return fmt.Errorf("lock keys: %w", err)
	}
	defer unlock()
	t, err := s.current()
	if err != nil {
		return err
	}
	next := file{Version: storeVersion, Projects: slices.Clone(t.file.Projects), Keys: slices.Clone(t.file.Keys)}
	if err := fn(&next); err != nil {
		return err
	}
	return sealed.Write(filepath.Join(s.dir, keysFile), next)
}

// current returns the content of keys.json, which it reads again if the file is
// another one than before.
func (s *Store) current() (*table, error) {
	path := filepath.Join(s.dir, keysFile)
	s.mu.Lock()
	defer s.mu.Unlock()
	now, err := stampOf(path)
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	if s.table != nil && now == s.stamp {
		return s.table, nil
	}
	if !now.exists && s.stamp.exists {
		return nil, errdefs.Corrupt.Errorf("file %s is gone; no key is valid until it is back or the agent starts again", keysFile)
	}
	t, err := load(path)
	if err != nil {
		return nil, err
	}
	// If the file was replaced after the stamp was taken, the next call reads it
	// once more.
	s.stamp, s.table = now, t
	return t, nil
}

func load(path string) (*table, error) {
	t := &table{byDigest: map[string]Key{}, projects: map[string]Project{}}
	err := sealed.Read(path, &t.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if t.file.Version > storeVersion {
		return nil, errdefs.Corrupt.Errorf("file %s is of version %d, newer than this agent's %d", keysFile, t.file.Version, storeVersion)
	}
	for _, p := range t.file.Projects {
		t.projects[p.Name] = p
	}
	for _, k := range t.file.Keys {
		if _, ok := t.projects[k.Project]; !ok {
			return nil, errdefs.Corrupt.Errorf("file %s: key %s is of no project", keysFile, k.ID)
		}
		t.byDigest[k.Digest] = k
	}
	return t, nil
}

// find looks a key up by its digest, so that the time that it takes says nothing
// of the keys that there are.
func (t *table) find(key string) (Key, bool) {
	sum := digest(key)
	k, ok := t.byDigest[sum]
	if !ok || !keyPattern.MatchString(key) {
		return Key{}, false
	}
	return k, subtle.ConstantTimeCompare([]byte(k.Digest), []byte(sum)) == 1
}

func digest(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:])
}

// use notes that a key was used now, and from time to time writes such notes.
func (s *Store) use(id string) {
	now := time.Now().UnixNano()
	at, ok := s.uses.Load(id)
	if !ok {
		at, _ = s.uses.LoadOrStore(id, new(atomic.Int64))
	}
	at.(*atomic.Int64).Store(now)
	last := s.notedAt.Load()
	if now-last > int64(usedEvery) && s.notedAt.CompareAndSwap(last, now) {
		s.noting.Go(func() { _ = s.noteUses() }) // the next one tries again
	}
}

// noteUses writes the last use of each key that there still is.
func (s *Store) noteUses() error {
	keys, err := s.Keys()
	if err != nil {
		return err
	}
	u := used{Keys: map[string]time.Time{}}
	for _, k := range keys {
		if !k.LastUsedAt.IsZero() {
			u.Keys[k.ID] = k.LastUsedAt
		}
	}
	s.uses.Range(func(id, _ any) bool {
		if _, ok := u.Keys[id.(string)]; !ok {
			s.uses.Delete(id) // revoked
		}
		return true
	})
	if maps.EqualFunc(u.Keys, s.readUses(), time.Time.Equal) {
		return nil
	}
	return sealed.Write(filepath.Join(s.dir, usedFile), u)
}

// readUses returns the notes of use; none if they cannot be read, for they open
// nothing.
func (s *Store) readUses() map[string]time.Time {
	var u used
	if err := sealed.Read(filepath.Join(s.dir, usedFile), &u); err != nil {
		return nil
	}
	return u.Keys
}

func stampOf(path string) (stamp, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return stamp{}, nil
	}
	if err != nil {
		return stamp{}, err
	}
	st := info.Sys().(*syscall.Stat_t)
	return stamp{exists: true, inode: st.Ino, size: st.Size, mtim: st.Mtim, ctim: st.Ctim}, nil
}

// lock waits for the lock on a file, which ends with the process at the latest.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// flock waits for a file's lock.
func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	text := hex.EncodeToString(b[:])
	return strings.Join([]string{text[:8], text[8:12], text[12:16], text[16:20], text[20:]}, "-")
}
