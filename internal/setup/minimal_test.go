package setup

import (
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSourcesFrom(t *testing.T) {
	mirrors := filepath.Join(t.TempDir(), "debian.list")
	write(t, mirrors, "# nearest first\n\nhttps://mirror.test/security priority:1\nhttps://other.test/x\n")
	targets := `Debian|bookworm|http://apt.test/debian/|bookworm|main
Debian|bookworm|http://apt.test/debian/|bookworm|main
Debian|bookworm|http://apt.test/debian/|bookworm|contrib
Debian|bookworm-updates|http://apt.test/debian/|bookworm-updates|main
Debian|bookworm-security|mirror+file:` + mirrors + `/|bookworm-security|main
Debian|trixie|http://apt.test/debian/|trixie|main
Vendor|bookworm|http://thirdparty.test/|bookworm|main
Debian|bookworm|file:/srv/mirror/|bookworm|main
Debian|bookworm|mirror+file:/nonexistent|bookworm|main

garbage
`
	want := []string{
		"deb http://apt.test/debian/ bookworm main",
		"deb http://apt.test/debian/ bookworm-updates main",
		"deb https://mirror.test/security bookworm-security main",
	}
	if diff := cmp.Diff(want, sourcesFrom(targets, "bookworm")); diff != "" {
		t.Errorf("sources (-want +got):\n%s", diff)
	}
	if got := sourcesFrom("", "bookworm"); len(got) != 0 {
		t.Errorf("sources from nothing: %v", got)
	}
}
