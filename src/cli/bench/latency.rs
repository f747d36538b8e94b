//! How long things took, and when they were due. A time that is counted from
//! when a message was due, and not from when it could be sent, shows a stall to
//! everything that the stall held up.

use std::{
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

/// Durations of one run, to three digits.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Option<Histogram<u64>>);

impl Latencies {
    pub(crate) fn new() -> Self {
        // Bounds that the library takes; without a histogram nothing is said.
        Self(Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).ok())
    }

    pub(crate) fn record(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(LONGEST_NS);
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(ns.max(1));
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        if let (Some(mine), Some(other)) = (&mut self.0, &other.0) {
            // Both have the same bounds, so nothing is left out.
            let _ = mine.add(other);
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(Histogram::is_empty)
    }

    /// The latency that this share of the messages kept, in microseconds.
    #[allow(clippy::cast_precision_loss, reason = "three digits are kept anyway")]
    pub(crate) fn quantile_us(&self, share: f64) -> Option<f64> {
        let histogram = self.0.as_ref().filter(|h| !h.is_empty())?;
        Some(histogram.value_at_quantile(share) as f64 / 1000.0)
    }
}

/// Counts what consumers got, with how long it took since it was due. Handlers
/// run on several threads; each takes one of a few histograms.
#[derive(Debug)]
pub(crate) struct Tally {
    count: AtomicU64,
    /// When the last one came, in nanoseconds of [`now_ns`].
    last: AtomicU64,
    first: AtomicU64,
    shards: Vec<Mutex<Latencies>>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            count: AtomicU64::new(0),
            last: AtomicU64::new(0),
            first: AtomicU64::new(u64::MAX),
            shards: (0..SHARDS).map(|_| Mutex::new(Latencies::new())).collect(),
        }
    }

    /// A message with a stamp came.
    pub(crate) fn take(&self, payload: &[u8]) {
        let now = now_ns();
        let count = self.arrived(now);
        let Some(stamp) = Stamp::read(payload) else {
            return;
        };
        let shard = usize::try_from(count).unwrap_or(0) % SHARDS;
        if let Some(shard) = self.shards.get(shard) {
            let latency = Duration::from_nanos(now.saturating_sub(stamp.due_ns));
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.record(latency);
        }
    }

    /// A message came whose latency says nothing.
    pub(crate) fn count_one(&self) {
        self.arrived(now_ns());
    }

    fn arrived(&self, now: u64) -> u64 {
        self.last.fetch_max(now, Relaxed);
        let count = self.count.fetch_add(1, Release);
        if count == 0 {
            self.first.store(now, Relaxed);
        }
        count
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(std::sync::atomic::Ordering::Acquire)
    }

    /// From the first to the last that came.
    pub(crate) fn span(&self) -> Duration {
        let (first, last) = (self.first.load(Relaxed), self.last.load(Relaxed));
        Duration::from_nanos(last.saturating_sub(first))
    }

    /// From `since` to the last that came.
    pub(crate) fn until_last(&self, since: Instant) -> Duration {
        Duration::from_nanos(self.last.load(Relaxed).saturating_sub(ns_of(since)))
    }

    pub(crate) fn latencies(&self) -> Latencies {
        let mut all = Latencies::new();
        for shard in &self.shards {
            all.add(&shard.lock().unwrap_or_else(PoisonError::into_inner));
        }
        all
    }
}

/// What stands at the beginning of a payload whose way is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// When it was due, in nanoseconds of [`now_ns`].
    pub(crate) due_ns: u64,
    /// Its number among all messages of its run.
    pub(crate) number: u64,
}

impl Stamp {
    /// Bytes of a stamp.
    pub(crate) const SIZE: usize = 16;

    pub(crate) fn write(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let (due, number) = out.split_at_mut(8);
        due.copy_from_slice(&self.due_ns.to_le_bytes());
        number.copy_from_slice(&self.number.to_le_bytes());
        out
    }

    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let (due, rest) = payload.split_first_chunk::<8>()?;
        let (number, _) = rest.split_first_chunk::<8>()?;
        Some(Self {
            due_ns: u64::from_le_bytes(*due),
            number: u64::from_le_bytes(*number),
        })
    }
}

/// Nanoseconds since this process first asked.
pub(crate) fn now_ns() -> u64 {
    ns_of(Instant::now())
}

/// An instant in nanoseconds of [`now_ns`].
pub(crate) fn ns_of(at: Instant) -> u64 {
    static BASE: OnceLock<Instant> = OnceLock::new();
    let base = BASE.get_or_init(Instant::now);
    u64::try_from(at.saturating_duration_since(*base).as_nanos()).unwrap_or(u64::MAX)
}

/// Ten minutes; what took longer counts as that.
const LONGEST_NS: u64 = 600_000_000_000;
const DIGITS: u8 = 3;
/// Enough that two threads seldom want the same one.
const SHARDS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_comes_back_from_a_payload_and_not_from_a_short_one() {
        let stamp = Stamp {
            due_ns: 7,
            number: u64::MAX,
        };
        let mut payload = stamp.write().to_vec();
        payload.extend_from_slice(b"rest");
        assert_eq!(Stamp::read(&payload), Some(stamp));
        assert_eq!(Stamp::read(&payload[..15]), None);
    }

    #[test]
    fn quantiles_are_in_microseconds_and_absent_without_a_message() {
        let mut latencies = Latencies::new();
        assert_eq!(latencies.quantile_us(0.5), None);
        for ms in 1..=100 {
            latencies.record(Duration::from_millis(ms));
        }
        let p50 = latencies.quantile_us(0.5).unwrap();
        assert!((49_900.0..=50_200.0).contains(&p50), "{p50}");
        let p999 = latencies.quantile_us(0.999).unwrap();
        assert!((99_800.0..=100_200.0).contains(&p999), "{p999}");
    }

    #[test]
    fn a_tally_counts_and_times_what_has_a_stamp() {
        let tally = Tally::new();
        let stamp = Stamp {
            due_ns: now_ns(),
            number: 1,
        };
        tally.take(&stamp.write());
        tally.count_one();
        assert_eq!(tally.count(), 2);
        assert!(!tally.latencies().is_empty());
    }
}
