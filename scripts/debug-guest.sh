#!/usr/bin/env bash
# Boot one microVM of a template by itself, its console on this terminal, to
# see why a guest does not come up.
#
#   scripts/debug-guest.sh [TEMPLATE]     default minimal
#
# Ctrl-a x leaves, Ctrl-a c changes between the console and QEMU's monitor.
# Needs what `wrenn setup` prepares, and read access to it. No agent is
# involved: the disk is thrown away afterwards, the network is QEMU's own.
#
#   WRENN_STATE_DIR   where setup has been                  /var/lib/wrenn
#   ACCEL             tcg or kvm                            tcg
#   VCPUS, MEMORY     number, and MiB                       1, 512
#   CMDLINE           added to the kernel's command line, as in CMDLINE=debug
#   PORT              port of 127.0.0.1 that leads to envd, as in
#                     PORT=4000 and then curl -i localhost:4000/health
set -euo pipefail

template=${1:-minimal}
state=${WRENN_STATE_DIR:-/var/lib/wrenn}
accel=${ACCEL:-tcg}
kernel=$state/kernels/default

if [[ $# -gt 1 || $template == -* || ! $template =~ ^[A-Za-z0-9_.-]+$ ]]; then
    echo "usage: scripts/debug-guest.sh [TEMPLATE]" >&2
    exit 2
fi
# The newest build of the template with that name.
base=
if info=$(grep -ls "\"names\":\[\"$template\"" "$state"/templates/*/template.json); then
    base=$(ls -t "$(dirname "$info")"/*/base.ext4 | head -n 1)
fi
for file in "$kernel/vmlinux" "$kernel/initrd.img" "$base"; do
    if [[ ! -r $file ]]; then
        echo "${file:-the template $template} cannot be read; prepare it with: sudo wrenn setup --state-dir $state" >&2
        exit 1
    fi
done

case $accel in
    kvm) cpu=host ;;
    tcg) cpu=qemu64,ssse3=on,sse4.1=on,sse4.2=on,popcnt=on,cx16=on,lahf-lm=on,xsave=on,xsaveopt=on,xgetbv1=on,avx=on,avx2=on,bmi1=on,bmi2=on,f16c=on,fma=on,abm=on,movbe=on,aes=on,pclmulqdq=on,enforce=on accel=tcg,thread=multi ;;
    *)
        echo "ACCEL is $accel, must be tcg or kvm" >&2
        exit 2
        ;;
esac

overlay=$(mktemp "${TMPDIR:-/tmp}/debug-guest.XXXXXX")
trap 'rm -f "$overlay"' EXIT
truncate -s 2G "$overlay"
mke2fs -q -F -t ext4 -E lazy_itable_init=1,lazy_journal_init=1 "$overlay"

echo "booting $template with $accel; Ctrl-a x leaves"
# The machine is the one that sandboxes get, without their disk and network.
qemu-system-x86_64 \
    -name debug-guest \
    -no-user-config -nodefaults -display none -no-reboot \
    -machine q35,usb=off,smbus=off,sata=off,vmport=off \
    -accel "$accel" -cpu "$cpu" -smp "${VCPUS:-1}" -m "${MEMORY:-512}M" \
    -kernel "$kernel/vmlinux" -initrd "$kernel/initrd.img" \
    -append "console=ttyS0 reboot=k panic=-1 wrenn.ip=10.0.2.15/24 wrenn.gw=10.0.2.2 wrenn.dns=10.0.2.3 wrenn.hostname=debug-guest wrenn.base=vda wrenn.overlay=vdb ${CMDLINE:-}" \
    -serial mon:stdio \
    -object rng-builtin,id=rng -device virtio-rng-pci,rng=rng,addr=0x2 \
    -netdev "user,id=net${PORT:+,hostfwd=tcp:127.0.0.1:$PORT-:49983}" \
    -device virtio-net-pci,netdev=net,romfile=,addr=0x3,mac=02:FC:00:00:00:05 \
    -blockdev "driver=raw,node-name=disk0,read-only=on,file.driver=file,file.filename=${base//,/,,}" \
    -device virtio-blk-pci,drive=disk0,addr=0x10 \
    -blockdev "driver=raw,node-name=disk1,discard=unmap,file.driver=file,file.filename=${overlay//,/,,}" \
    -device virtio-blk-pci,drive=disk1,addr=0x11
