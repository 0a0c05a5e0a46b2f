//! Tests of the whole.

mod api;
