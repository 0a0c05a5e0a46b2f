#!/usr/bin/env bash
# A guest boots and counts, with each number on its disk before the next.
# imaged makes an image of its boot volume while it goes on, and verifies it. A
# second guest boots from that image, answers by the same name, and has the
# numbers up to the point in time.
set -euo pipefail
cd "$(dirname "$0")/.."

[[ $EUID -eq 0 ]] || { echo "demo: imaged opens block devices and QEMU's disks: run it as root" >&2; exit 1; }

export IMAGED_SOCKET
work=$(mktemp -d "${TMPDIR:-/tmp}/imaged-demo.XXXXXX")
IMAGED_SOCKET=$work/imaged.sock
imaged=target/release/imaged imagectl=target/release/imagectl vm=tests/lab/vm.py
daemon=

finish() {
    local status=$?
    set +e
    for guest in first second; do
        [[ -d $work/$guest ]] && "$vm" kill --dir "$work/$guest" >/dev/null 2>&1
    done
    [[ -n $daemon ]] && kill "$daemon" && wait "$daemon"
    [[ $status -eq 0 ]] || tail -n 50 "$work/imaged.log" >&2
    rm -rf "$work"
    exit $status
}
trap finish EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '\033[2m$ %s\033[0m\n' "${*//$work\//}"; "$@"; }

say "A small Debian guest (built once), that counts"
guest=$(tests/lab/guest.sh)
cp --sparse=always "$guest/disk.raw" "$work/web-1.raw"
mkdir "$work/first" "$work/second" "$work/instances.d"
"$vm" start --disk "$work/web-1.raw" --format raw --dir "$work/first"
"$vm" wait-agent --dir "$work/first"
name=$("$vm" hostname --dir "$work/first")
echo "the guest's agent says its name: $name"
# shellcheck disable=SC2016 # for the guest's shell
"$vm" exec --dir "$work/first" /bin/sh -c \
    'setsid sh -c "n=0; while n=\$((n + 1)); do echo \$n >>/count; sync /count; done" </dev/null >/dev/null 2>&1 &'
count() { "$vm" exec --dir "$work/$1" /usr/bin/tail -n 1 /count; }
until [[ $(count first 2>/dev/null) -gt 10 ]]; do sleep 0.2; done
echo "it counts: $(count first)"

say "The daemon, with the directory store and one instance"
cat >"$work/imaged.toml" <<EOF
socket = "$IMAGED_SOCKET"
socket_group = "root"
state_dir = "$work/state"
instances_dir = "$work/instances.d"
boot_volume_dirs = ["$work"]
encode_threads = "all"
EOF
cat >"$work/instances.d/web-1.toml" <<EOF
compartment = "demo"
boot_volume = "$work/web-1.raw"
qmp_socket = "$work/first/qmp.sock"
agent_socket = "$work/first/agent.sock"
operating_system = "Debian"
operating_system_version = "12"
EOF
"$imaged" --config "$work/imaged.toml" >"$work/imaged.log" 2>&1 &
daemon=$!
for _ in {1..100}; do
    "$imagectl" host get >/dev/null 2>&1 && break
    sleep 0.1
done
show "$imagectl" host get
show "$imagectl" instance list

say "The image of the running guest"
before=$(count first)
show "$imagectl" image create --instance-id web-1 --display-name golden --wait-for-state AVAILABLE
image=$("$imagectl" image list --display-name golden --output json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
after=$(count first)
echo "the guest counted on from $before to $after"
work_request=$("$imagectl" work-request list --resource-id "$image" --output json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
show "$imagectl" work-request get --trace --work-request-id "$work_request" |
    grep -E 'freeze|thaw|copy-before-write|qom-set' | cut -c 1-110
show "$imagectl" image verify --image-id "$image"

say "The same digests, computed by a script that needs nothing of imaged"
show docs/verify-image.py "$work/state/images/images/$image" "$work/restored.raw"

say "A second guest boots from the image"
"$vm" start --disk "$work/state/images/images/$image/image.qcow2" --format qcow2 --snapshot --dir "$work/second"
"$vm" wait-agent --dir "$work/second"
second=$("$vm" hostname --dir "$work/second")
echo "the second guest's agent says its name: $second"
# Numbers from 1, without a gap.
# shellcheck disable=SC2016 # for the guest's shell
last=$("$vm" exec --dir "$work/second" /bin/sh -c \
    'seq "$(wc -l </count)" | cmp - /count && wc -l </count')
echo "its numbers go from 1 to $last: the image is of a moment between $before and $after"
"$vm" shutdown --dir "$work/second"
((before <= last && last <= after)) || { echo "demo: not between $before and $after" >&2; exit 1; }
[[ $second == "$name" ]] || { echo "demo: expected the name $name" >&2; exit 1; }

say "demo: ok"
