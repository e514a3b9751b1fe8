package template

import (
	"context"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Diff makes the new file dst hold what the overlay newer has and the overlay older has
// not; older is empty for none.
func Diff(ctx context.Context, dst, older, newer string) error {
	return errdefs.Unsupported.Errorf("differences of overlays are not made yet")
}

// Patch makes dst, which holds the older overlay of a Diff or is a new file, the newer
// one.
func Patch(ctx context.Context, dst, diff string) error {
	return errdefs.Unsupported.Errorf("differences of overlays are not applied yet")
}
