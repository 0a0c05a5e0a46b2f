# Each target installs what it misses on Debian and says so; elsewhere it
# names the packages and stops.

CARGO ?= cargo
NEED  := tests/lab/need.sh
# One comparison or value by name: make bench ONLY=capture-zstd-debian
ONLY    ?=
# Seconds for each fuzz target.
SECONDS ?= 60

.PHONY: all test lint demo bench fuzz

all:
	$(NEED) build
	$(CARGO) build --release --locked

# Unit, property and end-to-end tests, those that need root and devices
# included. A bare `cargo test` leaves these out and passes anywhere.
test:
	$(NEED) test
	$(CARGO) test --locked -- --include-ignored

# Exactly what CI runs.
lint:
	$(NEED) lint
	packaging/check.sh

# A stopped guest becomes an image, and a second guest boots from it.
demo:
	$(NEED) demo
	$(CARGO) build --release --locked
	tests/demo.sh

bench:
	$(NEED) bench
	$(CARGO) build --release --locked
	$(CARGO) bench --locked --bench compare -- $(ONLY)

fuzz:
	$(NEED) fuzz
	tests/fuzz/run.sh $(SECONDS)
