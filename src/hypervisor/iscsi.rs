//! What of iSCSI a running guest has, asked of itself: its host sees none of
//! the sessions that end in it.
//!
//! ```text
//! keep        survey ─► plan ─► records          nothing is changed
//!   │           (kept, sealed)
//! disconnect  unmount ─► log out ─► records overwritten and removed
//! reconnect   records ─► log in ─► mount
//! ```

mod plan;
mod survey;

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
pub use survey::{Odd, read};

use self::plan::Plan;
use super::{
    COMMAND,
    agent::{Agent, GuestProgram, Input, IscsiStep},
    within,
};
use crate::{
    error::{Context, Error, Reason, Result},
    model::iscsi::Iscsi,
    port::Secret,
};

/// A guest with hundreds of disks takes seconds.
const SURVEY: Duration = Duration::from_secs(60);

/// For one step: what was written may have to reach its disks first.
const STEP: Duration = Duration::from_secs(300);

/// Asks the guest of instance `name`, and changes nothing.
///
/// # Errors
///
/// Those of [`Agent`]; `GUEST_UNSUPPORTED` for Windows.
pub(super) async fn survey(agent: &Agent, name: &str) -> Result<Iscsi> {
    let info = agent.info(within(COMMAND)).await?;
    for needed in ["guest-exec", "guest-exec-status"] {
        if !info.allows(needed) {
            let context = format!("the agent in instance {name:?} may not run {needed}");
            return Err(Error::new(Reason::GuestAgentDisabled, context).advice(
                "allow guest-exec and guest-exec-status in the guest's qemu-ga configuration \
                 (Red Hat's and Oracle's forbid them in /etc/sysconfig/qemu-ga), or look in the \
                 guest: iscsiadm -m session; iscsiadm -m node",
            ));
        }
    }
    let asks = info.allows("guest-get-osinfo");
    if asks && agent.os_info(within(COMMAND)).await?.is_windows() {
        let context =
            format!("instance {name:?} runs Windows, of whose iSCSI imaged knows nothing");
        return Err(Error::new(Reason::GuestUnsupported, context)
            .advice("look in the guest: iSCSI Initiator, Targets and Favorite Targets"));
    }
    let said = agent.run(GuestProgram::IscsiSurvey, "tell of its iSCSI", within(SURVEY)).await?;
    read(&String::from_utf8_lossy(&said)).context(Reason::GuestAgentRefused, || {
        format!("what instance {name:?} says of its iSCSI cannot be understood")
    })
}

/// What would give the guest of instance `name` back all of its iSCSI; `None`:
/// it has nothing. Changes nothing.
///
/// # Errors
///
/// As [`survey()`]; `GUEST_UNSUPPORTED` for what cannot be given back.
pub(super) async fn keep(agent: &Agent, name: &str) -> Result<Option<Secret>> {
    let iscsi = survey(agent, name).await?;
    if iscsi.is_empty() {
        return Ok(None);
    }
    let mut plan = Plan::of(&iscsi).map_err(|why| {
        let context = format!("instance {name:?} cannot be disconnected from its iSCSI volumes");
        let advice = why.advice();
        Error::new(Reason::GuestUnsupported, context).because(why).advice(advice)
    })?;
    plan.records = BASE64.encode(step(agent, IscsiStep::Save, Vec::new()).await?);
    let kept = serde_json::to_string(&plan)
        .context(Reason::Internal, || "what was found cannot be written as JSON")?;
    Ok(Some(Secret(kept)))
}

/// Takes away what was kept. After an error it is to be given back. Repeating
/// it changes nothing.
///
/// # Errors
///
/// Those of [`Agent`]; `GUEST_BUSY` for what is in use.
pub(super) async fn disconnect(agent: &Agent, kept: &Secret) -> Result<()> {
    let plan = open(kept)?;
    step(agent, IscsiStep::Unmount, plan.unmount.into()).await?;
    step(agent, IscsiStep::LogOut, plan.logout.into()).await?;
    step(agent, IscsiStep::Forget, Vec::new()).await?;
    Ok(())
}

/// Gives back what was kept, from wherever it stands: all that can be, though
/// a target be away. Repeating it changes nothing.
///
/// # Errors
///
/// Those of [`Agent`]: it is to be tried again.
pub(super) async fn reconnect(agent: &Agent, kept: &Secret) -> Result<()> {
    let plan = open(kept)?;
    let records = BASE64
        .decode(&plan.records)
        .context(Reason::Internal, || "the records that were kept cannot be read")?;
    step(agent, IscsiStep::Restore, records).await?;
    let logged_in = step(agent, IscsiStep::LogIn, plan.login.into()).await;
    let mounted = step(agent, IscsiStep::Mount, plan.mount.into()).await;
    logged_in.and(mounted).map(drop)
}

async fn step(agent: &Agent, step: IscsiStep, input: Vec<u8>) -> Result<Vec<u8>> {
    let program = GuestProgram::Iscsi { step, input: Input(input) };
    agent.run(program, step.purpose(), within(STEP)).await
}

fn open(kept: &Secret) -> Result<Plan> {
    serde_json::from_str(&kept.0)
        .context(Reason::Internal, || "what was kept of a guest's iSCSI cannot be read")
}
