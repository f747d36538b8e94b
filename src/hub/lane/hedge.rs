//! How long a confirm may take before its lane becomes suspect:
//! clamp(4 x recent p99 of confirms, min, max).

use std::time::Duration;

/// Keeps recent confirm times and derives the hedge.
#[derive(Debug)]
pub(crate) struct Hedge {
    min: Duration,
    max: Duration,
    recent: Vec<u32>,
    /// Room to find the percentile in.
    scratch: Vec<u32>,
    next: usize,
    since_update: usize,
    current: Duration,
}

/// Confirm times that count as recent. At this many, p99 rests on ten values.
const RECENT: usize = 1024;

/// Confirms between two calculations: looking through 1,024 numbers for each of
/// them would cost more than the confirm.
const EVERY: usize = 128;

impl Hedge {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            recent: Vec::new(),
            scratch: Vec::new(),
            next: 0,
            since_update: 0,
            // Nothing known yet: the first confirms of a cold broker are slow.
            current: max,
        }
    }

    /// A confirm that came while the lane was not suspect.
    pub(crate) fn record(&mut self, took: Duration) {
        let us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        if self.recent.len() < RECENT {
            self.recent.push(us);
        } else if let Some(slot) = self.recent.get_mut(self.next) {
            *slot = us;
            self.next = (self.next + 1) % RECENT;
        }
        self.since_update += 1;
        if self.since_update >= EVERY {
            self.since_update = 0;
            self.scratch.clone_from(&self.recent);
            let place = self.scratch.len().saturating_sub(1) * 99 / 100;
            let (_, p99, _) = self.scratch.select_nth_unstable(place);
            let p99 = *p99;
            self.current = (Duration::from_micros(u64::from(p99)) * 4).clamp(self.min, self.max);
        }
    }

    pub(crate) fn current(&self) -> Duration {
        self.current
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_tail_of_confirms_within_its_bounds() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut hedge = Hedge::new(min, max);
        assert_eq!(hedge.current(), max);
        for _ in 0..RECENT {
            hedge.record(Duration::from_millis(1));
        }
        assert_eq!(hedge.current(), min);
        for _ in 0..RECENT {
            hedge.record(Duration::from_millis(50));
        }
        assert_eq!(hedge.current(), Duration::from_millis(200));
    }

    #[test]
    fn one_in_a_hundred_may_be_slow_and_the_oldest_are_forgotten() {
        let (min, max) = (Duration::from_millis(1), Duration::from_secs(1));
        let mut hedge = Hedge::new(min, max);
        let record = |hedge: &mut Hedge, slow: bool| {
            hedge.record(Duration::from_millis(if slow { 50 } else { 1 }));
        };
        for n in 0..RECENT {
            record(&mut hedge, (EVERY - 12..EVERY).contains(&n));
        }
        assert_eq!(hedge.current(), Duration::from_millis(200));
        // The last of the slow ones is replaced: eleven of 1,024 are too few.
        for n in 0..EVERY {
            record(&mut hedge, (EVERY - 12..EVERY - 1).contains(&n));
        }
        assert_eq!(hedge.current(), Duration::from_millis(4));
    }

    #[test]
    fn a_few_confirms_decide_nothing() {
        let max = Duration::from_secs(1);
        let mut hedge = Hedge::new(Duration::from_millis(1), max);
        for _ in 1..EVERY {
            hedge.record(Duration::from_millis(1));
        }
        assert_eq!(hedge.current(), max);
        hedge.record(Duration::from_millis(1));
        assert_eq!(hedge.current(), Duration::from_millis(4));
    }
}
