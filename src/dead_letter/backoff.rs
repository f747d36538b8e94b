//! When a processor tries a letter again. Pure: letters and times in, times out.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use crate::message::Timestamp;

/// How long a failed letter rests: `first`, then twice as long each time, up to
/// `longest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Default 5 s.
    pub first: Duration,
    /// Default 10 min.
    pub longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(5),
            longest: Duration::from_secs(600),
        }
    }
}

impl Backoff {
    /// The rest after so many failed attempts (1 and up).
    #[must_use]
    pub fn after(&self, failed: u32) -> Duration {
        let doubled = 1_u32.checked_shl(failed.saturating_sub(1).min(31));
        self.first
            .saturating_mul(doubled.unwrap_or(u32::MAX))
            .min(self.longest)
    }
}

/// What a processor remembers of the letters that it has tried; as many as it
/// saw at its last look.
#[derive(Debug, Default)]
pub(super) struct Book(HashMap<String, Tried>);

#[derive(Clone, Copy, Debug)]
struct Tried {
    failed: u32,
    /// None: given up, until somebody decides.
    next: Option<Timestamp>,
}

impl Book {
    /// Whether a letter may be tried now.
    pub(super) fn is_due(&self, letter: &str, now: Timestamp) -> bool {
        self.0
            .get(letter)
            .is_none_or(|t| t.next.is_some_and(|at| at <= now))
    }

    /// When a letter is tried again, if it was tried and is not given up.
    pub(super) fn next_of(&self, letter: &str) -> Option<Timestamp> {
        self.0.get(letter)?.next
    }

    /// A letter failed once more. Answers how often it has, and when it is tried
    /// again; never after `most` attempts, or when no attempt can help.
    pub(super) fn failed(
        &mut self,
        letter: &str,
        now: Timestamp,
        backoff: &Backoff,
        most: u32,
        hopeless: bool,
    ) -> (u32, Option<Timestamp>) {
        let tried = self.0.entry(letter.to_owned()).or_insert(Tried {
            failed: 0,
            next: None,
        });
        tried.failed = tried.failed.saturating_add(1);
        tried.next = (!hopeless && tried.failed < most).then(|| now + backoff.after(tried.failed));
        (tried.failed, tried.next)
    }

    /// A letter is done with.
    pub(super) fn done(&mut self, letter: &str) {
        self.0.remove(letter);
    }

    /// Forgets letters that are not there any more. Only after a look that saw
    /// them all.
    pub(super) fn keep(&mut self, seen: &HashSet<String>) {
        self.0.retain(|letter, _| seen.contains(letter));
    }

    /// When the next letter is due.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.0.values().filter_map(|t| t.next).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn rests_double_up_to_the_longest() {
        let backoff = Backoff {
            first: Duration::from_secs(1),
            longest: Duration::from_secs(5),
        };
        let rests: Vec<u64> = (1..6).map(|n| backoff.after(n).as_secs()).collect();
        assert_eq!(rests, [1, 2, 4, 5, 5]);
        assert_eq!(backoff.after(u32::MAX).as_secs(), 5);
    }

    #[test]
    fn a_letter_rests_between_attempts_and_is_given_up_after_the_last() {
        let backoff = Backoff {
            first: Duration::from_millis(10),
            longest: Duration::from_secs(1),
        };
        let mut book = Book::default();
        assert!(book.is_due("a", at(0)));
        assert_eq!(
            book.failed("a", at(0), &backoff, 3, false),
            (1, Some(at(10)))
        );
        assert!(!book.is_due("a", at(9)) && book.is_due("a", at(10)));
        assert!(book.is_due("b", at(0)), "others do not wait for it");
        assert_eq!(book.next(), Some(at(10)));
        assert_eq!(
            book.failed("a", at(10), &backoff, 3, false),
            (2, Some(at(30)))
        );
        assert_eq!(book.failed("a", at(30), &backoff, 3, false), (3, None));
        assert!(!book.is_due("a", at(1_000_000)));
        assert_eq!(book.next(), None);
        assert_eq!(book.failed("c", at(0), &backoff, 3, true), (1, None));
        book.keep(&HashSet::new());
        assert!(book.is_due("a", at(0)), "what came anew is tried anew");
    }
}
