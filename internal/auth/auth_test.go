package auth

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !errors.Is(err, errdefs.Corrupt) {
			t.Error(err)
		}
	})
	return s
}

func create(t *testing.T, s *Store, project, name string) (string, Key) {
	t.Helper()
	secret, key, err := s.CreateKey(project, name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lookup(secret); err != nil {
		t.Fatal(err)
	}
	return secret, key
}

func TestKeyIsKeptAsDigestAlone(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if any, err := s.Any(); any || err != nil {
		t.Fatalf("a new store has keys: %v, %v", any, err)
	}
	secret, key := create(t, s, "", "laptop")
	if !regexp.MustCompile(`^e2b_[0-9a-f]{40}$`).MatchString(secret) {
		t.Errorf("key is %q", secret)
	}
	caller, err := s.Lookup(secret)
	if err != nil || caller.KeyID != key.ID || caller.Project.Name != DefaultProject || len(caller.Project.ID) != 36 {
		t.Errorf("caller is %+v, %v", caller, err)
	}
	if text := fmt.Sprintf("%v %+v %s", caller, caller, &caller); strings.Contains(text, secret[4:]) {
		t.Errorf("a caller is printed as %s", text)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, _ := f.Info()
		data, _ := os.ReadFile(filepath.Join(dir, f.Name()))
		if info.Mode().Perm() != 0o600 || strings.Contains(string(data), secret[4:]) {
			t.Errorf("%s has mode %v, or the key itself", f.Name(), info.Mode())
		}
	}
}

func TestWrongKeys(t *testing.T) {
	s := open(t, t.TempDir())
	secret, key := create(t, s, "", "")
	for _, wrong := range []string{
		"", "e2b_", secret[:len(secret)-1], secret + "0", strings.ToUpper(secret), secret[4:], key.ID, key.Digest,
		"e2b_" + strings.Repeat("0", 40), " " + secret,
	} {
		if c, err := s.Lookup(wrong); !errors.Is(err, errdefs.Unauthenticated) || c.KeyID != "" {
			t.Errorf("%q opens %+v, %v", wrong, c, err)
		}
	}
}

// Two stores of one directory are two processes.
func TestChangesCountAtOnceElsewhere(t *testing.T) {
	dir := t.TempDir()
	agent, cli := open(t, dir), open(t, dir)
	for range 20 { // so that inodes are used again
		secret, key := create(t, cli, "p", "name")
		if c, err := agent.Lookup(secret); err != nil || c.Project.Name != "p" {
			t.Fatalf("a new key: %+v, %v", c, err)
		}
		if removed, err := cli.RemoveKey("name"); err != nil || removed.ID != key.ID {
			t.Fatalf("removed %+v, %v", removed, err)
		}
		if _, err := agent.Lookup(secret); !errors.Is(err, errdefs.Unauthenticated) {
			t.Fatalf("a revoked key: %v", err)
		}
	}
	if _, err := cli.RemoveKey("name"); !errors.Is(err, errdefs.NotFound) {
		t.Errorf("a second removal: %v", err)
	}
	quota := Quota{Sandboxes: 3, VCPUs: 4, MemMiB: 2048, DiskMiB: 8192}
	secret, _ := create(t, cli, "p", "")
	if err := cli.SetQuota("p", quota); err != nil {
		t.Fatal(err)
	}
	if c, err := agent.Lookup(secret); err != nil || c.Project.Quota != quota {
		t.Errorf("quota is %+v, %v", c.Project.Quota, err)
	}
	if err := os.WriteFile(filepath.Join(agent.dir, keysFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if agent.Quota("p") != quota || agent.Quota("none") != (Quota{}) {
		t.Errorf("with a damaged file the quota is %+v, that of no project %+v", agent.Quota("p"), agent.Quota("none"))
	}
}

func TestNames(t *testing.T) {
	s := open(t, t.TempDir())
	create(t, s, "p-1", "one key")
	for _, c := range []struct {
		project, name string
		class         *errdefs.Class
	}{
		{"P", "", errdefs.InvalidArgument},
		{"../x", "", errdefs.InvalidArgument},
		{"-p", "", errdefs.InvalidArgument},
		{strings.Repeat("p", 64), "", errdefs.InvalidArgument},
		{"p", "\x1b[2J", errdefs.InvalidArgument},
		{"p", strings.Repeat("n", 64), errdefs.InvalidArgument},
		{"other", "one key", errdefs.AlreadyExists},
	} {
		if _, _, err := s.CreateKey(c.project, c.name); !errors.Is(err, c.class) {
			t.Errorf("project %q, name %q: %v", c.project, c.name, err)
		}
	}
	if err := s.SetQuota("p-1", Quota{VCPUs: -1}); !errors.Is(err, errdefs.InvalidArgument) {
		t.Errorf("a negative quota: %v", err)
	}
	if projects, err := s.Projects(); err != nil || len(projects) != 1 {
		t.Errorf("refused calls left %+v, %v", projects, err)
	}
}

// The kept key is the same at every call until it is revoked or its file is lost.
func TestKeptKey(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, keptFile)
	kept := func() string {
		t.Helper()
		secret, err := open(t, dir).KeptKey()
		if err != nil {
			t.Fatal(err)
		}
		if c, err := open(t, dir).Lookup(secret); err != nil || c.Project.Name != DefaultProject {
			t.Errorf("it is of %+v, %v", c, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("its file: %v, %v", info, err)
		}
		if keys, err := open(t, dir).Keys(); err != nil || len(keys) != 1 {
			t.Errorf("keys are %+v, %v", keys, err)
		}
		return secret
	}
	var all sync.WaitGroup
	secrets := make([]string, 8)
	for i := range secrets {
		all.Go(func() { secrets[i], _ = open(t, dir).KeptKey() })
	}
	all.Wait()
	first := kept()
	for _, s := range secrets {
		if s != first {
			t.Errorf("at once: %q beside %q", s, first)
		}
	}
	for what, lose := range map[string]func() error{
		"revoked": func() error { _, err := open(t, dir).RemoveKey(keptName); return err },
		"lost":    func() error { return os.Remove(path) },
		"torn":    func() error { return os.WriteFile(path, []byte(strings.Repeat("x", 100)), 0o644) },
	} {
		old := kept()
		if err := lose(); err != nil {
			t.Fatal(err)
		}
		if now := kept(); now == old {
			t.Errorf("%s: it is the same", what)
		}
		if _, err := open(t, dir).Lookup(old); !errors.Is(err, errdefs.Unauthenticated) {
			t.Errorf("%s: the old one: %v", what, err)
		}
	}
}

// A file that cannot be used gives no access and stays as it is.
func TestDamagedFile(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"empty":   func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"cut":     func(path string) error { return os.Truncate(path, 100) },
		"no seal": func(path string) error { return os.WriteFile(path, []byte(`{"version":1}`), 0o600) },
		"gone":    os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			secret, key := create(t, s, "", "")
			path := filepath.Join(dir, keysFile)
			good, _ := os.ReadFile(path)
			if err := damage(path); err != nil {
				t.Fatal(err)
			}
			bad, _ := os.ReadFile(path)
			noAccess(t, s, secret, key)
			if _, err := Open(dir); name != "gone" && !errors.Is(err, errdefs.Corrupt) {
				t.Errorf("open: %v", err)
			}
			if now, _ := os.ReadFile(path); string(now) != string(bad) {
				t.Error("the file was changed")
			}
			if err := os.WriteFile(path, good, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Lookup(secret); err != nil {
				t.Errorf("lookup after the repair: %v", err)
			}
		})
	}
}

// noAccess checks that a store whose file is damaged refuses everything.
func noAccess(t *testing.T, s *Store, secret string, key Key) {
	t.Helper()
	_, lookup := s.Lookup(secret)
	any, anyErr := s.Any()
	_, _, create := s.CreateKey("", "new")
	_, remove := s.RemoveKey(key.ID)
	for what, err := range map[string]error{"lookup": lookup, "any": anyErr, "create": create, "remove": remove} {
		if !errors.Is(err, errdefs.Corrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if any {
		t.Error("there is a key")
	}
}

func TestNewerFileIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	create(t, s, "", "")
	if err := s.change(func(f *file) error { f.Version = storeVersion + 1; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, errdefs.Corrupt) || !strings.Contains(err.Error(), "newer") {
		t.Errorf("open: %v", err)
	}
}

func TestLastUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	secret, _ := create(t, s, "", "used")
	if _, _, err := s.CreateKey("", "unused"); err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	if _, err := s.Lookup(secret); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, usedFile)); err == nil {
		t.Error("one use was written at once")
	}
	s.notedAt.Store(0) // long ago
	if _, err := s.Lookup(secret); err != nil {
		t.Fatal(err)
	}
	s.noting.Wait()
	keys, err := open(t, dir).Keys()
	if err != nil || len(keys) != 2 || keys[0].LastUsedAt.Before(before) || !keys[1].LastUsedAt.IsZero() {
		t.Fatalf("keys are %+v, %v", keys, err)
	}
	if _, err := s.RemoveKey("used"); err != nil {
		t.Fatal(err)
	}
	if err := s.noteUses(); err != nil {
		t.Fatal(err)
	}
	if uses := s.readUses(); len(uses) != 0 {
		t.Errorf("a revoked key has notes: %v", uses)
	}
	if err := os.WriteFile(filepath.Join(dir, usedFile), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Keys(); err != nil {
		t.Errorf("keys with damaged notes: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	agent, cli := open(t, dir), open(t, dir)
	kept, _ := create(t, cli, "", "kept")
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			secret, key, err := cli.CreateKey(fmt.Sprint("p", i), fmt.Sprint("k", i))
			if err == nil {
				_, err = agent.Lookup(secret)
			}
			if err == nil {
				_, err = agent.RemoveKey(key.ID)
			}
			if err != nil {
				t.Error(err)
			}
			if _, err := cli.Lookup(secret); !errors.Is(err, errdefs.Unauthenticated) {
				t.Errorf("a revoked key: %v", err)
			}
		})
		all.Go(func() {
			for range 50 {
				if _, err := agent.Lookup(kept); err != nil {
					t.Error(err)
				}
				agent.notedAt.Store(0)
			}
		})
	}
	all.Wait()
	keys, err := agent.Keys()
	projects, perr := agent.Projects()
	if err != nil || perr != nil || len(keys) != 1 || len(projects) != 9 {
		t.Errorf("%d keys, %d projects, %v, %v", len(keys), len(projects), err, perr)
	}
}

func TestKeyOf(t *testing.T) {
	for _, c := range []struct{ apiKey, authorization, want string }{
		{"a", "Bearer b", "a"},
		{"", "Bearer b", "b"},
		{"", "bearer  b ", "b"},
		{"", "Basic b", ""},
		{"", "Bearer", ""},
		{"", "", ""},
	} {
		h := http.Header{}
		h.Set("X-Api-Key", c.apiKey)
		h.Set("Authorization", c.authorization)
		if got := KeyOf(h); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestLimiter(t *testing.T) {
	l := NewLimiter(Rates{Requests: 2, Burst: 3, Creates: 0.1, CreatesBurst: 1})
	now := time.Now()
	headers := func(d Decision) string {
		h := http.Header{}
		d.Tell(h)
		return fmt.Sprint(d.Allowed, h.Get("RateLimit-Limit"), h.Get("RateLimit-Remaining"), h.Get("RateLimit-Reset"), "/", h.Get("Retry-After"))
	}
	for i, step := range []struct {
		key    string
		create bool
		after  time.Duration
		want   string
	}{
		{"a", false, 0, "true 3 2 1 / "},
		{"a", true, 0, "true 1 0 10 / "},
		{"a", true, 0, "false 1 0 10 / 10"},
		{"a", false, 0, "false 3 0 1 / 1"},
		{"b", false, 0, "true 3 2 1 / "},
		{"a", false, 500 * time.Millisecond, "true 3 0 2 / "},
		{"a", true, 10 * time.Second, "true 1 0 10 / "},
	} {
		now = now.Add(step.after)
		got := headers(l.Take(step.key, step.create, now))
		if strings.ReplaceAll(got, " ", "") != strings.ReplaceAll(step.want, " ", "") {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
	}
	if got := headers(NewLimiter(Rates{}).Take("a", true, now)); got != "true/" && strings.TrimSpace(got) != "true    /" {
		t.Errorf("no rates: %q", got)
	}
}

func TestLimiterForgets(t *testing.T) {
	l := NewLimiter(Rates{Requests: 1})
	now := time.Now()
	for i := range maxBuckets {
		l.Take(fmt.Sprint(i), false, now)
	}
	l.Take("new", false, now.Add(2*time.Hour))
	if len(l.keys) != 1 {
		t.Errorf("%d keys are remembered", len(l.keys))
	}
}
