// Command sentry runs one gVisor sandbox: it is the VMM of the gvisor driver, which
// starts it and tells it what to do over its control socket. It has a module of its
// own, so that gVisor's dependencies are none of the agent's.
package main

import (
	"os"

	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
)

func main() {
	// The launcher executes a descriptor, after which the process would be called.
	_ = os.WriteFile("/proc/self/comm", []byte("sentry"), 0)
	cli.Run(nil, map[util.SubCommand]string{
		new(sentrycmd.Boot):   "",
		new(sentrycmd.Umount): "", // it starts itself with this, to lose sight of /proc
	}, nil)
}
