//! Decoding an image: the digests of what a guest would see.

use std::{
    io,
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
    worker::frame::{FromWorker, Held, Task},
};

/// Decodes on a thread for each lane until the daemon has no more tasks.
pub fn run(control: &Control, how: &str, lanes: Vec<UnixStream>, object_size: u64) -> Result<()> {
    let lanes: Vec<Lane> = lanes.into_iter().map(|lane| Lane::new(lane, object_size)).collect();
    let Some((own, others)) = lanes.split_first() else {
        return Err(Error::new(Reason::Internal, "a worker without lanes"));
    };
    let shared = OnceLock::new();
    // A new thread makes calls of its own, which the filter does not allow:
    // all must be there before it, and none may work before it.
    let (started, sealed) = (Barrier::new(lanes.len()), OnceLock::new());
    thread::scope(|scope| {
        for (index, lane) in others.iter().enumerate() {
            let (shared, started, sealed) = (&shared, &started, &sealed);
            let body = move || {
                started.wait();
                if *sealed.wait() { work(lane, shared) } else { Ok(()) }
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
        outcome.and_then(|()| work(own, &shared))
    })
}

/// What the threads share: read by the first that needs it.
type Shared = OnceLock<Result<Arc<Map>, ReadError>>;

fn work(lane: &Lane, shared: &Shared) -> Result<()> {
    match tasks(lane, shared) {
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

fn tasks(lane: &Lane, shared: &Shared) -> Result<(), Ended> {
    let Some(mut task) = lane.next_task().map_err(Ended::Lane)? else { return Ok(()) };
    let map = shared.get_or_init(|| Map::read(lane).map(Arc::new));
    let map = map.as_ref().map_err(Ended::from)?;
    lane.push(&FromWorker::Opened(map.header().virtual_size));
    let mut image = Image::with_map(lane, Arc::clone(map)).map_err(|error| Ended::from(&error))?;
    let mut buf = vec![0; EXTENT_SIZE as usize];
    loop {
        let Task { first, count, volume_size } = task;
        for index in first..first + count {
            let buf = &mut buf[..content::extent_len(volume_size, index)];
            let held = image.read_at(buf, index * EXTENT_SIZE);
            let extent = match held.map_err(|error| Ended::from(&error))? {
                Content::Zeroes => {
                    FromWorker::Extent(Held::Zeroes, content::zeroes_digest(buf.len()))
                }
                Content::Data => FromWorker::Extent(Held::Data, content::extent_digest(buf)),
            };
            lane.push(&extent);
        }
        match lane.next_task().map_err(Ended::Lane)? {
            Some(next) => task = next,
            None => return Ok(()),
        }
    }
}
