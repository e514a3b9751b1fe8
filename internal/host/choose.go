package host

import (
	"context"
	"fmt"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// AutoVMM is the name with which Choose decides.
const AutoVMM = "auto"

// Choice is the driver that sandboxes are run with.
type Choice struct {
	Driver vmm.Driver
	Report vmm.Report
	// Others are the drivers that were not chosen. VMs that they started under
	// another choice still belong to them.
	Others []vmm.Driver
	// Why gives the reason for this driver in a sentence.
	Why string
}

// Choose asks the drivers, which come in the order of preference, and takes the
// first of those with the fastest guests. With a name other than AutoVMM it takes
// the driver of that name. If no driver can be used the error gives the reason for
// each.
func Choose(ctx context.Context, name string, drivers []vmm.Driver) (Choice, error) {
	chosen := -1
	reports := make([]vmm.Report, len(drivers))
	var failures []string
	for i, d := range drivers {
		if name != AutoVMM && name != d.Name() {
			continue
		}
		report, err := d.Check(ctx)
		if ctx.Err() != nil {
			return Choice{}, fmt.Errorf("choose a vmm: %w", context.Cause(ctx))
		}
		if err != nil {
			failures = append(failures, err.Error())
			continue
		}
		reports[i] = report
		if chosen < 0 || report.Speed > reports[chosen].Speed {
			chosen = i
		}
	}
	if chosen < 0 {
		if len(failures) == 0 {
			return Choice{}, errdefs.InvalidArgument.Errorf("no vmm is called %.40q", name)
		}
		return Choice{}, errdefs.Unavailable.Errorf("no VMM can be used: %s", strings.Join(failures, "; "))
	}
	c := Choice{Driver: drivers[chosen], Report: reports[chosen]}
	for i, d := range drivers {
		if i != chosen {
			c.Others = append(c.Others, d)
		}
	}
	c.Why = c.reason(name, failures)
	return c, nil
}

// reason says why a driver was chosen by that name, while others failed.
func (c Choice) reason(name string, failures []string) string {
	notes := []string{"it works without KVM"}
	switch {
	case name != AutoVMM:
		notes[0] = "the settings say so"
	case c.Report.Speed == vmm.Native:
		notes[0] = "the first choice that has KVM"
	}
	notes = append(notes, failures...)
	if c.Report.Why != "" {
		notes = append(notes, c.Driver.Name()+": "+c.Report.Why)
	}
	return strings.Join(notes, "; ")
}
