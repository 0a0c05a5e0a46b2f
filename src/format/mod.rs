//! Disk image formats: encoders and decoders, pure over bytes.

pub mod qcow2;
