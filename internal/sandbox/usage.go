package sandbox

import (
	"context"
	"fmt"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// sampleEvery is the time between two samples of what a running sandbox uses.
	sampleEvery = 5 * time.Second
	// sampleTimeout bounds the wait for one.
	sampleTimeout = 3 * time.Second
	// samplesAtOnce is how many guests are asked at a time.
	samplesAtOnce = 16
	// keptSamples is how many samples are kept, and as many again that are a minute
	// apart: two hours and a day of a sandbox that runs.
	keptSamples = 1440
	sparseEvery = time.Minute
)

// Metric is what a sandbox used at a time, in bytes. All except VCPUs is its guest's
// word, within the sandbox's size.
type Metric struct {
	At    time.Time
	VCPUs int
	// CPUUsedPct is of all vCPUs since the sample before, 0 to 100.
	CPUUsedPct                  float64
	MemUsed, MemTotal, MemCache int64
	DiskUsed, DiskTotal         int64
}

// sample is a Metric as it is kept: in KiB and small, for there are thousands of each
// sandbox.
type sample struct {
	atMS                        int64
	cpuPct                      float32
	memUsed, memTotal, memCache uint32
	diskUsed, diskTotal         uint32
}

// usage keeps the samples of a sandbox, over pauses, until the agent ends or the sandbox
// is forgotten. It is safe for concurrent use.
type usage struct {
	mu sync.Mutex
	// fine are the last samples, sparse those a minute apart.
	fine, sparse ring
	// asking: the guest has not answered yet.
	asking bool
	// failures counts the times in a row that the guest did not answer; retryAt is when
	// it is asked again.
	failures int
	retryAt  time.Time
}

// ring keeps the last keptSamples samples.
type ring struct {
	samples []sample
	oldest  int // once there are keptSamples
}

func (r *ring) add(s sample) {
	if len(r.samples) < keptSamples {
		r.samples = append(r.samples, s)
		return
	}
	r.samples[r.oldest] = s
	r.oldest = (r.oldest + 1) % keptSamples
}

// at returns the sample with that place, from 0 for the oldest.
func (r *ring) at(i int) sample { return r.samples[(r.oldest+i)%len(r.samples)] }

// mayAsk says whether it is time to ask the guest, and notes that it is asked.
func (u *usage) mayAsk(now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.asking || now.Before(u.retryAt) {
		return false
	}
	u.asking = true
	return true
}

// asked ends what mayAsk began.
func (u *usage) asked(s sample, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asking = false
	if err != nil {
		u.failures++
		u.retryAt = time.Now().Add(backOff(u.failures))
		return
	}
	u.failures = 0
	u.fine.add(s)
	last := len(u.sparse.samples) - 1
	// A clock that was put back begins anew.
	if last < 0 || s.atMS-u.sparse.at(last).atMS >= sparseEvery.Milliseconds() || s.atMS < u.sparse.at(last).atMS {
		u.sparse.add(s)
	}
}

// between returns the samples from start to end, both included, oldest first: a minute
// apart where no others are kept. A zero time is no bound.
func (u *usage) between(start, end time.Time) []sample {
	u.mu.Lock()
	defer u.mu.Unlock()
	var found []sample
	take := func(s sample) {
		at := time.UnixMilli(s.atMS)
		if (start.IsZero() || !at.Before(start)) && (end.IsZero() || !at.After(end)) {
			found = append(found, s)
		}
	}
	if len(u.fine.samples) == 0 {
		return nil
	}
	for i := range u.sparse.samples {
		if s := u.sparse.at(i); s.atMS < u.fine.at(0).atMS {
			take(s)
		}
	}
	for i := range u.fine.samples {
		take(u.fine.at(i))
	}
	return found
}

// sampleOf is what a guest of that size says, as far as it can be.
func sampleOf(m guestapi.Metrics, rec Record, now time.Time) sample {
	kib := func(bytes, most uint64) uint32 { return uint32(min(bytes, most) >> 10) }
	mem := min(m.MemTotal, uint64(rec.MemMiB)<<20)
	disk := min(m.DiskTotal, uint64(rec.DiskMiB)<<20)
	return sample{
		atMS: now.UnixMilli(), cpuPct: float32(max(0, min(m.CPUUsedPct, 100))),
		memUsed: kib(m.MemUsed, mem), memTotal: kib(mem, mem), memCache: kib(m.MemCache, mem),
		diskUsed: kib(m.DiskUsed, disk), diskTotal: kib(disk, disk),
	}
}

// Metrics returns what is kept of a sandbox's use from start to end, both included,
// oldest first; a zero time is no bound. It never waits for an operation. There are
// samples of the times at which the sandbox ran under this agent: one each 5 s, the last
// 1,440 of them, and before those one a minute, as many.
func (r *registry) Metrics(id ID, start, end time.Time) ([]Metric, error) {
	b, err := r.find(id)
	if err != nil {
		return nil, err
	}
	vcpus := b.record().VCPUs
	samples := b.usage.between(start, end)
	metrics := make([]Metric, 0, len(samples))
	for _, s := range samples {
		bytes := func(kib uint32) int64 { return int64(kib) << 10 }
		metrics = append(metrics, Metric{
			At: time.UnixMilli(s.atMS).UTC(), VCPUs: vcpus, CPUUsedPct: float64(s.cpuPct),
			MemUsed: bytes(s.memUsed), MemTotal: bytes(s.memTotal), MemCache: bytes(s.memCache),
			DiskUsed: bytes(s.diskUsed), DiskTotal: bytes(s.diskTotal),
		})
	}
	return metrics, nil
}

// Busy says what counts as activity of a sandbox beside calls and connections.
type Busy string

// BusyCPU counts programs that use busyPct or more of a vCPU.
const BusyCPU Busy = "cpu"

// busyPct is what no idle guest uses, in percent of one vCPU.
const busyPct = 20

func (b Busy) check() error {
	if b != "" && b != BusyCPU {
		return fmt.Errorf("busy is %.40q, must be cpu or nothing", string(b))
	}
	return nil
}

// sampler asks the guests of running sandboxes what they use. That is no activity by
// itself, and no guest is woken for it.
type sampler struct{ *Manager }

// run does so until the manager's life ends.
func (s sampler) run() {
	timer := time.NewTimer(sampleEvery)
	defer timer.Stop()
	atOnce := make(chan struct{}, samplesAtOnce)
	for {
		select {
		case <-timer.C:
		case <-s.life.Done():
			return
		}
		began := time.Now()
		for _, b := range s.all() {
			s.sample(b, atOnce)
		}
		timer.Reset(max(sampleEvery-time.Since(began), sampleEvery/10))
	}
}

// sample asks a guest on a goroutine of its own, for which it waits its turn. A sandbox
// in an operation is left out: its guest may be about to stand still.
func (s sampler) sample(b *box, atOnce chan struct{}) {
	guest, alive, rec := b.measured()
	if guest == nil || len(b.lock) > 0 || !b.usage.mayAsk(time.Now()) {
		return
	}
	select {
	case atOnce <- struct{}{}:
	case <-s.life.Done():
		return
	}
	s.goes("sample", func() {
		defer func() { <-atOnce }()
		ctx, cancel := context.WithTimeout(alive, sampleTimeout)
		defer cancel()
		ctx, cancelBoth := both(ctx, s.life)
		defer cancelBoth()
		m, err := guest.Metrics(ctx)
		b.usage.asked(sampleOf(m, rec, time.Now()), err)
		if err == nil && rec.Busy == BusyCPU && min(m.CPUUsedPct, 100)*float64(rec.VCPUs) >= busyPct {
			s.active(b)
		}
	})
}

// measured returns the guest of a running sandbox and what ends with it; nil of others.
func (b *box) measured() (Guest, context.Context, Record) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.rec.State != Running {
		return nil, nil, Record{}
	}
	return b.mu.guest, b.mu.alive, b.mu.rec
}
