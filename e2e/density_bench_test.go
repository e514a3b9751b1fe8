package e2e_test

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	// manyBoxes is how many sandboxes share a snapshot in BenchmarkDensity.
	manyBoxes = 16
	// idleFor is how long idle VMMs are watched, after settleFor at the most.
	idleFor     = 20 * time.Second
	settleFor   = 30 * time.Second
	settleEvery = 2 * time.Second
)

// memory is what a process holds, in bytes: all that it maps, its share (PSS),
// in which a page that n processes map counts as 1/n of a page, and what it maps
// alone.
type memory struct{ rss, pss, own int64 }

// memoryOf reads what a process holds.
func memoryOf(b *testing.B, pid int) memory {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	var m memory
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		switch f[0] {
		case "Rss:":
			m.rss += kib << 10
		case "Pss:":
			m.pss += kib << 10
		case "Private_Clean:", "Private_Dirty:":
			m.own += kib << 10
		}
	}
	return m
}

func mib(n int64) string { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

// cpuTime is how long a process has run, in user and kernel mode.
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	const tick = time.Second / 100 // USER_HZ
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:]) // the name may hold anything
	user, uerr := strconv.ParseInt(string(f[11]), 10, 64)
	system, serr := strconv.ParseInt(string(f[12]), 10, 64)
	if uerr != nil || serr != nil {
		b.Fatal(uerr, serr)
	}
	return time.Duration(user+system) * tick
}

// BenchmarkDensity measures what one more idle sandbox takes.
func BenchmarkDensity(b *testing.B) {
	repeat(b, 1, time.Minute, func() {
		a, cold := benchAgent(b), coldAgent(b)
		used := func(a *agent) *sandbox {
			box := a.create(b, nil)
			if _, err := box.exec("true"); err != nil {
				b.Fatal(err)
			}
			return box
		}
		if err := a.restoredBox(b).destroy(); err != nil { // the snapshot is there
			b.Fatal(err)
		}
		booted := used(cold)
		var boxes []*sandbox
		b.ReportMetric(0, "ns/op") // it is no time that is measured
		sharedMemory(b, booted.vmmPID(), func() int {
			boxes = append(boxes, used(a))
			return boxes[len(boxes)-1].vmmPID()
		})
		file, err := os.Stat(filepath.Join(readyDir(b, boxes[0]), "mem"))
		if err != nil {
			b.Fatal(err)
		}
		remark("All of these have run one command. The snapshot's memory, %s MiB of data, is in the host's memory once, "+
			"however many VMMs map it.",
			mib(file.Sys().(*syscall.Stat_t).Blocks*512))

		paused := used(a)
		if err := paused.pause(); err != nil {
			b.Fatal(err)
		}
		bare := newBareHost(b, nil, boxes[0], 1)
		if err := bare.restoreDisk(bare.places[0]); err != nil {
			b.Fatal(err)
		}
		vm, err := bare.restore(b.Context(), bare.places[0])
		if err != nil {
			b.Fatal(err)
		}
		defer vm.end()
		restored := watched{name: "a restored sandbox"}
		for _, box := range boxes {
			restored.pids = append(restored.pids, box.vmmPID())
		}
		idleCPU(b, []watched{
			restored,
			{"a booted sandbox", []int{booted.vmmPID()}},
			{"a paused sandbox", []int{paused.vmmPID()}},
			{"bare QEMU with the guest of a restored one", []int{vm.cmd.Process.Pid}},
			{fmt.Sprintf("the agent, with %d sandboxes", manyBoxes+1), []int{a.cmd.Process.Pid}},
		})
	})
}

// sharedMemory measures VMMs of restored sandboxes, which more starts one of,
// beside one that booted.
func sharedMemory(b *testing.B, booted int, more func() (pid int)) {
	b.Helper()
	t := &table{head: []string{"restored sandboxes (MiB)", "PSS of all", "of each", "of one more", "private", "unshared", "booted",
		"PSS of each is"}}
	naive := memoryOf(b, booted)
	var pids []int
	var was memory
	for _, n := range []int{1, 4, manyBoxes} {
		had := len(pids)
		for len(pids) < n {
			pids = append(pids, more())
		}
		var sum memory
		for _, pid := range pids {
			m := memoryOf(b, pid)
			sum.rss, sum.pss, sum.own = sum.rss+m.rss, sum.pss+m.pss, sum.own+m.own
		}
		many := int64(n)
		part := func(of int64) float64 { return float64(sum.pss) / float64(of) }
		t.lines = append(t.lines, []string{
			fmt.Sprint(n), mib(sum.pss), mib(sum.pss / many), mib((sum.pss - was.pss) / int64(n-had)), mib(sum.own / many),
			mib(sum.rss / many), mib(naive.pss), fmt.Sprintf("%.2f of one without sharing (RSS), %.2f of one that booted", part(sum.rss),
				part(many*naive.pss)),
		})
		was = sum
	}
	tables = append(tables, t)
}

// watched are processes of one kind.
type watched struct {
	name string
	pids []int
}

// idleCPU measures what processes run while nothing is asked of them.
func idleCPU(b *testing.B, kinds []watched) {
	b.Helper()
	ran := func() []time.Duration {
		sums := make([]time.Duration, len(kinds))
		for i, k := range kinds {
			for _, pid := range k.pids {
				sums[i] += cpuTime(b, pid)
			}
		}
		return sums
	}
	// They have settled when the first kind does no less than a moment ago.
	last := time.Duration(math.MaxInt64)
	for began := time.Now(); time.Since(began) < settleFor; {
		before := ran()[0]
		time.Sleep(settleEvery)
		now := ran()[0] - before
		if now >= last {
			break
		}
		last = now
	}
	before, began := ran(), time.Now()
	time.Sleep(idleFor)
	after, took := ran(), time.Since(began)
	t := &table{head: []string{"idle", "n", "% of a core", "each, of"}}
	for i, k := range kinds {
		share := float64(after[i]-before[i]) / float64(took) / float64(len(k.pids))
		t.lines = append(t.lines, []string{k.name, fmt.Sprint(len(k.pids)), fmt.Sprintf("%.2f", 100*share),
			fmt.Sprintf("user and system time over %.0f s", took.Seconds())})
	}
	tables = append(tables, t)
}
