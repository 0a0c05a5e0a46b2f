//! Scratch and snapshot of a running guest's volume, over their exports.

use std::ops::Range;

use super::{client::Client, endpoint::Context, map::Allocated};
use crate::{
    block::reconcile::{Saved, Snapshot},
    error::{Error, Reason, Result},
    model::image::EXTENT_SIZE,
    sys::slab::{Buffer, Slab},
};

/// The scratch node's own export.
#[derive(Debug)]
pub struct ScratchExport(Client);

impl ScratchExport {
    /// Over a client that was connected for [`Context::Depth`].
    ///
    /// # Errors
    ///
    /// `VOLUME_UNAVAILABLE` when its server tells no depths: everything would
    /// seem untouched.
    pub fn new(client: Client) -> Result<Self> {
        if client.context() == Context::Depth && client.has_map() {
            return Ok(Self(client));
        }
        let sentence = format!("{} does not tell what is allocated in it", client.endpoint());
        Err(Error::new(Reason::VolumeUnavailable, sentence)
            .advice("export the scratch node with allocation-depth"))
    }
}

impl Saved for ScratchExport {
    fn saved(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut saved = Vec::new();
        for extent in self.0.allocation(range)? {
            if let (range, Allocated::Yes) = extent? {
                saved.push(range);
            }
        }
        Ok(saved)
    }
}

/// The export of QEMU's `snapshot-access` node.
#[derive(Debug)]
pub struct SnapshotExport {
    client: Client,
    /// `None` while it is lent to the client, and after an error.
    buffer: Option<Buffer>,
}

impl SnapshotExport {
    /// Over a client that was connected with
    /// [`Role::Snapshot`](super::Role::Snapshot).
    #[must_use]
    pub fn new(client: Client) -> Self {
        let (_, mut buffers) = Slab::cut(1, BUFFER);
        Self { client, buffer: buffers.pop() }
    }

    fn buffer(&mut self) -> Result<Buffer> {
        self.buffer.take().ok_or_else(|| {
            let sentence = format!("{} failed before", self.client.endpoint());
            Error::new(Reason::ReadFailed, sentence)
        })
    }
}

/// Bytes of the buffer: an extent is read again in one piece at most.
#[allow(clippy::cast_possible_truncation, reason = "1 MiB fits every usize")]
const BUFFER: usize = EXTENT_SIZE as usize;

impl Snapshot for SnapshotExport {
    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let unit = self.client.unit();
        let size = self.client.size().get();
        let (mut at, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            // Whole units, of which a volume's last may be cut off.
            let start = at - at % unit;
            let end = (at + bytes.len() as u64).next_multiple_of(unit).min(size);
            let len = usize::try_from(end.saturating_sub(start)).unwrap_or(BUFFER).min(BUFFER);
            let buffer = self.buffer()?;
            let buffer = self.client.read_alone(buffer, start, 0..len)?;
            #[allow(clippy::cast_possible_truncation, reason = "less than a unit")]
            let skipped = (at - start) as usize;
            let came = len.saturating_sub(skipped).min(bytes.len());
            let (filled, rest) = bytes.split_at_mut(came);
            filled.copy_from_slice(&buffer[skipped..skipped + came]);
            self.buffer = Some(buffer);
            (at, bytes) = (at + came as u64, rest);
        }
        Ok(())
    }

    fn vouch(&mut self) -> Result<()> {
        let buffer = self.buffer()?;
        self.buffer = Some(self.client.vouch(buffer)?);
        Ok(())
    }
}
