package agent

import (
	"fmt"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/image"
)

// openBuilds opens what makes templates. It comes after the manager has freed the build
// sandboxes of the agent before.
func (a *Agent) openBuilds() (err error) {
	images, builds := filepath.Join(a.cfg.StateDir, "images"), filepath.Join(a.cfg.StateDir, "builds")
	if a.images, err = image.Open(images, a.log, image.Limits{}); err != nil {
		return fmt.Errorf("open images: %w", err)
	}
	a.builds, err = build.New(build.Config{
		Dir: builds, Templates: a.templates, Images: a.images, Sandboxes: build.OfHost(a.base.manager),
		Dirs: []string{images, filepath.Join(a.cfg.StateDir, "templates")}, Log: a.log,
		MaxDisk: int64(a.cfg.MaxTemplateDiskMiB) << 20, Flat: a.base.manager.Builders().Flat(),
	})
	if err != nil {
		return fmt.Errorf("open builds: %w", err)
	}
	return nil
}
