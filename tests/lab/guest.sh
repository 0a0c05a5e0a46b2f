#!/usr/bin/env bash
# Builds the lab's guest, once, and prints the directory it is in:
#
#   vmlinuz, initrd.img   boot them with vm.py
#   disk.raw              4 GiB, sparse, GPT; ext4 "imaged-root" at 1 MiB, some 400 MB of Debian
#
# The guest answers its agent within seconds, because init is a script and no systemd.
# Copy disk.raw before a guest writes to it: cp --sparse=always "$(tests/lab/guest.sh)/disk.raw" …
# IMAGED_LAB is the lab's directory (target/lab); the guest is built again when this script changes.
set -euo pipefail

die() { echo "guest.sh: $*" >&2; exit 1; }

here=$(cd "$(dirname "$0")" && pwd)
lab=${IMAGED_LAB:-$here/../../target/lab}
mkdir -p "$lab"
lab=$(cd "$lab" && pwd)
name=guest-$(sha256sum <"$here/guest.sh" | cut -c1-16)

# The link is the last thing made: a guest it names is whole.
is_there() { [ "$(readlink "$lab/guest")" = "$name" ]; }

is_there && { echo "$lab/guest"; exit 0; }
[ "$(id -u)" = 0 ] || die "building the guest needs root: sudo $here/guest.sh"
"$here/need.sh" demo

# Tests run in parallel: one builds, the others wait and find it there.
exec 9>"$lab/guest.lock"
flock 9
is_there && { echo "$lab/guest"; exit 0; }

rm -rf --one-file-system "$lab"/building.* # of a build that was killed
work=$(mktemp -d "$lab/building.XXXXXX")
builder=
cleanup() {
  [ -z "$builder" ] || { kill -KILL "$builder" && wait "$builder"; } 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
root=$work/root
out=$work/out
mkdir "$out"
echo "guest.sh: building the guest with mmdebstrap (a minute, once)" >&2

# mmdebstrap mounts /dev and /sys below the root. In namespaces that end with this script, no
# interruption leaves them behind, to be found by the rm above.
# shellcheck disable=SC2016 # $1 is for mmdebstrap's shell
setpriv --pdeathsig KILL unshare --mount --pid --mount-proc --fork --kill-child \
  mmdebstrap --quiet --mode=root --variant=minbase \
  --include=qemu-guest-agent,open-iscsi,udev,kmod,iproute2,procps,linux-image-cloud-amd64,initramfs-tools,zstd \
  --customize-hook='rm -rf "$1"/var/cache/apt/*.bin "$1"/var/lib/apt/lists/*' \
  bookworm "$root" >"$work/mmdebstrap.log" 2>&1 </dev/null 9>&- &
builder=$!
wait "$builder" || {
  builder=
  tail -n 20 "$work/mmdebstrap.log" >&2
  die "mmdebstrap failed: see above; it needs a Debian mirror, and some 2 GB free in $lab"
}
builder=

echo imaged-demo >"$root/etc/hostname"
echo 'LABEL=imaged-root / ext4 defaults 0 1' >"$root/etc/fstab"
echo 'InitiatorName=iqn.1993-08.org.debian:01:imaged-demo' >"$root/etc/iscsi/initiatorname.iscsi"

cat >"$root/sbin/lab-init" <<'INIT'
#!/bin/sh
# PID 1. It stays, so that orphans of guest-exec are reaped, and the agent is started again.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
# The initramfs has brought some of them along.
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mountpoint -q /dev/pts || mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mountpoint -q /run || mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock
cat /etc/hostname >/proc/sys/kernel/hostname
modprobe virtio_console
modprobe virtio_net

# Without udev nobody makes these links, and the agent looks for its port by name.
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
	[ -e "$port/name" ] && ln -sf "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done

# QEMU's user network, where 10.0.2.2 is the host's loopback.
ip link set lo up
for dev in /sys/class/net/e*; do
	[ -e "$dev" ] || continue
	dev=${dev##*/}
	ip link set "$dev" up && ip addr add 10.0.2.15/24 dev "$dev" && ip route add default via 10.0.2.2
	break
done

# As its units would.
modprobe -a iscsi_tcp sd_mod
iscsid

while :; do
	qemu-ga --method=virtio-serial --path=/dev/virtio-ports/org.qemu.guest_agent.0
	sleep 1
done
INIT

# What the agent calls for guest-shutdown: `shutdown -h|-H|-P|-r +0 MESSAGE`.
cat >"$root/sbin/shutdown" <<'SHUTDOWN'
#!/bin/sh
# Leaves a clean filesystem behind. The root can only be made read-only when nothing has a file
# open for writing, so all else is ended first; SysRq does what a reboot(2) would.
key=o
[ "$1" = -r ] && key=b
trap '' TERM HUP
for pid in $(ps -A -o pid=); do
	[ "$pid" -gt 1 ] && [ "$pid" -ne $$ ] && [ -e "/proc/$pid/exe" ] && kill -TERM "$pid" 2>/dev/null
done
sleep 0.2
sync
mount -o remount,ro / || { echo u >/proc/sysrq-trigger; sleep 1; }
echo "$key" >/proc/sysrq-trigger
sleep 10
SHUTDOWN
chmod 755 "$root/sbin/lab-init" "$root/sbin/shutdown"

cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
cp "$root"/boot/initrd.img-* "$out/initrd.img"

# The last MiB is for the second partition table. The inode tables are zeroed now, or else the
# guest's kernel would do it in the background and no test would find an idle disk.
truncate -s 4G "$out/disk.raw"
sfdisk -q "$out/disk.raw" <<<$'label: gpt\nstart=1MiB, size=4094MiB, type=linux, name=imaged-root'
mke2fs -q -F -t ext4 -L imaged-root -d "$root" \
  -E offset=1048576,lazy_itable_init=0,lazy_journal_init=0 "$out/disk.raw" 4094M

rm -rf "${lab:?}/$name"
mv "$out" "$lab/$name"
ln -s "$name" "$work/link"
mv -T "$work/link" "$lab/guest"
# Guests of older scripts; a VM that still runs from one keeps its open files.
find "$lab" -maxdepth 1 -name 'guest-*' ! -name "$name" -exec rm -rf {} +
echo "$lab/guest"
