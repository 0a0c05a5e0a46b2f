//! imaged makes custom images of virtual machines.
//!
//! ```text
//! imagectl ──gRPC──► rpc ──► work ──► block ──► encode ──► store
//!   ctl            convert   decide   read      qcow2      parts, manifest
//! ```
//!
//! `model`, `format` and the policies of `work` are pure; `block`, `store`,
//! `hypervisor` and `journal` touch the world behind the traits of `port`;
//! `daemon` wires them. Who may import whom is held by `tests/it/imports.rs`.

pub mod block;
pub mod error;
pub mod model;
pub mod pb;
pub mod port;
pub mod sys;
