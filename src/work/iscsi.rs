//! Takes iSCSI from a running guest, and gives it back.
//!
//! ```text
//! disconnect  what gives it back: sealed ─► journal ─► taken
//! reconnect   given back ─► journal ─► wiped          also by who fails, and by the next start
//! ```

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Ports, Work,
    admission::Lock,
    driver::{Task, check},
    order::{Guest, retry},
    recover::in_one_line,
    resolve,
    tracker::Tracker,
};
use crate::{
    error::{Error, Reason, Result},
    model::{
        WorkRequestId,
        instance::{Instance, PowerState},
        iscsi::{Iscsi, IscsiUndo},
        work_request::{
            Action, EntityType, LogEntry, Operation, Phase, Resource, Status, WorkRequest,
        },
    },
    recorder::Recorder,
};

/// For a guest at a start, before requests are served; what is not done by
/// then is tried beside them.
const AT_START: Duration = Duration::from_secs(60);

/// How long a guest that was shut down may take until it has its iSCSI back,
/// after the image was made.
const BACK: Duration = Duration::from_secs(600);

/// Between tries.
const PAUSE: Duration = Duration::from_secs(2);

/// A guest's iSCSI, on its way back. Dropped, it is left to who drives the
/// work request.
#[derive(Debug)]
pub(super) struct ComingBack(JoinSet<bool>, IscsiUndo);

impl ComingBack {
    /// Waits until the guest has it. Never fails: the image is made, and what
    /// is not given back by now is still owed.
    pub(super) async fn wait(
        mut self,
        work: &Work,
        tracker: &mut Tracker,
        stop: &CancellationToken,
    ) {
        let settled = async {
            tracker.phase(Phase::Reconnect).await?;
            let came = tokio::select! {
                came = timeout(BACK, self.0.join_next()) => matches!(came, Ok(Some(Ok(true)))),
                () = stop.cancelled() => false,
            };
            if !came {
                let waited = Error::new(Reason::GuestAgentTimeout, "it was not waited for longer");
                tracker.log(still_owed(&self.1, &waited));
                return Ok(());
            }
            tracker.log("the guest has its iSCSI back".into());
            tracker.owe_iscsi(None).await?;
            wipe(&work.0.ports, &self.1).await;
            Ok::<(), Error>(())
        };
        if let Err(error) = settled.await {
            tracing::error!(instance = self.1.instance, "{error:?}");
        }
    }
}

/// An accepted order to give back.
#[derive(Debug)]
pub(super) struct Reconnect {
    /// Who took it.
    by: WorkRequestId,
    undo: IscsiUndo,
}

impl Work {
    /// What of iSCSI an instance has, as its guest says. Its agent serves one
    /// caller at a time, so it is left to a work request that holds it.
    ///
    /// # Errors
    ///
    /// `INSTANCE_NOT_FOUND`, `SOURCE_LOCKED`, `INVALID_PARAMETER` for one that
    /// does not run, and those of [`Guests::iscsi`](crate::port::Guests::iscsi).
    pub async fn iscsi(&self, id_or_name: &str) -> Result<Iscsi> {
        let instance = self.instance(id_or_name).await?;
        self.0.registry.check_free(&lock(&instance).await)?;
        self.check_runs(&instance).await?;
        self.0.ports.guests.iscsi(&instance).await
    }

    /// Accepts an order to take all iSCSI from an instance's guest.
    ///
    /// # Errors
    ///
    /// As [`iscsi`](Self::iscsi); `TOO_MANY_REQUESTS`, `RETRY_TOKEN_REUSED`.
    pub async fn disconnect_iscsi(&self, wanted: Guest) -> Result<WorkRequest> {
        let task = async |instance: Instance| Ok(Task::Disconnect(Box::new(instance)));
        self.about_iscsi(Operation::DisconnectIscsi, wanted, task).await
    }

    /// Accepts an order to give back what was taken.
    ///
    /// # Errors
    ///
    /// As [`disconnect_iscsi`](Self::disconnect_iscsi); `INVALID_PARAMETER`
    /// when nothing was taken.
    pub async fn reconnect_iscsi(&self, wanted: Guest) -> Result<WorkRequest> {
        let task = async |instance: Instance| {
            let taken = |request: WorkRequest| {
                let undo = request.iscsi.filter(|undo| undo.instance == instance.name)?;
                Some(Reconnect { by: request.id, undo })
            };
            let taken = self.0.registry.all().into_iter().find_map(taken);
            taken.map(|taken| Task::Reconnect(Box::new(taken))).ok_or_else(|| {
                let context =
                    format!("imaged has taken no iSCSI from instance {:?}", instance.name);
                Error::new(Reason::InvalidParameter, context)
                    .advice("`imagectl instance iscsi list` shows what its guest has")
                    .field("instance_id")
            })
        };
        self.about_iscsi(Operation::ReconnectIscsi, wanted, task).await
    }

    async fn about_iscsi(
        &self,
        operation: Operation,
        wanted: Guest,
        task: impl AsyncFnOnce(Instance) -> Result<Task>,
    ) -> Result<WorkRequest> {
        let Guest { instance, retry_token, requested_by } = wanted;
        let words = format!("{operation:?} {instance}");
        let retry = retry(&retry_token, &requested_by, &words);
        if let Some(known) = self.0.known(retry.as_ref())? {
            return Ok(known);
        }
        let instance = self.instance(&instance).await?;
        let resources = vec![Resource {
            action: Action::Related,
            entity_type: EntityType::Instance,
            identifier: instance.id.to_string(),
        }];
        let compartment = instance.compartment_id.clone();
        let request = self.0.new_request(operation, compartment, resources, requested_by, retry);
        let lock = lock(&instance).await;
        let task = async {
            self.check_runs(&instance).await?;
            task(instance).await
        };
        self.admitted(request, lock, task).await
    }

    async fn check_runs(&self, instance: &Instance) -> Result<()> {
        if self.power_state(instance).await != PowerState::Stopped {
            return Ok(());
        }
        let context = format!("instance {:?} does not run", instance.name);
        Err(Error::new(Reason::InvalidParameter, context)
            .advice("start it: its sessions end with it, and only its guest tells of the rest")
            .field("instance_id"))
    }

    /// Gives back what was taken as soon as the guest's agent answers.
    pub(super) fn comes_back(&self, undo: IscsiUndo) -> ComingBack {
        let (ports, of) = (self.0.ports.clone(), undo.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            loop {
                match give_back(&ports, &of, Arc::default()).await {
                    Ok(()) => return true,
                    // It is not kept any more, or cannot be opened.
                    Err(error) if error.reason() == Reason::JournalFailed => return false,
                    Err(error) => tracing::debug!(instance = of.instance, "{error:?}"),
                }
                sleep(PAUSE).await;
            }
        });
        ComingBack(task, undo)
    }

    /// Goes on giving back what `request` took, beside all else and for a
    /// while: its guest may be booting.
    pub(super) fn goes_on_giving_back(&self, request: &WorkRequest) {
        let Some(undo) = request.iscsi.clone().filter(|_| !is_wanted(request)) else { return };
        let (work, id, closing) = (self.clone(), request.id.clone(), self.0.closing.clone());
        let given = async move {
            let ComingBack(mut task, undo) = work.comes_back(undo);
            let Ok(Some(Ok(true))) = timeout(BACK, task.join_next()).await else { return };
            tracing::warn!(instance = undo.instance, "gave it its iSCSI back");
            if let Err(error) = work.settle(&id, &undo).await {
                tracing::error!(instance = undo.instance, "{error:?}");
            }
        };
        self.0.tasks.spawn(async move {
            tokio::select! { () = given => {}, () = closing.cancelled() => {} }
        });
    }

    /// What `id` took was given back.
    async fn settle(&self, id: &WorkRequestId, undo: &IscsiUndo) -> Result<()> {
        if let Some(settled) = self.0.registry.settle_iscsi(id) {
            self.0.ports.journal.put(&settled).await?;
        }
        wipe(&self.0.ports, undo).await;
        Ok(())
    }

    /// Takes it. After an error it is given back by who drives the request.
    pub(super) async fn disconnect(
        &self,
        instance: &Instance,
        tracker: &mut Tracker,
        stop: &CancellationToken,
    ) -> Result<()> {
        let Ports { guests, vault, .. } = &self.0.ports;
        let Some(kept) = guests.keep_iscsi(instance, tracker.recorder()).await? else {
            tracker.log(format!("instance {:?} has nothing of iSCSI", instance.name));
            return Ok(());
        };
        check(stop)?;
        let undo = IscsiUndo {
            instance: instance.name.clone(),
            machine: instance.machine.clone(),
            kept: vault.keep(&kept).await?,
        };
        tracker.owe_iscsi(Some(undo)).await?;
        tracker.phase(Phase::Disconnect).await?;
        // Not cut short: a step that goes on in the guest would meet its undo.
        guests.disconnect_iscsi(&instance.machine, &kept, tracker.recorder()).await?;
        check(stop)
    }
}

impl Reconnect {
    /// Gives it back.
    pub(super) async fn run(self: Box<Self>, work: &Work, tracker: &mut Tracker) -> Result<()> {
        tracker.phase(Phase::Reconnect).await?;
        give_back(&work.0.ports, &self.undo, tracker.recorder()).await?;
        work.settle(&self.by, &self.undo).await
    }
}

/// What a volume's images are kept from, too: its agent is one.
async fn lock(instance: &Instance) -> Lock {
    Lock::Source(resolve(instance.boot_volume.clone()).await)
}

/// Gives back what was taken. Repeating it changes nothing.
async fn give_back(ports: &Ports, undo: &IscsiUndo, recorder: Arc<Recorder>) -> Result<()> {
    let Some(kept) = ports.vault.open(&undo.kept).await? else {
        let context =
            format!("what instance {:?} had of iSCSI is not kept any more", undo.instance);
        return Err(Error::new(Reason::JournalFailed, context)
            .advice("log in again in the guest: iscsiadm -m discovery, iscsiadm -m node --login"));
    };
    ports.guests.reconnect_iscsi(&undo.machine, &kept, recorder).await
}

/// What is over. The next start wipes what cannot be wiped now.
async fn wipe(ports: &Ports, undo: &IscsiUndo) {
    if let Err(error) = ports.vault.wipe(&undo.kept).await {
        tracing::error!(instance = undo.instance, "{error:?}");
    }
}

/// Gives back what a failed request took. What cannot be done now stays in
/// the journal.
pub(super) async fn undo(work: &Work, tracker: &Tracker, undo: &IscsiUndo) {
    let ports = &work.0.ports;
    let told = match give_back(ports, undo, tracker.recorder()).await {
        Ok(()) => tracker.owe_iscsi(None).await,
        Err(error) => Err(error),
    };
    match told {
        Ok(()) => wipe(ports, undo).await,
        Err(error) => {
            tracker.log(still_owed(undo, &error));
            tracing::error!(instance = undo.instance, "{error:?}");
        }
    }
}

/// What the log of a request says of what could not be given back.
fn still_owed(undo: &IscsiUndo, error: &Error) -> String {
    format!(
        "instance {:?} does not have its iSCSI back, which is tried for {} min more, by the next \
         start of imaged and by `imagectl instance iscsi reconnect`: {}",
        undo.instance,
        BACK.as_secs() / 60,
        in_one_line(error)
    )
}

/// What was asked to be taken, and was, stays so.
fn is_wanted(request: &WorkRequest) -> bool {
    request.operation == Operation::DisconnectIscsi && request.status == Status::Succeeded
}

/// Gives back what dead requests took, all at once, and wipes what nothing
/// needs any more.
pub(super) async fn recover(ports: &Ports, requests: &mut [WorkRequest]) -> Result<()> {
    let owing = requests.iter_mut().filter(|request| !is_wanted(request));
    let given = owing.map(async |request| {
        let Some(undo) = request.iscsi.clone() else { return Ok(()) };
        let given = timeout(AT_START, give_back(ports, &undo, Arc::default())).await;
        let given = given.unwrap_or_else(|late| {
            let context = format!("it was not done within {} s", AT_START.as_secs());
            Err(Error::new(Reason::GuestAgentTimeout, context).because(late))
        });
        let message = match given {
            Ok(()) => {
                request.iscsi = None;
                format!("gave instance {:?} its iSCSI back", undo.instance)
            }
            Err(error) => {
                tracing::error!(instance = undo.instance, "{error:?}");
                still_owed(&undo, &error)
            }
        };
        tracing::warn!(work_request = %request.id, "{message}");
        let message = format!("imaged was started again: {message}");
        request.logs.push(LogEntry { message, time: ports.clock.now() });
        ports.journal.put(request).await
    });
    futures_util::future::join_all(given).await.into_iter().collect::<Result<()>>()?;
    let keep: Vec<_> = requests.iter().filter_map(|request| request.iscsi.as_ref()).collect();
    let keep: Vec<_> = keep.iter().map(|undo| undo.kept.as_str()).collect();
    match ports.vault.sweep(&keep).await {
        Ok(0) => {}
        Ok(secrets) => tracing::warn!(secrets, "wiped what dead requests had kept of iSCSI"),
        Err(error) => tracing::error!("{error:?}"),
    }
    Ok(())
}
