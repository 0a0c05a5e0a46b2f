//! Where images are kept: adapters of [`crate::port::ObjectStore`].
//!
//! The form of a directory store is written down in `docs/store-format.md`.

mod bucket;
mod credentials;
mod directory;
mod form;
mod http;
mod lazy;
mod metered;
mod oci;
mod par;
mod s3;
mod skim;

pub use self::{
    bucket::{Bucket, BucketStore, ETag, StoredAs, UploadId},
    credentials::Place,
    directory::DirectoryStore,
    http::Http,
    lazy::LazyStore,
    metered::{Counters, Metered},
    oci::OciBucket,
    par::{ObjectPar, ParBucket, ParOutlets, ParUrl},
    s3::S3Bucket,
};
