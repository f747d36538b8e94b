//! What a consumer holds: messages ready to be handed out, messages in a
//! reader's hands, and the offsets behind them. Shared by the thread that polls
//! and the task that hands out and settles; no I/O, no waiting.

use std::collections::{HashMap, VecDeque};

use super::tracker::{Mark, TopicPartition, Tracker};
use crate::broker::Received;

/// A message between the broker and its settlement.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) received: Received,
    pub(super) partition: TopicPartition,
    /// None for readers without a group, which settle nothing.
    pub(super) mark: Option<Mark>,
}

/// What a consumer holds.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) tracker: Tracker,
    /// Ready to be handed out, in order. The tag, or none for what is settled
    /// by being handed out.
    ready: VecDeque<(Option<u64>, Held)>,
    /// In a reader's hands, being dead-lettered, or resting before a retry.
    out: HashMap<u64, Held>,
    next_tag: u64,
    /// Offsets that moved and are not stored yet.
    dirty: HashMap<TopicPartition, i64>,
    /// Nothing more is handed out.
    pub(super) stopping: bool,
}

/// What became of a settlement.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// Done; the partition's offset to store, when it moved.
    Done(Option<(TopicPartition, i64)>),
    /// The assignment that delivered it has ended.
    Stale,
}

impl State {
    /// Messages that are not finished.
    pub(super) fn unfinished(&self) -> usize {
        self.ready.len() + self.out.len()
    }

    /// Messages in a reader's hands.
    pub(super) fn handed_out(&self) -> usize {
        self.out.len()
    }

    /// Whether there is something to hand out.
    pub(super) fn has_ready(&self) -> bool {
        !self.stopping && !self.ready.is_empty()
    }

    /// Takes in a message. `settle`: it will be settled by its reader.
    /// Returns whether it was taken (a repeat is not).
    pub(super) fn take_in(
        &mut self,
        received: Received,
        partition: TopicPartition,
        offset: i64,
        settle: Settle,
    ) -> bool {
        if self.stopping {
            return false;
        }
        let mark = match settle {
            Settle::Never => None,
            Settle::ByReader | Settle::WhenHandedOut => {
                match self.tracker.deliver(&partition, offset) {
                    Some(mark) => Some(mark),
                    None => return false,
                }
            }
        };
        let tag = (settle == Settle::ByReader).then(|| self.tag());
        let held = Held {
            received,
            partition,
            mark,
        };
        self.ready.push_back((tag, held));
        true
    }

    /// Takes the next message to hand out; what its reader settles is held.
    pub(super) fn hand_out(&mut self) -> Option<(Option<u64>, Held)> {
        if self.stopping {
            return None;
        }
        let (tag, held) = self.ready.pop_front()?;
        if let Some(tag) = tag {
            self.out.insert(tag, held.clone());
        }
        Some((tag, held))
    }

    /// A delivery in a reader's hands, if its assignment has not ended.
    pub(super) fn current(&self, tag: u64) -> Option<&Held> {
        let held = self.out.get(&tag)?;
        let mark = held.mark?;
        self.tracker
            .is_current(&held.partition, mark)
            .then_some(held)
    }

    /// A delivery is finished.
    pub(super) fn finish(&mut self, tag: u64) -> Settled {
        let Some(held) = self.out.remove(&tag) else {
            return Settled::Stale;
        };
        self.complete(&held)
    }

    /// What was handed out without a tag is finished by that.
    pub(super) fn complete(&mut self, held: &Held) -> Settled {
        let Some(mark) = held.mark else {
            return Settled::Done(None);
        };
        match self.tracker.complete(&held.partition, mark) {
            Ok(moved) => Settled::Done(moved.map(|next| (held.partition.clone(), next))),
            Err(_) => Settled::Stale,
        }
    }

    /// Notes an offset for the polling thread to store.
    pub(super) fn note(&mut self, partition: TopicPartition, next: i64) {
        self.dirty.insert(partition, next);
    }

    /// Offsets to store, once.
    pub(super) fn take_dirty(&mut self) -> Vec<(TopicPartition, i64)> {
        self.dirty.drain().collect()
    }

    /// A delivery comes back, to be handed out again at once, or to be left to
    /// the group when this consumer stops. False when it was stale.
    pub(super) fn give_back(&mut self, tag: u64, change: impl FnOnce(&mut Held)) -> bool {
        let Some(mut held) = self.out.remove(&tag) else {
            return false;
        };
        let current = held
            .mark
            .is_some_and(|mark| self.tracker.is_current(&held.partition, mark));
        if current && !self.stopping {
            change(&mut held);
            let tag = self.tag();
            self.ready.push_front((Some(tag), held));
        }
        current
    }

    /// Partitions are ours from now on.
    pub(super) fn assign(&mut self, partitions: impl IntoIterator<Item = TopicPartition>) {
        for partition in partitions {
            self.forget_ready(&partition);
            self.dirty.remove(&partition);
            self.tracker.assign(partition);
        }
    }

    /// A partition is no longer ours: what waited for handing out is dropped,
    /// what is handed out is stale. Gives the offset to commit.
    pub(super) fn revoke(&mut self, partition: &TopicPartition) -> Option<i64> {
        self.forget_ready(partition);
        self.dirty.remove(partition);
        self.tracker.revoke(partition)
    }

    /// Nothing more is handed out; what waited goes back to the broker.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
        self.ready.clear();
    }

    fn forget_ready(&mut self, partition: &TopicPartition) {
        self.ready.retain(|(_, held)| held.partition != *partition);
    }

    fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }
}

/// How a delivery is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settle {
    /// By its reader.
    ByReader,
    /// By being handed out (at most once).
    WhenHandedOut,
    /// Not at all (no group).
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{broker::BrokerType, message::Message, topic::Topic};
    use std::sync::Arc;

    fn tp() -> TopicPartition {
        ("t".into(), 0)
    }

    fn received() -> Received {
        Received {
            topic: Topic::new("t").unwrap(),
            message: Arc::new(Message::default()),
            marks: Arc::default(),
            via: BrokerType::Kafka,
        }
    }

    fn with(offsets: std::ops::Range<i64>) -> State {
        let mut state = State::default();
        state.assign([tp()]);
        for offset in offsets {
            assert!(state.take_in(received(), tp(), offset, Settle::ByReader));
        }
        state
    }

    #[test]
    fn what_is_given_back_comes_again_before_the_rest() {
        let mut state = with(0..3);
        let (tag, _) = state.hand_out().unwrap();
        assert!(state.give_back(tag.unwrap(), |held| {
            Arc::make_mut(&mut held.received.message).redelivered = true;
        }));
        let (_, again) = state.hand_out().unwrap();
        assert!(again.received.message.redelivered);
        assert_eq!(state.unfinished(), 3);
    }

    #[test]
    fn a_new_assignment_forgets_what_waited_and_disowns_what_is_out() {
        let mut state = with(0..3);
        let tag = state.hand_out().unwrap().0.unwrap();
        state.assign([tp()]);
        assert_eq!((state.unfinished(), state.handed_out()), (1, 1));
        assert!(state.current(tag).is_none());
        assert_eq!(state.finish(tag), Settled::Stale);
        assert_eq!(state.unfinished(), 0);
        // The same offset comes again and counts.
        assert!(state.take_in(received(), tp(), 0, Settle::ByReader));
        let tag = state.hand_out().unwrap().0.unwrap();
        assert_eq!(state.finish(tag), Settled::Done(Some((tp(), 1))));
    }

    #[test]
    fn a_stop_hands_out_and_takes_in_nothing_more() {
        let mut state = with(0..3);
        let tag = state.hand_out().unwrap().0.unwrap();
        state.stop();
        assert!(state.hand_out().is_none());
        assert!(!state.take_in(received(), tp(), 3, Settle::ByReader));
        // Given back while stopping: left to the group, its offset not done.
        assert!(state.give_back(tag, |_| {}));
        assert_eq!(state.unfinished(), 0);
        assert_eq!(state.revoke(&tp()), None);
    }
}
