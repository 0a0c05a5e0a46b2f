//! The real parts.

use crate::{
    config::Config,
    error::{Error, Reason, Result},
    model::instance::Instance,
};

use super::Parts;

/// Makes the parts of a real host.
///
/// # Errors
///
/// What the parts say.
#[allow(clippy::unused_async, reason = "stores are opened here")]
pub async fn wire(_config: Config, _instances: Vec<Instance>) -> Result<Parts> {
    Err(Error::new(Reason::Internal, "volumes and stores are not linked into this build"))
}
