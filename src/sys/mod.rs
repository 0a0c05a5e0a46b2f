//! The only unsafe code: thin, typed faces of system calls that nix does not
//! have.
#![allow(unsafe_code)]

pub mod aligned;
pub mod arenas;
pub mod descriptors;
pub mod ioctl;
pub mod peer;
pub mod ring;
pub mod sched;
pub mod shared;
pub mod slab;
pub mod stat;
