package server

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// metrics reads the numbers of Config when it is asked; it keeps none.
type metrics struct{ Config }

// The metrics; their names and labels are an interface.
var (
	sandboxesDesc = desc("sandboxes", "Sandboxes by state.", "state")
	endedDesc     = desc("sandboxes_ended_total", "Sandboxes that ended since the agent started, by reason.", "reason")
	usedDesc      = desc("reserved", "What sandboxes have reserved of the host: sandboxes, vcpus, memory_mib, disk_mib.", "resource")
	limitDesc     = desc("limit", "What sandboxes may reserve of the host.", "resource")
	markedDesc    = desc("sandboxes_marked", "Sandboxes that run or are paused but do not work as they should, by reason.", "reason")
	diskDesc      = desc("disk_bytes", "What is free on the file system of the state directory, and what of it is kept free.", "what")
	warmDesc      = desc("warm", "Waiting guests: those that are ready, and those that are wanted.", "state")
	slotsDesc     = desc("network_slots", "Network slots: reserved (all that are not free), open (with something on the host), "+
		"pool (built and waiting), fenced (not removed yet, kept from use).", "state")
	namesOpenDesc = desc("egress_connections", "Connections of sandboxes by name that are open.")
	namesDesc     = desc("egress_total", "What sandboxes asked of the way out by name since the agent started: "+
		"accepted (connections), refused (connections, requests and questions).", "result")
	deniedDesc = desc("egress_denied_total", "What network policies refused sandboxes since the agent started: http, tls, dns, other "+
		"connections to the proxy (tcp), and packets to addresses that were noted (tcp, udp, ip).", "kind")
	fencedDesc  = desc("cleanup_pending", "Sandboxes and slots that could not be freed yet.")
	panicsDesc  = desc("panics_total", "Requests whose handling panicked since the agent started.")
	refusedDesc = desc("connections_refused_total", "Connections closed since the agent started because there were too many.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("wrenn_"+name, help, labels, nil)
}

func (m metrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

func (m metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	stats := m.Manager.Stats()
	for _, state := range sandbox.States() {
		gauge(sandboxesDesc, stats.States[state], string(state))
	}
	for _, reason := range sandbox.Reasons() {
		ch <- prometheus.MustNewConstMetric(endedDesc, prometheus.CounterValue, float64(stats.Ended[reason]), string(reason))
	}
	for desc, r := range map[*prometheus.Desc]sandbox.Resources{usedDesc: stats.Reserved, limitDesc: stats.Limit} {
		gauge(desc, r.Sandboxes, "sandboxes")
		gauge(desc, r.VCPUs, "vcpus")
		gauge(desc, r.MemMiB, "memory_mib")
		gauge(desc, r.DiskMiB, "disk_mib")
	}
	for _, reason := range sandbox.Marks() {
		gauge(markedDesc, stats.Marked[reason], string(reason))
	}
	for what, bytes := range map[string]int64{"free": stats.DiskFree, "kept": stats.DiskKept} {
		ch <- prometheus.MustNewConstMetric(diskDesc, prometheus.GaugeValue, float64(bytes), what)
	}
	gauge(warmDesc, stats.Warm, "ready")
	gauge(warmDesc, stats.WarmWanted, "wanted")
	gauge(fencedDesc, stats.Pending)
	ch <- prometheus.MustNewConstMetric(panicsDesc, prometheus.CounterValue, float64(m.Panics.Load()))
	ch <- prometheus.MustNewConstMetric(refusedDesc, prometheus.CounterValue, float64(m.Refused()))
	names := m.Names()
	gauge(namesOpenDesc, names.Open)
	for result, n := range map[string]uint64{"accepted": names.Accepted, "refused": names.Refused} {
		ch <- prometheus.MustNewConstMetric(namesDesc, prometheus.CounterValue, float64(n), result)
	}
	for kind, n := range names.Denied {
		ch <- prometheus.MustNewConstMetric(deniedDesc, prometheus.CounterValue, float64(n), kind)
	}
	for state, n := range m.Slots() {
		gauge(slotsDesc, n, state)
	}
}

// metricsHandler answers GET /metrics in Prometheus' text format.
func metricsHandler(c Config) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		metrics{c},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
}
