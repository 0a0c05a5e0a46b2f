//! The volumes of this host.
