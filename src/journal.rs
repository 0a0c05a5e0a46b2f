//! What survives a restart: an embedded database with four tables.
//!
//! ```text
//! work_requests  {"version": 1, "workRequest": {…}}   by the id
//! traces         {"version": 1, "trace": {…}}         of a work request
//! parts          {"version": 1, "part": {…}}          by that and the part's number
//! blobs          bytes that belong to a part          by that and their kind
//! ```
//! Only the newest of the blobs that say how an encoder stood are kept: they
//! take turns.
//!
//! One thread owns the database, because its calls block on fsync; callers
//! wait in a bounded channel, no longer than a minute. An answer means that
//! the change is durable. A change is not taken back when its caller stops
//! waiting for it.

use std::{
    collections::BTreeMap,
    error::Error as StdError,
    fmt,
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    error::{Cause, Context, Error, Reason, Result},
    model::{
        WorkRequestId,
        image::StoredPart,
        trace::Trace,
        upload::{KeptPart, Receipt},
        work_request::WorkRequest,
    },
    port::{self, BoxFuture},
    steps,
};

const WORK_REQUESTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("work_requests");
const TRACES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("traces");

const PARTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("parts");
const BLOBS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("blobs");

/// How an encoder stood after so many parts is remembered: more than are on
/// their way to a store at once.
const STANDINGS: u32 = 8;

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

/// Version of the values that this imaged writes, and the newest it reads.
const VERSION: u32 = 1;

/// Callers that may wait for the thread; more wait for a place.
const QUEUE: usize = 64;

/// Longest wait for an answer. A disk that takes longer for some kilobytes is
/// as good as gone, and no work request may wait for it for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// The journal holds some hundred kilobytes; redb would take 1 GiB.
const CACHE_BYTES: usize = 4 << 20;

/// What to do when the journal cannot be read any more.
const DAMAGED: &str = "move the file aside to start with an empty journal, then look for instances \
                       that are stopped or frozen: only the journal knew of them";

/// What goes wrong inside the database, not yet said for people.
type Failed = Cause;

/// The journal of one state directory.
pub struct Journal {
    path: PathBuf,
    /// `None` only while dropping.
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

/// A key and its value.
type Entry = (String, Vec<u8>);

enum Command {
    Put { table: Table, key: String, value: Vec<u8>, done: oneshot::Sender<Result<(), Failed>> },
    Get { table: Table, key: String, done: oneshot::Sender<Result<Option<Vec<u8>>, Failed>> },
    Load { done: oneshot::Sender<Result<Vec<Entry>, Failed>> },
    Forget { keys: Vec<String>, done: oneshot::Sender<Result<(), Failed>> },
    PutAll { entries: Vec<(Table, String, Vec<u8>)>, done: oneshot::Sender<Result<(), Failed>> },
    Range { table: Table, id: String, done: oneshot::Sender<Result<Vec<Entry>, Failed>> },
    ForgetParts { id: String, done: oneshot::Sender<Result<(), Failed>> },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Value<T> {
    version: u32,
    work_request: T,
}

#[derive(Serialize, Deserialize)]
struct Traced<T> {
    version: u32,
    trace: T,
}

/// A part without its blobs.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Parted {
    version: u32,
    number: u32,
    stored: StoredPart,
    receipt: Option<Receipt>,
    digests: Vec<u8>,
}

/// The key of something that belongs to a part of the upload of `id`.
fn key_of(id: &str, number: u32) -> String {
    format!("{id}/{number:05}")
}

/// Enough of a value to know whether the rest can be read.
#[derive(Deserialize)]
struct Header {
    version: u32,
}

impl Journal {
    /// Opens the journal in the file `path`, or makes it. Nothing in it is
    /// ever deleted because it could not be read. Blocks.
    ///
    /// # Errors
    ///
    /// `JOURNAL_FAILED`, also for a damaged file.
    pub fn open(path: &Path) -> Result<Self> {
        let (opened, open) = std::sync::mpsc::sync_channel(1);
        let (commands, receiver) = mpsc::channel(QUEUE);
        let owned = path.to_owned();
        let unusable = || format!("the journal {} cannot be opened", path.display());
        let thread = thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                // Opening here, too: redb panics on some damage, and that must
                // be an error of this call.
                match Store::open(owned) {
                    Ok(store) => {
                        let _ = opened.send(Ok(()));
                        store.run(receiver);
                    }
                    Err(cause) => drop(opened.send(Err(cause))),
                }
            })
            .context(Reason::JournalFailed, unusable)?;
        // No answer: redb panicked.
        if let Err(cause) = open.recv().unwrap_or_else(|_| Err("the file is damaged".into())) {
            let damaged = is_damage(&*cause);
            let error = Error::new(Reason::JournalFailed, unusable()).because(cause);
            return Err(match damaged {
                true => error.advice(DAMAGED),
                false => error,
            });
        }
        Ok(Self { path: path.to_owned(), commands: Some(commands), thread: Some(thread) })
    }

    async fn ask<T>(
        &self,
        doing: impl FnOnce() -> String,
        command: impl FnOnce(oneshot::Sender<Result<T, Failed>>) -> Command,
    ) -> Result<T> {
        let (done, answer) = oneshot::channel();
        let ended = "the journal's thread has ended";
        let asked = async {
            match &self.commands {
                Some(commands) if commands.send(command(done)).await.is_ok() => {
                    answer.await.unwrap_or_else(|_| Err(ended.into()))
                }
                _ => Err(ended.into()),
            }
        };
        let outcome = timeout(PATIENCE, asked).await.unwrap_or_else(|_| {
            Err(format!("its disk did not answer for {} seconds", PATIENCE.as_secs()).into())
        });
        outcome.context(Reason::JournalFailed, || {
            format!("{} the journal {}", doing(), self.path.display())
        })
    }
}

impl Journal {
    /// The same for what changes the journal, called `name`.
    async fn change(
        &self,
        name: &str,
        doing: impl FnOnce() -> String,
        command: impl FnOnce(oneshot::Sender<Result<(), Failed>>) -> Command,
    ) -> Result<()> {
        steps::effect(name, self.ask(doing, command)).await
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        drop(self.commands.take());
        // Some milliseconds: what is queued is written, and whoever opens the
        // file next finds it closed. A disk that hangs must not keep the
        // daemon from ending.
        let begin = Instant::now();
        if let Some(thread) = self.thread.take() {
            while !thread.is_finished() && begin.elapsed() < PATIENCE {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("path", &self.path).finish_non_exhaustive()
    }
}

impl port::Journal for Journal {
    fn put<'a>(&'a self, request: &'a WorkRequest) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let value = Value { version: VERSION, work_request: request };
            let value = serde_json::to_vec(&value)
                .context(Reason::Internal, || format!("{} cannot be serialised", request.id))?;
            let key = request.id.to_string();
            self.change(
                "journal: request",
                || format!("{} could not be written to", request.id),
                |done| Command::Put { table: WORK_REQUESTS, key, value, done },
            )
            .await
        })
    }

    fn put_trace<'a>(
        &'a self,
        id: &'a WorkRequestId,
        trace: &'a Trace,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let value = serde_json::to_vec(&Traced { version: VERSION, trace })
                .context(Reason::Internal, || format!("the trace of {id} cannot be serialised"))?;
            let key = id.to_string();
            self.change(
                "journal: trace",
                || format!("the trace of {id} could not be written to"),
                |done| Command::Put { table: TRACES, key, value, done },
            )
            .await
        })
    }

    fn trace<'a>(&'a self, id: &'a WorkRequestId) -> BoxFuture<'a, Result<Option<Trace>>> {
        Box::pin(async move {
            let key = id.to_string();
            let doing = || format!("the trace of {id} could not be read from");
            let value = self.ask(doing, |done| Command::Get { table: TRACES, key, done }).await?;
            let Some(value) = value else { return Ok(None) };
            let key = format!("the trace of {id}");
            let Traced { trace, .. } = decode(&key, &value, &self.path)?;
            Ok(Some(trace))
        })
    }

    fn put_part<'a>(&'a self, id: &'a WorkRequestId, part: KeptPart) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let KeptPart { number, stored, receipt, standing, digests, body } = part;
            let parted = Parted { version: VERSION, number, stored, receipt, digests };
            let value = serde_json::to_vec(&parted).context(Reason::Internal, || {
                format!("part {number} of {id} cannot be serialised")
            })?;
            // With its number, because others had its turn before.
            let standing = [&number.to_le_bytes()[..], &standing].concat();
            let mut entries = vec![
                (PARTS, key_of(id.as_str(), number), value),
                (BLOBS, format!("{id}/standing-{}", number % STANDINGS), standing),
            ];
            if !body.is_empty() {
                entries.push((BLOBS, format!("{id}/body"), body));
            }
            self.change(
                "journal: part",
                || format!("part {number} of {id} could not be written to"),
                |done| Command::PutAll { entries, done },
            )
            .await
        })
    }

    fn parts<'a>(&'a self, id: &'a WorkRequestId) -> BoxFuture<'a, Result<Vec<KeptPart>>> {
        Box::pin(async move {
            let range = async |table| {
                let doing = || format!("the parts of {id} could not be read from");
                self.ask(doing, |done| Command::Range { table, id: id.to_string(), done }).await
            };
            let mut blobs: BTreeMap<String, Vec<u8>> = range(BLOBS).await?.into_iter().collect();
            let mut blob = |kind: String| blobs.remove(&format!("{id}/{kind}")).unwrap_or_default();
            let mut standings = BTreeMap::new();
            for turn in 0..STANDINGS {
                if let Some((number, standing)) =
                    blob(format!("standing-{turn}")).split_at_checked(4)
                {
                    let number: [u8; 4] = number.try_into().unwrap_or_default();
                    standings.insert(u32::from_le_bytes(number), standing.to_vec());
                }
            }
            let mut body = blob("body".to_owned());
            let mut parts = Vec::new();
            for (key, value) in range(PARTS).await? {
                let Parted { number, stored, receipt, digests, .. } =
                    decode(&key, &value, &self.path)?;
                let standing = standings.remove(&number).unwrap_or_default();
                let body = if receipt.is_none() { std::mem::take(&mut body) } else { Vec::new() };
                parts.push(KeptPart { number, stored, receipt, standing, digests, body });
            }
            Ok(parts)
        })
    }

    fn forget_parts<'a>(&'a self, id: &'a WorkRequestId) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let doing = || format!("the parts of {id} could not be removed from");
            let id = id.to_string();
            self.change("journal: parts forgotten", doing, |done| Command::ForgetParts { id, done })
                .await
        })
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<WorkRequest>>> {
        Box::pin(async move {
            let doing = || "nothing could be read from".to_owned();
            let values = self.ask(doing, |done| Command::Load { done }).await?;
            let mut requests = values
                .iter()
                .map(|(key, value)| {
                    let Value::<WorkRequest> { work_request, .. } = decode(key, value, &self.path)?;
                    Ok(work_request)
                })
                .collect::<Result<Vec<_>>>()?;
            requests.sort_by(|a, b| (a.time_accepted, &a.id).cmp(&(b.time_accepted, &b.id)));
            Ok(requests)
        })
    }

    fn forget<'a>(&'a self, ids: &'a [WorkRequestId]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let keys = ids.iter().map(ToString::to_string).collect();
            let doing = || format!("{} work requests could not be removed from", ids.len());
            self.change("journal: requests forgotten", doing, |done| Command::Forget { keys, done })
                .await
        })
    }
}

fn decode<T: DeserializeOwned>(key: &str, value: &[u8], path: &Path) -> Result<T> {
    let unreadable = || format!("{key} in the journal {} cannot be read", path.display());
    let header: Header =
        serde_json::from_slice(value).context(Reason::JournalFailed, unreadable)?;
    if header.version > VERSION {
        let found = header.version;
        return Err(Error::new(Reason::JournalFailed, unreadable())
            .because(format!("it has version {found}, and this imaged reads up to {VERSION}"))
            .advice("start the newer imaged that wrote it; nothing was changed"));
    }
    serde_json::from_slice(value).context(Reason::JournalFailed, unreadable)
}

/// The database, on its thread.
struct Store {
    path: PathBuf,
    /// Closed after an error: redb refuses all writing after one failed
    /// write, and a disk that was full has room again some day.
    database: Option<Database>,
}

impl Store {
    fn open(path: PathBuf) -> Result<Self, Failed> {
        // Only the daemon's user: what an undo needs may be secret.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        let database = Some(open_database(file)?);
        Ok(Self { path, database })
    }

    fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            // A caller that has gone does not want to know.
            match command {
                Command::Put { table, key, value, done } => {
                    let _ = done.send(self.with(|database| put(database, table, &key, &value)));
                }
                Command::Get { table, key, done } => {
                    let _ = done.send(self.with(|database| get(database, table, &key)));
                }
                Command::Load { done } => drop(done.send(self.with(load))),
                Command::Forget { keys, done } => {
                    let _ = done.send(self.with(|database| forget(database, &keys)));
                }
                Command::PutAll { entries, done } => {
                    let _ = done.send(self.with(|database| put_all(database, &entries)));
                }
                Command::Range { table, id, done } => {
                    let _ = done.send(self.with(|database| range(database, table, &id)));
                }
                Command::ForgetParts { id, done } => {
                    let _ = done.send(self.with(|database| forget_parts(database, &id)));
                }
            }
        }
    }

    fn with<T>(&mut self, act: impl FnOnce(&Database) -> Result<T, Failed>) -> Result<T, Failed> {
        let database = match self.database.take() {
            Some(database) => database,
            // Never a new file: an empty journal would pass for "nothing to
            // undo".
            None => open_database(OpenOptions::new().read(true).write(true).open(&self.path)?)?,
        };
        let outcome = act(&database);
        if outcome.is_ok() {
            self.database = Some(database);
        }
        outcome
    }
}

/// Whether the file's content is at fault, not its permissions or a peer.
fn is_damage(cause: &(dyn StdError + Send + Sync + 'static)) -> bool {
    match cause.downcast_ref::<DatabaseError>() {
        Some(DatabaseError::Storage(StorageError::Io(cause))) => {
            matches!(cause.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
        }
        Some(DatabaseError::Storage(StorageError::Corrupted(_))) => true,
        Some(_) => false,
        // An error of the file system, or our own word for a panic.
        None => !cause.is::<io::Error>(),
    }
}

fn open_database(file: File) -> Result<Database, Failed> {
    let database = Builder::new().set_cache_size(CACHE_BYTES).create_file(file)?;
    let transaction = database.begin_write()?;
    transaction.open_table(WORK_REQUESTS)?;
    transaction.open_table(TRACES)?;
    transaction.open_table(PARTS)?;
    transaction.open_table(BLOBS)?;
    transaction.commit()?;
    Ok(database)
}

// Commits are durable unless redb is told otherwise.

fn put(database: &Database, table: Table, key: &str, value: &[u8]) -> Result<(), Failed> {
    let transaction = database.begin_write()?;
    transaction.open_table(table)?.insert(key, value)?;
    Ok(transaction.commit()?)
}

fn get(database: &Database, table: Table, key: &str) -> Result<Option<Vec<u8>>, Failed> {
    let table = database.begin_read()?.open_table(table)?;
    Ok(table.get(key)?.map(|value| value.value().to_vec()))
}

fn load(database: &Database) -> Result<Vec<Entry>, Failed> {
    let table = database.begin_read()?.open_table(WORK_REQUESTS)?;
    let mut all = Vec::new();
    for entry in table.iter()? {
        let (key, value) = entry?;
        all.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(all)
}

fn put_all(database: &Database, entries: &[(Table, String, Vec<u8>)]) -> Result<(), Failed> {
    let transaction = database.begin_write()?;
    for (table, key, value) in entries {
        transaction.open_table(*table)?.insert(key.as_str(), value.as_slice())?;
    }
    Ok(transaction.commit()?)
}

/// All keys of `id`: `/` is followed by `0` in the order of bytes.
fn of(id: &str) -> Range<String> {
    format!("{id}/")..format!("{id}0")
}

fn range(database: &Database, table: Table, id: &str) -> Result<Vec<Entry>, Failed> {
    let table = database.begin_read()?.open_table(table)?;
    let (begin, end) = (of(id).start, of(id).end);
    let mut all = Vec::new();
    for entry in table.range(begin.as_str()..end.as_str())? {
        let (key, value) = entry?;
        all.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(all)
}

fn forget_parts(database: &Database, id: &str) -> Result<(), Failed> {
    let transaction = database.begin_write()?;
    for table in [PARTS, BLOBS] {
        let (begin, end) = (of(id).start, of(id).end);
        transaction.open_table(table)?.retain_in(begin.as_str()..end.as_str(), |_, _| false)?;
    }
    Ok(transaction.commit()?)
}

fn forget(database: &Database, keys: &[String]) -> Result<(), Failed> {
    let transaction = database.begin_write()?;
    for table in [WORK_REQUESTS, TRACES] {
        let mut table = transaction.open_table(table)?;
        for key in keys {
            table.remove(key.as_str())?;
        }
    }
    transaction.commit()?;
    keys.iter().try_for_each(|key| forget_parts(database, key))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{
        model::{
            ByteSize, Timestamp,
            image::ObjectDigest,
            trace::Dropped,
            work_request::{Operation, Phase, Progress, Status},
        },
        port::Journal as _,
    };

    fn request(accepted: u64) -> WorkRequest {
        let time = Timestamp::from_millis(accepted);
        WorkRequest {
            id: WorkRequestId::generate(time, 7),
            operation: Operation::CreateImage,
            status: Status::InProgress,
            compartment_id: "default".parse().unwrap(),
            resources: Vec::new(),
            phase: Phase::Read,
            progress: Progress { total: 10, read: 3, ..Progress::default() },
            time_accepted: time,
            time_started: Some(time),
            time_finished: None,
            errors: Vec::new(),
            logs: Vec::new(),
            requested_by: "uid 0 (root)".into(),
            retry: None,
            undo: None,
            iscsi: None,
            rehearsal: None,
            resume: None,
            outgoing: None,
            rates: Default::default(),
        }
    }

    fn in_dir() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.redb");
        (dir, path)
    }

    /// The report without the temporary directory.
    fn report(error: &Error, dir: &tempfile::TempDir) -> String {
        error.report().replace(dir.path().to_str().unwrap(), "DIR")
    }

    #[tokio::test]
    async fn what_was_put_is_there_after_reopening_oldest_first() {
        let (_dir, path) = in_dir();
        let (old, mut new) = (request(1_000), request(2_000));
        {
            let journal = Journal::open(&path).unwrap();
            journal.put(&new).await.unwrap();
            journal.put(&old).await.unwrap();
            new.status = Status::Succeeded;
            journal.put(&new).await.unwrap();
        }
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.load().await.unwrap(), [old.clone(), new.clone()]);
        let trace =
            Trace { dropped: Dropped { events: 3, ..Dropped::default() }, ..Trace::default() };
        journal.put_trace(&new.id, &trace).await.unwrap();
        assert_eq!(journal.trace(&new.id).await.unwrap(), Some(trace));
        assert_eq!(journal.trace(&old.id).await.unwrap(), None);
        let part = |number: u32| KeptPart {
            number,
            stored: StoredPart { size: ByteSize(7), sha256: ObjectDigest([1; 32]) },
            receipt: (number > 1).then(|| Receipt("etag".into())),
            standing: vec![9; number as usize],
            digests: vec![4],
            body: if number == 1 { vec![5; 100] } else { Vec::new() },
        };
        for number in (1..=20).rev() {
            journal.put_part(&new.id, part(number)).await.unwrap();
            journal.put_part(&old.id, part(number)).await.unwrap();
        }
        // They came backwards, so the first are the newest.
        let kept = journal.parts(&new.id).await.unwrap();
        let standing = |number| if number <= 8 { part(number).standing } else { Vec::new() };
        let wanted = (1..=20).map(|n| KeptPart { standing: standing(n), ..part(n) });
        assert_eq!(kept, wanted.collect::<Vec<_>>());
        journal.forget_parts(&old.id).await.unwrap();
        assert_eq!(journal.parts(&old.id).await.unwrap(), []);
        assert_eq!(journal.parts(&new.id).await.unwrap().len(), 20);
        journal.forget(&[new.id.clone(), request(3_000).id]).await.unwrap();
        assert_eq!(journal.parts(&new.id).await.unwrap(), []);
        assert_eq!(journal.trace(&new.id).await.unwrap(), None);
        assert_eq!(journal.load().await.unwrap(), [old]);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_hangs_is_not_waited_for() {
        // Nobody reads what is asked, as a thread in the middle of an fsync.
        let (commands, _unread) = mpsc::channel(1);
        let path = PathBuf::from("/j");
        let journal = Journal { path, commands: Some(commands), thread: None };
        for _ in 0..2 {
            let before = tokio::time::Instant::now();
            let error = journal.put(&request(0)).await.unwrap_err();
            assert_eq!(before.elapsed(), PATIENCE);
            let report = error.report();
            assert!(report.ends_with("its disk did not answer for 60 seconds"), "{report}");
        }
    }

    #[tokio::test]
    async fn a_newer_value_is_refused_and_kept() {
        let (dir, path) = in_dir();
        let newer = serde_json::json!({"version": 2, "workRequest": {"shape": "unknown"}});
        {
            let store = Store::open(path.clone()).unwrap();
            let database = store.database.as_ref().unwrap();
            put(database, WORK_REQUESTS, "wr-1", newer.to_string().as_bytes()).unwrap();
        }
        let error = {
            let journal = Journal::open(&path).unwrap();
            journal.load().await.unwrap_err()
        };
        insta::assert_snapshot!(report(&error, &dir), @"
        wr-1 in the journal DIR/journal.redb cannot be read
          0: it has version 2, and this imaged reads up to 1
          help: start the newer imaged that wrote it; nothing was changed
        ");
        let store = Store::open(path).unwrap();
        assert_eq!(load(store.database.as_ref().unwrap()).unwrap().len(), 1);
    }

    #[test]
    fn a_damaged_file_says_what_to_do_and_is_left_alone() {
        let (dir, path) = in_dir();
        let garbage = vec![0x5a; 1 << 20];
        std::fs::write(&path, &garbage).unwrap();
        let error = Journal::open(&path).unwrap_err();
        insta::assert_snapshot!(report(&error, &dir), @"
        the journal DIR/journal.redb cannot be opened
          0: I/O error: Not a redb database: magic number mismatch
          help: move the file aside to start with an empty journal, then look for instances that are stopped or frozen: only the journal knew of them
        ");
        assert_eq!(std::fs::read(&path).unwrap(), garbage);
    }

    #[test]
    fn damage_behind_an_intact_head_is_an_error_of_open() {
        let (_dir, path) = in_dir();
        drop(Journal::open(&path).unwrap());
        let length = path.metadata().unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert_eq!((error.reason(), error.advice_text()), (Reason::JournalFailed, Some(DAMAGED)));
        assert_eq!(path.metadata().unwrap().len(), length / 2);
    }

    #[test]
    fn two_daemons_cannot_share_a_journal() {
        let (_dir, path) = in_dir();
        let _first = Journal::open(&path).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert_eq!((error.reason(), error.advice_text()), (Reason::JournalFailed, None));
    }

    #[tokio::test]
    async fn an_error_does_not_last_longer_than_its_cause() {
        let (_dir, path) = in_dir();
        let mut store = Store::open(path).unwrap();
        let failed: Result<(), _> = store.with(|_| Err("the disk is full".into()));
        failed.unwrap_err();
        assert!(store.database.is_none());
        store.with(|database| put(database, WORK_REQUESTS, "a", b"b")).unwrap();
        assert_eq!(store.with(load).unwrap().len(), 1);
    }
}
