//! End-to-end tests: the real binaries on real parts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod api;
mod imports;
mod service;
