//! What the stages of a capture into a bucket take, each alone: how fast it
//! could be on this machine.

use std::{
    path::Path,
    sync::{Arc, mpsc::sync_channel},
    thread,
    time::{Instant, SystemTime},
};

use futures_util::{StreamExt, stream};
use imaged::{
    encode::{self, Output, SpareMemory},
    model::{ByteSize, Timestamp, image::Compression},
    port::{Body, Clock, Extent, Meter, Part, Piece},
    store::{Bucket, Http, Place, S3Bucket, StoredAs},
};
use nix::{
    sys::resource::{UsageWho, getrusage},
    sys::time::TimeValLike,
};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    reader,
    report::{Report, median},
    volumes,
    weed::{BUCKET, Weed},
};

/// Parts that are on their way to the store at once, as imaged has them.
const PUTS: usize = 2;

/// What passes from stage to stage, in memory.
pub struct Stages<'a> {
    device: &'a Path,
    pieces: Vec<Kept>,
    parts: Vec<Arc<Part>>,
    weed: &'a Weed,
    bucket: S3Bucket,
    runtime: Runtime,
    taken: Taken,
}

/// Seconds, of each round.
#[derive(Default)]
struct Taken {
    reader: Vec<Cost>,
    encoder: Vec<Cost>,
    client: Vec<Cost>,
    /// Only its processor time: it cannot be had without a client.
    store: Vec<f64>,
}

#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    /// Of all threads of this process; what the kernel's own do for a loop
    /// device is not seen.
    cpu: f64,
}

impl<'a> Stages<'a> {
    /// Has everything in memory that a capture of `device` to `weed` makes.
    pub fn new(device: &'a Path, weed: &'a Weed, keys: &Path) -> Self {
        let mut pieces = Vec::new();
        reader::read(device, |piece| pieces.push(Kept::from(piece)));
        let place = Place { store: "far".into(), file: Some(keys.to_owned()), profile: None };
        let http = Http::new(&format!("http://{}", weed.address()), None).unwrap();
        let bucket = S3Bucket::new(
            http,
            "us-east-1".into(),
            BUCKET.into(),
            place.s3().unwrap(),
            Arc::new(HostClock),
        );
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (parts, taken) = (Vec::new(), Taken::default());
        let mut stages = Self { device, pieces, parts, weed, bucket, runtime, taken };
        let mut parts = Vec::new();
        stages.encode(|part| {
            let body = Memory(part.pieces().map(<[u8]>::to_vec).collect());
            parts.push(Arc::new(Part { body: Box::new(body), ..part }));
        });
        // The first comes last.
        parts.sort_by_key(|part| part.number);
        stages.parts = parts;
        stages
    }

    /// Runs each once.
    pub fn round(&mut self) {
        crate::cold();
        self.taken.reader.push(cost(|| _ = reader::read(self.device, drop)));
        self.taken.encoder.push(cost(|| self.encode(drop)));
        let before = self.weed.cpu_seconds();
        self.taken.client.push(cost(|| self.runtime.block_on(self.upload())));
        self.taken.store.push(self.weed.cpu_seconds() - before);
    }

    /// Digests included: a part comes with its own.
    fn encode(&self, mut take: impl FnMut(Part)) {
        let cores = thread::available_parallelism().unwrap();
        let settings = encode::Settings {
            volume_size: ByteSize(volumes::SIZE),
            compression: Compression::Zstd,
            threads: cores,
            spare: SpareMemory::default(),
            resumable: false,
        };
        let (pieces_in, pieces) = sync_channel(4);
        let (parts_in, mut parts) = mpsc::channel(1);
        thread::scope(|scope| {
            scope.spawn(move || {
                self.pieces.iter().for_each(|piece| pieces_in.send(piece.into()).unwrap());
            });
            let encoding = scope.spawn(move || {
                let (meter, stop) = (Meter::default(), CancellationToken::new());
                encode::run(&settings, pieces, parts_in, &meter, &stop).unwrap();
            });
            while let Some(output) = parts.blocking_recv() {
                if let Output::Part(part, _) = output {
                    take(part);
                }
            }
            encoding.join().unwrap();
        });
    }

    /// By imaged's own client, which needs less processor time than s5cmd's
    /// and aws's: it has no digests to compute.
    async fn upload(&self) {
        let upload = self.bucket.begin("stages", "bench").await.unwrap();
        let put = async |part: &Arc<Part>| {
            let etag = self.bucket.put_part("stages", &upload, Arc::clone(part)).await.unwrap();
            StoredAs { number: part.number, etag, sha256: part.sha256 }
        };
        let stored: Vec<_> = stream::iter(&self.parts).map(put).buffered(PUTS).collect().await;
        let _ = self.bucket.complete("stages", &upload, &stored).await.unwrap();
    }

    /// The slowest stage, or all their processor time on all cores, whichever
    /// takes longer; and how near to it `ours` comes.
    pub fn report(&self, report: &mut Report, ours: f64) {
        let Taken { reader, encoder, client, store } = &self.taken;
        let walls = [reader, encoder, client].map(|costs| middle(costs, |cost| cost.wall));
        let cpu = [reader, encoder, client].map(|costs| middle(costs, |cost| cost.cpu));
        let cpu = [cpu[0], cpu[1], cpu[2], median(store)];
        for (stage, cpu) in ["reader", "encoder", "client", "store"].iter().zip(cpu) {
            report.value(&format!("store-s3-cpu-{stage}"), cpu, "s of processor time, alone");
        }
        for (stage, wall) in ["reader", "encoder", "upload"].iter().zip(walls) {
            report.value(&format!("store-s3-alone-{stage}"), wall, "s, alone");
        }
        let cores = thread::available_parallelism().unwrap().get() as f64;
        let limit = walls.into_iter().fold(cpu.iter().sum::<f64>() / cores, f64::max);
        report.value("store-s3-limit", limit, "s, the slowest stage or all cores' time");
        report.value("store-s3-of-limit", limit / ours, "limit/ours");
    }
}

fn cost(deed: impl FnOnce()) -> Cost {
    let (before, start) = (own_cpu(), Instant::now());
    deed();
    Cost { wall: start.elapsed().as_secs_f64(), cpu: own_cpu() - before }
}

fn own_cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
}

fn middle(costs: &[Cost], of: fn(&Cost) -> f64) -> f64 {
    median(&costs.iter().map(of).collect::<Vec<_>>())
}

/// A piece that can be had again.
enum Kept {
    Data(u64, Shared),
    Zeroes { first: u64, count: u64 },
}

impl From<Piece> for Kept {
    fn from(piece: Piece) -> Self {
        match piece {
            Piece::Data(Extent { index, bytes }) => {
                Self::Data(index, Shared(Arc::from((*bytes).as_ref())))
            }
            Piece::Zeroes { first, count } => Self::Zeroes { first, count },
        }
    }
}

impl From<&Kept> for Piece {
    fn from(kept: &Kept) -> Self {
        match kept {
            Kept::Data(index, bytes) => {
                Self::Data(Extent { index: *index, bytes: Box::new(bytes.clone()) })
            }
            Kept::Zeroes { first, count } => Self::Zeroes { first: *first, count: *count },
        }
    }
}

#[derive(Clone)]
struct Shared(Arc<[u8]>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A part's body that does not go back to the encoder.
struct Memory(Vec<Vec<u8>>);

impl Body for Memory {
    fn piece(&self, index: usize) -> Option<&[u8]> {
        self.0.get(index).map(Vec::as_slice)
    }
}

#[derive(Debug)]
struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Timestamp {
        SystemTime::now().into()
    }

    fn random(&self) -> u128 {
        0
    }
}
