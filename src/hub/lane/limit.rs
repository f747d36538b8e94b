//! How fast a lane may drain: a token bucket, told the time and knowing no
//! clock. It refuses to sleep; it says when the next message may go.

use std::time::{Duration, Instant};

/// A token bucket, kept as the time at which it will be empty of debt (the
/// generic cell rate algorithm), so that nothing has to be refilled.
#[derive(Clone, Debug)]
pub(super) struct Limit {
    per_second: u32,
    /// What one message costs.
    interval: Duration,
    /// What may go at once.
    burst: Duration,
    /// When everything that went is paid for.
    paid: Instant,
}

/// How much of the rate may go at once: timers are not finer, and an even flow
/// need not be.
const BURST: Duration = Duration::from_millis(50);

impl Limit {
    /// A limit of so many messages a second; none for 0.
    pub(super) fn new(per_second: u32, now: Instant) -> Option<Self> {
        let interval = Duration::from_secs(1).checked_div(per_second)?;
        Some(Self {
            per_second,
            interval,
            burst: BURST.saturating_sub(interval),
            paid: now,
        })
    }

    pub(super) fn per_second(&self) -> u32 {
        self.per_second
    }

    /// Takes one message's worth, if it may go now.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        if self.next() > now {
            return false;
        }
        self.paid = self.paid.max(now) + self.interval;
        true
    }

    /// When the next message may go; in the past when one may go now.
    pub(super) fn next(&self) -> Instant {
        self.paid.checked_sub(self.burst).unwrap_or(self.paid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many go within a second when it is asked every `step`.
    fn within_a_second(rate: u32, step: Duration) -> u32 {
        let begin = Instant::now();
        let mut limit = Limit::new(rate, begin).unwrap();
        let mut gone = 0;
        let mut now = begin;
        while now < begin + Duration::from_secs(1) {
            while limit.take(now) {
                gone += 1;
            }
            assert!(limit.next() > now, "asked again at once for ever");
            now += step;
        }
        gone
    }

    #[test]
    fn the_rate_holds_however_often_it_is_asked() {
        for rate in [1, 3, 10, 100, 5_000, 100_000] {
            for step in [1, 7, 20] {
                let gone = within_a_second(rate, Duration::from_millis(step));
                let most = rate + rate / 20 + 1;
                let least = rate - rate / 20;
                assert!((least..=most).contains(&gone), "{rate}/s: {gone}");
            }
        }
    }

    #[test]
    fn a_rest_saves_up_no_more_than_a_burst() {
        let begin = Instant::now();
        let mut limit = Limit::new(1_000, begin).unwrap();
        let later = begin + Duration::from_secs(3600);
        let mut gone = 0;
        while limit.take(later) {
            gone += 1;
        }
        assert_eq!(gone, 50);
        assert!(Limit::new(0, begin).is_none());
    }
}
