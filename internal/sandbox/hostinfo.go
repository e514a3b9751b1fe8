package sandbox

import (
	"context"
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// HostInfo is what a scheduler needs to know of a host.
type HostInfo struct {
	Stats
	// Draining: no more sandboxes are made.
	Draining bool
	// Fault is what is wrong with the host; empty if nothing is known to be.
	Fault string
	// Drivers has the one first that new sandboxes get.
	Drivers []DriverInfo
}

// DriverInfo is a driver of a host.
type DriverInfo struct {
	Name string
	// SnapshotKey is what the memory of a sandbox of the default size depends on here:
	// hosts with the same key restore each other's. Empty if the driver restores none.
	SnapshotKey string
}

// Host returns what a scheduler needs to know of this host. It waits for no sandbox.
func (m *Manager) Host(ctx context.Context) (HostInfo, error) {
	info := HostInfo{Stats: m.Stats(), Draining: m.Draining(), Fault: m.HostFault()}
	var size CreateRequest
	if err := size.check(); err != nil {
		return HostInfo{}, err
	}
	for _, d := range m.drivers() {
		key, err := m.memoryKey(ctx, template.Shape{
			Driver: d.Name(), VCPUs: size.VCPUs, MemMiB: size.MemMiB, DiskMiB: m.cfg.OverlayMiB,
		}, "")
		if err != nil && !errors.Is(err, errdefs.Unsupported) && d == m.cfg.Drivers[0] {
			return HostInfo{}, fmt.Errorf("identify snapshots of %s: %w", d.Name(), err)
		}
		info.Drivers = append(info.Drivers, DriverInfo{Name: d.Name(), SnapshotKey: key})
	}
	return info, nil
}
