package e2e_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// BenchmarkLayers times creates from a template of as many layers as there can be beside
// those from one layer. Each layer has files in the directories that programs come from,
// so that a guest that looks for one there looks into all layers.
func BenchmarkLayers(b *testing.B) {
	a, cold := benchAgent(b), coldAgent(b)
	box := a.restoredBox(b)
	box.sh("for d in bin sbin lib lib/x86_64-linux-gnu lib/python3.11; do for i in $(seq 40); do echo $d >/usr/$d/layer-$i; done; done")
	if err := box.hibernate(); err != nil {
		b.Fatal(err)
	}
	layer := filepath.Join(a.stateDir, "sandboxes", box.id, "snapshot", "overlay.ext4")
	for _, host := range []*agent{a, cold} {
		host.build(b, "minimal", "stack", slices.Repeat([]string{layer}, template.MaxLayers-1)...)
	}
	// As coldAgent does with "minimal".
	if err := os.WriteFile(filepath.Join(cold.buildDir(b, "stack"), "ready"), nil, 0o444); err != nil {
		b.Fatal(err)
	}
	if err := a.create(b, &hostagentv1.CreateSandboxRequest{Template: "stack"}).destroy(); err != nil { // makes the boot snapshot
		b.Fatal(err)
	}
	for _, c := range []struct {
		name, what string
		host       *agent
		n          int
		limit      time.Duration
	}{
		{"Cold", "cold create", cold, 12, 90 * time.Second},
		{"Ready", "create from a ready snapshot", a, 20, 45 * time.Second},
	} {
		b.Run(c.name, func(b *testing.B) {
			ready := row(c.what+", 8 layers", "of 1 layer")
			exec := row(c.what+" and first exec, 8 layers", "of 1 layer")
			repeat(b, c.n, c.limit, func() {
				for _, of := range []struct {
					template    string
					ready, exec *[]time.Duration
				}{{"stack", &ready.agent, &exec.agent}, {"minimal", &ready.floor, &exec.floor}} {
					req := &hostagentv1.CreateSandboxRequest{Template: of.template}
					s, made, err := c.host.startTimed(b.Context(), req, "python3", "-c", "import json")
					if err != nil {
						b.Fatal(err)
					}
					x := &sandbox{b, c.host, made.SandboxId}
					if x.record().Restored != (c.name == "Ready") {
						b.Fatalf("%s started from %s: %s", of.template, made.StartedFrom, made.Why)
					}
					*of.ready, *of.exec = append(*of.ready, s.ready), append(*of.exec, s.exec)
					if err := x.destroy(); err != nil {
						b.Fatal(err)
					}
				}
			})
			ready.report(b)
		})
	}
}
