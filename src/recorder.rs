//! The flight recorder: what was said to a virtual machine, and heard.
//!
//! The work makes one for each capture, what speaks to the machine fills it,
//! and the work keeps it.
//!
//! ```text
//! lane      what                              kept
//! commands  what changes something, notes     first and last 512
//! queries   questions, asked again and again  first and last 64
//! events    what a guest can cause at will    first and last 128
//! ```
//! Three lanes, so that neither a poll nor a flood of events pushes out the
//! commands that a reader looks for.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use serde_json::{Value, json};

use crate::model::trace::{Channel, Dropped, Entry, Kind, Trace};

/// An entry's data is cut beyond this: commands have some hundred bytes, and
/// only lists of a host with very many disks are longer.
pub(crate) const MAX_DATA: usize = 4 << 10;

/// Longest text of a note or name.
const MAX_NAME: usize = 256;

/// Bytes of data in either half of a lane: with all lanes full, a trace has
/// less than 1 MiB and fits beside a manifest.
const MAX_HALF: usize = 128 << 10;

/// Records one capture. Cheap: a few microseconds an entry, and no I/O.
pub struct Recorder {
    start: Instant,
    lanes: Mutex<Lanes>,
}

/// Which entries compete for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Commands,
    Queries,
    Events,
}

#[derive(Debug)]
struct Lanes {
    next: u64,
    commands: Track,
    queries: Track,
    events: Track,
}

/// The first and the last entries of a lane.
#[derive(Debug)]
struct Track {
    /// Entries in either half.
    capacity: usize,
    head: Vec<Numbered>,
    head_bytes: usize,
    tail: VecDeque<Numbered>,
    tail_bytes: usize,
    dropped: u64,
}

#[derive(Debug)]
struct Numbered {
    number: u64,
    bytes: usize,
    entry: Entry,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recorder({} entries)", self.lanes().next)
    }
}

impl Recorder {
    /// Begins a recording: offsets count from now.
    #[must_use]
    pub fn new() -> Self {
        let lanes = Lanes {
            next: 0,
            commands: Track::new(512),
            queries: Track::new(64),
            events: Track::new(128),
        };
        Self { start: Instant::now(), lanes: Mutex::new(lanes) }
    }

    /// Adds a remark: a step of the capture that is no command.
    pub fn note(&self, text: impl Into<String>) {
        self.record(Lane::Commands, Channel::Imaged, Kind::Note, text, None, None);
    }

    /// Adds an entry. Secrets must have been removed from `data`.
    pub(crate) fn record(
        &self,
        lane: Lane,
        channel: Channel,
        kind: Kind,
        name: impl Into<String>,
        id: Option<u64>,
        data: Option<Value>,
    ) {
        let mut name = name.into();
        name.truncate(name.floor_char_boundary(MAX_NAME));
        let mut bytes = data.as_ref().map_or(0, |data| data.to_string().len());
        let mut data = data;
        if bytes > MAX_DATA {
            data = Some(json!({ "omittedBytes": bytes }));
            bytes = 0;
        }
        // The clock is read under the lock: entries are in the order of time.
        let mut lanes = self.lanes();
        let at_micros = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let number = lanes.next;
        lanes.next += 1;
        let entry = Entry { at_micros, channel, kind, name, id, data };
        let track = match lane {
            Lane::Commands => &mut lanes.commands,
            Lane::Queries => &mut lanes.queries,
            Lane::Events => &mut lanes.events,
        };
        track.push(Numbered { number, bytes, entry });
    }

    /// The recording so far, in order.
    #[must_use]
    pub fn trace(&self) -> Trace {
        let lanes = self.lanes();
        let tracks = [&lanes.commands, &lanes.queries, &lanes.events];
        let mut entries: Vec<_> = tracks.iter().flat_map(|track| track.iter()).collect();
        entries.sort_unstable_by_key(|numbered| numbered.number);
        let [commands, queries, events] = tracks.map(|track| track.dropped);
        Trace {
            entries: entries.into_iter().map(|numbered| numbered.entry.clone()).collect(),
            dropped: Dropped { commands, queries, events },
        }
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        // A panic elsewhere leaves no half-made entry.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Track {
    const fn new(capacity: usize) -> Self {
        Self {
            capacity,
            head: Vec::new(),
            head_bytes: 0,
            tail: VecDeque::new(),
            tail_bytes: 0,
            dropped: 0,
        }
    }

    fn push(&mut self, numbered: Numbered) {
        // Once the tail is begun, the head is closed: no gap lies before it.
        let room = self.head.len() < self.capacity && self.head_bytes < MAX_HALF;
        if room && self.tail.is_empty() {
            self.head_bytes += numbered.bytes;
            self.head.push(numbered);
            return;
        }
        self.tail_bytes += numbered.bytes;
        self.tail.push_back(numbered);
        while self.tail.len() > self.capacity || self.tail_bytes > MAX_HALF {
            let Some(oldest) = self.tail.pop_front() else { break };
            self.tail_bytes -= oldest.bytes;
            self.dropped += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Numbered> {
        self.head.iter().chain(&self.tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(trace: &Trace) -> Vec<&str> {
        trace.entries.iter().map(|entry| entry.name.as_str()).collect()
    }

    #[test]
    fn a_flood_of_events_costs_no_command() {
        let recorder = Recorder::new();
        recorder.note("before");
        for number in 0..1000 {
            let data = Some(json!({ "number": number }));
            recorder.record(Lane::Events, Channel::Qmp, Kind::Event, "RESET", None, data);
        }
        recorder.note("after");
        let trace = recorder.trace();
        assert_eq!(trace.entries.len(), 2 + 256);
        assert_eq!(trace.dropped, Dropped { commands: 0, queries: 0, events: 1000 - 256 });
        assert_eq!((names(&trace)[0], *names(&trace).last().unwrap()), ("before", "after"));
        let numbers: Vec<_> =
            trace.entries.iter().filter_map(|e| e.data.as_ref()?["number"].as_u64()).collect();
        let expected: Vec<_> = (0..128).chain(872..1000).collect();
        assert_eq!(numbers, expected, "the first and the last are kept");
        assert!(trace.entries.is_sorted_by_key(|entry| entry.at_micros));
    }

    #[test]
    fn bytes_are_bounded() {
        let recorder = Recorder::new();
        for size in [2 * MAX_DATA, MAX_DATA / 2] {
            for _ in 0..2000 {
                let data = Some(Value::String("x".repeat(size)));
                recorder.record(Lane::Commands, Channel::Agent, Kind::Answer, "n", None, data);
            }
        }
        let trace = recorder.trace();
        let bytes = serde_json::to_string(&trace).unwrap().len();
        assert!(bytes < 400 << 10, "{bytes}");
        assert_eq!(trace.dropped.commands + trace.entries.len() as u64, 4000);
        let first = &trace.entries[0];
        assert_eq!(first.data, Some(json!({ "omittedBytes": 2 * MAX_DATA + 2 })));
    }

    #[test]
    fn a_trace_reads_back() {
        let recorder = Recorder::new();
        recorder.record(Lane::Queries, Channel::Qmp, Kind::Command, "query-jobs", Some(7), None);
        let mut trace = recorder.trace();
        trace.entries[0].at_micros = 42;
        let text = serde_json::to_string(&trace).unwrap();
        insta::assert_snapshot!(text, @r#"{"entries":[{"atMicros":42,"channel":"qmp","kind":"command","name":"query-jobs","id":7}],"dropped":{"commands":0,"queries":0,"events":0}}"#);
        assert_eq!(serde_json::from_str::<Trace>(&text).unwrap(), trace);
    }
}
