//! imaged makes custom images of virtual machines.
//!
//! ```text
//! imagectl ──gRPC──► rpc ──► work ──► block ──► encode ──► store
//!   ctl            convert   decide   read      qcow2      parts, manifest
//! ```
//!
//! What is foreign, an image in a store, is decoded in `worker`: a process
//! without rights.
//!
//! `model`, `format` and the policies of `work` are pure; `block`, `store`,
//! `hypervisor`, `worker`, `journal` and `vault` touch the world behind the
//! traits of `port`; `daemon` wires them. Who may import whom is held by `tests/it/imports.rs`.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("imaged runs on 64-bit Linux: sizes are converted between u64 and usize freely");

pub mod block;
pub mod catalogue;
pub mod config;
pub mod ctl;
pub mod daemon;
pub mod encode;
pub mod error;
pub mod format;
pub mod hypervisor;
pub mod journal;
pub mod model;
pub mod pb;
pub mod port;
pub mod recorder;
pub mod rpc;
pub mod steps;
pub mod store;
pub mod sys;
pub mod vault;
pub mod work;
pub mod worker;
