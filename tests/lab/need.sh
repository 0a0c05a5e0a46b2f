#!/usr/bin/env bash
# Installs what a purpose needs and is not there yet. Silent when nothing is missing.
#
#   tests/lab/need.sh build|lint|test|demo|bench|fuzz
#
# Debian packages come from apt; cargo's tools are compiled into target/tools/bin.
# IMAGED_NEED=off trusts the machine and checks nothing.
set -euo pipefail

usage() { echo "usage: $0 build|lint|test|demo|bench|fuzz" >&2; exit 2; }
die() { echo "need.sh: $*" >&2; exit 1; }

# libc6-dev: gcc only recommends it.
build=(libsystemd-dev pkg-config gcc libc6-dev make)
# losetup is in mount, sfdisk in fdisk.
demo=("${build[@]}" qemu-system-x86 qemu-utils mmdebstrap debian-archive-keyring
  e2fsprogs fdisk util-linux mount python3 b3sum tmux procps)
# libfaketime: a clock that jumps.
# systemd: systemd-creds.
test=("${demo[@]}" xfsprogs btrfs-progs gdisk zstd systemd systemd-container python3-pip libfaketime
  libvirt-daemon-system libvirt-clients tgt)

tools=() # NAME@VERSION, as cargo install takes them
case ${1-} in
build) packages=("${build[@]}") ;;
lint) packages=("${build[@]}" shellcheck) tools=(cargo-deny@0.20.2) ;;
test) packages=("${test[@]}") ;;
demo) packages=("${demo[@]}") ;;
bench) packages=("${test[@]}" fio) ;;
# libFuzzer is C++, compiled by g++; the sanitizers' runtimes come with rustc.
fuzz) packages=("${build[@]}" g++) tools=(cargo-fuzz@0.13.1) ;;
*) usage ;;
esac
[ $# -eq 1 ] || usage
[ "${IMAGED_NEED-}" != off ] || exit 0

install_packages() {
  local missing=() p as_root=() extra=() lists=/var/lib/apt/lists
  local -A have=()

  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    die "this is not Debian: install what Debian calls '${packages[*]}', then set IMAGED_NEED=off"
  fi
  while read -r status p; do
    [ "$status" = ii ] && have[$p]=1
  done < <(dpkg-query -W -f='${db:Status-Abbrev} ${Package}\n' "${packages[@]}" 2>/dev/null)
  for p in "${packages[@]}"; do
    [ -n "${have[$p]-}" ] || missing+=("$p")
  done
  [ ${#missing[@]} -gt 0 ] || return 0

  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
      die "run this as root: apt-get install --no-install-recommends ${missing[*]}"
    as_root=(sudo)
    [ -t 0 ] || as_root=(sudo -n) # nobody is there to type a password
    "${as_root[@]}" true ||
      die "sudo refused; run this as root: apt-get install --no-install-recommends ${missing[*]}"
  fi
  as_root+=(env DEBIAN_FRONTEND=noninteractive)

  # Lists older than a day name packages that the mirror may have dropped.
  if [ -z "$(compgen -G "$lists/*_Packages*")" ] || [ -n "$(find $lists -maxdepth 0 -mtime +0)" ]; then
    "${as_root[@]}" apt-get -qq update && "${as_root[@]}" touch $lists ||
      echo "need.sh: apt-get update failed; trying with the lists that are here" >&2
  fi

  # The parts of QEMU must be of one version: a newer qemu-utils (a backport) makes apt remove
  # it for the sake of qemu-system-x86, or refuse both. So name the version that both can have.
  local i want now
  for i in "${!missing[@]}"; do
    [ "${missing[$i]}" = qemu-system-x86 ] || continue
    [ -n "${have[qemu-utils]-}" ] || continue
    want=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: //p')
    now=$(dpkg-query -W -f='${Version}' qemu-utils)
    [ "$want" = "$now" ] && continue
    echo "need.sh: qemu-utils $now becomes $want, to fit qemu-system-x86" >&2
    missing[i]="qemu-system-x86=$want"
    missing+=("qemu-utils=$want")
    extra=(--allow-downgrades)
  done

  echo "need.sh: installing ${missing[*]}" >&2
  "${as_root[@]}" apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 \
    -o Dpkg::Use-Pty=0 "${extra[@]}" install "${missing[@]}" >/dev/null ||
    die "apt-get could not install ${missing[*]}: see above; 'apt-get update' may help"
}

install_tools() {
  local root tool
  root=$(cd "$(dirname "$0")/../.." && pwd)/target/tools
  for tool in "${tools[@]}"; do
    # cargo keeps this list of what it has installed under a root.
    grep -qsF "\"${tool/@/ } " "$root/.crates.toml" && continue
    command -v cargo >/dev/null || die "cargo is missing: install Rust from https://rustup.rs"
    echo "need.sh: compiling $tool into target/tools (minutes, once)" >&2
    cargo install --quiet --locked --root "$root" "$tool" ||
      die "cargo could not install $tool: see above"
  done
}

install_packages
install_tools
