#!/usr/bin/env bash
# Kills imaged at random, IMAGED_TEST_SWEEPS times, over all modes and stores; the last line says how
# often, and how often a promise did not hold. Each violation was told with its seed:
#
#   IMAGED_TEST_SEED=SEED IMAGED_TEST_SWEEPS=1 tests/soak.sh
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
outcome=0
"${CARGO:-cargo}" test --locked --test it -- --include-ignored --nocapture qemu_sweep_random_kills 2>&1 |
  tee "$log" || outcome=$?
grep -E '^[0-9]+ sweeps, [0-9]+ violations$' "$log" || echo "soak.sh: it did not come to its end" >&2
exit "$outcome"
