#!/usr/bin/env bash
# Runs every fuzz target for so many seconds, from small seeds.
#   tests/fuzz/run.sh [SECONDS]
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-60}
export PATH=$PWD/target/tools/bin:$PATH
# cargo-fuzz needs the sanitizer's compiler flag, which stable rustc hides.
export RUSTC_BOOTSTRAP=1

corpus=target/fuzz/corpus/qcow2
mkdir -p "$corpus"
for type in zlib zstd; do
    seed=$corpus/seed-$type
    [[ -e $seed ]] && continue
    head -c 200000 Cargo.lock >"$seed.raw"
    qemu-img convert -c -O qcow2 -o "cluster_size=4096,compression_type=$type" "$seed.raw" "$seed"
    rm "$seed.raw"
done

corpus=target/fuzz/corpus/qmp
mkdir -p "$corpus"
cat >"$corpus/seed" <<'SEED'
{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}
{"return": {"running": true, "status": "running"}, "id": 1}
{"id": 2, "error": {"class": "GenericError", "desc": "Node imaged-f is in use"}}
{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true}}
SEED
printf '{"return": 3}\n\xff{"return": 7}\n' >"$corpus/seed-agent"
{
    printf 'session\t1\tiqn.2015-12.test:1\t10.0.2.2\t3260\tLOGGED_IN\timaged\n'
    printf 'device\t-\tsda\t8:0\t131072\t-\t-\t-\t-\t1\n'
    printf 'mount\t8:0\t28 27 8:0 / /data\\040one rw - ext4 /dev/sda rw\nswap\tsda\n'
    printf 'record\tiqn.2015-12.test:1/10.0.2.2,3260,1/default\tautomatic\tCHAP\n'
    printf 'discovery\t10.0.2.2,3260\nend\n'
} >"$corpus/seed-iscsi"

corpus=target/fuzz/corpus/nbd
mkdir -p "$corpus"
# A greeting, structured replies, a map with the id 1, and an export of 1 MiB.
option='\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00'
ack='\x00\x00\x00\x01\x00\x00\x00\x00'
# shellcheck disable=SC2059 # the escapes are in the variables
{
    printf 'NBDMAGICIHAVEOPT\x00\x03'
    printf "$option\x08$ack"
    printf "$option\x0a\x00\x00\x00\x04\x00\x00\x00\x13\x00\x00\x00\x01base:allocation$option\x0a$ack"
    printf "$option\x07\x00\x00\x00\x03\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x03"
    printf "$option\x07$ack"
} >"$corpus/seed"

for target in $(cargo fuzz list --fuzz-dir tests/fuzz); do
    echo "fuzz: $target for $seconds s"
    mkdir -p "target/fuzz/corpus/$target"
    cargo fuzz run --fuzz-dir tests/fuzz --target-dir target/fuzz/build "$target" \
        "target/fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -rss_limit_mb=512 -timeout=10 -max_len=1048576 \
        -artifact_prefix=target/fuzz/ -print_final_stats=1
done
