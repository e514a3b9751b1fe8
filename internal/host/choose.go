package host

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// AutoVMM is the name with which Choose decides.
const AutoVMM = "auto"

// Candidate is a driver that can run VMs on this host.
type Candidate struct {
	Driver vmm.Driver
	Report vmm.Report
}

func (c Candidate) machine() bool { return c.Report.Isolation != vmm.UserSpaceKernel }

// Refusal is a driver that cannot, and why.
type Refusal struct {
	Driver vmm.Driver
	Err    error
}

// Choice is what sandboxes can be run with.
type Choice struct {
	// Usable has the driver first that sandboxes get which name none; it is not empty.
	Usable []Candidate
	// Others cannot run VMs. Those that they started before still belong to them.
	Others []Refusal
	// Why gives the reason for the first in a sentence.
	Why string
}

// First is the driver of sandboxes that name none.
func (c Choice) First() Candidate { return c.Usable[0] }

// Choose asks the drivers, which come in the order of preference, which of them can be
// used, and puts virtual machines first, those with the fastest guests before others. With
// a name other than AutoVMM the driver of that name is the first, and must be usable. If no
// driver can be used the error gives the reason for each.
//
// A kernel in user space comes after emulated machines, though it is faster: its hibernated
// sandboxes fit one version of its program, and it keeps no files without memory.
func Choose(ctx context.Context, name string, drivers []vmm.Driver) (Choice, error) {
	var c Choice
	for _, d := range drivers {
		report, err := d.Check(ctx)
		switch {
		case ctx.Err() != nil:
			return Choice{}, fmt.Errorf("choose a vmm: %w", context.Cause(ctx))
		case err != nil && name == d.Name():
			return Choice{}, errdefs.Unavailable.Errorf("no VMM can be used: %s", err)
		case err != nil:
			c.Others = append(c.Others, Refusal{d, err})
		default:
			c.Usable = append(c.Usable, Candidate{d, report})
		}
	}
	slices.SortStableFunc(c.Usable, func(a, b Candidate) int {
		if am, bm := a.machine(), b.machine(); am != bm {
			return map[bool]int{true: -1, false: 1}[am]
		}
		return int(b.Report.Speed) - int(a.Report.Speed)
	})
	if name != AutoVMM {
		at := slices.IndexFunc(c.Usable, func(u Candidate) bool { return u.Driver.Name() == name })
		if at < 0 {
			return Choice{}, errdefs.InvalidArgument.Errorf("no vmm is called %.40q", name)
		}
		named := c.Usable[at]
		c.Usable = slices.Insert(slices.Delete(c.Usable, at, at+1), 0, named)
	}
	if len(c.Usable) == 0 {
		return Choice{}, errdefs.Unavailable.Errorf("no VMM can be used: %s", strings.Join(c.refusals(), "; "))
	}
	c.Why = c.reason(name)
	return c, nil
}

func (c Choice) refusals() (texts []string) {
	for _, o := range c.Others {
		texts = append(texts, o.Err.Error())
	}
	return texts
}

// reason says why the first driver was chosen by that name.
func (c Choice) reason(name string) string {
	first := c.First()
	var notes []string
	switch {
	case name != AutoVMM:
		notes = []string{"the settings say so"}
	case first.Report.Speed == vmm.Native:
		notes = append([]string{"the first choice that has KVM"}, c.refusals()...)
	case !first.machine():
		notes = append([]string{"no virtual machine can be used"}, c.refusals()...)
	default:
		notes = append([]string{"it works without KVM"}, c.refusals()...)
	}
	if first.Report.Why != "" {
		notes = append(notes, first.Driver.Name()+": "+first.Report.Why)
	}
	for _, u := range c.Usable[1:] {
		if name == AutoVMM && u.Report.Speed > first.Report.Speed {
			notes = append(notes, fmt.Sprintf("--vmm %s is faster, and no virtual machine", u.Driver.Name()))
		}
	}
	return strings.Join(notes, "; ")
}
