package main

import (
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// jailer makes the root, goes into it, becomes the user and executes
// Firecracker in the same process.
func jailer(_ settings, args []string) {
	o, rest := options(args, "id exec-file uid gid chroot-base-dir netns cgroup cgroup-version parent-cgroup resource-limit", "cgroup", "resource-limit")
	must := func(what string, err error) {
		if err != nil {
			die(1, "Failed to %s: %v", what, err)
		}
	}
	if !validID(o["id"]) {
		die(1, "Invalid instance ID: %q", o["id"])
	}
	binary, err := filepath.EvalSymlinks(o["exec-file"])
	must("canonicalize exec-file", err)
	name := filepath.Base(binary)
	if !strings.Contains(name, "firecracker") {
		die(1, "The file name must contain 'firecracker': %q", name)
	}
	uid, err := strconv.ParseUint(o["uid"], 10, 32)
	must("parse uid", err)
	gid, err := strconv.ParseUint(o["gid"], 10, 32)
	must("parse gid", err)
	base, err := filepath.EvalSymlinks(o["chroot-base-dir"])
	must("canonicalize chroot-base-dir", err)
	root := filepath.Join(base, name, o["id"], "root")

	// At the end, not now: the runtime has files of its own.
	must("close files", unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC))
	os.Clearenv()
	must("make root", os.MkdirAll(root, 0o755))
	program, err := os.ReadFile(binary)
	must("read exec-file", err)
	copied, err := os.OpenFile(filepath.Join(root, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	must("copy exec-file", err)
	_, err = copied.Write(program)
	must("copy exec-file", err)
	must("copy exec-file", copied.Close())

	files := uint64(2048)
	if limit, ok := strings.CutPrefix(o["resource-limit"], "no-file="); ok {
		files, err = strconv.ParseUint(limit, 10, 32)
		must("parse resource-limit", err)
	}
	must("limit files", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files}))

	must("unshare mounts", unix.Unshare(unix.CLONE_NEWNS))
	must("make mounts slaves", unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""))
	must("bind root", unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""))
	must("enter root", unix.Chdir(root))
	must("make old root", unix.Mkdir("old_root", 0o600))
	must("pivot", unix.PivotRoot(".", "old_root"))
	must("enter root", unix.Chdir("/"))
	must("unmount old root", unix.Unmount("old_root", unix.MNT_DETACH))
	must("remove old root", unix.Rmdir("old_root"))

	for _, dir := range []string{"/", "/dev", "/dev/net", "/run"} {
		must("make "+dir, os.MkdirAll(dir, 0o700))
		must("chmod "+dir, os.Chmod(dir, 0o700))
		must("chown "+dir, os.Chown(dir, int(uid), int(gid)))
	}
	for path, number := range map[string][2]uint32{"/dev/net/tun": {10, 200}, "/dev/kvm": {10, 232}, "/dev/urandom": {1, 9}} {
		must("make "+path, unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(number[0], number[1]))))
		must("chown "+path, os.Chown(path, int(uid), int(gid)))
	}
	must("drop groups", unix.Setgroups(nil))
	must("set gid", unix.Setgid(int(gid)))
	must("set uid", unix.Setuid(int(uid)))
	argv := append([]string{"/" + name, "--id", o["id"], "--start-time-us", "1", "--start-time-cpu-us", "1", "--parent-cpu-time-us", "1"}, rest...)
	must("execute", unix.Exec("/"+name, argv, nil))
}
