package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"git.omukk.dev/wrenn/sandbox/internal/nftgen"
)

// Inventory is what exists on this machine that a sandbox host could leave
// behind, a line each: processes, namespaces, links, routes, nftables objects,
// mounts, loop devices, cgroups, runtime files, and this process's own file
// descriptors.
type Inventory map[string]bool

// NoLeaks takes an inventory now and another when the test has ended, and fails
// the test if they differ. Only lines that contain marker count, so that tests
// beside each other do not disturb; an empty marker counts every line. What is
// still on its way out gets two seconds.
func NoLeaks(t testing.TB, marker string) {
	t.Helper()
	before, err := Take(marker)
	if err != nil {
		t.Fatalf("take inventory: %v", err)
	}
	t.Cleanup(func() {
		var diff []string
		for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			after, err := Take(marker)
			if err != nil {
				t.Errorf("take inventory: %v", err)
				return
			}
			if diff = before.Diff(after); len(diff) == 0 {
				return
			}
			if time.Now().After(deadline) {
				break
			}
		}
		t.Errorf("the test changed the machine:\n%s", strings.Join(diff, "\n"))
	})
}

// Diff lists what is in only one of the inventories: "- " was there before,
// "+ " has come.
func (p Inventory) Diff(after Inventory) []string {
	var out []string
	for line := range p {
		if !after[line] {
			out = append(out, "- "+line)
		}
	}
	for line := range after {
		if !p[line] {
			out = append(out, "+ "+line)
		}
	}
	slices.SortFunc(out, func(a, b string) int { return strings.Compare(a[2:], b[2:]) })
	return out
}

// Lines returns the inventory sorted.
func (p Inventory) Lines() []string { return slices.Sorted(maps.Keys(p)) }

// errChanged says that what one list named was gone when it was looked at.
var errChanged = errors.New("it changed while it was listed")

// Take returns the lines of the inventory that contain marker. It starts again, 20 times
// at most, if others change what it lists.
func Take(marker string) (p Inventory, err error) {
	for range 20 {
		if p, err = take(marker); !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, errChanged) {
			break
		}
	}
	return p, err
}

func take(marker string) (Inventory, error) {
	p := Inventory{}
	add := func(format string, args ...any) {
		if line := fmt.Sprintf(format, args...); strings.Contains(line, marker) {
			p[line] = true
		}
	}
	for _, part := range []func(func(string, ...any)) error{
		processes, namespaces, links, routes, nft, mounts, loops, cgroups, runtimeFiles, descriptors,
	} {
		if err := part(add); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// processes lists the programs that a sandbox host runs.
func processes(add func(string, ...any)) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(dir + "/cmdline")
		if err != nil || len(cmdline) == 0 {
			continue // it has ended, or is a kernel thread
		}
		argv := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		name := filepath.Base(argv[0])
		if !strings.HasPrefix(name, "qemu-system") && !slices.Contains([]string{"firecracker", "jailer", "wrenn", "envd", "mmdebstrap"}, name) {
			continue
		}
		add("process %s %s", filepath.Base(dir), strings.Join(argv, " "))
	}
	return nil
}

func namespaces(add func(string, ...any)) error {
	names, err := filepath.Glob("/run/netns/*")
	for _, name := range names {
		add("netns %s", name)
	}
	return err
}

func links(add func(string, ...any)) error {
	list, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range list {
		add("link %s %s", l.Type(), l.Attrs().Name)
	}
	return nil
}

func routes(add func(string, ...any)) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			name := "none"
			if r.LinkIndex != 0 {
				l, err := netlink.LinkByIndex(r.LinkIndex)
				if errors.As(err, new(netlink.LinkNotFoundError)) {
					return errChanged // the route went with its link
				}
				if err != nil {
					return fmt.Errorf("find the link of route %v: %w", r, err)
				}
				name = l.Attrs().Name
			}
			add("route %v via %v dev %s table %d", r.Dst, r.Gw, name, r.Table)
		}
	}
	return nil
}

func nft(add func(string, ...any)) error {
	var lines []string
	err := nftgen.Steady(func() (err error) {
		lines, err = nftLines()
		return err
	})
	for _, line := range lines {
		add("%s", line)
	}
	return err
}

func nftLines() (lines []string, err error) {
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	defer func() { err = errors.Join(err, c.CloseLasting()) }()
	tables, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list nft tables: %w", err)
	}
	for _, t := range tables {
		add("nft table %s", t.Name)
		sets, err := c.GetSets(t)
		if err != nil {
			return nil, fmt.Errorf("list nft sets: %w", err)
		}
		for _, s := range sets {
			if s.Dynamic {
				continue // the kernel fills and empties it
			}
			elems, err := c.GetSetElements(s)
			if err != nil {
				return nil, fmt.Errorf("list nft set %s: %w", s.Name, err)
			}
			for _, e := range elems {
				add("nft table %s set %s element %x", t.Name, s.Name, e.Key)
			}
		}
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nft chains: %w", err)
	}
	for _, ch := range chains {
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return nil, fmt.Errorf("list nft rules: %w", err)
		}
		add("nft table %s chain %s rules %d", ch.Table.Name, ch.Name, len(rules))
	}
	return lines, nil
}

func mounts(add func(string, ...any)) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 {
			add("mount %s on %s", f[3], f[4])
		}
	}
	return err
}

func loops(add func(string, ...any)) error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if backing, err := os.ReadFile(f); err == nil {
			add("loop %s %s", f, bytes.TrimSpace(backing))
		}
	}
	return err
}

// cgroups lists our cgroups in every hierarchy; those of others come and go.
func cgroups(add func(string, ...any)) error {
	for _, pattern := range []string{
		"/sys/fs/cgroup/wrenn*", "/sys/fs/cgroup/wrenn*/*",
		"/sys/fs/cgroup/*/wrenn*", "/sys/fs/cgroup/*/wrenn*/*",
	} {
		dirs, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			if info, err := os.Stat(dir); err == nil && info.IsDir() {
				add("cgroup %s", dir)
			}
		}
	}
	return nil
}

func runtimeFiles(add func(string, ...any)) error {
	for _, pattern := range []string{"/run/wrenn*", "/run/wrenn*/*", "/tmp/wrenn*", "/var/tmp/wrenn*"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, f := range files {
			add("file %s", f)
		}
	}
	return nil
}

// descriptors lists what this process holds open that outlives a test's own
// memory: files, namespaces, pidfds and devices; the runtime's own pollers and
// anonymous pipes are left out.
func descriptors(add func(string, ...any)) error {
	const dir = "/proc/self/fd/"
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		target, err := os.Readlink(dir + e.Name())
		if err != nil || strings.HasPrefix(target, "pipe:") || strings.HasPrefix(target, "socket:") ||
			strings.Contains(target, "eventpoll") || strings.Contains(target, "eventfd") ||
			strings.HasPrefix(target, "/proc/") {
			continue
		}
		add("fd %s %s", e.Name(), target)
	}
	return err
}
