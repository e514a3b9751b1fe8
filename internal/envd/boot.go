package envd

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	// deviceTimeout bounds the wait for a disk or a link whose driver is
	// loaded: under emulation they appear within tens of milliseconds.
	deviceTimeout = 10 * time.Second
	pollInterval  = 2 * time.Millisecond

	// DefaultPath is the PATH of envd and of the processes that it starts.
	DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// CgroupRoot holds the cgroups of users' processes in a guest.
	CgroupRoot = "/sys/fs/cgroup/user"
)

// ErrProbe is Boot's error for a probe guest. The caller prints
// guestapi.ProbeSign and powers off.
var ErrProbe = errors.New("probe guest")

// Boot turns a body, with envd as its first program, into a guest. It must be called
// by PID 1, once, before anything else. An error means that the guest cannot be
// used; the failure of a step that a guest can do without is logged.
func Boot(log *slog.Logger, body Body) (guestapi.Boot, *Disk, error) {
	b := &booter{log: log, grouped: make(chan struct{})}
	p, err := body.boot(b)
	return p, b.disk, err
}

// boot turns a bare kernel, with envd as the /init of its initrd, into a guest:
// modules, root filesystem, mounts, network, names.
func (b *booter) boot() (guestapi.Boot, error) {
	unix.Umask(0o022)
	for _, m := range []mount{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	} {
		if err := m.do(); err != nil {
			return guestapi.Boot{}, err
		}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return guestapi.Boot{}, fmt.Errorf("read the command line: %w", err)
	}
	p, disks, err := guestapi.ParseCmdline(string(cmdline))
	if err != nil {
		return guestapi.Boot{}, err
	}
	if p.Probe {
		return p, ErrProbe
	}
	// Mounting cgroups takes long, most of it waiting in the kernel.
	go func() {
		defer close(b.grouped)
		b.cgroups()
	}()
	// Only IPv4 passes a sandbox's tap. IPv6 addresses on eth0 would be of no use,
	// and make the driver work at arbitrary moments. This holds for links that
	// appear later; the loopback keeps its address. A kernel without IPv6 does not
	// have the file.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0o644)
	if err := loadModules("/modules"); err != nil {
		return guestapi.Boot{}, err
	}

	// The kernel announces the address when the link comes up. Otherwise a host
	// that waits for the guest asks for the address again after a second only.
	b.optional("announce the address", os.WriteFile("/proc/sys/net/ipv4/conf/all/arp_notify", []byte("1"), 0o644))

	// Network and disks take equally long and are set up side by side. A failure
	// of either is an error: the host cannot reach a guest without network.
	netErr := make(chan error, 1)
	go func() { netErr <- b.network(p) }()
	rootErr := b.root(disks)
	if err := errors.Join(rootErr, <-netErr); err != nil {
		return guestapi.Boot{}, err
	}
	b.names(p)
	b.limits()
	return p, nil
}

type booter struct {
	log *slog.Logger
	// grouped is closed when the cgroups are made.
	grouped chan struct{}
	disk    *Disk
}

// optional logs the error of a step that a guest can do without.
func (b *booter) optional(step string, err error) {
	if err != nil {
		b.log.Warn("boot step left out", "step", step, "err", err)
	}
}

func (b *booter) network(p guestapi.Boot) error {
	b.optional("loopback", upLoopback())
	if !p.Addr.IsValid() {
		return nil
	}
	return upEthernet(p)
}

// root lays the overlay over the layers and makes the result the root.
func (b *booter) root(d guestapi.Disks) error {
	const over, root = "/overlay", "/newroot"
	disks := []mount{{"/dev/" + d.Overlay, over, "ext4", unix.MS_NOATIME, ""}}
	for i, device := range d.Layers {
		disks = append(disks, mount{"/dev/" + device, layerDir(i), "ext4", unix.MS_RDONLY | unix.MS_NOATIME, ""})
	}
	errs := make([]error, len(disks))
	var wg sync.WaitGroup
	for i, m := range disks {
		wg.Go(func() {
			if errs[i] = waitFile(m.source, deviceTimeout); errs[i] == nil {
				errs[i] = m.do()
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	dir, err := os.Open(over)
	if err != nil {
		return err
	}
	b.disk = newDisk(dir, d.Overlay)
	b.optional("the whole disk", b.disk.grow("/dev/"+d.Overlay))
	upper, work := over+guestapi.UpperDir, over+"/work"
	if err := os.MkdirAll(upper, 0o755); err != nil {
		return err
	}
	if err := os.MkdirAll(work, 0o755); err != nil {
		return err
	}
	// Without redirects a directory of a layer cannot be renamed, and a layer in which one
	// was cannot be read.
	layers := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=on", lowerDirs(len(d.Layers)), upper, work)
	if err := (mount{"overlay", root, "overlay", unix.MS_NOATIME, layers}).do(); err != nil {
		return err
	}
	<-b.grouped // it uses paths, which are about to move
	modules, err := keepLoadable()
	b.optional("keep the modules", err)
	if err := switchRoot(root); err != nil {
		return err
	}
	// As on other Linux systems. Containers of users without privileges ask for it.
	b.optional("share the mounts", unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""))
	b.mounts(append([]mount{
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
	}, memoryMounts...))
	if modules != nil {
		b.optional("bring the modules", modules.bring())
	}
	return nil
}

// layerDir is where layer i of the root file system is mounted, 0 for the lowest.
func layerDir(i int) string {
	if i == 0 {
		return "/base"
	}
	return fmt.Sprintf("/layer%d", i)
}

// lowerDirs are the trees of n layers as overlayfs wants them, the highest first.
func lowerDirs(n int) string {
	var dirs []string
	for i := n - 1; i > 0; i-- {
		dirs = append(dirs, layerDir(i)+guestapi.UpperDir)
	}
	return strings.Join(append(dirs, layerDir(0)), ":")
}

// switchRoot moves /proc, /sys and /dev into root, removes the files of the initrd
// and makes root the root. All threads of a Go program share their root directory,
// so one chroot is enough.
func switchRoot(root string) error {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		target := root + dir
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	// The initrd is in memory, and its files are not needed any more.
	_ = os.RemoveAll("/modules")
	_ = os.Remove("/init")
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	return os.Chdir("/")
}

// cgroups makes the cgroup of users' processes. The mount moves with /sys.
func (b *booter) cgroups() {
	const dir = cgroupTop
	err := (mount{"cgroup2", dir, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate"}).do()
	if err == nil {
		err = setupCgroups(dir, CgroupRoot)
	}
	b.optional("make cgroups", err)
}

// memoryMounts are the file systems in memory.
var memoryMounts = []mount{
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=20%"},
}

// mounts adds what programs expect of a Linux system.
func (b *booter) mounts(mounts []mount) {
	for _, m := range mounts {
		b.optional("mount "+m.target, m.do())
	}
	// On the disk, which is larger than the memory.
	b.optional("make /tmp", errors.Join(os.MkdirAll("/tmp", 0o777), os.Chmod("/tmp", 0o777|fs.ModeSticky)))
	b.optional("make /run/lock", os.MkdirAll("/run/lock", 0o755))
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2",
	} {
		if err := os.Symlink(target, name); !errors.Is(err, fs.ErrExist) {
			b.optional("link "+name, err)
		}
	}
}

// names sets the host name and the resolvers.
func (b *booter) names(p guestapi.Boot) {
	b.optional("set the host name", setHostname(p.Hostname, p.Addr.Addr()))
	if len(p.DNS) == 0 {
		return
	}
	var conf strings.Builder
	for _, addr := range p.DNS {
		fmt.Fprintf(&conf, "nameserver %s\n", addr)
	}
	b.optional("write resolv.conf", replaceFile("/etc/resolv.conf", conf.String()))
}

// setHostname sets the host name in the kernel and in /etc. The name resolves to
// addr, or to the loopback if addr is invalid.
func setHostname(name string, addr netip.Addr) error {
	if !addr.IsValid() {
		addr = netip.AddrFrom4([4]byte{127, 0, 1, 1})
	}
	hosts := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" + addr.String() + "\t" + name + "\n"
	return errors.Join(
		unix.Sethostname([]byte(name)),
		replaceFile("/etc/hostname", name+"\n"),
		replaceFile("/etc/hosts", hosts),
	)
}

// replaceFile writes a file. A link in its place is replaced and not followed: images
// have links to files of daemons that do not run here.
func replaceFile(name, text string) error {
	if overwrite(name, text) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if info, err := os.Lstat(name); err == nil && !info.Mode().IsRegular() {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return os.WriteFile(name, []byte(text), 0o644)
}

// overwrite writes text into the file of that name if the file has the same
// length. No block is freed and allocated, and few functions of the kernel run: in a
// restored guest, code that runs for the first time is slow.
func overwrite(name, text string) bool {
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != int64(len(text)) {
		return false
	}
	n, err := unix.Write(fd, []byte(text))
	return err == nil && n == len(text)
}

// limits keeps envd alive when users' processes exhaust memory or files.
func (b *booter) limits() {
	b.optional("protect envd from the OOM killer", os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0o644))
	// In a guest, memory costs less than the time that the garbage collector takes.
	debug.SetGCPercent(400)
	// The limits of containers. What a program may open at once is bounded by memory.
	b.optional("raise the limit of open files",
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 65536, Max: 524288}))
	for name, value := range map[string]string{
		"HOME": "/root", "PATH": DefaultPath, "TERM": "", "GODEBUG": "",
	} {
		if value == "" {
			os.Unsetenv(name)
			continue
		}
		b.optional("set "+name, os.Setenv(name, value))
	}
}

// mount is one call of mount(2), its target made if missing.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
	}
	return nil
}

// loadModules loads the modules that dir/list names, in its order. A guest
// whose kernel has everything built in has no list.
func loadModules(dir string) error {
	list, err := os.Open(filepath.Join(dir, "list"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the list of modules: %w", err)
	}
	defer list.Close()
	lines := bufio.NewScanner(list)
	for lines.Scan() {
		name := strings.TrimSpace(lines.Text())
		if name == "" || strings.HasPrefix(name, "#") {
			continue
		}
		if err := loadModule(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return lines.Err()
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func waitFile(path string, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		_, err := os.Stat(path)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: %w", path, err)
		}
		time.Sleep(pollInterval)
	}
}
