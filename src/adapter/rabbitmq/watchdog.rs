//! Notices a queue that has lost our consumer without a word: the server is
//! asked how many consumers the queue has, and that is held against how many
//! of them are ours. It refuses to guess: a server that does not answer says
//! nothing, and one look alone is not believed.
//!
//! A server can drop a consumer while its channel lives on and nobody is told,
//! for example where a queue's leader moved and forgot it. The subscription then
//! looks well for ever, and nothing comes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How many consumers of each queue this process has, by its own account.
#[derive(Clone, Debug, Default)]
pub(super) struct Roll(Arc<Mutex<HashMap<String, u64>>>);

/// One consumer that counts until this is dropped.
#[derive(Debug)]
pub(super) struct Enrolled {
    roll: Roll,
    queue: String,
}

impl Roll {
    /// Counts a consumer that the server has confirmed.
    pub(super) fn enrol(&self, queue: &str) -> Enrolled {
        *self.counts().entry(queue.to_owned()).or_default() += 1;
        Enrolled {
            roll: self.clone(),
            queue: queue.to_owned(),
        }
    }

    /// Ours of a queue.
    pub(super) fn of(&self, queue: &str) -> u64 {
        self.counts().get(queue).copied().unwrap_or(0)
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        // Nothing under this lock can panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        let mut counts = self.roll.counts();
        if let Some(count) = counts.get_mut(&self.queue) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.queue);
            }
        }
    }
}

/// When one consumer's queue is looked at, and what follows. Lives as long as the
/// subscription, over all its sessions.
#[derive(Debug)]
pub(super) struct Watchdog {
    interval: Duration,
    /// Between looks; longer than the interval while subscribing again does not
    /// help.
    pause: Duration,
    next: Instant,
    /// The last look found too few.
    missed: bool,
    /// It was subscribed again for that, and no look was well since.
    tried: bool,
}

impl Watchdog {
    pub(super) fn new(now: Instant, interval: Duration) -> Self {
        Self {
            interval,
            pause: interval,
            next: now + interval,
            missed: false,
            tried: false,
        }
    }

    /// When to look.
    pub(super) fn due(&self) -> Instant {
        self.next
    }

    /// A session began: the server has just confirmed the consumer.
    pub(super) fn subscribed(&mut self, now: Instant) {
        self.missed = false;
        self.next = now + self.pause;
    }

    /// The server said how many consumers the queue has (`theirs`; none: it did
    /// not answer), of which `ours` should be this process's. Whether to
    /// subscribe again.
    pub(super) fn looked(&mut self, now: Instant, ours: u64, theirs: Option<u64>) -> bool {
        let Some(theirs) = theirs else {
            self.next = now + self.pause;
            return false;
        };
        if theirs >= ours {
            self.pause = self.interval;
            self.missed = false;
            self.tried = false;
            self.next = now + self.pause;
            return false;
        }
        if !self.missed {
            // Perhaps one of ours was being made or ended just then.
            self.missed = true;
            self.next = now + AGAIN.min(self.interval);
            return false;
        }
        if self.tried {
            // Some server may count otherwise; asking on and on would only
            // disturb the consumers that live.
            self.pause = (self.pause * 2).min(LONGEST_PAUSE).max(self.interval);
        }
        self.tried = true;
        self.missed = false;
        self.next = now + self.pause;
        true
    }
}

/// Until a finding is looked at again before it is believed.
const AGAIN: Duration = Duration::from_secs(1);

/// What the pause grows to where subscribing again does not help.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(30);

    #[test]
    fn a_consumer_counts_from_its_confirmation_to_its_end() {
        let roll = Roll::default();
        let (one, two) = (roll.enrol("q"), roll.enrol("q"));
        let other = roll.enrol("p");
        assert_eq!((roll.of("q"), roll.of("p"), roll.of("none")), (2, 1, 0));
        drop((one, other));
        assert_eq!((roll.of("q"), roll.of("p")), (1, 0));
        drop(two);
        assert!(roll.counts().is_empty(), "names of ended consumers stay");
    }

    #[test]
    fn a_lost_consumer_is_believed_at_the_second_look_and_not_at_one() {
        let start = Instant::now();
        let mut dog = Watchdog::new(start, INTERVAL);
        let first = dog.due();
        assert_eq!(first, start + INTERVAL);
        assert!(!dog.looked(first, 2, Some(1)));
        let second = dog.due();
        assert_eq!(second, first + AGAIN);
        // It was only being made.
        assert!(!dog.looked(second, 2, Some(2)));
        let third = dog.due();
        assert!(!dog.looked(third, 2, Some(1)));
        assert!(dog.looked(dog.due(), 2, Some(1)));
    }

    #[test]
    fn foreign_consumers_hide_nothing_that_matters_and_silence_says_nothing() {
        let mut dog = Watchdog::new(Instant::now(), INTERVAL);
        for theirs in [None, Some(7), None, None] {
            let at = dog.due();
            assert!(!dog.looked(at, 2, theirs));
            assert_eq!(dog.due(), at + INTERVAL);
        }
        assert!(!dog.looked(dog.due(), 2, Some(0)));
        assert!(!dog.looked(dog.due(), 2, None));
        assert!(
            dog.looked(dog.due(), 2, Some(0)),
            "the finding was forgotten"
        );
    }

    #[test]
    fn where_it_does_not_help_it_is_done_ever_more_seldom_and_soon_again_once_well() {
        let mut dog = Watchdog::new(Instant::now(), INTERVAL);
        let mut last = dog.due();
        let mut gaps = Vec::new();
        for _ in 0..12 {
            while !dog.looked(dog.due(), 2, Some(1)) {}
            let at = dog.due() - dog.pause;
            gaps.push(at - last);
            last = at;
            dog.subscribed(at);
        }
        assert!(gaps.is_sorted(), "{gaps:?}");
        assert!(gaps[11] <= LONGEST_PAUSE + AGAIN);
        assert!(!dog.looked(dog.due(), 2, Some(2)));
        assert_eq!(dog.pause, INTERVAL);
    }
}
