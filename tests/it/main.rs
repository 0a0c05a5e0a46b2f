//! End-to-end tests: the real binaries on real parts.

mod imports;
