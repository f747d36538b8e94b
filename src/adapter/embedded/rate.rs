//! Events per second over the last few whole seconds.

use crate::message::Timestamp;

/// Seconds that a rate looks back.
const WINDOW: usize = 5;

/// A sliding count.
#[derive(Clone, Debug, Default)]
pub(super) struct Rate {
    /// One bucket a second: the running one and [`WINDOW`] whole ones.
    buckets: [u64; WINDOW + 1],
    second: i64,
}

impl Rate {
    pub(super) fn add(&mut self, now: Timestamp, n: u64) {
        self.advance(now);
        let index = self.index(0);
        if let Some(bucket) = self.buckets.get_mut(index) {
            *bucket += n;
        }
    }

    /// Events per second.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn per_second(&mut self, now: Timestamp) -> f64 {
        self.advance(now);
        let running = self.index(0);
        let sum: u64 = self
            .buckets
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != running)
            .map(|(_, n)| *n)
            .sum();
        sum as f64 / WINDOW as f64
    }

    fn index(&self, back: i64) -> usize {
        usize::try_from((self.second - back).rem_euclid(WINDOW as i64 + 1)).unwrap_or(0)
    }

    fn advance(&mut self, now: Timestamp) {
        let second = now.as_millis().div_euclid(1000);
        if second <= self.second {
            return;
        }
        if second - self.second > WINDOW as i64 {
            self.buckets = Default::default();
            self.second = second;
            return;
        }
        while self.second < second {
            self.second += 1;
            let index = self.index(0);
            if let Some(bucket) = self.buckets.get_mut(index) {
                *bucket = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_counts_whole_seconds_and_forgets() {
        let mut rate = Rate::default();
        let at = Timestamp::from_millis;
        for second in 0..5 {
            rate.add(at(100_000 + second * 1000), 10);
        }
        assert!((rate.per_second(at(105_000)) - 10.0).abs() < f64::EPSILON);
        assert!(rate.per_second(at(120_000)).abs() < f64::EPSILON);
    }
}
