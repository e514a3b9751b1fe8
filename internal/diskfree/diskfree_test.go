package diskfree

import (
	"errors"
	"io/fs"
	"testing"
)

func TestBytes(t *testing.T) {
	if n, err := Bytes(t.TempDir()); err != nil || n <= 0 {
		t.Errorf("got %d, %v", n, err)
	}
	if _, err := Bytes("/no/such"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing path: %v", err)
	}
}
