//! The test's own record: every attempt to publish with what it was told, and
//! every delivery. Nothing in it comes from the hub's counters.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use messaging_hub::conformance::ledger::{self, Outcome};

/// Keys that order is kept by, each of one publisher.
pub const KEYS: u64 = 24;

/// One line that was sent for a message.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub publisher: usize,
    pub n: u64,
    /// 0, and higher for repeats of the same id.
    pub again: u32,
    pub written: Instant,
    pub answered: Option<Instant>,
    /// `Unknown` until it is answered, and if it never is.
    pub outcome: Outcome,
    /// What a failed one was told.
    pub problem: Option<String>,
}

/// One delivery to one of the two readers.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub id: String,
    pub key: Option<String>,
    pub payload_hash: u64,
    pub marked: bool,
    /// The broker itself said that it had delivered it before: whatever came
    /// of that, this is no first delivery.
    pub again: bool,
    pub settled: bool,
    /// Which life of the hub's process handed it out; 0 at the broker.
    pub life: u32,
}

#[derive(Debug, Default)]
pub struct Book {
    pub topic: String,
    publishes: Mutex<Vec<Attempt>>,
    foreign: Mutex<Vec<Arrival>>,
    through: Mutex<Vec<Arrival>>,
}

/// Which reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// At the broker, with a client that is not ours.
    Foreign,
    /// Through the hub, over HTTP.
    Through,
}

impl Book {
    pub fn new(topic: &str) -> Self {
        Self {
            topic: topic.to_owned(),
            ..Self::default()
        }
    }

    /// Notes that a line goes out now; the number is its place.
    pub fn writes(&self, publisher: usize, n: u64, again: u32) -> usize {
        let mut all = self.publishes.lock().unwrap();
        all.push(Attempt {
            publisher,
            n,
            again,
            written: Instant::now(),
            answered: None,
            outcome: Outcome::Unknown,
            problem: None,
        });
        all.len() - 1
    }

    pub fn answered(&self, place: usize, at: Instant, outcome: Outcome, problem: Option<String>) {
        let mut all = self.publishes.lock().unwrap();
        let attempt = &mut all[place];
        attempt.answered = Some(at);
        attempt.outcome = outcome;
        attempt.problem = problem;
    }

    pub fn attempt(&self, place: usize) -> Attempt {
        self.publishes.lock().unwrap()[place].clone()
    }

    pub fn attempts(&self) -> Vec<Attempt> {
        self.publishes.lock().unwrap().clone()
    }

    /// How many lines with this outcome were written since.
    pub fn count_since(&self, since: Instant, wanted: impl Fn(Outcome) -> bool) -> usize {
        let all = self.publishes.lock().unwrap();
        all.iter()
            .rev()
            .take_while(|a| a.written >= since)
            .filter(|a| a.answered.is_some() && wanted(a.outcome))
            .count()
    }

    fn reader(&self, reader: Reader) -> &Mutex<Vec<Arrival>> {
        match reader {
            Reader::Foreign => &self.foreign,
            Reader::Through => &self.through,
        }
    }

    /// Notes a delivery; the number is its place.
    pub fn arrives(&self, reader: Reader, arrival: Arrival) -> usize {
        let mut all = self.reader(reader).lock().unwrap();
        all.push(arrival);
        all.len() - 1
    }

    pub fn settled(&self, reader: Reader, places: impl IntoIterator<Item = usize>) {
        let mut all = self.reader(reader).lock().unwrap();
        for place in places {
            all[place].settled = true;
        }
    }

    pub fn arrivals(&self, reader: Reader) -> Vec<Arrival> {
        self.reader(reader).lock().unwrap().clone()
    }

    pub fn arrived(&self, reader: Reader) -> usize {
        self.reader(reader).lock().unwrap().len()
    }

    pub fn id(&self, publisher: usize, n: u64) -> String {
        format!("{}-{publisher}-{n}", self.topic)
    }

    /// Messages that had been written by then and for which nobody had said
    /// `delivered`: those that the loss of a connection may repeat.
    pub fn not_delivered_by(&self, moment: Instant) -> u64 {
        let all = self.publishes.lock().unwrap();
        let mut open: HashMap<(usize, u64), bool> = HashMap::new();
        for attempt in all.iter().filter(|a| a.written <= moment) {
            let delivered = attempt.outcome == Outcome::Delivered
                && attempt.answered.is_some_and(|at| at <= moment);
            let open = open.entry((attempt.publisher, attempt.n)).or_insert(true);
            *open &= !delivered && !attempt.outcome.is_refused();
        }
        open.values().filter(|open| **open).count() as u64
    }

    /// Messages that nobody had answered by then.
    pub fn unanswered_by(&self, moment: Instant) -> u64 {
        let all = self.publishes.lock().unwrap();
        let mut open: HashMap<(usize, u64), bool> = HashMap::new();
        for attempt in all.iter().filter(|a| a.written <= moment) {
            let answered = attempt.answered.is_some_and(|at| at <= moment);
            *open.entry((attempt.publisher, attempt.n)).or_insert(true) &= !answered;
        }
        open.values().filter(|open| **open).count() as u64
    }

    /// The publishes as the ledger wants them.
    pub fn published(&self) -> Vec<ledger::Published> {
        let all = self.publishes.lock().unwrap();
        all.iter()
            .map(|a| ledger::Published {
                publisher: a.publisher.to_string(),
                topic: self.topic.clone(),
                key: Some(key(a.publisher, a.n)),
                seq: a.n,
                id: self.id(a.publisher, a.n),
                payload_hash: hash(&payload(a.publisher, a.n)),
                outcome: a.outcome,
            })
            .collect()
    }
}

impl Attempt {
    /// How long it took, if it was answered.
    pub fn took(&self) -> Option<Duration> {
        Some(self.answered?.duration_since(self.written))
    }
}

pub fn key(publisher: usize, n: u64) -> String {
    format!("key-{publisher}-{}", n % KEYS)
}

/// Says which message it is, in different lengths.
pub fn payload(publisher: usize, n: u64) -> Vec<u8> {
    format!(
        "message {n} of publisher {publisher} {}",
        "x".repeat((n % 100) as usize)
    )
    .into_bytes()
}

pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}
