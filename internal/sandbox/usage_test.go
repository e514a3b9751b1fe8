package sandbox

import (
	"context"
	"errors"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// moderate is a guest that says what it uses.
func moderate(context.Context) (guestapi.Metrics, error) {
	return guestapi.Metrics{
		CPUUsedPct: 12.5, MemTotal: 100 << 20, MemUsed: 40 << 20, MemCache: 8 << 20, DiskTotal: 60 << 20, DiskUsed: 5 << 20,
	}, nil
}

// samples returns what is kept of a sandbox's use.
func (r *rig) samples(id ID) []Metric {
	r.t.Helper()
	all, err := r.Metrics(id, time.Time{}, time.Time{})
	if err != nil {
		r.t.Fatal(err)
	}
	return all
}

// A running sandbox is measured each 5 s, which is no activity. A paused or hibernated
// sandbox is left alone and keeps its samples.
func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.metrics = moderate
		info, err := r.Create(t.Context(), CreateRequest{VCPUs: 2, Timeout: 5 * time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		id := info.ID
		time.Sleep(29 * time.Second)
		synctest.Wait()
		got := r.samples(id)
		if len(got) < 5 {
			t.Fatalf("after 29 s there are %d samples", len(got))
		}
		want := Metric{
			At: got[0].At, VCPUs: 2, CPUUsedPct: 12.5, MemTotal: 100 << 20, MemUsed: 40 << 20, MemCache: 8 << 20,
			DiskTotal: 60 << 20, DiskUsed: 5 << 20,
		}
		if got[0] != want {
			t.Errorf("got %+v, want %+v", got[0], want)
		}
		before := 0
		quiet := func(what string) {
			t.Helper()
			before = len(r.samples(id))
			time.Sleep(time.Minute)
			synctest.Wait()
			if n := len(r.samples(id)); n != before {
				t.Errorf("%s: %d samples were taken", what, n-before)
			}
		}
		if err := r.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		quiet("paused")
		r.wantState(id, Paused)
		if err := r.Hibernate(t.Context(), id, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		quiet("hibernated")
		r.wantState(id, Hibernated)
		if err := r.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		active := r.wantState(id, Running).LastActiveAt
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(r.samples(id)) - before; n < 10 || n > 13 {
			t.Errorf("%d samples in a minute", n)
		}
		if at := r.wantState(id, Running).LastActiveAt; !at.Equal(active) {
			t.Errorf("a sample counts as activity: %s, before %s", at, active)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		r.wantState(id, Stopped)
		if err := r.Destroy(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		_, err = r.Metrics(id, time.Time{}, time.Time{})
		wantClass(t, err, errdefs.NotFound)
	})
}

// What is kept is bounded: two hours of samples, and a day of one a minute.
func TestMetricsAreBounded(t *testing.T) {
	var u usage
	began := time.Unix(1_000_000, 0)
	const days = 2
	last := began
	for at := began; at.Before(began.Add(days * 24 * time.Hour)); at = at.Add(sampleEvery) {
		u.asked(sample{atMS: at.UnixMilli()}, nil)
		last = at
	}
	all := u.between(time.Time{}, time.Time{})
	if n := len(all); n > 2*keptSamples || n < 2*keptSamples-130 {
		t.Errorf("%d samples", n)
	}
	for i := range all[1:] {
		gap := time.Duration(all[i+1].atMS-all[i].atMS) * time.Millisecond
		if gap != sampleEvery && gap != sparseEvery {
			t.Fatalf("sample %d is %s after the one before", i+1, gap)
		}
	}
	if span := last.Sub(time.UnixMilli(all[0].atMS)); span < 23*time.Hour {
		t.Errorf("the samples are of %s", span)
	}
	from, to := last.Add(-time.Minute), last.Add(-30*time.Second)
	if some := u.between(from, to); len(some) != 7 || some[0].atMS != from.UnixMilli() || some[6].atMS != to.UnixMilli() {
		t.Errorf("from %s to %s: %+v", from, to, some)
	}
	if none := u.between(last.Add(time.Hour), time.Time{}); len(none) != 0 {
		t.Errorf("later than all: %+v", none)
	}
}

// A guest's numbers are within its size, whatever it says.
func TestMetricsOfALiar(t *testing.T) {
	rec := Record{MemMiB: 512, DiskMiB: 1024}
	s := sampleOf(guestapi.Metrics{
		CPUUsedPct: 1e300, MemTotal: math.MaxUint64, MemUsed: math.MaxUint64, MemCache: math.MaxUint64,
		DiskTotal: math.MaxUint64, DiskUsed: math.MaxUint64,
	}, rec, time.Unix(0, 0))
	if want := (sample{0, 100, 512 << 10, 512 << 10, 512 << 10, 1024 << 10, 1024 << 10}); s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
	s = sampleOf(guestapi.Metrics{CPUUsedPct: -1, MemTotal: 4096, MemUsed: 1 << 40}, rec, time.Unix(0, 0))
	if want := (sample{memUsed: 4, memTotal: 4}); s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
}

// Guests that do not answer are asked more and more seldom, and do not keep others from
// being measured.
func TestMetricsOfTheSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var asked atomic.Int64
		r.metrics = func(ctx context.Context) (guestapi.Metrics, error) {
			asked.Add(1)
			return guestapi.Metrics{}, hang(ctx)
		}
		silent := r.create()
		for range samplesAtOnce {
			r.create()
		}
		r.metrics = moderate
		id := r.create()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := len(r.samples(id)); n < 100 {
			t.Errorf("%d samples in 10 minutes", n)
		}
		if n := len(r.samples(silent)); n != 0 || asked.Load() > (samplesAtOnce+1)*20 {
			t.Errorf("%d samples of a silent guest, %d guests were asked %d times", n, samplesAtOnce+1, asked.Load())
		}
		if err := errors.Join(r.Pause(t.Context(), silent), r.Resume(t.Context(), silent)); err != nil {
			t.Error(err)
		}
	})
}

// A program that computes keeps a sandbox from expiring where its creator asks for that,
// and nowhere else. One that does little keeps none.
func TestBusyCPU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var pct atomic.Int64
		r.metrics = func(context.Context) (guestapi.Metrics, error) {
			return guestapi.Metrics{CPUUsedPct: float64(pct.Load())}, nil
		}
		pct.Store(12) // of two vCPUs: 24 % of one
		busy := r.request(CreateRequest{VCPUs: 2, Timeout: time.Minute, Busy: BusyCPU})
		plain := r.request(CreateRequest{VCPUs: 2, Timeout: time.Minute})
		little := r.request(CreateRequest{VCPUs: 1, Timeout: time.Minute, Busy: BusyCPU})
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		r.wantState(busy, Running)
		r.wantState(plain, Stopped)
		r.wantState(little, Stopped)
		pct.Store(1)
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		r.wantState(busy, Stopped)
		_, err := r.Create(t.Context(), CreateRequest{Busy: "disk"})
		wantClass(t, err, errdefs.InvalidArgument)
	})
}
