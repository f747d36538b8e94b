//! Latency histograms, exact to three digits from a microsecond to an hour.

use std::{fmt, sync::Mutex, time::Duration};

use hdrhistogram::Histogram as Hdr;
use serde::{Deserialize, Serialize};

/// A histogram of durations. Recording takes a short lock; record a batch at
/// once where messages come in batches.
pub struct Histogram(Mutex<Option<Hdr<u64>>>);

/// What a histogram says, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Values recorded.
    pub count: u64,
    /// Sum of all values.
    pub sum_us: u64,
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// 99.9th percentile.
    pub p999_us: u64,
    /// Largest value.
    pub max_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        // The bounds are constants that hdrhistogram accepts; were they not,
        // latencies would go unrecorded rather than the process down.
        Self(Mutex::new(Hdr::new_with_bounds(1, MAX_US, 3).ok()))
    }
}

impl Histogram {
    /// Records one duration.
    pub fn record(&self, took: Duration) {
        self.record_n(took, 1);
    }

    /// Records the same duration `n` times.
    pub fn record_n(&self, took: Duration, n: u64) {
        let us = u64::try_from(took.as_micros())
            .unwrap_or(MAX_US)
            .clamp(1, MAX_US);
        if let Some(h) = self.lock().as_mut() {
            h.saturating_record(us);
            if n > 1 {
                let _ = h.record_n(us, n - 1);
            }
        }
    }

    /// What was recorded so far.
    #[must_use]
    pub fn summary(&self) -> LatencySummary {
        let guard = self.lock();
        let Some(h) = guard.as_ref() else {
            return LatencySummary::default();
        };
        LatencySummary {
            count: h.len(),
            sum_us: (h.mean() * h.len() as f64) as u64,
            p50_us: h.value_at_quantile(0.5),
            p99_us: h.value_at_quantile(0.99),
            p999_us: h.value_at_quantile(0.999),
            max_us: h.max(),
        }
    }

    /// How many values were at most each bound (microseconds), cumulative; what
    /// a Prometheus histogram needs.
    #[must_use]
    pub fn cumulative(&self, bounds_us: &[u64]) -> Vec<u64> {
        let guard = self.lock();
        bounds_us
            .iter()
            .map(|b| guard.as_ref().map_or(0, |h| h.count_between(0, *b)))
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Hdr<u64>>> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.summary().fmt(f)
    }
}

/// One hour; what takes longer counts as one hour.
const MAX_US: u64 = 3_600_000_000;
