#!/usr/bin/env bash
# Builds a tree with a systemd to boot in systemd-nspawn, once, and prints its directory.
#
# At boot it runs /lab/run, which the caller binds there, and powers off. Boot it with
# --volatile=overlay: then it stays as it is.
# IMAGED_LAB is the lab's directory (target/lab); the tree is built again when this script changes.
set -euo pipefail

die() { echo "systemd.sh: $*" >&2; exit 1; }

here=$(cd "$(dirname "$0")" && pwd)
lab=${IMAGED_LAB:-$here/../../target/lab}
mkdir -p "$lab"
lab=$(cd "$lab" && pwd)
tree=$lab/systemd-$(sha256sum <"$here/systemd.sh" | cut -c1-16)

# The rename is the last thing done: a tree of this name is whole.
[ ! -d "$tree" ] || { echo "$tree"; exit 0; }
[ "$(id -u)" = 0 ] || die "building the tree needs root: sudo $here/systemd.sh"
"$here/need.sh" test

exec 9>"$lab/systemd.lock"
flock 9
[ ! -d "$tree" ] || { echo "$tree"; exit 0; }

rm -rf --one-file-system "$lab"/systemd-building.* # of a build that was killed
work=$(mktemp -d "$lab/systemd-building.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
echo "systemd.sh: building a tree with systemd by mmdebstrap (half a minute, once)" >&2
# In namespaces that end with this script, no interruption leaves mounts behind.
setpriv --pdeathsig KILL unshare --mount --pid --mount-proc --fork --kill-child \
  mmdebstrap --quiet --mode=root --variant=minbase --include=systemd,systemd-sysv,dbus \
  bookworm "$work/root" >"$work/log" 2>&1 </dev/null 9>&- || {
  tail -n 20 "$work/log" >&2
  die "mmdebstrap failed: see above; it needs a Debian mirror, and some 500 MB free in $lab"
}
rm -rf "$work"/root/var/cache/apt/*.bin "$work"/root/var/lib/apt/lists/*

units=$work/root/etc/systemd/system
cat >"$units/lab.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/lab/run
ExecStopPost=systemctl poweroff --no-block
TimeoutStartSec=infinity
UNIT
mkdir -p "$units/default.target.wants"
ln -s ../lab.service "$units/default.target.wants/lab.service"
mv "$work/root" "$tree"
echo "$tree"
