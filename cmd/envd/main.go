// Command envd is the guest daemon: /init of a microVM's initrd or of a guest of
// gVisor, modprobe in a guest that has none, or an ordinary process for tests.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/internal/envd"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

func main() {
	if os.Getpid() == 1 && filepath.Base(os.Args[0]) == "init" {
		guest()
	}
	if filepath.Base(os.Args[0]) == "modprobe" {
		os.Exit(envd.Modprobe(os.Args[1:], os.Stderr))
	}
	if err := host(); err != nil {
		fmt.Fprintln(os.Stderr, "envd:", err)
		os.Exit(1)
	}
}

// guest is PID 1's life. It does not return.
func guest() {
	log := newLogger()
	body := envd.ThisBody(os.Args)
	params, disk, err := envd.Boot(log, body)
	switch {
	case errors.Is(err, envd.ErrProbe):
		fmt.Println(guestapi.ProbeSign)
	case err != nil:
		log.Error("boot", "err", err)
	default:
		server := envd.New(envd.Config{Log: log, Body: body, CgroupRoot: envd.CgroupRoot, Disk: disk, Addr: params.Addr.Addr()})
		go server.ReapOrphans(context.Background())
		go server.KeepTrimmed(context.Background())
		go server.KeepMemory(context.Background())
		log.Info("booted", "hostname", params.Hostname, "uptime", envd.Uptime())
		failed := make(chan error, 1)
		go func() { failed <- serve(context.Background(), server, fmt.Sprintf(":%d", guestapi.Port)) }()
		select {
		case err := <-failed:
			log.Error("end", "err", err)
		case sig := <-envd.PowerOffRequests():
			log.Info("powering off", "signal", sig)
		}
	}
	envd.PowerOff(log, body)
}

// host serves on the machine as it is.
func host() error {
	listen := flag.String("listen", fmt.Sprintf("127.0.0.1:%d", guestapi.Port), "address to serve on")
	cgroup := flag.String("cgroup", "", "directory in the cgroup2 hierarchy for the processes' cgroups")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	server := envd.New(envd.Config{Log: newLogger(), CgroupRoot: *cgroup})
	defer server.Close()
	if os.Getpid() == 1 {
		go server.ReapOrphans(ctx)
	}
	return serve(ctx, server, *listen)
}

func serve(ctx context.Context, server *envd.Server, addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return server.Serve(ctx, l)
}

func newLogger() *slog.Logger {
	return slog.New(slog.NewTextHandler(envd.BoundedLog(os.Stderr), nil))
}
