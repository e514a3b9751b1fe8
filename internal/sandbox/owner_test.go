package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// owned is a request with an owner key.
func owned(key string) CreateRequest { return CreateRequest{Labels: Labels{OwnerKey: key}} }

// request returns the sandbox that answers a request.
func (r *rig) request(req CreateRequest) ID {
	r.t.Helper()
	made, err := r.Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatalf("create: %v", err)
	}
	return made.ID
}

func TestOwnerKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		req := owned("a.B-9_")
		req.EndAt, req.Timeout = time.Now().Add(time.Minute), time.Second*30
		req.Labels.Metadata = map[string]string{"x": "1", "y": "2"}
		id := r.request(req)
		same := func(what string) {
			t.Helper()
			if again := r.request(req); again != id {
				t.Errorf("%s: another sandbox, %s beside %s", what, again, id)
			}
			other := req
			other.VCPUs = 2
			_, err := r.Create(t.Context(), other)
			wantClass(t, err, errdefs.AlreadyExists)
			if err != nil && !strings.Contains(err.Error(), string(id)) {
				t.Errorf("%s: the error does not name the sandbox: %v", what, err)
			}
		}
		same("running")
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		same("hibernated")
		r.die()
		r.start()
		same("after a restart")
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		forked, err := r.Fork(t.Context(), id, ForkRequest{Count: 1})
		if err != nil || forked.Sandboxes[0].Labels.OwnerKey != "" {
			t.Errorf("fork: %+v, %v", forked, err)
		}
		for what, other := range map[string]Labels{"project": {Project: "blue", OwnerKey: req.Labels.OwnerKey}, "key": {OwnerKey: "b"}} {
			req := req
			req.Labels = other
			if r.request(req) == id {
				t.Errorf("another %s has the same sandbox", what)
			}
		}
		pass(10 * time.Minute) // it has expired; its request is too late for a new one
		r.wantState(id, Stopped)
		same("expired")
		r.die()
		r.start()
		same("expired, after a restart")
		pass(time.Hour)
		req.EndAt = time.Time{}
		next := r.request(req)
		if next == id {
			t.Error("the key is not free after the sandbox was forgotten")
		}
		if err := r.Destroy(t.Context(), next); err != nil {
			t.Fatal(err)
		}
		if r.request(req) == next {
			t.Error("the key is not free after the sandbox was destroyed")
		}
		for _, bad := range []string{" ", "a b", "a/b", "ä", strings.Repeat("a", 256)} {
			_, err := r.Create(t.Context(), owned(bad))
			wantClass(t, err, errdefs.InvalidArgument)
		}
		r.request(owned(strings.Repeat("a", 255)))
	})
}

// However many ask at once, there is one sandbox.
func TestOwnerKeyAtOnce(t *testing.T) {
	for _, warm := range []int{0, 2} {
		t.Run(fmt.Sprintf("warm %d", warm), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(c *Config) { c.Warm = warm })
				r.create()
				if warm > 0 {
					r.fillPool()
				}
				var wg sync.WaitGroup
				var mu sync.Mutex
				ids := map[ID]bool{}
				for range 50 {
					wg.Go(func() {
						made, err := r.Create(context.Background(), owned("key"))
						mu.Lock()
						defer mu.Unlock()
						ids[made.ID] = true
						if err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				if n := len(r.List(true)); len(ids) != 1 || n != 2 {
					t.Errorf("%d sandboxes, %d are listed", len(ids), n-1)
				}
			})
		})
	}
}

// Whatever becomes of a create at whatever step, the same request makes one sandbox
// afterwards: that of the answer, if there was one.
func TestOwnerKeyAtEachStep(t *testing.T) {
	for _, warm := range []int{0, 1} {
		s := scenario{
			prepare: func(r *rig) ID {
				id := r.create()
				if warm > 0 {
					r.fillPool()
				}
				return id
			},
			run:    func(ctx context.Context, r *rig, _ ID) error { _, err := r.Create(ctx, owned("key")); return err },
			change: func(c *Config) { c.Warm = warm },
		}
		for _, step := range s.steps(t) {
			for _, kind := range []string{"error", "after", "cancel", "death"} {
				t.Run(fmt.Sprintf("warm %d/%s/%s", warm, step, kind), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { s.askAgain(t, step, kind) })
				})
			}
		}
	}
}

func (s scenario) askAgain(t *testing.T, step, kind string) {
	r := s.rig(t)
	other := s.prepare(r)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	f := r.faults
	died := make(chan struct{})
	var once sync.Once
	f.on(step, func(context.Context) (err error) {
		once.Do(func() {
			switch kind {
			case "cancel":
				cancel()
				err = context.Canceled
			case "after": // the caller leaves, and the step does not notice
				cancel()
			case "death":
				f.die()
				close(died)
				f.rest()
			default:
				err = errFault
			}
		})
		return err
	})
	answer, ended := make(chan ID, 1), make(chan struct{})
	go func() {
		defer close(ended)
		made, err := r.Manager.Create(ctx, owned("key"))
		if err != nil {
			made.ID = ""
		}
		answer <- made.ID
	}()
	var first ID
	select {
	case first = <-answer:
	case <-died:
		manager := r.Manager
		r.die()
		defer func() {
			close(f.grave)
			<-ended
			manager.wg.Wait()
		}()
		r.start()
	}
	second, third := r.request(owned("key")), r.request(owned("key"))
	if second != third || first != "" && first != second {
		t.Errorf("the answers were %q, %q, %q", first, second, third)
	}
	pass(5 * time.Minute)
	r.wantState(second, Running)
	for _, info := range r.List(false) {
		if info.ID != second && info.ID != other {
			t.Errorf("there is another sandbox: %+v", info)
		}
	}
	r.wantConsistent()
}

// The record of an unknown sandbox does not say what its key is, and the events do.
func TestOwnerKeyOfAnUnknownSandbox(t *testing.T) {
	r := newRig(t)
	id := r.request(owned("key"))
	r.die()
	whole, err := os.ReadFile(r.store.record(id))
	if err != nil {
		t.Fatal(err)
	}
	r.spoil(id, func(data []byte) []byte { return data[:len(data)/2] })
	if err := os.RemoveAll(r.store.previous(id)); err != nil {
		t.Fatal(err)
	}
	r.start()
	_, err = r.Create(t.Context(), owned("key"))
	wantClass(t, err, errdefs.Unavailable)
	r.request(owned("other"))
	r.spoil(id, func([]byte) []byte { return whole })
	if _, err := r.Recover(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if again := r.request(owned("key")); again != id {
		t.Errorf("another sandbox, %s", again)
	}
}

// A caller that waits for another's create with the same key gives up with its context.
func TestOwnerKeyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.faults.on("guest.init", hang)
		slow, stop := context.WithCancel(t.Context())
		first := make(chan error, 1)
		go func() {
			_, err := r.Create(slow, owned("key"))
			first <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := r.Create(ctx, owned("key"))
		wantClass(t, err, errdefs.Busy)
		r.faults.on("guest.init", nil)
		stop()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the first ended with %v", err)
		}
		r.request(owned("key"))
	})
}

// A later version must find that a request is the same.
func TestRequestDigest(t *testing.T) {
	yes := true
	req := CreateRequest{
		Template: "minimal", VCPUs: 2, MemMiB: 512, Timeout: time.Minute, OnTimeout: HibernateOnTimeout,
		EndAt: time.Date(2030, 1, 31, 12, 0, 0, 123456789, time.FixedZone("", 3600)), OnEnd: DestroyOnTimeout,
		Network: Policy{Egress: Egress{AllowInternet: &yes, Allow: []string{"example.com"}}},
		Login:   Login{User: "user", Env: map[string]string{"A": "1", "B": "2"}},
		Labels:  Labels{Project: "blue", OwnerKey: "key", Metadata: map[string]string{"b": "", "a": "x"}},
	}
	for want, req := range map[string]CreateRequest{
		"8bbb45834f8667316e5960ca06d450de30a1e41edba078fd489fdf6b511c17c2": owned("key"),
		"fda2195389383bdef8f047d6c281d62212ebf058f8594fe08fe9e4750df8c553": req,
	} {
		if got, err := req.sum(); err != nil || got != want {
			t.Errorf("%s, want %s (%v)", got, want, err)
		}
	}
}

// BenchmarkOwnedBy5000 is what an owner key costs a create on a full host.
func BenchmarkOwnedBy5000(b *testing.B) {
	r := &registry{boxes: map[ID]*box{}}
	for i := range 5000 {
		rec := Record{ID: newID(), State: Running, Labels: Labels{OwnerKey: fmt.Sprint("key-", i)}}
		r.boxes[rec.ID] = newBox(rec)
	}
	for b.Loop() {
		if r.ownedBy(owner{key: "none"}) != nil {
			b.Fatal("found")
		}
	}
}
