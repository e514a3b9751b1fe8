package sandbox

import (
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// limited is a manager whose project blue has a quota.
func limited(t *testing.T, q Quota, warm int) *rig {
	return newRig(t, func(c *Config) {
		c.Warm, c.OverlayMiB = warm, 1000
		c.Quota = func(project string) Quota {
			if project == "blue" {
				return q
			}
			return Quota{}
		}
	})
}

func (r *rig) createIn(project string) (ID, error) {
	made, err := r.Create(r.t.Context(), CreateRequest{MemMiB: 512, Labels: Labels{Project: project}})
	return made.ID, err
}

// wantOver wants the error of a quota, and nothing more than before.
func (r *rig) wantOver(what string, err error, sandboxes int) {
	r.t.Helper()
	if errdefs.ClassOf(err) != errdefs.Exhausted || !strings.Contains(err.Error(), "quota of project blue") {
		r.t.Errorf("%s: %v", what, err)
	}
	if n := len(r.List(true)); n != sandboxes {
		r.t.Errorf("%s: %d sandboxes, want %d", what, n, sandboxes)
	}
}

// Each bound of a quota refuses what is over it, of its own project alone.
func TestQuota(t *testing.T) {
	for name, c := range map[string]struct {
		quota Quota
		says  string
	}{
		"sandboxes": {Quota{Sandboxes: 2}, "2 of 2 sandboxes, 1 more"},
		"vcpus":     {Quota{VCPUs: 2}, "2 of 2 vcpus, 1 more"},
		"memory":    {Quota{MemMiB: 1100}, "1024 of 1100 MiB of memory, 512 more"},
		"disk":      {Quota{DiskMiB: 2999}, "2000 of 2999 MiB of disk, 1000 more"},
	} {
		t.Run(name, func(t *testing.T) {
			r := limited(t, c.quota, 0)
			for range 2 {
				if _, err := r.createIn("blue"); err != nil {
					t.Fatal(err)
				}
			}
			_, err := r.createIn("blue")
			r.wantOver(name, err, 2)
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("it says %q, want %q", err, c.says)
			}
			for _, other := range []string{"red", ""} {
				if _, err := r.createIn(other); err != nil {
					t.Errorf("project %q: %v", other, err)
				}
			}
		})
	}
}

// A quota counts in each way to make a sandbox or let one go on, and after a restart.
func TestQuotaEverywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		r := limited(t, Quota{Sandboxes: 3, VCPUs: 2}, 1)
		must := func(errs ...error) {
			t.Helper()
			if err := errors.Join(errs...); err != nil {
				t.Fatal(err)
			}
		}
		first, err := r.createIn("blue")
		must(err)
		forked, err := r.Fork(ctx, first, ForkRequest{Count: 1})
		must(err)
		r.fillPool()
		over := func(what string) {
			t.Helper()
			_, err := r.createIn("blue")
			r.wantOver(what, err, 2)
			_, err = r.Fork(ctx, first, ForkRequest{Count: 1})
			r.wantOver(what+": fork", err, 2)
			if r.pool.size() != 1 {
				t.Errorf("%s: %d guests wait", what, r.pool.size())
			}
		}
		over("two run")
		if _, err := r.Fork(ctx, first, ForkRequest{Count: 2}); r.faults.count("guest.freeze") != 1 {
			t.Errorf("a fork over the quota froze its source, %v", err)
		}
		must(r.Pause(ctx, first))
		over("one is paused")
		must(r.Hibernate(ctx, first, Hibernation{}))
		third, err := r.createIn("blue") // of the waiting guest
		must(err)
		r.wantOver("resume", r.Resume(ctx, first), 3)
		r.die()
		r.start()
		r.wantOver("resume after a restart", r.Resume(ctx, first), 3)
		must(r.Hibernate(ctx, third, Hibernation{}))
		must(r.Resume(ctx, first), r.Destroy(ctx, forked.Sandboxes[0].ID), r.Destroy(ctx, third), r.Destroy(ctx, first))
		if _, err := r.createIn("blue"); err != nil {
			t.Errorf("after all are destroyed: %v", err)
		}
	})
}

// Of many creates at once as many are made as the quota allows.
func TestQuotaIsAtomic(t *testing.T) {
	const allowed, tried = 7, 40
	r := limited(t, Quota{Sandboxes: allowed}, 0)
	var made atomic.Int64
	var wg sync.WaitGroup
	for range tried {
		wg.Go(func() {
			if _, err := r.createIn("blue"); err == nil {
				made.Add(1)
			} else if errdefs.ClassOf(err) != errdefs.Exhausted {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(r.List(true)); made.Load() != allowed || n != allowed {
		t.Errorf("%d were made and %d are there, want %d", made.Load(), n, allowed)
	}
}

// An unknown sandbox counts for the project that the events know.
func TestQuotaOfAnUnknown(t *testing.T) {
	r := limited(t, Quota{Sandboxes: 1}, 0)
	id, err := r.createIn("blue")
	if err != nil {
		t.Fatal(err)
	}
	r.die()
	if err := os.WriteFile(r.store.record(id), []byte(`{"version": 1, "id": "sb-`), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(r.store.previous(id))
	r.start()
	r.wantState(id, Unknown)
	_, err = r.createIn("blue")
	r.wantOver("unknown", err, 1)
}
