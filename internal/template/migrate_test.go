package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/sealed"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/snapfile"
)

const (
	// earlierBase and earlierSnapshot are the digests of "image" and "memory".
	earlierBase     = "6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"
	earlierManifest = `{"format": 1, "files": {"base.ext4": {"size": 5, "sha256": "` + earlierBase + `"}}, "recipe": "ff",
		"defaults": {"vcpus": 1, "mem_mib": 512, "overlay_mib": 4096, "user": "root"}}`
	readyKeyOfEarlier = "00112233445566778899aabbccddeeff"
)

// writeEarlier makes a state directory as versions without ids wrote it: a kernel, the
// template "minimal" with a boot snapshot, and the snapshots "prepared" and "broken",
// which has no manifest.
func writeEarlier(t *testing.T, dir string) {
	t.Helper()
	kernel, tmpl := filepath.Join(dir, "kernels", "default"), filepath.Join(dir, "templates", "minimal")
	ready, snap := filepath.Join(tmpl, "ready", readyKeyOfEarlier), filepath.Join(dir, "snapshots", "prepared")
	for name, text := range map[string]string{
		kernel + "/vmlinux":           "kernel",
		kernel + "/initrd.img":        "initrd",
		kernel + "/modules/virtio.ko": "mod",
		kernel + "/kernel.json": `{"format": 1, "files": {"vmlinux": {"size": 6, "sha256": "aa"}, "initrd.img": {"size": 6, "sha256": "bb"},
			"modules/virtio.ko": {"size": 3, "sha256": "cc"}}, "release": "6.1.0-56-cloud-amd64",
			"source": "package linux-image-6.1.0-56-cloud-amd64 6.1.192-2", "envd_sha256": "dd", "modules": ["virtio.ko"], "initrd_format": 1}`,
		tmpl + "/base.ext4":                              "image",
		tmpl + "/template.json":                          earlierManifest,
		filepath.Join(dir, "templates", "lock"):          "",
		ready + "/mem":                                   "memory",
		ready + "/overlay.ext4":                          "disk",
		snap + "/mem":                                    "memory",
		snap + "/overlay.ext4":                           "disk",
		filepath.Join(dir, "snapshots", "broken", "mem"): "memory",
		filepath.Join(dir, "snapshots", "lock"):          "",
	} {
		write(t, name, text)
	}
	// The snapshot has digests as versions before wrote them.
	files := func(of func(context.Context, string) (File, error), dir string) string {
		found := map[string]File{}
		for _, name := range []string{"mem", readyOverlay} {
			f, err := of(t.Context(), filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			found[name] = f
		}
		text, err := json.Marshal(found)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	write(t, ready+"/manifest.json", fmt.Sprintf(`{"format": 1, "files": %s, "key": %q,
		"shape": {"driver": "qemu", "vcpus": 1, "mem_mib": 512, "disk_mib": 4096}}`, files(snapfile.Digest, ready), readyKeyOfEarlier))
	write(t, snap+"/manifest.json", fmt.Sprintf(`{"format": 1, "files": %s, "key": "k",
		"shape": {"driver": "qemu", "vcpus": 2, "mem_mib": 768, "disk_mib": 4096},
		"source": {"sandbox": "sb-0123456789abcdef", "template": "minimal", "base": %q, "clone_key": "secret", "synced": true,
		"created_at": "2026-01-02T03:04:05Z"}}`, files(snapfile.OldDigest, snap), earlierBase))
}

// wantTakenOver demands of a store that it has all that writeEarlier made, under ids.
func wantTakenOver(t *testing.T, s *Store) {
	t.Helper()
	wantTemplates(t, s, 3)
	got, err := s.Get("minimal")
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != HostID("minimal") || got.Name != "minimal" || got.RootSHA256 != earlierBase || got.Release != "6.1.0-56-cloud-amd64" ||
		!reflect.DeepEqual(got.Defaults, Defaults{VCPUs: 1, MemMiB: 512, OverlayMiB: 4096, Login: Login{User: "root"}}) {
		t.Errorf("minimal is %+v", got)
	}
	if data, err := os.ReadFile(got.Layers[0].Path); err != nil || string(data) != "image" {
		t.Errorf("its image is %q, %v", data, err)
	}
	for _, name := range []string{"minimal", HostID("minimal"), "base"} {
		if old, err := s.RootOf(name, earlierBase); err != nil || !reflect.DeepEqual(old.Layers, got.Layers) {
			t.Errorf("what the disk of an earlier sandbox is over: %+v, %v", old, err)
		}
	}
	if _, err := s.Ready(t.Context(), got.ID, got.Build, readyKeyOfEarlier); err != nil {
		t.Errorf("its boot snapshot: %v", err)
	}
	info, b, err := s.Resolve("", "prepared")
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if err != nil || info.Source != "sb-0123456789abcdef" || !info.CreatedAt.Equal(at) || b.VCPUs != 2 || b.MemMiB != 768 ||
		b.Base != earlierBase || b.Over != got.ID {
		t.Fatalf("prepared is %+v, build %+v, %v", info, b, err)
	}
	snap, err := s.Snapshot(t.Context(), info.ID, b.ID)
	if err != nil || snap.Source.CloneKey != "secret" || snap.Key != "k" {
		t.Errorf("prepared has %+v, %v", snap, err)
	}
	info, b, err = s.Resolve("", "broken")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Snapshot(t.Context(), info.ID, b.ID); errdefs.ClassOf(err) != errdefs.Corrupt {
		t.Errorf("broken: %v", err)
	}
	if !missing(filepath.Join(s.dir, "snapshots")) {
		t.Error("the directory of the earlier version is left")
	}
}

// TestTakesOverAnEarlierVersion: also where an agent died at any step of it.
func TestTakesOverAnEarlierVersion(t *testing.T) {
	// Of a directory that was taken over, what each step does.
	info := func(t *testing.T, dir, id string) (Info, string) {
		done := filepath.Join(t.TempDir(), "done")
		writeEarlier(t, done)
		s := open(t, done)
		all, _, err := s.load()
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range all {
			if id == i.Name() {
				return i, filepath.Join(dir, "templates", i.ID)
			}
		}
		t.Fatalf("no %s", id)
		return Info{}, ""
	}
	listed := func(t *testing.T, dir, name string) string {
		i, to := info(t, dir, name)
		if err := os.Mkdir(to, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := sealed.Write(filepath.Join(to, infoFile), i); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(to, i.Builds[0].ID)
	}
	for name, step := range map[string]func(t *testing.T, dir string) error{
		"before": func(*testing.T, string) error { return nil },
		"manifest renamed": func(_ *testing.T, dir string) error {
			return os.Rename(filepath.Join(dir, "templates/minimal/template.json"), filepath.Join(dir, "templates/minimal/manifest.json"))
		},
		"directory made": func(t *testing.T, dir string) error {
			_, to := info(t, dir, "minimal")
			return os.Mkdir(to, 0o755)
		},
		"template listed": func(t *testing.T, dir string) error {
			listed(t, dir, "minimal")
			return os.Rename(filepath.Join(dir, "templates/minimal/template.json"), filepath.Join(dir, "templates/minimal/manifest.json"))
		},
		"snapshot listed": func(t *testing.T, dir string) error { listed(t, dir, "prepared"); return nil },
		"snapshot moved": func(t *testing.T, dir string) error {
			return os.Rename(filepath.Join(dir, "snapshots/prepared"), listed(t, dir, "prepared"))
		},
		"all": func(t *testing.T, dir string) error { open(t, dir); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			writeEarlier(t, dir)
			if err := step(t, dir); err != nil {
				t.Fatal(err)
			}
			wantTakenOver(t, open(t, dir))
			wantTakenOver(t, open(t, dir)) // and does it once
		})
	}
}

// TestEarlierVersionComesBack: what it makes is taken over, too, and nothing of
// this version's is lost.
func TestEarlierVersionComesBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	writeEarlier(t, dir)
	first, err := open(t, dir).Get("minimal")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "templates/minimal/base.ext4"), "newer")
	write(t, filepath.Join(dir, "templates/minimal/template.json"), strings.ReplaceAll(earlierManifest, earlierBase, "abc"))
	s := open(t, dir)
	second, err := s.Get("minimal")
	if err != nil || second.ID != first.ID || second.Build == first.Build || second.RootSHA256 != "abc" {
		t.Errorf("minimal is %+v, %v; was %+v", second, err, first)
	}
	if old, err := s.RootOf("minimal", earlierBase); err != nil || !reflect.DeepEqual(old.Layers, first.Layers) {
		t.Errorf("sandboxes of before find %+v, %v", old, err)
	}
}

// TestDigestsOfAnEarlierVersion find damage, also in what was read once.
func TestDigestsOfAnEarlierVersion(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	writeEarlier(t, dir)
	s := open(t, dir)
	wantTakenOver(t, s)
	mem := filepath.Join(buildOf(t, s, "prepared"), "mem")
	if err := errors.Join(os.Chmod(mem, 0o600), os.WriteFile(mem, []byte("mEmory"), 0o600)); err != nil {
		t.Fatal(err)
	}
	found := map[string]error{}
	err := s.Verify(t.Context(), func(kind Kind, _ string) bool { return kind == KindSnapshot }, func(v Verified) error {
		found[v.Name] = v.Err
		return nil
	})
	both := []*errdefs.Class{errdefs.ClassOf(found["prepared"]), errdefs.ClassOf(found["broken"])}
	if err != nil || len(found) != 2 || both[0] != errdefs.Corrupt || both[1] != errdefs.Corrupt {
		t.Errorf("found %v, %v", found, err)
	}
	info, b, err := s.Resolve("", "prepared")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Snapshot(t.Context(), info.ID, b.ID); errdefs.ClassOf(err) != errdefs.Corrupt {
		t.Errorf("damaged after it was read once: %v", err)
	}
}
