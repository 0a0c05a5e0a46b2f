# Each target installs what it misses on Debian and says so; elsewhere it
# names the packages and stops.

CARGO ?= cargo
NEED  := tests/lab/need.sh
# One comparison or value by name: make bench ONLY=capture-zstd-debian
ONLY    ?=
# Random kills of a soak.
SWEEPS  ?= 100
# Seconds for each fuzz target.
SECONDS ?= 60

.PHONY: all test lint demo bench fuzz soak

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

# A running guest becomes an image, and a second guest boots from it.
demo:
	$(NEED) demo
	$(CARGO) build --release --locked
	tests/demo.sh

# The tests that gain by repetition, for an hour and more: 20 captures of a
# guest that writes, of each mode, 200 uploads through a network that fails, to
# each kind of bucket, and imaged killed at random, of which the last line
# tells. IMAGED_TEST_SEED=SEED repeats one.
soak:
	$(NEED) test
	IMAGED_TEST_CAPTURES=20 IMAGED_TEST_UPLOADS=200 \
		$(CARGO) test --locked --test it -- --include-ignored --nocapture \
		qemu_guest_is_imaged_while_it_writes bit_for_bit through_a_bad_network
	IMAGED_TEST_SWEEPS=$(SWEEPS) tests/soak.sh

bench:
	$(NEED) bench
	$(CARGO) build --release --locked
	$(CARGO) bench --locked --bench compare -- $(ONLY)

fuzz:
	$(NEED) fuzz
	tests/fuzz/run.sh $(SECONDS)
