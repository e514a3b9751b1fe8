// Command guest is the /init of the driver's own test guest: it shows on its
// console that it lives and what its memory holds.
package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

func main() {
	syscall.Mount("devtmpfs", "/dev", "devtmpfs", 0, "")
	syscall.Mount("proc", "/proc", "proc", 0, "")
	console, err := os.OpenFile("/dev/ttyS0", os.O_RDWR, 0)
	if err != nil {
		os.Exit(1) // the kernel panics
	}
	cmdline, _ := os.ReadFile("/proc/cmdline")
	if strings.Contains(string(cmdline), "wrenn.probe=1") {
		fmt.Fprintln(console, "wrenn-probe-ok")
		syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	}
	if strings.Contains(string(cmdline), "test=idle") {
		fmt.Fprintln(console, "idle")
		console.Read(make([]byte, 1)) // nobody types
	}
	if strings.Contains(string(cmdline), "test=flood") {
		for {
			fmt.Fprintln(console, strings.Repeat("flood ", 100))
		}
	}
	// Memory with a pattern, and a counter in it.
	memory := make([]byte, 16<<20)
	for i := range memory {
		memory[i] = byte(i * 7)
	}
	for n := 0; ; n++ {
		sum := uint32(0)
		for i := 0; i < len(memory); i += 512 {
			sum = sum*31 + uint32(memory[i])
		}
		fmt.Fprintf(console, "tick %d %08x\n", n, sum)
		time.Sleep(50 * time.Millisecond)
	}
}
