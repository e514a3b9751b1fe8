package host

import (
	"context"
	"fmt"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// AutoVMM lets Choose decide.
const AutoVMM = "auto"

// Choice is the driver that sandboxes are run with.
type Choice struct {
	Driver vmm.Driver
	Report vmm.Report
	// Others are the drivers that were not chosen. The VMs that they have
	// started, when it was otherwise, are still theirs.
	Others []vmm.Driver
	// Why it is this one, in a sentence.
	Why string
}

// Choose asks the drivers, which come in the order of preference, and takes the
// first that has KVM, or else the first that works. With a name it takes that
// one. If none can be used the error says of each why.
func Choose(ctx context.Context, name string, drivers []vmm.Driver) (Choice, error) {
	chosen := -1
	var reports = make([]vmm.Report, len(drivers))
	var notes, failures []string
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
		if chosen < 0 || report.Accel == "kvm" && reports[chosen].Accel != "kvm" {
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
	switch {
	case name != AutoVMM:
		notes = append(notes, "the settings say so")
	case c.Report.Accel == "kvm":
		notes = append(notes, "the first choice that has KVM")
	default:
		notes = append(notes, "it works without KVM")
	}
	notes = append(notes, failures...)
	if c.Report.Why != "" {
		notes = append(notes, c.Driver.Name()+": "+c.Report.Why)
	}
	c.Why = strings.Join(notes, "; ")
	return c, nil
}
