//! The API as generated from `proto/imaged/v1`.
#![allow(missing_docs, clippy::all, reason = "generated")]

tonic::include_proto!("imaged.v1");

/// The compiled protos, for reflection and for the compatibility test.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/imaged.binpb"));
