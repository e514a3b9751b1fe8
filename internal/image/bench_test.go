package image

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// benchImage is like an image that people use: 200 MiB of files in three layers, which
// compress to less than half.
func benchImage(b *testing.B) (img madeImage, files int, bytes int64) {
	random := rand.New(rand.NewSource(7))
	layer := func(dir string, count, mib int) []byte {
		var entries []entry
		for i := range count {
			// Hexadecimal digits compress to about half.
			half := make([]byte, mib<<20/count/2)
			random.Read(half)
			text := hex.EncodeToString(half)
			entries = append(entries, entry{name: fmt.Sprintf("%s/%d/%d", dir, i/50, i), text: text})
			bytes += int64(len(text))
		}
		files += count
		return archiveOf(b, entries...)
	}
	return makeImage(b, v1.Config{}, layer("usr/lib", 3000, 80), layer("usr/share", 4000, 100), layer("srv", 1000, 20)), files, bytes
}

// BenchmarkPull is an image of 200 MiB from a registry on this machine to its root layer,
// beside its floor: the same blobs downloaded one after another and unpacked by tar.
func BenchmarkPull(b *testing.B) {
	rootPrograms(b)
	testenv.Program(b, "tar", "gzip")
	reg := newRegistry(b)
	img, files, bytes := benchImage(b)
	ref := reg.push(b, "bench", "v1", img)
	var ours, root, again, floor []time.Duration
	for b.Loop() {
		dir := b.TempDir()
		floor = append(floor, timed(b, func() error { return pullFloor(b.Context(), reg, img, dir) }))
		s, err := Open(b.TempDir(), quiet(), Limits{})
		if err != nil {
			b.Fatal(err)
		}
		var got Image
		pull := func() (err error) { got, err = s.Pull(b.Context(), ref, Credentials{}, nil); return err }
		unpack := func() error { _, err := s.Root(b.Context(), got, nil); return err }
		ours = append(ours, timed(b, pull))
		root = append(root, timed(b, unpack))
		again = append(again, timed(b, func() error {
			if err := pull(); err != nil {
				return err
			}
			return unpack()
		}))
	}
	p, r, a, f := median(ours), median(root), median(again), median(floor)
	b.ReportMetric(p.Seconds(), "s-pull")
	b.ReportMetric(r.Seconds(), "s-root")
	b.ReportMetric(a.Seconds(), "s-again")
	b.ReportMetric(f.Seconds(), "s-floor")
	b.ReportMetric((p+r).Seconds()/f.Seconds(), "ratio")
	b.Logf("%d files, %d MiB: pull %v, root layer %v, both again %v; download and tar %v", files, bytes>>20, p, r, a, f)
}

func timed(b *testing.B, what func() error) time.Duration {
	b.Helper()
	start := time.Now()
	if err := what(); err != nil {
		b.Fatal(err)
	}
	return time.Since(start)
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[(len(all)-1)/2]
}

func pullFloor(ctx context.Context, reg *testRegistry, img madeImage, dir string) error {
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		return err
	}
	for i, l := range img.layers {
		resp, err := reg.Client().Get(reg.URL + "/v2/bench/blobs/" + l.Digest)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("blob: %s", resp.Status)
		}
		blob := filepath.Join(dir, fmt.Sprint(i, ".tar.gz"))
		f, err := os.Create(blob)
		if err != nil {
			return err
		}
		if _, err := io.Copy(f, resp.Body); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		if out, err := execCombined(ctx, "tar", "-C", tree, "-xzf", blob); err != nil {
			return fmt.Errorf("tar: %w: %s", err, out)
		}
	}
	return nil
}
