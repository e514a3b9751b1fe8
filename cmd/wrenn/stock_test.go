package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/templates"
)

// TestMissingStock: "base" leads to the template minimal, and is missing all the same
// until there is one of that name.
func TestMissingStock(t *testing.T) {
	store, err := template.Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	missing := func() int {
		t.Helper()
		left, err := missingStock(store, []templates.Stock{{Name: "base"}})
		if err != nil {
			t.Fatal(err)
		}
		return len(left)
	}
	if missing() != 1 {
		t.Error("an empty store has base")
	}
	makeTemplate(t, store, template.DefaultName)
	if missing() != 1 {
		t.Error("minimal is taken for base")
	}
	makeTemplate(t, store, "base")
	if missing() != 0 {
		t.Error("base is missing though it is there")
	}
}

// makeTemplate makes a template of one layer, which nothing can boot.
func makeTemplate(t *testing.T, store *template.Store, name string) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	about := template.Making{Recipe: name, Defaults: template.Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: 4096}}
	err := os.WriteFile(image, []byte("image"), 0o600)
	if err == nil {
		_, _, err = store.MakeBuild(t.Context(), template.NewBuild{Name: name}, about, func(b *template.BuildStage) error {
			return b.AddLayer(t.Context(), image)
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}
