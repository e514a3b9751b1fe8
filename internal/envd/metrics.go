package envd

import (
	"encoding/json"
	"math"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// meter measures the use of the CPUs between two calls of look. Safe for
// concurrent use.
type meter struct {
	mu   sync.Mutex
	busy uint64
	all  uint64
	pct  float64
}

func (s *Server) metrics(w http.ResponseWriter, _ *http.Request) {
	m := guestapi.Metrics{Timestamp: time.Now().Unix(), CPUCount: runtime.NumCPU(), CPUUsedPct: s.meter.look()}
	info := memInfo()
	m.MemTotal = info["MemTotal"]
	m.MemUsed = m.MemTotal - min(m.MemTotal, info["MemAvailable"])
	m.MemCache = info["Cached"]
	m.MemTotalMiB, m.MemUsedMiB = m.MemTotal>>20, m.MemUsed>>20
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err == nil {
		m.DiskTotal = st.Blocks * uint64(st.Bsize)
		m.DiskUsed = (st.Blocks - st.Bfree) * uint64(st.Bsize)
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, m)
}

// look returns the percentage of all CPUs that was used since the last look,
// or since boot.
func (m *meter) look() float64 {
	busy, all := cpuTimes()
	m.mu.Lock()
	defer m.mu.Unlock()
	// Two calls within one tick of the kernel's clock read the same numbers.
	if all > m.all && busy >= m.busy {
		m.pct = math.Round(10000*float64(busy-m.busy)/float64(all-m.all)) / 100
		m.busy, m.all = busy, all
	}
	return m.pct
}

// cpuTimes returns the CPUs' time spent working and in total, in ticks.
func cpuTimes() (busy, all uint64) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	line, _, _ := strings.Cut(string(text), "\n")
	// user nice system idle iowait irq softirq steal; guest time is in user.
	for i, field := range strings.Fields(line) {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil || i > 8 {
			continue
		}
		all += n
		if i != 4 && i != 5 {
			busy += n
		}
	}
	return busy, all
}

// memInfo reads /proc/meminfo, in bytes.
func memInfo() map[string]uint64 {
	text, _ := os.ReadFile("/proc/meminfo") // without it nothing is known
	return parseMemInfo(string(text))
}

func parseMemInfo(text string) map[string]uint64 {
	info := make(map[string]uint64)
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		if fields := strings.Fields(value); len(fields) > 0 {
			n, _ := strconv.ParseUint(fields[0], 10, 64)
			info[name] = n << 10
		}
	}
	return info
}

// envs is GET /envs.
func (s *Server) envs(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, s.userEnv())
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_ = json.NewEncoder(w).Encode(value)
}

// maxJSON bounds the JSON bodies of plain HTTP requests.
const maxJSON = 1 << 20

func readJSON(w http.ResponseWriter, r *http.Request, value any) error {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxJSON)).Decode(value); err != nil {
		return failf(http.StatusBadRequest, "parse the request: %v", err)
	}
	return nil
}
