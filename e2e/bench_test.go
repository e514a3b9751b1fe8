package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// samples are the times that one operation took, through the agent and with
// what it is made of alone.
type samples struct {
	name, floorName string
	agent, floor    []time.Duration
	// goal is the ratio that is aimed at, at the most; zero for none.
	goal float64
	// bytes is how many each operation moves; zero where that is not its point.
	bytes int64
	// absent says why nothing was measured.
	absent string
}

// What TestMain prints at the end: where it was measured, the table of
// operations, others, and what there is to say of them.
var (
	measuredOn string
	measured   []*samples
	tables     []*table
	remarks    []string
)

func row(name, floorName string) *samples {
	s := &samples{name: name, floorName: floorName}
	measured = append(measured, s)
	return s
}

// remark adds a line below the tables.
func remark(format string, args ...any) { remarks = append(remarks, fmt.Sprintf(format, args...)) }

// timed adds the time that do takes.
func timed(b *testing.B, to *[]time.Duration, do func() error) {
	b.Helper()
	began := time.Now()
	err := do()
	*to = append(*to, time.Since(began))
	if err != nil {
		b.Fatal(err)
	}
}

// benchLimit bounds what all benchmarks together take. What comes after it is
// measured as little as can be.
const benchLimit = 11 * time.Minute

var benchBegan time.Time

// repeat measures a round n times, whatever -benchtime says. After limit it
// begins none but the first twentieth of them: how often it was is in the table.
func repeat(b *testing.B, n int, limit time.Duration, round func()) {
	b.Helper()
	if benchBegan.IsZero() {
		benchBegan = time.Now()
	}
	limit = min(limit, max(0, benchLimit-time.Since(benchBegan)).Round(time.Second))
	fmt.Fprintf(os.Stderr, "%s %s: %d rounds, or as many as begin within %s\n", time.Now().Format(time.TimeOnly), b.Name(), n, limit)
	for done := false; b.Loop(); done = true {
		began := time.Now()
		for i := 0; !done && i < n && (i < max(1, n/20) || time.Since(began) < limit); i++ {
			round()
		}
	}
}

// atOnce does something for 0 to n-1 at the same time, and returns when all
// have ended.
func atOnce(b *testing.B, n int, do func(i int) error) {
	b.Helper()
	failed := make(chan error, n)
	for i := range n {
		go func() { failed <- do(i) }()
	}
	var err error
	for range n {
		if e := <-failed; e != nil {
			err = e
		}
	}
	if err != nil {
		b.Fatal(err)
	}
}

// report makes the numbers part of the benchmark's own line as well.
func (s *samples) report(b *testing.B) {
	b.ReportMetric(0, "ns/op") // agent and floor in one would say nothing
	b.ReportMetric(millis(percentile(s.agent, 50)), "agent-p50-ms")
	b.ReportMetric(millis(percentile(s.floor, 50)), "floor-p50-ms")
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// percentile is the least sample that p percent of them do not exceed.
func percentile(d []time.Duration, p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d))
	return sorted[(len(sorted)*p+99)/100-1]
}

// inMillis is a percentile as text. A high one that has no sample beyond it
// would be the maximum by another name: the 95th takes 20 samples, the 99th 100.
func inMillis(d []time.Duration, p int) string {
	if len(d) == 0 || p > 50 && len(d)*(100-p) < 100 {
		return "–"
	}
	return fmt.Sprintf("%.2f", millis(percentile(d, p)))
}

// megabytes is a rate in 10⁶ bytes a second.
func megabytes(n int64, d time.Duration) string {
	return fmt.Sprintf("%.1f", float64(n)/1e6/d.Seconds())
}

// cells is the row as a line of the table.
func (s *samples) cells() []string {
	if s.absent != "" {
		return append(append([]string{s.name, "0"}, slices.Repeat([]string{"–"}, 10)...), s.absent)
	}
	agent, floor := percentile(s.agent, 50), percentile(s.floor, 50)
	n := fmt.Sprint(len(s.agent))
	if len(s.floor) > 0 && len(s.floor) != len(s.agent) {
		n += fmt.Sprintf(", %d", len(s.floor))
	}
	line := []string{s.name, n}
	for _, d := range [][]time.Duration{s.agent, s.floor} {
		line = append(line, inMillis(d, 50), inMillis(d, 95), inMillis(d, 99))
	}
	ratio, goal, rate, floorRate := "–", "", "", ""
	if floor > 0 {
		ratio = fmt.Sprintf("%.2f", float64(agent)/float64(floor))
	}
	if s.goal > 0 {
		goal = fmt.Sprintf("≤ %.2f", s.goal)
	}
	if s.bytes > 0 {
		rate, floorRate = megabytes(s.bytes, agent), megabytes(s.bytes, floor)
	}
	return append(line, ratio, goal, rate, floorRate, s.floorName)
}

// table is lines of cells. The first and the last column begin at the left, the
// others end at the right.
type table struct {
	head  []string
	lines [][]string
}

func (t *table) print(w io.Writer) {
	var widths []int
	for _, line := range append([][]string{t.head}, t.lines...) {
		for i, cell := range line {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range append([][]string{t.head}, t.lines...) {
		for i, cell := range line {
			switch i {
			case 0:
				fmt.Fprintf(w, "%-*s", widths[i], cell)
			case len(widths) - 1:
				fmt.Fprintf(w, "  %s", cell)
			default:
				fmt.Fprintf(w, "  %*s", widths[i], cell)
			}
		}
		fmt.Fprintln(w)
	}
}

func printMeasured(w io.Writer) {
	if len(measured) == 0 && len(tables) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n\n", measuredOn)
	operations := &table{head: []string{"operation (ms)", "n", "p50", "p95", "p99", "floor: p50", "p95", "p99", "ratio", "goal",
		"MB/s", "floor", "the floor is"}}
	for _, s := range measured {
		operations.lines = append(operations.lines, s.cells())
	}
	for _, t := range append([]*table{operations}, tables...) {
		if len(t.lines) > 0 {
			t.print(w)
			fmt.Fprintln(w)
		}
	}
	for _, line := range remarks {
		fmt.Fprintln(w, line)
	}
}

// benchAgent starts an agent with the settings that its users have, and args.
func benchAgent(b *testing.B, args ...string) *agent {
	b.Helper()
	load, _ := os.ReadFile("/proc/loadavg")
	a := startAgent(b, append([]string{"--pool=4"}, args...)...)
	version, err := a.GetVersion(b.Context(), connect.NewRequest(&hostagentv1.GetVersionRequest{}))
	if err != nil {
		b.Fatal(err)
	}
	if measuredOn == "" {
		measuredOn = fmt.Sprintf("%s: wrenn %s, %s %s; %s; load before it %s",
			time.Now().UTC().Format("2006-01-02 15:04 UTC"), version.Msg.Version, version.Msg.Vmm, version.Msg.VmmVersion, machine(), first(load))
	}
	return a
}

// machine is what the host is.
func machine() string {
	var cpu string
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			cpu = strings.TrimSpace(value)
		}
	}
	var un unix.Utsname
	var si unix.Sysinfo_t
	_, _ = unix.Uname(&un), unix.Sysinfo(&si)
	return fmt.Sprintf("%d × %s, %.0f GiB, Linux %s", runtime.NumCPU(), cpu,
		float64(si.Totalram)*float64(si.Unit)/(1<<30), unix.ByteSliceToString(un.Release[:]))
}

// first is the first word of a text.
func first(text []byte) string {
	word, _, _ := bytes.Cut(text, []byte(" "))
	return string(word)
}

func TestPercentile(t *testing.T) {
	upTo := func(n int) (d []time.Duration) {
		for i := n; i > 0; i-- {
			d = append(d, time.Duration(i)*time.Millisecond)
		}
		return d
	}
	for _, c := range []struct{ n, p, want int }{
		{0, 50, 0}, {1, 50, 1}, {1, 99, 1}, {2, 50, 1}, {3, 50, 2}, {10, 50, 5}, {10, 95, 10},
		{20, 95, 19}, {99, 99, 99}, {100, 50, 50}, {100, 95, 95}, {100, 99, 99}, {200, 99, 198},
	} {
		if got := percentile(upTo(c.n), c.p); got != time.Duration(c.want)*time.Millisecond {
			t.Errorf("percentile %d of 1 to %d ms is %s, want %d ms", c.p, c.n, got, c.want)
		}
	}
	for _, c := range []struct {
		n, p int
		want string
	}{
		{0, 50, "–"}, {1, 50, "1.00"}, {2, 50, "1.00"}, {19, 95, "–"}, {20, 95, "19.00"}, {99, 99, "–"}, {100, 99, "99.00"},
	} {
		if got := inMillis(upTo(c.n), c.p); got != c.want {
			t.Errorf("percentile %d of 1 to %d ms is printed as %q, want %q", c.p, c.n, got, c.want)
		}
	}
}

func TestMeasuredTable(t *testing.T) {
	ms := func(n ...int) (d []time.Duration) {
		for _, i := range n {
			d = append(d, time.Duration(i)*time.Millisecond)
		}
		return d
	}
	tab := table{head: []string{"operation", "n", "p50", "p95", "p99", "floor: p50", "p95", "p99", "ratio", "goal", "MB/s", "floor",
		"the floor is"}}
	for _, s := range []*samples{
		{name: "step", floorName: "a bare step", agent: ms(3, 9, 4), floor: ms(2, 1, 2), goal: 1.15},
		{name: "copy", floorName: "cp", agent: ms(4, 4), floor: ms(2, 2, 2), bytes: 1e6},
		{name: "leap", absent: "there is none"},
	} {
		tab.lines = append(tab.lines, s.cells())
	}
	var out strings.Builder
	tab.print(&out)
	want := `operation     n   p50  p95  p99  floor: p50  p95  p99  ratio    goal   MB/s  floor  the floor is
step          3  4.00    –    –        2.00    –    –   2.00  ≤ 1.15                a bare step
copy       2, 3  4.00    –    –        2.00    –    –   2.00          250.0  500.0  cp
leap          0     –    –    –           –    –    –      –       –      –      –  there is none
`
	if got := out.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}
