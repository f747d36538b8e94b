//! Which message may be handled next: one at a time in each lane, lanes side by
//! side, in turn. Pure: it is told the time and starts nothing itself.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::time::Instant;

use crate::{broker::Received, message::Key, topic::Topic};

/// What order is kept by among received messages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum LaneId {
    /// Messages of one topic and key.
    Key(Topic, Key),
    /// Messages without a key of one topic and partition.
    Partition(Topic, i32),
    /// A message of a queue: nothing waits for it, it waits for nothing.
    Alone(u64),
}

impl LaneId {
    /// The lane of a message of a stream.
    pub(super) fn in_stream(received: &Received) -> Self {
        let topic = received.topic.clone();
        match &received.message.key {
            Some(key) => Self::Key(topic, key.clone()),
            None => Self::Partition(topic, received.message.partition.unwrap_or(-1)),
        }
    }
}

/// Items in lanes. A lane exists while something of it is unfinished, so memory
/// follows what is unfinished and not how many keys there ever were.
#[derive(Debug)]
pub(super) struct Lanes<T> {
    lanes: HashMap<LaneId, Lane<T>>,
    /// Lanes that are not busy and have something to do; each once.
    ready: VecDeque<LaneId>,
    /// Items that rest before another attempt. Their lanes stay busy. The
    /// number keeps apart what is due at the same instant.
    resting: BTreeMap<(Instant, u64), (LaneId, T)>,
    rested: u64,
    held: usize,
}

#[derive(Debug)]
struct Lane<T> {
    queue: VecDeque<T>,
    busy: bool,
}

impl<T> Default for Lanes<T> {
    fn default() -> Self {
        Self {
            lanes: HashMap::new(),
            ready: VecDeque::new(),
            resting: BTreeMap::new(),
            rested: 0,
            held: 0,
        }
    }
}

impl<T> Lanes<T> {
    /// Puts an item at the end of its lane.
    pub(super) fn push(&mut self, id: LaneId, item: T) {
        self.held += 1;
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.queue.push_back(item);
            return;
        }
        self.ready.push_back(id.clone());
        self.lanes.insert(
            id,
            Lane {
                queue: VecDeque::from([item]),
                busy: false,
            },
        );
    }

    /// Takes the next item; its lane is busy until [`Lanes::finish`].
    pub(super) fn pop(&mut self) -> Option<(LaneId, T)> {
        while let Some(id) = self.ready.pop_front() {
            if let Some(lane) = self.lanes.get_mut(&id)
                && let Some(item) = lane.queue.pop_front()
            {
                lane.busy = true;
                return Some((id, item));
            }
        }
        None
    }

    /// The item of a busy lane is done with; the lane's next may go.
    pub(super) fn finish(&mut self, id: LaneId) {
        self.held = self.held.saturating_sub(1);
        self.release(id);
    }

    /// The item of a busy lane goes again at `until`, before what is behind it.
    pub(super) fn rest(&mut self, id: LaneId, item: T, until: Instant) {
        self.rested += 1;
        self.resting.insert((until, self.rested), (id, item));
    }

    /// The item of a busy lane was not handled: it stays in front of what is
    /// behind it, and its lane goes behind the other lanes.
    pub(super) fn put_back(&mut self, id: LaneId, item: T) {
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.queue.push_front(item);
        }
        self.release(id);
    }

    /// When the next resting item is due.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        self.resting.first_key_value().map(|((at, _), _)| *at)
    }

    /// Makes what is due at `now` ready.
    pub(super) fn wake(&mut self, now: Instant) {
        while let Some(entry) = self.resting.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let (id, item) = entry.remove();
            self.put_back(id, item);
        }
    }

    /// Items that are queued, resting, or being handled.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Whether something could be taken now.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Drops everything that is not being handled.
    pub(super) fn clear(&mut self) {
        self.ready.clear();
        self.resting.clear();
        self.lanes.clear();
        self.held = 0;
    }

    fn release(&mut self, id: LaneId) {
        let Some(lane) = self.lanes.get_mut(&id) else {
            return;
        };
        lane.busy = false;
        if lane.queue.is_empty() {
            self.lanes.remove(&id);
        } else {
            self.ready.push_back(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn lane(n: u8) -> LaneId {
        LaneId::Partition(Topic::new("events.test").unwrap(), i32::from(n))
    }

    proptest! {
        /// Whatever is pushed, finished and rested: a lane never has two items
        /// out, its items come in order, and all come.
        #[test]
        fn each_lane_gives_one_item_at_a_time_in_order(
            steps in prop::collection::vec((0..6_u8, 0..3_u8, 0..20_u64), 0..300),
        ) {
            let mut lanes = Lanes::default();
            let mut now = Instant::now();
            let mut pushed = [0_u32; 3];
            let mut finished = [0_u32; 3];
            let mut out: Vec<(LaneId, u8, u32)> = Vec::new();
            let end = std::iter::repeat_n([(1, 0, 0), (2, 0, 0), (5, 0, 20)], 400).flatten();
            for (step, which, wait) in steps.into_iter().chain(end) {
                let slot = usize::from(which);
                match step {
                    0 => {
                        lanes.push(lane(which), (which, pushed[slot]));
                        pushed[slot] += 1;
                    }
                    1 => if let Some((id, (of, n))) = lanes.pop() {
                        prop_assert!(out.iter().all(|(other, ..)| *other != id));
                        prop_assert_eq!(n, finished[usize::from(of)]);
                        out.push((id, of, n));
                    }
                    2 if !out.is_empty() => {
                        let (id, of, _) = out.remove(0);
                        finished[usize::from(of)] += 1;
                        lanes.finish(id);
                    }
                    3 if !out.is_empty() => {
                        let (id, of, n) = out.remove(0);
                        lanes.rest(id, (of, n), now + Duration::from_millis(wait));
                    }
                    4 if !out.is_empty() => {
                        let (id, of, n) = out.remove(0);
                        lanes.put_back(id, (of, n));
                    }
                    _ => {
                        now += Duration::from_millis(wait);
                        lanes.wake(now);
                    }
                }
            }
            prop_assert_eq!(pushed, finished);
            prop_assert_eq!(lanes.held(), 0);
            prop_assert!(lanes.lanes.is_empty(), "memory follows what is unfinished");
        }
    }
}
