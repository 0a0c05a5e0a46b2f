//! How a worker gives up everything but its work.
//!
//! ```text
//! restrict  one thread   memory and time limited ─► user nobody, no capabilities
//!                        ─► not to be traced, dies with the daemon ─► landlock
//! (threads are started)
//! seal      all threads  no new processes ─► seccomp: any call that is not in
//!                        the list kills the process
//! ```
//!
//! All of it happens in the worker itself, after exec and before the first
//! byte of an object: the daemon's own code forks nothing that runs between.
//!
//! seccomp alone would do; the rest is there for a kernel's or a filter's
//! defect. Where the kernel has no landlock the work goes on, where it refuses
//! seccomp nothing does.

use std::collections::BTreeMap;

use caps::CapSet;
use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use nix::{
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        signal::Signal,
    },
    unistd::{Gid, Uid, geteuid, getresgid, getresuid, setgroups, setresgid, setresuid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::limits::Limits;
use crate::error::{Context, Error, Reason, Result};

/// `nobody` of every distribution, which owns nothing. The kernel's own
/// overflow id too.
const NOBODY: u32 = 65534;

/// The newest landlock that is asked for; older kernels give what they have.
const LANDLOCK: ABI = ABI::V6;

/// Limits the calling process, which has one thread, to `limits`, and takes
/// its rights away. Returns how, in a few words.
///
/// # Errors
///
/// `CONFINEMENT_UNAVAILABLE`: the process must do nothing then.
pub fn restrict(limits: &Limits) -> Result<String> {
    prctl::set_no_new_privs().context(REFUSED, || "new privileges cannot be ruled out")?;
    let user = drop_privileges()?;
    // After the change of user, which resets both (prctl(2)).
    prctl::set_dumpable(false).context(REFUSED, || "tracing cannot be ruled out")?;
    // A daemon that died before this line has closed the sockets: then the
    // first read ends the worker.
    prctl::set_pdeathsig(Signal::SIGKILL)
        .context(REFUSED, || "the worker cannot be tied to the daemon's life")?;
    let landlock = landlock()?;

    let address_space = limits.address_space.get();
    let seconds = limits.processor_seconds;
    // SIGXCPU at the first, which tells what happened; SIGKILL at the second.
    limit(Resource::RLIMIT_CPU, seconds, seconds + 1)?;
    limit(Resource::RLIMIT_AS, address_space, address_space)?;
    for nothing in [Resource::RLIMIT_CORE, Resource::RLIMIT_FSIZE, Resource::RLIMIT_MEMLOCK] {
        limit(nothing, 0, 0)?;
    }
    // Last: landlock needs a descriptor.
    limit(Resource::RLIMIT_NOFILE, 0, 0)?;
    Ok(format!("{user}, {landlock}"))
}

const REFUSED: Reason = Reason::ConfinementUnavailable;

/// Becomes nobody, where it is root, and gives up every capability.
fn drop_privileges() -> Result<String> {
    if geteuid().is_root() {
        // Without CAP_SETPCAP this fails, and is not needed: nothing is ever
        // executed again.
        let _ = caps::clear(None, CapSet::Bounding);
        let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setgroups(&[]).context(REFUSED, || "the groups cannot be given up")?;
        setresgid(gid, gid, gid).context(REFUSED, || format!("group {gid} cannot be taken on"))?;
        setresuid(uid, uid, uid).context(REFUSED, || format!("user {uid} cannot be taken on"))?;
    }
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        let cleared = caps::clear(None, set).and_then(|()| caps::read(None, set));
        let left = cleared.context(REFUSED, || "capabilities cannot be given up")?;
        if !left.is_empty() {
            return Err(Error::new(REFUSED, format!("capabilities are left: {left:?}")));
        }
    }
    let (users, groups) = (
        getresuid().context(REFUSED, || "the kernel does not tell the user")?,
        getresgid().context(REFUSED, || "the kernel does not tell the group")?,
    );
    if users.real.is_root() || users.effective.is_root() || users.saved.is_root() {
        return Err(Error::new(REFUSED, "the worker is still root"));
    }
    Ok(format!("user {}, group {}, no capabilities", users.real, groups.real))
}

/// No file, no port, no socket or signal outside, as far as the kernel has it.
fn landlock() -> Result<&'static str> {
    let nothing = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(LANDLOCK)))
        .and_then(|rules| rules.scope(Scope::from_all(LANDLOCK)))
        .and_then(|rules| rules.create())
        .and_then(|rules| rules.restrict_self());
    let nothing = nothing.context(REFUSED, || "landlock fails")?;
    Ok(match nothing.ruleset {
        RulesetStatus::FullyEnforced => "landlock",
        RulesetStatus::PartiallyEnforced => "landlock as far as this kernel has it",
        RulesetStatus::NotEnforced => "no landlock",
    })
}

fn limit(resource: Resource, soft: u64, hard: u64) -> Result<()> {
    setrlimit(resource, soft, hard).context(REFUSED, || format!("{resource:?} cannot be set"))
}

/// Puts every thread of the process under the filter; none can be started
/// any more.
///
/// # Errors
///
/// `CONFINEMENT_UNAVAILABLE`: the process must do nothing then.
pub fn seal() -> Result<()> {
    let context = || "seccomp is not to be had";
    // Only now: it counts all of nobody's threads on this host.
    limit(Resource::RLIMIT_NPROC, 0, 0)?;
    let filter = filter().context(REFUSED, || "the list of system calls is wrong")?;
    seccompiler::apply_filter_all_threads(&filter).context(REFUSED, context)
}

/// What a thread of a worker does after it was started: it reads and writes
/// its sockets, allocates, waits for others, and ends.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    // Memory, without what is in `memory_without_code`.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Keys of hash maps.
    libc::SYS_getrandom,
    // Where the clock is not in the vDSO.
    libc::SYS_clock_gettime,
    // Panics, aborts and the ends of threads.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let argument = |index, op, value: libc::c_int| {
        let value = u64::from(value.unsigned_abs());
        SeccompCondition::new(index, SeccompCmpArgLen::Qword, op, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    // To whom the socket is connected, and to nobody else.
    rules.insert(libc::SYS_sendto, vec![argument(4, SeccompCmpOp::Eq, 0)?]);
    // std looks whether a descriptor is open before it closes it.
    rules.insert(libc::SYS_fcntl, vec![argument(1, SeccompCmpOp::Eq, libc::F_GETFD)?]);
    // Memory that can be executed is never made.
    let code = libc::PROT_EXEC;
    let without_code = SeccompCmpOp::MaskedEq(u64::from(code.unsigned_abs()));
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![argument(2, without_code.clone(), 0)?]);
    }
    // abort(3), which tells of a failed allocation.
    rules.insert(libc::SYS_tgkill, vec![argument(2, SeccompCmpOp::Eq, libc::SIGABRT)?]);
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?
        .try_into()
}
