#!/usr/bin/env bash
# Builds the lab's host, once, and prints the path of its disk: the lab's guest (guest.sh) with
# LVM and thin provisioning in it. Boot it with vm.py; the guest's kernel has device-mapper, which
# the kernel of a test machine may lack.
# IMAGED_LAB is the lab's directory (target/lab); it is built again when a script changes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
guest=$("$here/guest.sh")
lab=$(cd "$guest/.." && pwd)
disk=$lab/host-$(cat "$here/host.sh" <(readlink "$lab/guest") | sha256sum | cut -c1-16).raw

# The file is the last thing made: one that is there is whole.
[ -e "$disk" ] && { echo "$disk"; exit 0; }
[ "$(id -u)" = 0 ] || { echo "host.sh: building the host needs root" >&2; exit 1; }

# Tests run in parallel: one builds, the others wait and find it there.
exec 9>"$lab/host.lock"
flock 9
[ -e "$disk" ] && { echo "$disk"; exit 0; }

work=$(mktemp -d "$lab/building-host.XXXXXX")
cleanup() {
  umount --quiet --recursive --lazy "$work/root" || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
echo "host.sh: adding LVM to the guest (half a minute, once)" >&2
cp --sparse=always "$guest/disk.raw" "$work/disk.raw"
mkdir "$work/root"
mount -o loop,offset=1048576 "$work/disk.raw" "$work/root"
# apt as this machine has it: its mirror, its proxy.
mount --bind /etc/apt "$work/root/etc/apt"
mount --bind /usr/share/keyrings "$work/root/usr/share/keyrings"
mount -t tmpfs tmpfs "$work/root/var/lib/apt/lists"
mount -t tmpfs tmpfs "$work/root/var/cache/apt"
cp /etc/resolv.conf "$work/root/etc/resolv.conf"
{
  chroot "$work/root" apt-get -q update
  DEBIAN_FRONTEND=noninteractive chroot "$work/root" apt-get -q -y --no-install-recommends \
    install lvm2 thin-provisioning-tools libsystemd0
} >"$work/log" 2>&1 </dev/null 9>&- || { tail -n 20 "$work/log" >&2; exit 1; }
umount --recursive "$work/root"
find "$lab" -maxdepth 1 -name 'host-*.raw' -exec rm -f {} +
mv "$work/disk.raw" "$disk"
echo "$disk"
