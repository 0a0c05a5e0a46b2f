//! A request under way: one message to the server or several, of which the
//! answers come in any order.

use std::ops::{DerefMut, Range};

use super::{
    answer::{Answer, Asked, Descriptor},
    fault::{Fault, Violation},
    protocol::{self, Command},
};

/// See the module's head.
#[derive(Debug)]
pub(super) struct Request<B> {
    /// The cookie of its first message; the others' follow.
    first: u64,
    /// What was asked by each message, until it is answered.
    parts: Vec<Option<Answer>>,
    /// Offset of the first byte in the export.
    start: u64,
    /// A read's buffer, and where in it the bytes go.
    target: Option<(B, Range<usize>)>,
    /// The first refusal.
    refused: Option<(Asked, Fault)>,
}

/// The end of a request.
#[derive(Debug)]
pub(super) enum Ended<B> {
    /// With a read's offset, buffer and range.
    Read(u64, B, Range<usize>),
    Status(Vec<Descriptor>),
    Refused(Asked, Fault),
}

impl<B: DerefMut<Target = [u8]>> Request<B> {
    /// A read of `range.len()` bytes at `start` into `buffer[range]`, which is
    /// within the buffer, in messages that do not cross multiples of `step`.
    pub(super) fn read(first: u64, start: u64, buffer: B, range: Range<usize>, step: u64) -> Self {
        let end = start.saturating_add(range.len() as u64);
        let mut parts = Vec::new();
        let mut at = start;
        while at < end {
            let next = (at - at % step).saturating_add(step).min(end);
            parts.push(Some(Answer::to(Asked::Read(at..next))));
            at = next;
        }
        Self { first, parts, start, target: Some((buffer, range)), refused: None }
    }

    /// A request for the map of `range`.
    pub(super) fn status(first: u64, range: Range<u64>, context: u32) -> Self {
        let start = range.start;
        let parts = vec![Some(Answer::to(Asked::Status(range, context)))];
        Self { first, parts, start, target: None, refused: None }
    }

    /// The messages, one after the other, and the first cookie that is free
    /// after them.
    pub(super) fn messages(&self) -> (Vec<u8>, u64) {
        let mut cookie = self.first;
        let mut bytes = Vec::with_capacity(self.parts.len() * protocol::REQUEST);
        for answer in self.parts.iter().flatten() {
            let (command, range) = match answer.asked() {
                Asked::Read(range) => (Command::Read, range),
                Asked::Status(range, _) => (Command::BlockStatus, range),
            };
            let len = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
            bytes.extend(protocol::request(command, cookie, range.start, len));
            cookie += 1;
        }
        (bytes, cookie)
    }

    /// What it still waits for.
    pub(super) fn waits_for(&self) -> Option<&Asked> {
        self.parts.iter().flatten().next().map(Answer::asked)
    }

    /// The answer to the message with this cookie, if it is one of these and
    /// still under way.
    pub(super) fn answer(&mut self, cookie: u64) -> Option<&mut Answer> {
        let index = self.index(cookie)?;
        self.parts.get_mut(index)?.as_mut()
    }

    fn index(&self, cookie: u64) -> Option<usize> {
        usize::try_from(cookie.checked_sub(self.first)?).ok()
    }

    /// Where bytes for `place` within the message that asked for the bytes
    /// from `asked` on belong.
    pub(super) fn bytes(
        &mut self,
        asked: u64,
        place: Range<usize>,
    ) -> Result<&mut [u8], Violation> {
        let (buffer, range) = self.target.as_mut().ok_or(Violation::Unexpected)?;
        let skipped = usize::try_from(asked - self.start).map_err(|_| Violation::Outside)?;
        let target = buffer.get_mut(range.clone()).and_then(|bytes| bytes.get_mut(skipped..));
        target.and_then(|bytes| bytes.get_mut(place)).ok_or(Violation::Outside)
    }

    /// Ends the message with this cookie. What became of the whole request,
    /// if it was the last; `self` is of no use then.
    pub(super) fn end(&mut self, cookie: u64) -> Result<Option<Ended<B>>, (Asked, Fault)> {
        let index = self.index(cookie);
        let Some(part) = index.and_then(|index| self.parts.get_mut(index)) else { return Ok(None) };
        let Some(answer) = part.take() else { return Ok(None) };
        let asked = answer.asked().clone();
        let mut descriptors = Vec::new();
        match answer.finish() {
            Ok(found) => descriptors = found,
            Err(fault @ Fault::Refused { .. }) => {
                self.refused.get_or_insert((asked, fault));
            }
            Err(fault) => return Err((asked, fault)),
        }
        if self.waits_for().is_some() {
            return Ok(None);
        }
        Ok(Some(match (self.refused.take(), self.target.take()) {
            (Some((asked, fault)), _) => Ended::Refused(asked, fault),
            (None, Some((buffer, range))) => Ended::Read(self.start, buffer, range),
            (None, None) => Ended::Status(descriptors),
        }))
    }
}
