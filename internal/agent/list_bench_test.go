package agent

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// BenchmarkListOfAKey lists the 50 sandboxes of one key on a host that has 100 such keys,
// over REST.
func BenchmarkListOfAKey(b *testing.B) {
	const projects, each = 100, 50
	r := newRig(b)
	r.cfg.Rates = auth.Rates{}
	r.cfg.Capacity.Resources = sandbox.Resources{Sandboxes: 1 << 20, VCPUs: 1 << 20, MemMiB: 1 << 30, DiskMiB: 1 << 40}
	keys, err := auth.Open(r.cfg.StateDir)
	if err != nil {
		b.Fatal(err)
	}
	defer keys.Close()
	r.start()
	var secrets []string
	for p := range projects {
		project := fmt.Sprint("p", p)
		secret, _, err := keys.CreateKey(project, "")
		if err != nil {
			b.Fatal(err)
		}
		secrets = append(secrets, secret)
		for range each {
			if _, err := r.agent.base.manager.Create(b.Context(), sandbox.CreateRequest{
				Labels: sandbox.Labels{Project: project, Metadata: map[string]string{"n": project}},
			}); err != nil {
				b.Fatal(err)
			}
		}
	}
	n := 0
	for b.Loop() {
		req, err := http.NewRequest("GET", "http://"+r.agent.Addr().String()+"/v2/sandboxes", nil)
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("X-API-KEY", secrets[n%projects])
		n++
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || strings.Count(string(text), `"sandboxID"`) != each {
			b.Fatalf("HTTP %d %s, %v", resp.StatusCode, text, err)
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N), "ms/list")
}
