//! What runs the instances of this host.

mod qemu;

pub use qemu::QemuHost;
