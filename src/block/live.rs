//! A volume that its guest goes on writing to, as it was at a point in time.
//!
//! ```text
//! raw:    volume ──direct reads──► reconciler ──► pieces
//!                                  ▲ scratch: what was overwritten meanwhile?
//!                                  └ snapshot: what was there before
//! other:  snapshot ──NBD──► pieces
//! backup: its export ──NBD──► pieces
//! ```
//! [`reconcile`](super::reconcile) has the argument why the first is right.

use std::{path::PathBuf, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{
    hold,
    holder::Host,
    map,
    nbd::{
        Client, Context as Asks, Endpoint, Guide, Role, ScratchExport, SnapshotExport, Wanted,
        check_size, read_all,
    },
    reader::{self, Past, ReaderSettings, Source},
    reconcile::{Reconciler, Saved, Snapshot},
};
use crate::{
    error::{Error, Reason, Result},
    model::{
        ByteSize,
        image::SnapshotKind,
        live::{BackupSource, FilterSource, LiveSource},
        upload::VolumeMark,
    },
    port::{HeldVolume, Pace, Piece, VolumeFacts},
    sys::slab::Buffer,
};

/// How long QEMU may owe an answer. It serves its exports beside the guest,
/// on disks that the guest keeps busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A snapshot that is ready to be read, once.
#[derive(Debug)]
pub(super) struct Live {
    facts: VolumeFacts,
    settings: ReaderSettings,
    pace: Pace,
    /// The first extent that is read.
    from: u64,
    /// `None` once it was read.
    way: Option<Way>,
}

#[derive(Debug)]
enum Way {
    Beside {
        source: Source,
        scratch: ScratchExport,
        snapshot: SnapshotExport,
    },
    Exports {
        snapshot: Client<Buffer>,
        live: Client<Buffer>,
        scratch: ScratchExport,
    },
    /// QEMU answers from one view, map and bytes, of what was saved over what
    /// is there: what it calls zeroes was zeroes then.
    Backup(Client<Buffer>),
}

impl Live {
    /// Connects to the exports and maps the volume. Blocks.
    pub(super) fn open(
        host: &Host,
        allowed: &[PathBuf],
        settings: ReaderSettings,
        from: &LiveSource,
        pace: Pace,
    ) -> Result<Self> {
        match from {
            LiveSource::Filter(from) => Self::of_filter(host, allowed, settings, from, pace),
            LiveSource::Backup(from) => Self::of_backup(settings, from, pace),
        }
    }

    fn of_backup(settings: ReaderSettings, from: &BackupSource, pace: Pace) -> Result<Self> {
        let BackupSource { size, volume, socket, export } = from.clone();
        let endpoint = Endpoint { socket, export, role: Role::Volume };
        let client = Client::<Buffer>::connect(&endpoint, Asks::Content, PATIENCE)?;
        check_size(&client, size)?;
        let data = map::everything(size.get());
        let facts = VolumeFacts { path: volume, size, sector_size: 512, data };
        Ok(Self { facts, settings, pace, from: 0, way: Some(Way::Backup(client)) })
    }

    fn of_filter(
        host: &Host,
        allowed: &[PathBuf],
        settings: ReaderSettings,
        from: &FilterSource,
        pace: Pace,
    ) -> Result<Self> {
        let connect = |export: &str, role, asks| {
            let endpoint = Endpoint { socket: from.socket.clone(), export: export.into(), role };
            Client::<Buffer>::connect(&endpoint, asks, PATIENCE)
        };
        let snapshot = connect(&from.snapshot, Role::Snapshot, Asks::Content)?;
        check_size(&snapshot, from.size)?;
        let mut scratch = ScratchExport::new(connect(&from.scratch, Role::Scratch, Asks::Depth)?)?;
        if !from.raw {
            let live = connect(&from.live, Role::Volume, Asks::Content)?;
            let facts = VolumeFacts {
                path: from.volume.clone(),
                size: from.size,
                sector_size: 512,
                data: map::everything(from.size.get()),
            };
            let way = Some(Way::Exports { snapshot, live, scratch });
            return Ok(Self { facts, settings, pace, from: 0, way });
        }
        let mut source = hold::beside(host, allowed, &from.volume, from.process)?;
        if source.facts.size != from.size {
            return Err(resized(&source.facts, source.facts.size, from.size));
        }
        // Asked after the map was made: what is a hole now and was not
        // overwritten before was a hole then.
        let saved = scratch.saved(0..from.size.get())?;
        source.facts.data = map::united(&source.facts.data, &saved);
        let facts = source.facts.clone();
        let snapshot = SnapshotExport::new(snapshot);
        let way = Some(Way::Beside { source, scratch, snapshot });
        Ok(Self { facts, settings, pace, from: 0, way })
    }
}

impl HeldVolume for Live {
    fn facts(&self) -> &VolumeFacts {
        &self.facts
    }

    fn snapshot(&self) -> SnapshotKind {
        SnapshotKind::CopyBeforeWrite
    }

    fn mark(&self) -> Option<VolumeMark> {
        None
    }

    fn begin_at(&mut self, extent: u64) {
        self.from = extent;
    }

    fn read(
        &mut self,
        pieces: &std::sync::mpsc::SyncSender<Piece>,
        stop: &CancellationToken,
    ) -> Result<()> {
        match self.way.take() {
            Some(Way::Beside { source, scratch, snapshot }) => {
                let mut past = Reconciler::new(scratch, snapshot);
                let guest: (&mut dyn Past, &Pace) = (&mut past, &self.pace);
                reader::read(&source, self.settings, self.from, Some(guest), pieces, stop)?;
                let size = source.size_now()?;
                if size != source.facts.size {
                    return Err(resized(&source.facts, size, source.facts.size));
                }
                let again = past.finish()?;
                tracing::debug!(volume = %source.facts.path.display(), %again, "read beside its guest");
                Ok(())
            }
            Some(Way::Exports { mut snapshot, mut live, mut scratch }) => {
                let guide = Guide::Live { live: &mut live, scratch: &mut scratch };
                let wanted = Wanted {
                    size: self.facts.size,
                    from: self.from,
                    depth: self.settings.depth,
                    pace: &self.pace,
                };
                read_all(&mut snapshot, guide, wanted, pieces, stop)
            }
            Some(Way::Backup(mut export)) => {
                let wanted = Wanted {
                    size: self.facts.size,
                    from: self.from,
                    depth: self.settings.depth,
                    pace: &self.pace,
                };
                read_all(&mut export, Guide::Own, wanted, pieces, stop)
            }
            None => Err(Error::new(
                Reason::Internal,
                format!("the snapshot of {} was read before", self.facts.path.display()),
            )),
        }
    }
}

impl<A: Saved, S: Snapshot> Past for Reconciler<A, S> {
    fn correct(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        Self::correct(self, offset, bytes)
    }
}

fn resized(facts: &VolumeFacts, found: ByteSize, expected: ByteSize) -> Error {
    let path = facts.path.display();
    Error::new(Reason::ReadFailed, format!("{path} has {found:#}, and its guest has {expected:#}"))
        .advice("do not resize a volume while it is imaged; ask again")
}
