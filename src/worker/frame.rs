//! What a worker and the daemon say to each other.
//!
//! ```text
//! frame   = kind (1 byte), length of the payload (4 bytes, little endian), payload
//! control   ─► Job and the lanes' descriptors          ◄─ Confined | Refused
//! lane      ─► Task ────────────────────────────────►
//!                    ◄─ Read ◄─ Bytes …  ◄─ Opened, Extent … or Filled …, Broken
//!           ─► Task, or the end of the stream: no more tasks
//! ```
//!
//! Both ends are one binary, so there are no versions. What comes from a
//! worker is hostile: [`FromWorker::decode`] takes any bytes, and each kind
//! has a length that it cannot exceed.

use serde::{Deserialize, Serialize};

use super::{attempt::Attempt, limits::Limits};

/// Bytes of kind and length.
pub const HEADER: usize = 5;
/// Most that one [`FromWorker::Read`] may ask for: the unit of the digests.
pub const MAX_READ: usize = 1 << 20;
/// Most extents of a task that are decoded into memory.
pub const SLOTS: u64 = 8;
/// Longest text of a worker: a sentence and its causes.
pub const MAX_TEXT: usize = 1024;
/// Longest job: a few numbers.
pub const MAX_JOB: usize = 1024;

/// What a worker is for. Comes before it is confined, from the daemon alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// What it may use.
    pub limits: Limits,
    /// What it does.
    pub work: Work,
}

/// Kinds of work.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Work {
    /// Decodes an image; a lane for each thread.
    Decode {
        /// Size of the object.
        object_size: u64,
    },
    /// The same, into memory that comes behind the lanes: [`SLOTS`] extents
    /// for each lane, where the extents of a task come in order.
    Fill {
        /// Size of the object.
        object_size: u64,
    },
    /// Tries what it must not be able to do; no lanes.
    Attempt(Attempt),
}

/// A run of extents to be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// Index of the first.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Size of the volume, for the length of the last.
    pub volume_size: u64,
}

/// What an extent holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Bytes.
    Data,
    /// Nothing: it reads as zeroes.
    Zeroes,
}

impl Held {
    fn byte(self) -> u8 {
        u8::from(self == Self::Data)
    }

    fn of(payload: &[u8]) -> Result<Self, Nonsense> {
        match payload {
            [0] => Ok(Self::Zeroes),
            [1] => Ok(Self::Data),
            _ => Err(Nonsense("an extent is neither data nor zeroes")),
        }
    }
}

/// What the daemon sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToWorker {
    /// See [`Task`].
    Task(Task),
    /// The answer to a read: so many bytes follow.
    Bytes(usize),
}

/// What a worker sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromWorker {
    /// It can do nothing any more but work; how well that is ensured.
    Confined(String),
    /// It could not be confined, and does nothing.
    Refused(String),
    /// The image's header is sound, and says this size of the volume.
    Opened(u64),
    /// Wants bytes of the object.
    Read {
        /// From here.
        offset: u64,
        /// 1 to [`MAX_READ`].
        len: usize,
    },
    /// The next extent of the task is decoded.
    Extent(Held, [u8; 32]),
    /// The next extent of the task is decoded, into its slot if it is data.
    Filled(Held),
    /// The image is at fault.
    Broken(String),
    /// The outcome of an attempt that should not have had one.
    Said(String),
}

/// Bytes that no worker of ours sends.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Nonsense(pub &'static str);

impl ToWorker {
    /// Its bytes, without those that follow [`ToWorker::Bytes`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Task(Task { first, count, volume_size }) => {
                header(out, 1, 24);
                [first, count, volume_size].iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Self::Bytes(len) => header(out, 2, *len),
        }
    }

    /// The payload's length of the frame that begins with `bytes`, and its
    /// kind.
    ///
    /// # Errors
    ///
    /// Nonsense.
    pub fn header(bytes: [u8; HEADER]) -> Result<(u8, usize), Nonsense> {
        match split(bytes) {
            (1, 24) => Ok((1, 24)),
            (2, len) if len <= MAX_READ => Ok((2, len)),
            _ => Err(Nonsense("the daemon sent a frame of no kind")),
        }
    }

    /// A task from its payload.
    #[must_use]
    pub fn task(payload: &[u8; 24]) -> Task {
        let number = |index: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&payload[index * 8..index * 8 + 8]);
            u64::from_le_bytes(bytes)
        };
        Task { first: number(0), count: number(1), volume_size: number(2) }
    }
}

impl FromWorker {
    /// Appends its bytes. Texts are cut.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut text = |kind, text: &str| {
            let text = &text[..text.floor_char_boundary(MAX_TEXT)];
            header(out, kind, text.len());
            out.extend(text.as_bytes());
        };
        match self {
            Self::Confined(how) => text(1, how),
            Self::Refused(why) => text(2, why),
            Self::Broken(why) => text(3, why),
            Self::Said(what) => text(4, what),
            Self::Opened(size) => {
                header(out, 5, 8);
                out.extend(size.to_le_bytes());
            }
            Self::Read { offset, len } => {
                header(out, 6, 16);
                out.extend(offset.to_le_bytes());
                out.extend((*len as u64).to_le_bytes());
            }
            Self::Extent(held, digest) => {
                header(out, 7, 33);
                out.push(held.byte());
                out.extend(digest);
            }
            Self::Filled(held) => {
                header(out, 8, 1);
                out.push(held.byte());
            }
        }
    }

    /// The first frame in `bytes`, which are hostile, and its length; `None`
    /// when more bytes are needed, never more than [`HEADER`] and
    /// [`MAX_TEXT`].
    ///
    /// # Errors
    ///
    /// Nonsense.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, Nonsense> {
        let Some((start, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let (kind, len) = split(*start);
        let allowed = match kind {
            1..=4 => len <= MAX_TEXT,
            5 => len == 8,
            6 => len == 16,
            7 => len == 33,
            8 => len == 1,
            _ => return Err(Nonsense("it sent a frame of no kind")),
        };
        if !allowed {
            return Err(Nonsense("it sent a frame of the wrong length"));
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let text = || shown(payload);
        let message = match kind {
            1 => Self::Confined(text()),
            2 => Self::Refused(text()),
            3 => Self::Broken(text()),
            4 => Self::Said(text()),
            5 => Self::Opened(number(payload)?),
            6 => {
                let (offset, len) = payload.split_at(8);
                let len = usize::try_from(number(len)?).unwrap_or(usize::MAX);
                if !(1..=MAX_READ).contains(&len) {
                    return Err(Nonsense("it wants a read of a wrong length"));
                }
                Self::Read { offset: number(offset)?, len }
            }
            8 => Self::Filled(Held::of(payload)?),
            _ => {
                let (held, digest) = payload.split_at(1);
                let held = Held::of(held)?;
                let digest = digest.try_into().map_err(|_| Nonsense("a digest is too short"))?;
                Self::Extent(held, digest)
            }
        };
        Ok(Some((message, HEADER + len)))
    }
}

/// Hostile bytes as one line that may be shown.
#[must_use]
pub fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim().replace('\n', "; ");
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn header(out: &mut Vec<u8>, kind: u8, len: usize) {
    out.push(kind);
    out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn split([kind, a, b, c, d]: [u8; HEADER]) -> (u8, usize) {
    (kind, u32::from_le_bytes([a, b, c, d]) as usize)
}

fn number(bytes: &[u8]) -> Result<u64, Nonsense> {
    bytes.try_into().map(u64::from_le_bytes).map_err(|_| Nonsense("a number is too short"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> impl Strategy<Value = FromWorker> {
        let text = || "[a-zäß ]{0,40}".prop_map(|text: String| text.trim().to_owned());
        prop_oneof![
            text().prop_map(FromWorker::Confined),
            text().prop_map(FromWorker::Refused),
            text().prop_map(FromWorker::Broken),
            text().prop_map(FromWorker::Said),
            any::<u64>().prop_map(FromWorker::Opened),
            (any::<u64>(), 1..=MAX_READ).prop_map(|(offset, len)| FromWorker::Read { offset, len }),
            any::<bool>().prop_map(|data| {
                FromWorker::Filled(if data { Held::Data } else { Held::Zeroes })
            }),
            (any::<bool>(), any::<[u8; 32]>()).prop_map(|(data, digest)| {
                FromWorker::Extent(if data { Held::Data } else { Held::Zeroes }, digest)
            }),
        ]
    }

    proptest! {
        /// However a stream is cut, the same messages come out of it.
        #[test]
        fn messages_survive_being_cut(
            sent in prop::collection::vec(message(), 0..12),
            cut in 1..40_usize,
        ) {
            let mut bytes = Vec::new();
            sent.iter().for_each(|message| message.encode(&mut bytes));
            let (mut inbox, mut received) = (Vec::new(), Vec::new());
            for chunk in bytes.chunks(cut) {
                inbox.extend(chunk);
                while let Some((message, used)) = FromWorker::decode(&inbox).unwrap() {
                    inbox.drain(..used);
                    received.push(message);
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert!(inbox.is_empty());
        }

        /// Any bytes are a message, nonsense, or wait for a bounded number of
        /// further bytes.
        #[test]
        fn any_bytes_are_survived(
            kind in 0..10_u8,
            len in prop_oneof![0..64_u32, any::<u32>()],
            payload in prop::collection::vec(any::<u8>(), 0..1100),
        ) {
            let mut bytes = vec![kind];
            bytes.extend(len.to_le_bytes());
            bytes.extend(&payload);
            match FromWorker::decode(&bytes) {
                Ok(Some((FromWorker::Read { len, .. }, _))) => prop_assert!(len <= MAX_READ),
                Ok(Some((_, used))) => prop_assert!(used <= bytes.len()),
                Ok(None) => prop_assert!(bytes.len() < HEADER + MAX_TEXT),
                Err(_) => {}
            }
        }

        #[test]
        fn tasks_arrive(first in any::<u64>(), count in any::<u64>(), volume_size in any::<u64>()) {
            let task = Task { first, count, volume_size };
            let mut bytes = Vec::new();
            ToWorker::Task(task).encode(&mut bytes);
            let (start, payload) = bytes.split_first_chunk().unwrap();
            prop_assert_eq!(ToWorker::header(*start), Ok((1, 24)));
            prop_assert_eq!(ToWorker::task(payload.try_into().unwrap()), task);
        }
    }

    #[test]
    fn texts_of_workers_cannot_forge_lines() {
        let mut bytes = Vec::new();
        FromWorker::Broken("a\nimaged: \u{1b}[31mall is well".into()).encode(&mut bytes);
        let (message, _) = FromWorker::decode(&bytes).unwrap().unwrap();
        assert_eq!(message, FromWorker::Broken("a; imaged: \u{fffd}[31mall is well".into()));
    }

    #[test]
    fn a_longer_text_than_allowed_is_cut() {
        let mut bytes = Vec::new();
        FromWorker::Broken("ü".repeat(MAX_TEXT)).encode(&mut bytes);
        assert_eq!(bytes.len(), HEADER + MAX_TEXT);
        assert!(FromWorker::decode(&bytes).unwrap().is_some());
    }
}
