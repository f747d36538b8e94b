//! Batches acks: one ack for everything up to a tag, sent when enough is done,
//! or when nothing is left to do. Pure: it says what to send.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::oneshot;

use crate::error::Result;

/// The unsettled deliveries of one channel.
#[derive(Debug, Default)]
pub(super) struct Acks {
    open: BTreeSet<u64>,
    done: BTreeMap<u64, Option<Answer>>,
}

/// Who waits until the broker was told.
pub(super) type Answer = oneshot::Sender<Result<()>>;

/// One ack to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ack {
    pub(super) tag: u64,
    /// Everything up to the tag.
    pub(super) multiple: bool,
}

impl Acks {
    /// A delivery arrived.
    pub(super) fn delivered(&mut self, tag: u64) {
        self.open.insert(tag);
    }

    /// Whether the delivery still waits for a verdict.
    pub(super) fn is_open(&self, tag: u64) -> bool {
        self.open.contains(&tag)
    }

    /// A delivery may be acked.
    pub(super) fn done(&mut self, tag: u64, answer: Option<Answer>) {
        if self.open.remove(&tag) {
            self.done.insert(tag, answer);
        }
    }

    /// A delivery was given back on its own.
    pub(super) fn forget(&mut self, tag: u64) {
        self.open.remove(&tag);
    }

    /// Deliveries without a verdict.
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    /// Acks that were not sent.
    pub(super) fn waiting(&self) -> usize {
        self.done.len()
    }

    /// What to send. Everything below the first open delivery takes one ack;
    /// what is done above it takes one each, and waits unless `all` is set.
    pub(super) fn take(&mut self, all: bool) -> (Vec<Ack>, Vec<Answer>) {
        let mut acks = Vec::new();
        let above = match self.open.first() {
            Some(first) => self.done.split_off(first),
            None => BTreeMap::new(),
        };
        let below = std::mem::replace(&mut self.done, above);
        if let Some((tag, _)) = below.last_key_value() {
            acks.push(Ack {
                tag: *tag,
                multiple: true,
            });
        }
        let mut answers: Vec<Answer> = below.into_values().flatten().collect();
        if all {
            for (tag, answer) in std::mem::take(&mut self.done) {
                acks.push(Ack {
                    tag,
                    multiple: false,
                });
                answers.extend(answer);
            }
        }
        (acks, answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivered(tags: std::ops::RangeInclusive<u64>) -> Acks {
        let mut acks = Acks::default();
        for tag in tags {
            acks.delivered(tag);
        }
        acks
    }

    #[test]
    fn everything_up_to_the_first_open_delivery_is_one_ack() {
        let mut acks = delivered(1..=5);
        for tag in [3, 1, 2, 5] {
            acks.done(tag, None);
        }
        let multiple = |tag| Ack {
            tag,
            multiple: true,
        };
        assert_eq!(acks.take(false).0, [multiple(3)]);
        assert_eq!(acks.take(false).0, []);
        assert_eq!((acks.open(), acks.waiting()), (1, 1));
        acks.done(4, None);
        assert_eq!(acks.take(false).0, [multiple(5)]);
    }

    #[test]
    fn a_slow_delivery_does_not_hold_back_those_behind_it_for_ever() {
        let mut acks = delivered(1..=3);
        acks.done(2, None);
        acks.done(3, None);
        let single = |tag| Ack {
            tag,
            multiple: false,
        };
        assert_eq!(acks.take(true).0, [single(2), single(3)]);
    }

    #[test]
    fn what_was_given_back_is_not_acked_by_tag() {
        let mut acks = delivered(1..=3);
        acks.done(1, None);
        acks.forget(2);
        acks.done(2, None);
        acks.done(3, None);
        assert_eq!(
            acks.take(false).0,
            [Ack {
                tag: 3,
                multiple: true
            }]
        );
        assert_eq!(acks.open(), 0);
    }
}
