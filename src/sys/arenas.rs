//! The allocator's use of address space.

/// Makes all threads allocate from one arena (mallopt(3)). glibc gives each
/// thread 64 MiB of address space for its own otherwise, which would make a
/// limit of address space meaningless. Where the C library is another one:
/// nothing.
pub fn one_for_all() {
    #[cfg(target_env = "gnu")]
    // SAFETY: passes two integers; may be called at any time.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
