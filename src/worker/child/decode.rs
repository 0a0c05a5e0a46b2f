//! Decoding an image: what a guest would see, or its digests.

use std::{
    io, iter,
    os::unix::net::UnixStream,
    sync::{Arc, Barrier, OnceLock},
    thread,
};

use super::{Control, Lane};
use crate::{
    error::{Context, Error, Reason, Result},
    format::qcow2::{
        content,
        image::{Content, Image, Map, ReadError},
    },
    model::image::EXTENT_SIZE,
    sys::shared::Mapped,
    worker::frame::{FromWorker, Held, Task},
};

/// Decodes on a thread for each lane until the daemon has no more tasks.
/// With `regions`, one for each lane, into those.
pub fn run(
    control: &Control,
    how: &str,
    lanes: Vec<UnixStream>,
    regions: Vec<Mapped>,
    object_size: u64,
) -> Result<()> {
    let regions = regions.into_iter().map(Some).chain(iter::repeat_with(|| None));
    let mut lanes = (lanes.into_iter().zip(regions))
        .map(|(lane, region)| (Lane::new(lane, object_size), Into::from(region)));
    let Some(own) = lanes.next() else {
        return Err(Error::new(Reason::Internal, "a worker without lanes"));
    };
    let others: Vec<_> = lanes.collect();
    let shared = OnceLock::new();
    // A new thread makes calls of its own, which the filter does not allow:
    // all must be there before it, and none may work before it.
    let (started, sealed) = (Barrier::new(1 + others.len()), OnceLock::new());
    thread::scope(|scope| {
        for (index, (lane, into)) in others.into_iter().enumerate() {
            let (shared, started, sealed) = (&shared, &started, &sealed);
            let body = move || {
                started.wait();
                if *sealed.wait() { work(&lane, into, shared) } else { Ok(()) }
            };
            let name = format!("decode-{}", index + 1);
            // The process ends: who waits at the barrier need not be told.
            if let Err(cause) = thread::Builder::new().name(name).spawn_scoped(scope, body) {
                eprintln!("a thread cannot be started: {cause}");
                std::process::exit(1);
            }
        }
        started.wait();
        let outcome = control.seal(how);
        let _ = sealed.set(outcome.is_ok());
        outcome.and_then(|()| work(&own.0, own.1, &shared))
    })
}

/// What the threads share: read by the first that needs it.
type Shared = OnceLock<Result<Arc<Map>, ReadError>>;

/// Where extents are decoded.
enum Into {
    /// Into the one buffer, for their digests.
    Digests(Vec<u8>),
    /// Into memory that the daemon reads.
    Memory(Mapped),
}

impl From<Option<Mapped>> for Into {
    fn from(region: Option<Mapped>) -> Self {
        region.map_or_else(|| Self::Digests(vec![0; EXTENT_SIZE as usize]), Self::Memory)
    }
}

impl Into {
    /// Decodes `len` bytes, the task's `nth` extent, with `read`, and says
    /// what came of it.
    fn decode(
        &mut self,
        nth: u64,
        len: usize,
        read: impl FnOnce(&mut [u8]) -> Result<Content, ReadError>,
    ) -> Result<FromWorker, Ended> {
        let (memory, start) = match self {
            Self::Digests(buf) => (&mut buf[..], 0),
            Self::Memory(region) => (&mut region[..], nth as usize * EXTENT_SIZE as usize),
        };
        let Some(bytes) = memory.get_mut(start..start + len) else {
            return Err(Ended::Lane(io::ErrorKind::InvalidInput.into()));
        };
        let held = match read(bytes).map_err(|error| Ended::from(&error))? {
            Content::Data => Held::Data,
            Content::Zeroes => Held::Zeroes,
        };
        Ok(match (self, held) {
            (Self::Memory(_), held) => FromWorker::Filled(held),
            (Self::Digests(_), Held::Zeroes) => {
                FromWorker::Extent(held, content::zeroes_digest(len))
            }
            (Self::Digests(buf), Held::Data) => {
                FromWorker::Extent(held, content::extent_digest(&buf[..len]))
            }
        })
    }
}

fn work(lane: &Lane, into: Into, shared: &Shared) -> Result<()> {
    match tasks(lane, into, shared) {
        Ok(()) => Ok(()),
        Err(Ended::Broken(why)) => {
            lane.push(&FromWorker::Broken(why));
            // The daemon hangs up when it has heard this.
            let _ = lane.next_task();
            Ok(())
        }
        Err(Ended::Lane(cause)) => {
            Err(cause).context(Reason::Internal, || "the conversation with the daemon broke off")
        }
    }
}

enum Ended {
    Broken(String),
    Lane(io::Error),
}

impl From<&ReadError> for Ended {
    fn from(error: &ReadError) -> Self {
        match error {
            ReadError::Format(format) => Self::Broken(format.to_string()),
            ReadError::Io { source, .. } => {
                Self::Lane(io::Error::new(source.kind(), source.to_string()))
            }
        }
    }
}

fn tasks(lane: &Lane, mut into: Into, shared: &Shared) -> Result<(), Ended> {
    let Some(mut task) = lane.next_task().map_err(Ended::Lane)? else { return Ok(()) };
    let map = shared.get_or_init(|| Map::read(lane).map(Arc::new));
    let map = map.as_ref().map_err(Ended::from)?;
    lane.push(&FromWorker::Opened(map.header().virtual_size));
    let mut image = Image::with_map(lane, Arc::clone(map)).map_err(|error| Ended::from(&error))?;
    loop {
        let Task { first, count, volume_size } = task;
        for index in first..first + count {
            let len = content::extent_len(volume_size, index);
            let told =
                into.decode(index - first, len, |bytes| image.read_at(bytes, index * EXTENT_SIZE))?;
            lane.push(&told);
        }
        match lane.next_task().map_err(Ended::Lane)? {
            Some(next) => task = next,
            None => return Ok(()),
        }
    }
}
