#!/usr/bin/env bash
# A libvirtd of the tests' own: its state is in DIR, and neither reads nor changes what a
# libvirtd of the host has.
#
#   libvirt.sh DIR      runs until its standard input ends, then all of it is gone
#
# DIR/run/libvirt-sock is its socket. The file DIR/stop has it kill libvirtd, DIR/start has it
# start one again; the file is gone when that was done.
set -euo pipefail

dir=$1
if [ "${2-}" != inside ]; then
  mkdir -p "$dir"/{run,lib,etc,cache,log}
  cp -a /etc/libvirt/. "$dir/etc/"
  rm -rf "$dir/etc/qemu" && mkdir -p "$dir/etc/qemu"
  printf 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\n' \
    >"$dir/etc/qemu.conf"
  # The namespace ends with its processes, and they with it: QEMUs, too.
  exec setpriv --pdeathsig KILL unshare --mount --pid --mount-proc --fork --kill-child \
    "$0" "$dir" inside
fi

mount --make-rprivate /
for place in run:/run/libvirt lib:/var/lib/libvirt etc:/etc/libvirt cache:/var/cache/libvirt log:/var/log/libvirt; do
  mkdir -p "${place#*:}"
  mount --bind "$dir/${place%%:*}" "${place#*:}"
done
daemon=
start() {
  libvirtd --pid-file "$dir/libvirtd.pid" >>"$dir/libvirtd.log" 2>&1 </dev/null &
  daemon=$!
}
virtlogd -d --pid-file "$dir/virtlogd.pid"
start
while :; do
  # A file there is an order, and its end the answer.
  if [ -e "$dir/stop" ]; then
    kill -KILL "$daemon" || true
    wait "$daemon" || true
    rm -f "$dir/stop"
  elif [ -e "$dir/start" ]; then
    start
    rm -f "$dir/start"
  fi
  read -r -t 0.1 _ || [ $? -gt 128 ] || exit 0
done
