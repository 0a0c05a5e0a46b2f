//! Scheduling of threads.

/// Lets the calling thread run only when nothing else wants to:
/// `SCHED_IDLE`, sched(7). Undone for no one: meant for threads of one
/// purpose.
///
/// # Errors
///
/// What the kernel says.
pub fn set_idle() -> std::io::Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` outlives the call; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const param) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
