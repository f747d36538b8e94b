//! What producers were answered in a run, by whichever side.

use std::time::{Duration, Instant};

use super::{latency::Latencies, run::Run};

/// What producers were answered.
#[derive(Debug)]
pub(crate) struct Published {
    messages: u64,
    spooled: u64,
    latencies: Latencies,
    /// When the last answer came.
    last: Instant,
    /// Every answer by itself, where that was asked for.
    trace: Option<Vec<Answered>>,
}

/// When a message was due, and when it was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered {
    pub(crate) due: Instant,
    pub(crate) at: Instant,
    pub(crate) spooled: bool,
}

impl Published {
    pub(crate) fn new() -> Self {
        Self {
            messages: 0,
            spooled: 0,
            latencies: Latencies::new(),
            last: Instant::now(),
            trace: None,
        }
    }

    /// Keeps every answer by itself: about 40 bytes each.
    pub(crate) fn traced(mut self, traced: bool) -> Self {
        self.trace = traced.then(Vec::new);
        self
    }

    /// Every answer, as far as they were kept.
    pub(crate) fn into_trace(self) -> Vec<Answered> {
        self.trace.unwrap_or_default()
    }

    /// A message that was due then has been confirmed now.
    pub(crate) fn note(&mut self, due: Instant) {
        self.answer(due, false);
    }

    /// A message that was due then has been spooled now.
    pub(crate) fn note_spooled(&mut self, due: Instant) {
        self.spooled += 1;
        self.answer(due, true);
    }

    fn answer(&mut self, due: Instant, spooled: bool) {
        let at = Instant::now();
        self.messages += 1;
        self.latencies.record(at.saturating_duration_since(due));
        self.last = at;
        if let Some(trace) = &mut self.trace {
            trace.push(Answered { due, at, spooled });
        }
    }

    /// A message has been answered now, so long after it was due.
    pub(crate) fn took(&mut self, latency: Duration) {
        self.messages += 1;
        self.latencies.record(latency);
        self.last = Instant::now();
    }

    pub(crate) fn messages(&self) -> u64 {
        self.messages
    }

    pub(crate) fn spooled_count(&self) -> u64 {
        self.spooled
    }

    /// Adds another producer's.
    pub(crate) fn add(&mut self, other: Self) {
        self.messages += other.messages;
        self.spooled += other.spooled;
        self.latencies.add(&other.latencies);
        self.last = self.last.max(other.last);
        if let Some(theirs) = other.trace {
            self.trace.get_or_insert_default().extend(theirs);
        }
    }

    /// A run of publishing alone.
    pub(crate) fn into_run(self, started: Instant) -> Run {
        let elapsed = self.last.saturating_duration_since(started);
        Run {
            spooled: self.spooled,
            ..Run::new(self.messages, elapsed, self.latencies)
        }
    }
}
