//! The state machine of one replay. Pure: time is what passed since it began.
//!
//! ```text
//!   next(now) -> Open(n)  -> the shell reads the n-th stretch
//!             -> Read     -> message(received), or ended() when there is no more
//!             -> Publish  -> settled(now, outcomes), later
//!             -> Settle   -> an outcome must come first
//!             -> Pause    -> until a time
//!             -> End
//! ```
//!
//! In order one batch is under way at a time: the next is written when each of
//! the last is known to be published. Otherwise up to [`BATCHES`] are.

use std::{collections::BTreeMap, time::Duration};

use super::{
    copy::{self, Copied},
    plan::Stretch,
    progress::{ReplayPlace, ReplayProgress, ReplayStatus},
    request::Wanted,
    runner::Outcome,
    seen::{MAX_SEEN, Seen},
};
use crate::{broker::Received, error::Error, message::Timestamp};

/// A replay under way.
pub(crate) struct Job {
    pub(super) wanted: Wanted,
    progress: ReplayProgress,
    began: Timestamp,
    stretches: Vec<Stretch>,
    /// Which is to be read next.
    next: usize,
    /// Of the stretch that is being read: where each partition stands.
    reading: Option<BTreeMap<i32, i64>>,
    batch: Vec<Copied>,
    under_way: usize,
    /// No batch before this.
    not_before: Duration,
    seen: Option<Seen>,
    /// Why it ends early.
    ending: Option<ReplayStatus>,
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Action {
    /// Read this stretch.
    Open(usize),
    /// Take a message from the stretch that is open.
    Read,
    /// Publish these, in order.
    Publish(Vec<Copied>),
    /// Wait for the outcome of a batch.
    Settle,
    /// Wait until this time.
    Pause(Duration),
    /// It is over.
    End,
}

impl Job {
    pub(crate) fn new(wanted: Wanted, began: Timestamp) -> Self {
        let seen = wanted.options.skip_duplicates.then(|| Seen::new(MAX_SEEN));
        Self {
            progress: ReplayProgress {
                started_at: Some(began),
                ..ReplayProgress::default()
            },
            wanted,
            began,
            stretches: Vec::new(),
            next: 0,
            reading: None,
            batch: Vec::new(),
            under_way: 0,
            not_before: Duration::ZERO,
            seen,
            ending: None,
        }
    }

    /// What there is to be read.
    pub(super) fn planned(&mut self, stretches: Vec<Stretch>) {
        self.progress.total = stretches.iter().map(|s| s.expected).sum();
        self.progress.offsets_total = stretches.iter().map(Stretch::offsets).sum();
        self.stretches = stretches;
        if self.ending.is_none() {
            self.progress.status = ReplayStatus::Running;
        }
    }

    /// A stretch, by its number.
    pub(super) fn stretch(&self, n: usize) -> Option<&Stretch> {
        self.stretches.get(n)
    }

    /// What to do now.
    pub(super) fn next(&mut self, now: Duration) -> Action {
        if self.progress.status.is_over() {
            return Action::End;
        }
        if let Some(status) = self.ending {
            // What was read and not published stays unpublished; what is under
            // way is counted.
            self.batch.clear();
            return self.end(now, status);
        }
        let full = self.batch.len() >= self.wanted.options.batch_size;
        if full || (self.reading.is_none() && !self.batch.is_empty()) {
            if self.under_way >= self.most_under_way() {
                return Action::Settle;
            }
            if now < self.not_before {
                return Action::Pause(self.not_before);
            }
            self.under_way += 1;
            return Action::Publish(std::mem::take(&mut self.batch));
        }
        if self.reading.is_some() {
            return Action::Read;
        }
        while let Some(stretch) = self.stretches.get(self.next) {
            self.next += 1;
            if !stretch.partitions.is_empty() {
                let starts = stretch
                    .partitions
                    .iter()
                    .map(|(p, (first, _))| (*p, *first));
                self.reading = Some(starts.collect());
                return Action::Open(self.next - 1);
            }
        }
        self.end(now, ReplayStatus::Completed)
    }

    /// A message of the open stretch was read.
    pub(super) fn message(&mut self, received: &Received) {
        let (partition, offset) = (
            received.partition.unwrap_or_default(),
            received.offset.unwrap_or_default(),
        );
        let at = self.reading.as_ref().and_then(|r| r.get(&partition));
        if at.is_none_or(|at| offset < *at) {
            // Read before: a source that had to begin again may go back a little.
            return;
        }
        self.pass(partition, offset + 1);
        self.progress.current = Some(ReplayPlace {
            topic: received.topic.clone(),
            partition,
            offset,
        });
        let time = received.timestamp;
        if self.wanted.from.is_some_and(|from| time < from)
            || self.wanted.to.is_some_and(|to| time >= to)
        {
            return;
        }
        if !self.wanted.filter.passes(received) {
            self.progress.skipped += 1;
            return self.count();
        }
        if let Some(seen) = &mut self.seen
            && !seen.insert(&copy::first_identity(received))
        {
            self.progress.skipped += 1;
            return self.count();
        }
        if self.wanted.options.dry_run {
            self.progress.replayed += 1;
            self.progress.last_id = Some(copy::first_id(received).to_owned());
            return self.count();
        }
        let target = self.wanted.target.clone();
        let target = target.unwrap_or_else(|| received.topic.clone());
        let source = self.source(partition);
        let copy = copy::copy(received, &self.wanted.id, target, source);
        self.batch.push(copy);
    }

    /// Whether a message at the end of each partition was read, so that nothing
    /// can be missing.
    pub(super) fn has_read_all(&self) -> bool {
        let at = self.reading.as_ref();
        self.ends()
            .iter()
            .all(|(p, end)| at.and_then(|r| r.get(p)).is_some_and(|at| at >= end))
    }

    /// The open stretch was read to its end.
    pub(super) fn ended(&mut self) {
        // What does not exist has been passed too.
        for (partition, end) in self.ends() {
            self.pass(partition, end);
        }
        self.reading = None;
    }

    /// A batch has its outcomes, one for each message, in order.
    pub(super) fn settled(&mut self, now: Duration, outcomes: Vec<Outcome>) {
        self.under_way = self.under_way.saturating_sub(1);
        self.not_before = now + self.wanted.options.delay_between;
        for outcome in outcomes {
            match outcome {
                Outcome::Published(id) => {
                    self.progress.replayed += 1;
                    self.progress.last_id = Some(id);
                }
                Outcome::Failed(error) => {
                    self.progress.failed += 1;
                    self.note(&error);
                    if self.wanted.options.preserve_order {
                        self.ending.get_or_insert(ReplayStatus::Failed);
                    }
                }
                Outcome::NotTried => {}
            }
            self.count();
        }
    }

    /// It is to end, because of an error.
    pub(super) fn fail(&mut self, error: &Error) {
        self.note(error);
        self.ending.get_or_insert(ReplayStatus::Failed);
    }

    /// It is to end, because somebody wants it so.
    pub(super) fn cancel(&mut self) {
        self.ending.get_or_insert(ReplayStatus::Cancelled);
    }

    /// How far it is.
    pub(super) fn progress(&self, now: Duration) -> ReplayProgress {
        let mut progress = self.progress.clone();
        let passed = match progress.ended_at {
            Some(at) => at.since(self.began),
            None => now,
        };
        // Of less than a moment no rate can be said.
        let seconds = passed.as_secs_f64().max(0.001);
        progress.rate = progress.replayed as f64 / seconds;
        progress
    }

    fn end(&mut self, now: Duration, status: ReplayStatus) -> Action {
        if self.under_way > 0 {
            return Action::Settle;
        }
        self.progress.status = status;
        self.progress.ended_at = Some(self.began + now);
        if status == ReplayStatus::Completed {
            self.progress.total = self.handled();
        }
        Action::End
    }

    fn most_under_way(&self) -> usize {
        let options = &self.wanted.options;
        if options.preserve_order || !options.delay_between.is_zero() {
            1
        } else {
            BATCHES
        }
    }

    /// Whose order a message keeps.
    fn source(&self, partition: i32) -> u64 {
        let partition = u64::from(partition.unsigned_abs());
        (self.next as u64) << 32 | partition
    }

    /// The ends of the stretch that is open.
    fn ends(&self) -> Vec<(i32, i64)> {
        let open = self.next.checked_sub(1).and_then(|n| self.stretches.get(n));
        let ends = open.into_iter().flat_map(|s| &s.partitions);
        ends.map(|(p, (_, end))| (*p, *end)).collect()
    }

    fn pass(&mut self, partition: i32, to: i64) {
        if let Some(at) = self.reading.as_mut().and_then(|r| r.get_mut(&partition))
            && *at < to
        {
            self.progress.offsets_read += to.abs_diff(*at);
            *at = to;
        }
    }

    fn handled(&self) -> u64 {
        let p = &self.progress;
        p.replayed + p.skipped + p.failed
    }

    /// More than was expected: messages of the range lay behind its end.
    fn count(&mut self) {
        self.progress.total = self.progress.total.max(self.handled());
    }

    fn note(&mut self, error: &Error) {
        self.progress.error.get_or_insert_with(|| error.to_string());
    }
}

/// Batches under way at once, where no order is asked for.
pub(super) const BATCHES: usize = 4;
