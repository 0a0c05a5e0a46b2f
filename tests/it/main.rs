//! End-to-end tests: the real binaries on real parts.
//!
//! Names that begin with `root_` need root, loop devices and mounts; they are
//! ignored by a bare `cargo test` and run by `make test`. So are those that
//! begin with `qemu_`, which need QEMU, with `libvirt_`, which need libvirt, and
//! with `host_`, which run imaged in a guest that plays the host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod api;
mod imports;
#[path = "../lab/lab.rs"]
mod lab;
#[path = "../lab/host.rs"]
mod lab_host;
#[path = "../lab/libvirt.rs"]
mod lab_libvirt;
#[path = "../lab/oci/mod.rs"]
mod oci_server;
#[path = "../lab/proxy.rs"]
mod proxy;
#[path = "../lab/tgt.rs"]
mod tgt;
#[path = "../lab/weed.rs"]
mod weed;

mod drain;
mod export;
mod host;
mod image;
mod iscsi;
mod libvirt;
mod lifecycle;
mod limits;
mod live;
mod live_bits;
mod live_faults;
mod oci;
mod oci_errors;
mod oci_judge;
mod par;
mod qemu;
mod reflink;
mod reflink_live;
mod restore;
mod s3;
mod sealed;
mod service;
mod sources;
mod stalls;
mod stop;
mod stores;
mod survive;
mod sweep;
mod systemd;
mod worker;
