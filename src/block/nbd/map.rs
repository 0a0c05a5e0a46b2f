//! The map of an export, extent by extent.

use std::ops::{DerefMut, Range};

use super::{client::Client, endpoint::Context, socket::Stream};
use crate::error::{Error, Reason, Result};

/// How much of an export one request for its map covers: a length has 32
/// bits, and QEMU answers for the whole range before it serves anything else
/// of the connection.
const STEP: u64 = 1 << 30;

/// What an extent holds, by `base:allocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Anything.
    Data,
    /// Zeroes, and nothing is allocated.
    Hole,
    /// Zeroes.
    Zero,
}

/// Whether an extent has bytes of its own in the image, by
/// `qemu:allocation-depth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocated {
    /// In the image, or in one that it is based on.
    Yes,
    /// In none.
    No,
}

impl From<u32> for Content {
    /// Bit 0: nothing is allocated. Bit 1: reads as zeroes. The first alone
    /// says nothing about what is read, so that counts as data.
    fn from(flags: u32) -> Self {
        match flags & 3 {
            3 => Self::Hole,
            2 => Self::Zero,
            _ => Self::Data,
        }
    }
}

impl From<u32> for Allocated {
    /// Depth 0: in no image of the chain.
    fn from(depth: u32) -> Self {
        if depth == 0 { Self::No } else { Self::Yes }
    }
}

/// The extents of a range, ascending, adjacent, none empty; neighbours
/// differ. Ends after an error.
#[derive(Debug)]
pub struct Extents<'a, T, B, S: Stream> {
    client: &'a mut Client<B, S>,
    /// What the server was not asked for yet.
    left: Range<u64>,
    /// What it told and was not given out, in reverse.
    told: Vec<(Range<u64>, T)>,
}

impl<B: DerefMut<Target = [u8]>, S: Stream> Client<B, S> {
    /// What `range` holds. No read may be under way while this is used. One
    /// extent of data where the server has no maps. Slow for a snapshot, which
    /// is asked about 64 KiB at a time (see [`Guide`](super::Guide)).
    ///
    /// # Errors
    ///
    /// `INTERNAL` unless connected for [`Context::Content`].
    pub fn contents(&mut self, range: Range<u64>) -> Result<Extents<'_, Content, B, S>> {
        if self.has_map() {
            return self.extents(Context::Content, range);
        }
        tracing::warn!(export = %self.endpoint(), "the server tells no map: everything is read");
        let end = range.end;
        let mut extents = self.extents(Context::Content, end..end)?;
        if !range.is_empty() {
            extents.told.push((range, Content::Data));
        }
        Ok(extents)
    }

    /// What of `range` is allocated. No read may be under way while this is
    /// used.
    ///
    /// # Errors
    ///
    /// `INTERNAL` unless connected for [`Context::Depth`].
    pub fn allocation(&mut self, range: Range<u64>) -> Result<Extents<'_, Allocated, B, S>> {
        self.extents(Context::Depth, range)
    }

    fn extents<T>(&mut self, context: Context, left: Range<u64>) -> Result<Extents<'_, T, B, S>> {
        if self.context() != context {
            let sentence = format!("{} was opened for another map", self.endpoint());
            return Err(Error::new(Reason::Internal, sentence));
        }
        Ok(Extents { client: self, left, told: Vec::new() })
    }
}

impl<T, B, S> Extents<'_, T, B, S>
where
    T: From<u32> + Copy + PartialEq,
    B: DerefMut<Target = [u8]>,
    S: Stream,
{
    /// Asks for more, when there is more.
    fn ask(&mut self) -> Result<()> {
        if !self.told.is_empty() || self.left.is_empty() {
            return Ok(());
        }
        let start = self.left.start;
        let step = self.client.endpoint().role.boundary().unwrap_or(STEP);
        let end = self.left.end.min((start - start % step).saturating_add(step));
        let descriptors = self.client.status(start..end)?;
        let mut at = start;
        self.told.extend(descriptors.into_iter().map(|descriptor| {
            let start = at;
            at += u64::from(descriptor.len);
            (start..at, T::from(descriptor.flags))
        }));
        self.told.reverse();
        self.left.start = at;
        Ok(())
    }
}

impl<T, B, S> Iterator for Extents<'_, T, B, S>
where
    T: From<u32> + Copy + PartialEq,
    B: DerefMut<Target = [u8]>,
    S: Stream,
{
    type Item = Result<(Range<u64>, T)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut found: Option<(Range<u64>, T)> = None;
        loop {
            if let Err(error) = self.ask() {
                self.left = 0..0;
                self.told.clear();
                return Some(Err(error));
            }
            match (&mut found, self.told.last()) {
                (None, Some(_)) => found = self.told.pop(),
                (Some((range, state)), Some((next, other))) if state == other => {
                    range.end = next.end;
                    self.told.pop();
                }
                _ => return found.map(Ok),
            }
        }
    }
}
