//! Serving one lane: hands out tasks, reads the object for them, and compares
//! what comes back with what should.

use std::{
    collections::VecDeque,
    fs::File,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    frame::{FromWorker, HEADER, Held, MAX_READ, SLOTS, Task, ToWorker},
    line::{Break, Line, Watch},
};
use crate::{
    encode::verify::unreadable,
    error::{Error, Reason},
    format::qcow2::content,
    model::image::EXTENT_SIZE,
    port::{Fault, Meter, ReadAt, Sink, Undecodable},
};

/// Most extents of one task: neighbours lie near each other in the object,
/// and the other threads are not left without work for long.
pub const TASK: u64 = 16;

/// Where decoded extents go.
#[derive(Clone, Copy)]
pub enum Output<'a> {
    /// Nowhere: the worker tells their digests, which only it has computed.
    Digests,
    /// Into a sink.
    Sink {
        /// What all lanes decode into: see [`super::frame::Work::Fill`].
        memory: &'a File,
        /// Takes what was copied from there and is as it should be.
        sink: &'a dyn Sink,
    },
}

/// An object whose extents are to be decoded, and what they should be.
pub struct Server<'a> {
    /// The bytes.
    pub object: &'a dyn ReadAt,
    /// Size of the volume in it.
    pub volume_size: u64,
    /// Digest of each extent, all of them.
    pub extent_digests: &'a [u8],
    /// Where the extents go.
    pub output: Output<'a>,
    /// Counts what was decoded.
    pub meter: &'a Meter,
    /// Whose waits the reads explain.
    pub watch: &'a Watch,
    /// Extents of one task.
    pub task: u64,
    /// The next extent that nobody has.
    pub next: AtomicU64,
    /// Bytes that may still be read: see [`super::limits::reads`].
    pub allowance: AtomicU64,
}

/// Why a lane ended early.
#[derive(Debug)]
pub enum Cut {
    /// Because of the worker.
    Worker(Break),
    /// Because of the store, or of the sink.
    Failed(Error),
}

impl From<Break> for Cut {
    fn from(why: Break) -> Self {
        Self::Worker(why)
    }
}

/// Extents of one task, `most` at most, so that `lanes` all have some.
pub fn task_length(volume_size: u64, lanes: usize, most: u64) -> u64 {
    (content::extent_count(volume_size) / (4 * lanes as u64)).clamp(1, most)
}

impl Server<'_> {
    /// Serves the lane of this number until no extent is left, or one differs.
    ///
    /// # Errors
    ///
    /// Any [`Cut`].
    pub fn serve(&self, lane: u64, line: &mut Line<'_>) -> Result<Option<Fault>, Cut> {
        let mut opened = false;
        let mut buf = Vec::new();
        while let Some(task) = self.next_task() {
            line.say(&ToWorker::Task(task))?;
            let end = task.first + task.count;
            // Extents before `told` are decoded, those before `index` done with.
            let (mut told, mut index) = (task.first, task.first);
            let mut filled = VecDeque::new();
            let mut zeroes = Zeroes { first: index, count: 0 };
            while index < end {
                // What the worker waits for goes first: so it decodes while
                // what it has decoded is taken.
                let message = match filled.is_empty() {
                    true => Some(line.receive()?),
                    false => line.received()?,
                };
                match message {
                    Some(FromWorker::Read { offset, len }) => {
                        self.read(offset, len, &mut buf)?;
                        line.send(&buf)?;
                    }
                    Some(FromWorker::Opened(size)) if !opened => {
                        if size != self.volume_size {
                            return Ok(Some(Fault::Sum("virtual size")));
                        }
                        opened = true;
                    }
                    Some(FromWorker::Extent(held, digest))
                        if opened && matches!(self.output, Output::Digests) =>
                    {
                        line.satisfied();
                        if !self.is_expected(index, &digest) {
                            return Ok(Some(different(index)));
                        }
                        self.count(index, held);
                        index += 1;
                    }
                    Some(FromWorker::Filled(held))
                        if opened && told < end && matches!(self.output, Output::Sink { .. }) =>
                    {
                        line.satisfied();
                        filled.push_back(held);
                        told += 1;
                    }
                    None if let Output::Sink { memory, sink } = self.output
                        && let Some(held) = filled.pop_front() =>
                    {
                        let slot = lane * SLOTS + index - task.first;
                        let taken = match held {
                            Held::Data => self.take(memory, slot, index, sink)?,
                            Held::Zeroes => self.take_zeroes(index),
                        };
                        if !taken {
                            return Ok(Some(different(index)));
                        }
                        zeroes.add(index, held, sink)?;
                        self.count(index, held);
                        index += 1;
                    }
                    Some(FromWorker::Broken(why)) => {
                        return Ok(Some(Fault::Undecodable(Undecodable(why))));
                    }
                    _ => return Err(Break::Nonsense("it spoke out of turn").into()),
                }
            }
            if let Output::Sink { sink, .. } = self.output {
                zeroes.pass_on(sink)?;
            }
        }
        line.finish();
        Ok(None)
    }

    /// Copies an extent out of `memory`, which the worker may change at any
    /// time, and passes it on if it is what it should be.
    fn take(&self, memory: &File, slot: u64, index: u64, sink: &dyn Sink) -> Result<bool, Cut> {
        let len = content::extent_len(self.volume_size, index);
        let mut room = sink.room().map_err(Cut::Failed)?;
        let bytes = &mut room.bytes()[..len];
        memory.read_exact_at(bytes, slot * EXTENT_SIZE).map_err(|cause| {
            Cut::Failed(Error::new(Reason::Internal, "shared memory cannot be read").because(cause))
        })?;
        if !self.is_expected(index, &content::extent_digest(bytes)) {
            return Ok(false);
        }
        room.write(index, len).map_err(Cut::Failed)?;
        Ok(true)
    }

    fn take_zeroes(&self, index: u64) -> bool {
        let len = content::extent_len(self.volume_size, index);
        self.is_expected(index, &content::zeroes_digest(len))
    }

    fn next_task(&self) -> Option<Task> {
        let first = self.next.fetch_add(self.task, Ordering::Relaxed);
        let left = content::extent_count(self.volume_size).checked_sub(first)?;
        let count = left.min(self.task);
        (count > 0).then_some(Task { first, count, volume_size: self.volume_size })
    }

    /// The answer to a read: its header and the bytes, in `buf`.
    fn read(&self, offset: u64, len: usize, buf: &mut Vec<u8>) -> Result<(), Cut> {
        let end = offset.checked_add(len as u64);
        if len > MAX_READ || end.is_none_or(|end| end > self.object.len()) {
            return Err(Break::Nonsense("it wants bytes beyond the object's end").into());
        }
        let spent = self.allowance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(len as u64)
        });
        if spent.is_err() {
            return Err(Break::Nonsense("it reads more than any image of this size needs").into());
        }
        buf.clear();
        ToWorker::Bytes(len).encode(buf);
        buf.resize(HEADER + len, 0);
        self.watch.reading.fetch_add(1, Ordering::Relaxed);
        let outcome = self.object.read_at(&mut buf[HEADER..], offset);
        self.watch.reading.fetch_sub(1, Ordering::Relaxed);
        outcome.map_err(|cause| Cut::Failed(unreadable(offset, cause)))
    }

    fn is_expected(&self, index: u64, digest: &[u8; content::DIGEST_SIZE]) -> bool {
        let at = usize::try_from(index).ok().and_then(|index| index.checked_mul(digest.len()));
        let expected = at.and_then(|at| self.extent_digests.get(at..at + digest.len()));
        expected == Some(&digest[..])
    }

    fn count(&self, index: u64, held: Held) {
        let len = content::extent_len(self.volume_size, index) as u64;
        match held {
            Held::Data => self.meter.add_read(len),
            Held::Zeroes => self.meter.add_skipped(len),
        }
    }
}

/// An extent that is not what it should be.
fn different(index: u64) -> Fault {
    Fault::Extent { offset: index * EXTENT_SIZE }
}

/// A run of extents of zeroes that was not passed on yet.
struct Zeroes {
    first: u64,
    count: u64,
}

impl Zeroes {
    /// Extent `index`, the next one, holds this.
    fn add(&mut self, index: u64, held: Held, sink: &dyn Sink) -> Result<(), Cut> {
        match held {
            Held::Zeroes => {
                self.count += 1;
                Ok(())
            }
            Held::Data => {
                self.pass_on(sink)?;
                self.first = index + 1;
                Ok(())
            }
        }
    }

    fn pass_on(&mut self, sink: &dyn Sink) -> Result<(), Cut> {
        let (first, count) = (self.first, std::mem::take(&mut self.count));
        self.first += count;
        if count == 0 { Ok(()) } else { sink.zeroes(first, count).map_err(Cut::Failed) }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        os::unix::net::UnixStream,
        sync::Mutex,
        time::Duration,
    };

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{error::Result, port::Room};

    /// 1000 bytes, and how often they were read.
    struct Counting(AtomicU64);

    impl ReadAt for Counting {
        fn len(&self) -> u64 {
            1000
        }

        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    /// Keeps what comes.
    #[derive(Default)]
    struct Kept(Mutex<Vec<String>>);

    struct Place<'a>(&'a Kept, Vec<u8>);

    impl Sink for Kept {
        fn room(&self) -> Result<Box<dyn Room + '_>> {
            Ok(Box::new(Place(self, vec![9; EXTENT_SIZE as usize])))
        }

        fn zeroes(&self, first: u64, count: u64) -> Result<()> {
            self.0.lock().unwrap().push(format!("{count} zeroes at {first}"));
            Ok(())
        }

        fn finish(self: Box<Self>, _: &Meter) -> Result<()> {
            Ok(())
        }
    }

    impl Room for Place<'_> {
        fn bytes(&mut self) -> &mut [u8] {
            &mut self.1
        }

        fn write(self: Box<Self>, index: u64, len: usize) -> Result<()> {
            let same = self.1[..len].iter().all(|byte| *byte == self.1[0]);
            let text = format!("{len} times {} at {index}: {same}", self.1[0]);
            self.0.0.lock().unwrap().push(text);
            Ok(())
        }
    }

    /// What becomes of a worker that fills memory with 7 and says this. The
    /// volume is an extent of 7, two of zeroes, and half an extent of 7.
    fn fills(said: &[FromWorker]) -> String {
        let watch = Watch::new(CancellationToken::new(), Duration::from_millis(200));
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        said.iter().for_each(|message| message.encode(&mut bytes));
        far.write_all(&bytes).unwrap();
        let memory = crate::sys::shared::memory(SLOTS * EXTENT_SIZE).unwrap();
        for slot in 0..SLOTS {
            memory.write_all_at(&vec![7; EXTENT_SIZE as usize], slot * EXTENT_SIZE).unwrap();
        }
        let (object, meter) = (Counting(AtomicU64::new(0)), Meter::default());
        let (whole, half) = (vec![7; EXTENT_SIZE as usize], vec![7; EXTENT_SIZE as usize / 2]);
        let zeroes = content::zeroes_digest(1 << 20);
        let digests =
            [content::extent_digest(&whole), zeroes, zeroes, content::extent_digest(&half)]
                .concat();
        let kept = Kept::default();
        let server = Server {
            object: &object,
            volume_size: 3 * EXTENT_SIZE + EXTENT_SIZE / 2,
            extent_digests: &digests,
            output: Output::Sink { memory: &memory, sink: &kept },
            meter: &meter,
            watch: &watch,
            task: SLOTS,
            next: AtomicU64::new(0),
            allowance: AtomicU64::new(2000),
        };
        let outcome = server.serve(0, &mut Line::new(near, &watch).unwrap());
        let text = match outcome {
            Ok(None) => format!("well, {} read, {} skipped", meter.read(), meter.skipped()),
            Ok(Some(fault)) => fault.to_string(),
            Err(Cut::Worker(why)) => format!("{why:?}"),
            Err(Cut::Failed(error)) => error.report(),
        };
        format!("{:?} was kept: {text}", kept.0.into_inner().unwrap())
    }

    #[test]
    fn only_what_has_its_digest_is_passed_on() {
        use FromWorker::{Extent, Filled, Opened};
        let open = || Opened(3 * EXTENT_SIZE + EXTENT_SIZE / 2);
        let (data, zeroes) = (|| Filled(Held::Data), || Filled(Held::Zeroes));
        let cases = [
            vec![open(), data(), zeroes(), zeroes(), data()],
            vec![open(), zeroes()],
            vec![open(), data(), data()],
            vec![open(), data(), zeroes(), zeroes(), zeroes()],
            vec![open(), Extent(Held::Data, content::extent_digest(&[7; 1 << 20]))],
            vec![data()],
            vec![open(), data()],
        ];
        let filled: Vec<_> = cases.iter().map(|said| fills(said)).collect();
        insta::assert_snapshot!(filled.join("\n"), @r#"
        ["1048576 times 7 at 0: true", "524288 times 7 at 3: true", "2 zeroes at 1"] was kept: well, 1572864 read, 2097152 skipped
        [] was kept: what a guest reads at offset 0 has another BLAKE3
        ["1048576 times 7 at 0: true"] was kept: what a guest reads at offset 1048576 has another BLAKE3
        ["1048576 times 7 at 0: true"] was kept: what a guest reads at offset 3145728 has another BLAKE3
        [] was kept: Nonsense("it spoke out of turn")
        [] was kept: Nonsense("it spoke out of turn")
        ["1048576 times 7 at 0: true"] was kept: Silent
        "#);
    }

    /// What becomes of a worker that says this, whatever it is told. The
    /// volume is one extent of zeroes.
    fn hears(said: &[FromWorker]) -> String {
        let watch = Watch::new(CancellationToken::new(), Duration::from_millis(200));
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        said.iter().for_each(|message| message.encode(&mut bytes));
        far.write_all(&bytes).unwrap();
        let (object, meter) = (Counting(AtomicU64::new(0)), Meter::default());
        let server = Server {
            object: &object,
            volume_size: EXTENT_SIZE,
            extent_digests: &content::zeroes_digest(1 << 20),
            output: Output::Digests,
            meter: &meter,
            watch: &watch,
            task: 1,
            next: AtomicU64::new(0),
            allowance: AtomicU64::new(2000),
        };
        let outcome = server.serve(0, &mut Line::new(near, &watch).unwrap());
        let text = match outcome {
            Ok(None) => format!("well, {} skipped", meter.skipped()),
            Ok(Some(fault)) => fault.to_string(),
            Err(Cut::Worker(why)) => format!("{why:?}"),
            Err(Cut::Failed(error)) => error.report(),
        };
        format!("{} reads: {text}", object.0.into_inner())
    }

    #[test]
    fn nothing_that_a_worker_says_is_believed() {
        use FromWorker::{Broken, Confined, Extent, Opened, Read};
        let right = || Extent(Held::Zeroes, content::zeroes_digest(1 << 20));
        let open = || Opened(EXTENT_SIZE);
        let read = |offset, len| Read { offset, len };
        let cases = [
            vec![open(), read(0, 1000), right()],
            vec![open(), Extent(Held::Zeroes, [0; 32])],
            vec![right()],
            vec![open(), open()],
            vec![Opened(EXTENT_SIZE + 1)],
            vec![Confined("again".into())],
            vec![read(0, 1001)],
            vec![read(u64::MAX, 2)],
            vec![read(1000, 1)],
            vec![read(0, 1000), read(0, 1000), read(0, 1)],
            vec![Broken("told so".into())],
            vec![open(), FromWorker::Filled(Held::Zeroes)],
            vec![open()],
        ];
        let heard: Vec<_> = cases.iter().map(|said| hears(said)).collect();
        insta::assert_snapshot!(heard.join("\n"), @r#"
        1 reads: well, 1048576 skipped
        0 reads: what a guest reads at offset 0 has another BLAKE3
        0 reads: Nonsense("it spoke out of turn")
        0 reads: Nonsense("it spoke out of turn")
        0 reads: the virtual size in the manifest is not that of its parts
        0 reads: Nonsense("it spoke out of turn")
        0 reads: Nonsense("it wants bytes beyond the object's end")
        0 reads: Nonsense("it wants bytes beyond the object's end")
        0 reads: Nonsense("it wants bytes beyond the object's end")
        2 reads: Nonsense("it reads more than any image of this size needs")
        0 reads: the object cannot be decoded
        0 reads: Nonsense("it spoke out of turn")
        0 reads: Silent
        "#);
    }

    #[test]
    fn every_lane_gets_work() {
        for lanes in [1, 2, 7, 64] {
            for extents in [1, 2, 41, 4096] {
                let task = task_length(extents * EXTENT_SIZE, lanes, TASK);
                assert!((1..=TASK).contains(&task));
                assert!(extents.div_ceil(task) >= extents.min(lanes as u64), "{lanes} {extents}");
            }
        }
    }
}
