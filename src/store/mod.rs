//! Where images are kept: adapters of [`crate::port::ObjectStore`].
//!
//! The form of a directory store is written down in `docs/store-format.md`.

mod directory;
mod lazy;

pub use self::{directory::DirectoryStore, lazy::LazyStore};
