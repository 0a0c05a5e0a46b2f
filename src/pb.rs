//! The API as generated from `proto/imaged/v1`.
#![allow(missing_docs, clippy::all, reason = "generated")]

tonic::include_proto!("imaged.v1");

impl std::fmt::Debug for ExportImageRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Its URI is a secret.
        write!(f, "ExportImageRequest({})", self.image_id)
    }
}

impl std::fmt::Debug for export_image_request::Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Object(object) => object.fmt(f),
            Self::Uri(_) => f.write_str("Uri"),
        }
    }
}

/// The compiled protos, for reflection and for the compatibility test.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/imaged.binpb"));
