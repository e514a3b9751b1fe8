package e2e_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

// A guest loads the modules of its kernel when something asks for them, also one that was
// restored from a boot snapshot, and has no program modprobe of its own.
func TestGuestModules(t *testing.T) {
	b := sharedAgent(t).create(t, &hostagentv1.CreateSandboxRequest{})
	for _, test := range []struct{ name, script string }{
		{"nothing is loaded before", `test -d /lib/modules/$(uname -r) && ! grep -E '^(tun|fuse|loop|nf_tables|bridge) ' /proc/modules`},
		{"mounts are shared", `grep " / / .* shared:" /proc/self/mountinfo`},
		{"modprobe", `modprobe dummy numdummies=2 && test -e /sys/class/net/dummy1 && modprobe -r dummy && ! grep ^dummy /proc/modules &&
			modprobe ext4 && ! modprobe no-such-module`},
		{"bridge and veth", `ip link add br0 type bridge && ip link add v0 type veth peer name v1 && ip link set v0 master br0 up`},
		{"TUN, as any user", `setpriv --reuid 1000 --clear-groups python3 -c 'open("/dev/net/tun", "r+b", buffering=0)' &&
			ip tuntap add dev tun0 mode tun && ip link show tun0`},
		{"WireGuard, VLAN, macvlan, VXLAN", `ip link add wg0 type wireguard && ip link add link v0 name v0.7 type vlan id 7 &&
			ip link add link v1 type macvlan mode bridge && ip link add vx0 type vxlan id 7 dev v0 dstport 4789`},
		{"loop device", `mkdir -p /mnt/loop && truncate -s 16M /root/image && mke2fs -q /root/image && mount -o loop /root/image /mnt/loop &&
			echo kept >/mnt/loop/f && umount /mnt/loop && mount -o loop,ro /root/image /mnt/loop && cat /mnt/loop/f && umount /mnt/loop`},
		{"overlay over the overlay", `mkdir -p /mnt/t && mount -t tmpfs tmpfs /mnt/t && mkdir /mnt/t/up /mnt/t/work /mnt/t/all &&
			mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/t/up,workdir=/mnt/t/work /mnt/t/all &&
			echo other >/mnt/t/all/hostname && cat /mnt/t/up/hostname && ! grep other /etc/hostname`},
		{"FUSE", fuseScript},
		{"a table of nftables", nftScript},
		{"headers of the kernel can be installed", `ln -s /usr/src /lib/modules/$(uname -r)/build`},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := &sandbox{t, b.a, b.id}
			b.sh(test.script)
		})
	}
	if out := b.sh("dmesg"); strings.Contains(out, "Call Trace") {
		t.Errorf("the kernel is not well: %s", out)
	}
}

// fuseScript serves a file system of one directory, and looks at it.
const fuseScript = `cat >/root/fuse.py <<'END'
import ctypes, os, struct, sys, threading
fd = os.open("/dev/fuse", os.O_RDWR)
os.makedirs("/mnt/fuse", exist_ok=True)
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"test", b"/mnt/fuse", b"fuse.test", 0, b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fd):
    sys.exit(os.strerror(ctypes.get_errno()))
def serve():
    while True:
        request = os.read(fd, 1 << 17)
        size, op, unique = struct.unpack_from("<IIQ", request)
        if op == 26:   # FUSE_INIT
            answer = struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 0, 0, 65536, 1, 0, 0, 0)
        elif op == 3:  # FUSE_GETATTR of a directory of 12,345 bytes
            answer = struct.pack("<QIIQQQQQQIIIIIIIIII", 1, 0, 0, 1, 12345, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
        else:
            os.write(fd, struct.pack("<IiQ", 16, -38, unique))
            continue
        os.write(fd, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
threading.Thread(target=serve, daemon=True).start()
size = os.stat("/mnt/fuse").st_size
libc.umount2(b"/mnt/fuse", 2)
print(size)
os._exit(0 if size == 12345 else 1)
END
python3 /root/fuse.py`

// nftScript makes a table and demands that the kernel confirms it.
const nftScript = `cat >/root/nft.py <<'END'
import os, socket, struct, sys
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
s.settimeout(10)
def message(kind, flags, seq, family, res, body=b""):
    return struct.pack("<IHHIIBBH", 20 + len(body), kind, flags, seq, 0, family, 0, socket.htons(res)) + body
name = b"test\0"
attr = struct.pack("<HH", 4 + len(name), 1) + name + b"\0" * (-len(name) % 4)
s.send(message(16, 1, 1, 0, 10) + message(10 << 8, 1 | 4 | 0x400, 2, 1, 0, attr) + message(17, 1, 3, 0, 10))
length, kind, flags, seq, pid, error = struct.unpack_from("<IHHIIi", s.recv(65536))
print(kind, seq, os.strerror(-error))
sys.exit(kind != 2 or error != 0)
END
python3 /root/nft.py`

// Debian's podman runs containers in a guest, for root over a bridge and for a user over a
// TUN device, and nft takes a rule. The image is made of files of the guest.
func TestGuestPodman(t *testing.T) {
	if !long() {
		t.Skip("an emulated guest installs the packages for six minutes: only with WRENN_TEST_LONG")
	}
	b := sharedAgent(t).create(t, &hostagentv1.CreateSandboxRequest{MemoryMb: 1024, Vcpus: 2})
	for _, script := range []string{
		`apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends nftables podman \
			fuse-overlayfs uidmap slirp4netns busybox-static containernetworking-plugins crun iptables >/dev/null`,
		`nft add table inet t && nft add chain inet t c "{ type filter hook input priority 0; }" &&
			nft add rule inet t c tcp dport 81 counter drop && nft list ruleset | grep "tcp dport 81 counter"`,
		`mkdir -p /srv/image/bin && cp /bin/busybox /srv/image/bin/ && for n in sh id ip grep; do ln -s busybox /srv/image/bin/$n; done
			tar c -C /srv/image . | podman import - box && podman run --rm box sh -c "ip addr | grep 10.88."`,
		`setpriv --reuid 1000 --regid 1000 --init-groups env HOME=/home/user USER=user XDG_RUNTIME_DIR=/tmp/run-user sh -c '
			mkdir -m 700 /tmp/run-user && cd && tar c -C /srv/image . | podman import - box &&
			podman run --rm box sh -c "id && ip addr | grep 10.0.2."'`,
	} {
		resp, err := b.a.Exec(t.Context(), connect.NewRequest(&hostagentv1.ExecRequest{
			SandboxId: b.id, Cmd: "bash", Args: []string{"-c", script}, TimeoutSec: 900,
		}))
		if err != nil || resp.Msg.ExitCode != 0 {
			t.Fatalf("%s: %v, %v", script, resp, err)
		}
		t.Logf("%s%s", resp.Msg.Stdout, resp.Msg.Stderr)
	}
}
