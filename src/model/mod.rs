//! The nouns: what imaged is about, without doing anything.
//!
//! Plain data with its rules of form. Nothing here reads a clock or a file;
//! ids alone ask the kernel for random bytes.

pub mod host;
pub mod ids;
pub mod image;
pub mod instance;
pub mod iscsi;
pub mod live;
pub mod size;
pub mod time;
pub mod trace;
pub mod units;
pub mod upload;
pub mod work_request;

pub use ids::{CompartmentId, ImageId, InstanceId, WorkRequestId};
pub use time::Timestamp;
pub use units::ByteSize;
