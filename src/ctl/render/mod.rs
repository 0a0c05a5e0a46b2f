//! Results as text: pure functions of what imaged answered.

pub(super) mod json;
pub(super) mod table;
pub(super) mod words;
