package main

import (
	"context"
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
	if err := publishTemplate(t.Context(), store, name, filepath.Join(t.TempDir(), "image")); err != nil {
		t.Fatal(err)
	}
}

func publishTemplate(ctx context.Context, store *template.Store, name, image string) error {
	if err := os.WriteFile(image, []byte("image"), 0o600); err != nil {
		return err
	}
	info, b, err := store.NewBuild(ctx, template.NewBuild{Name: name, VCPUs: 1, MemMiB: 512, DiskMiB: 4096})
	if err != nil {
		return err
	}
	if err := store.SetBuild(ctx, info.ID, b.ID, template.StatusBuilding, nil); err != nil {
		return err
	}
	stage, err := store.StageBuild(ctx, info.ID, b.ID)
	if err != nil {
		return err
	}
	defer stage.Discard()
	if err := stage.AddLayer(ctx, image); err != nil {
		return err
	}
	about := template.Making{Recipe: name, Defaults: template.Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: 4096}}
	if _, _, err := stage.Publish(ctx, about); err != nil {
		return err
	}
	return store.Finish(ctx, info.ID, b.ID, nil)
}
