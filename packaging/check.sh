#!/usr/bin/env bash
# Lint: format, clippy, shell scripts, dependencies. CI runs exactly this.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo fmt --all -- --check
cargo clippy --locked --all-targets -- --deny warnings
RUSTDOCFLAGS='--deny warnings' cargo doc --locked --no-deps --document-private-items --quiet
shellcheck packaging/*.sh tests/*.sh tests/lab/*.sh tests/fuzz/*.sh src/hypervisor/agent/*.sh .ci/run
target/tools/bin/cargo-deny --log-level error --config packaging/deny.toml check bans licenses sources
