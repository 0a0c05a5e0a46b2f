//! Takes a snapshot back from a domain, whatever is left of it.

use std::{fs, io, path::Path, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    BACKUP_FILE, COMMAND, SCRATCH_FILE, domain,
    virsh::{Line, State},
    within,
};
use crate::{
    error::{Context, Error, Reason, Result},
    hypervisor::{agent::Agent, freeze, live},
    model::{
        ByteSize,
        live::{Backup, Run, Undo},
    },
    steps,
};

/// Between two looks at a domain: each is a process.
const LOOK: Duration = Duration::from_millis(250);

/// For libvirt to end a backup.
const END: Duration = Duration::from_secs(30);

/// How long a virsh of a dead imaged may take to say what it was started for.
const ORPHANS: Duration = Duration::from_secs(2);

/// Takes back what `undo` says. Whatever is gone already is success, the
/// domain included.
///
/// # Errors
///
/// All that begin with `HYPERVISOR_` and `GUEST_AGENT_`; it can be tried
/// again.
pub(super) async fn undo(line: &Line, undo: &Undo, backup: &Backup) -> Result<()> {
    // What holds the guest first. A guest that does not answer is no reason
    // to leave the rest.
    let let_go = let_go(line, undo, &backup.run).await;
    end(line, backup).await?;
    // libvirt makes the scratch file in the directory: without it, no order
    // that a dead imaged has left on its way begins a backup any more.
    clean(&backup.dir).await?;
    end(line, backup).await?;
    let_go
}

/// Ends what holds the guest: thaws it, starts it again. Repeating it changes
/// nothing.
pub(super) async fn let_go(line: &Line, undo: &Undo, run: &Run) -> Result<()> {
    if undo.held.frozen && started(line).await? == Some(run.started) {
        let agent = Agent::of_domain(line.clone());
        let count = freeze::thaw(&agent, &line.recorder).await?;
        if count > 0 {
            tracing::warn!(instance = undo.instance, count, "thawed a guest that was left frozen");
        }
        freeze::disarm(&agent, &line.recorder).await;
    }
    match undo.held.stopped {
        Some(seconds) => start_again(line, undo, run, seconds).await,
        None => Ok(()),
    }
}

/// Has a guest run again, however far its shutdown came.
///
/// | the domain | since the start that it had | so |
/// |---|---|---|
/// | is shut off | | it is started |
/// | is paused | was started again | it goes on |
/// | runs | was started again | it was done |
/// | runs | was not | it may be shutting down: wait, at most as long as that may take |
async fn start_again(line: &Line, undo: &Undo, run: &Run, seconds: u32) -> Result<()> {
    let end = within(Duration::from_secs(seconds.into()));
    // Another that undoes the same (a guard, the next imaged) may be quicker:
    // what it did is refused here, and seen by the next look.
    let mut tries = 0;
    loop {
        let again = started(line).await? != Some(run.started);
        let done = match line.state(within(COMMAND)).await? {
            State::Gone => return Ok(()),
            State::Running if again || Instant::now() >= end => return Ok(()),
            State::Running => Ok(()),
            State::Off => {
                tracing::warn!(instance = undo.instance, "starts a guest that was left shut down");
                line.tell("start a domain", "start", &[], within(END)).await.map(drop)
            }
            State::Paused if again => {
                line.tell("let a domain go on", "resume", &[], within(COMMAND)).await.map(drop)
            }
            // By somebody else, who will know why.
            State::Paused => return Ok(()),
        };
        if let Err(error) = done {
            tries += 1;
            if tries == 3 {
                return Err(error.advice("start the domain (`virsh start`, `virsh resume`)"));
            }
        }
        sleep(LOOK).await;
    }
}

/// Which start of the domain it runs since; none while it is shut off.
pub(super) async fn started(line: &Line) -> Result<Option<u32>> {
    match line.ask("tell a domain's number", "domid", &[], within(COMMAND)).await {
        Ok(id) => Ok(id.trim().parse().ok()),
        Err(error) => match line.state(within(COMMAND)).await? {
            State::Gone => Ok(None),
            _ => Err(error),
        },
    }
}

/// Whether the snapshot's backup is under way. Other people's are not looked
/// at again.
pub(super) async fn is_under_way(line: &Line, backup: &Backup) -> Result<bool> {
    let told = line.ask("describe a backup", "backup-dumpxml", &[], within(COMMAND)).await;
    let error = match told {
        Ok(xml) => return Ok(domain::exports(&xml).contains(&backup.export())),
        Err(error) => error,
    };
    match line.state(within(COMMAND)).await? {
        State::Off | State::Gone => return Ok(false),
        State::Running | State::Paused => {}
    }
    let job = line.ask("tell of a domain's job", "domjobinfo", &[], within(COMMAND)).await?;
    match job.contains("Backup") {
        true => Err(error),
        false => Ok(false),
    }
}

/// Ends the snapshot's backup and waits until it has; libvirt removes what
/// belongs to it.
pub(super) async fn end(line: &Line, backup: &Backup) -> Result<()> {
    let deadline = within(END);
    let mut asked = false;
    while is_under_way(line, backup).await? {
        if !asked {
            asked = true;
            // It may have ended of itself by now.
            let abort = line.tell("end a backup", "domjobabort", &[], deadline).await;
            if abort.is_err() && is_under_way(line, backup).await? {
                abort?;
            }
            continue;
        }
        if Instant::now() >= deadline {
            let context = format!("libvirt did not end the backup of domain {}", line.domain);
            return Err(Error::new(Reason::HypervisorTimeout, context));
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// Removes what imaged made for a backup, and what a libvirt that was killed
/// has left.
async fn clean(dir: &Path) -> Result<()> {
    let order = dir.join(BACKUP_FILE);
    match steps::effect("order removed", tokio::fs::remove_file(&order)).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error)
                .context(Reason::Internal, || format!("{} cannot be removed", order.display()));
        }
        _ => {}
    }
    live::clean(dir).await
}

/// What a guard does: lets the guest go, and from then on keeps the scratch
/// from filling, as long as there is one. A full one would hold the guest.
pub(super) async fn stand_by(line: &Line, undo: &Undo, backup: &Backup) -> Result<()> {
    let_go(line, undo, &backup.run).await?;
    sleep(ORPHANS).await;
    // Where the next imaged has undone all, what holds the guest by now is
    // that one's.
    if backup.dir.exists() {
        let_go(line, undo, &backup.run).await?;
    }
    loop {
        match Room::of(backup) {
            Ok(room) if room.is_spent(backup.scratch) => return end(line, backup).await,
            Ok(_) => sleep(LOOK).await,
            // Whoever ended the backup, or nothing that can be watched.
            Err(_) => return Ok(()),
        }
    }
}

/// What a scratch takes, and what its filesystem has left.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub used: u64,
    pub free: u64,
}

impl Room {
    pub fn of(backup: &Backup) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let used = fs::metadata(backup.dir.join(SCRATCH_FILE))?.blocks() * 512;
        let space = nix::sys::statvfs::statvfs(&backup.dir)?;
        Ok(Self { used, free: space.blocks_available() * space.fragment_size() })
    }

    /// Whether a fifth is left, or less, of what it may take, or of the room
    /// for that: QEMU stops a guest whose old bytes find no room, so there
    /// must be time to end the backup before.
    pub fn is_spent(self, limit: ByteSize) -> bool {
        let fifth = limit.get() / 5;
        self.used >= limit.get() - fifth || self.free <= fifth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_fifths_of_the_scratch_or_of_its_room_are_the_end() {
        let limit = ByteSize(1000);
        let spent = |used, free| Room { used, free }.is_spent(limit);
        assert!(!spent(799, 201));
        assert!(spent(800, 201));
        assert!(spent(799, 200));
    }
}
