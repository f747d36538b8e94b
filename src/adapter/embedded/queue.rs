//! One work queue as a pure state machine: time and events in, what happened
//! out. It knows nothing of other queues, channels or clocks; where dead
//! letters go is its owner's business.
//!
//! Every change is one of few operations (append, assign, remove, requeue, fail,
//! take back, tick). A message carries where it lies in the log, so that its
//! owner can take it away there.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{log::RecordId, rate::Rate};
use crate::{
    broker::QueueOptions,
    error::{Error, ErrorCode, Result},
    message::{
        Message, MessageState, Priority, Timestamp,
        wire::{Failure, Marks},
    },
};

/// A consumer, by its number in the broker.
pub(super) type ConsumerId = u64;

/// A message's number in its queue, in the order in which it became ready.
pub(super) type Seq = u64;

/// A message that a queue holds.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// As readers get it: `topic` and `redelivered` are set.
    pub(super) message: Arc<Message>,
    pub(super) marks: Arc<Marks>,
    /// The key it was routed by, where that is not the queue's name.
    pub(super) routing_key: Option<Arc<str>>,
    /// What it counts towards the bounds.
    pub(super) bytes: u64,
    /// How often it was handed out.
    pub(super) deliveries: u32,
    /// Where it lies in the log, if it does.
    pub(super) record: Option<RecordId>,
}

/// A message that leaves for the dead letters.
#[derive(Debug)]
pub(super) struct Dead {
    pub(super) entry: Entry,
    pub(super) reason: &'static str,
}

/// An assignment of a message to a consumer.
#[derive(Debug)]
pub(super) struct Assigned {
    pub(super) consumer: ConsumerId,
    pub(super) seq: Seq,
    pub(super) message: Arc<Message>,
    pub(super) marks: Arc<Marks>,
    pub(super) record: Option<RecordId>,
}

/// What happens to a publish, or to the oldest message, at the bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Overflow {
    DropHead,
    Reject,
    RejectDeadLetter,
}

/// A queue.
#[derive(Debug)]
pub(super) struct Queue {
    options: QueueOptions,
    overflow: Overflow,
    max_messages: u64,
    ready: BTreeMap<Place, Ready>,
    /// Places of ready messages that expire, by when.
    expiring: BTreeSet<(Timestamp, Place)>,
    /// Messages that rest, by when they must be looked at again.
    delayed: BTreeMap<(Timestamp, u64), Delayed>,
    unacked: HashMap<Seq, Unacked>,
    /// In the order of their turn.
    consumers: VecDeque<ConsumerId>,
    /// In the order of their arrival; the first is the single active one.
    arrivals: Vec<ConsumerId>,
    exclusive: Option<ConsumerId>,
    had_consumer: bool,
    last_used: Timestamp,
    next_seq: Seq,
    next_delayed: u64,
    ready_bytes: u64,
    other_bytes: u64,
    published: Rate,
    delivered: Rate,
}

/// Where a ready message stands: higher priorities first, then by number.
type Place = (u8, Seq);

#[derive(Debug)]
struct Ready {
    entry: Entry,
    expires: Option<Timestamp>,
}

#[derive(Debug)]
struct Delayed {
    entry: Entry,
    due: Timestamp,
}

#[derive(Debug)]
struct Unacked {
    entry: Entry,
    place: Place,
    expires: Option<Timestamp>,
}

impl Queue {
    /// An empty queue.
    pub(super) fn new(now: Timestamp, options: QueueOptions, max_messages: u64) -> Result<Self> {
        let overflow = check(&options)?;
        Ok(Self {
            options,
            overflow,
            max_messages,
            ready: BTreeMap::new(),
            expiring: BTreeSet::new(),
            delayed: BTreeMap::new(),
            unacked: HashMap::new(),
            consumers: VecDeque::new(),
            arrivals: Vec::new(),
            exclusive: None,
            had_consumer: false,
            last_used: now,
            next_seq: 0,
            next_delayed: 0,
            ready_bytes: 0,
            other_bytes: 0,
            published: Rate::default(),
            delivered: Rate::default(),
        })
    }

    pub(super) fn options(&self) -> &QueueOptions {
        &self.options
    }

    pub(super) fn ready_len(&self) -> u64 {
        self.ready.len() as u64
    }

    pub(super) fn unacked_len(&self) -> u64 {
        self.unacked.len() as u64
    }

    /// All messages: ready, resting and handed out.
    pub(super) fn len(&self) -> u64 {
        (self.ready.len() + self.delayed.len() + self.unacked.len()) as u64
    }

    pub(super) fn bytes(&self) -> u64 {
        self.ready_bytes + self.other_bytes
    }

    pub(super) fn consumer_count(&self) -> u64 {
        self.consumers.len() as u64
    }

    pub(super) fn overflow(&self) -> Overflow {
        self.overflow
    }

    /// Publishes and deliveries per second.
    pub(super) fn rates(&mut self, now: Timestamp) -> (f64, f64) {
        (
            self.published.per_second(now),
            self.delivered.per_second(now),
        )
    }

    /// Why a publish of `bytes` must be refused now, if it must.
    pub(super) fn refuses(&self, bytes: u64) -> Option<String> {
        let length = self.ready.len() as u64 + self.delayed.len() as u64;
        if self.overflow != Overflow::DropHead {
            if let Some(max) = self.options.max_length.filter(|max| length >= *max) {
                return Some(format!("it holds its max_length of {max} messages"));
            }
            if let Some(max) = self
                .options
                .max_length_bytes
                .filter(|max| self.ready_bytes + bytes > *max)
            {
                return Some(format!("it is at its max_length_bytes of {max}"));
            }
        }
        (self.options.max_length.is_none() && self.len() >= self.max_messages).then(|| {
            format!(
                "it holds max_messages ({}) messages; consume it, or raise embedded.max_messages or its max_length",
                self.max_messages
            )
        })
    }

    /// Takes a message in. The caller has asked [`Queue::refuses`]; what is
    /// moved here from another queue is taken in any case.
    pub(super) fn append(&mut self, now: Timestamp, entry: Entry, dead: &mut Vec<Dead>) {
        self.published.add(now, 1);
        match scheduled(&entry.message).filter(|at| *at > now) {
            Some(due) => self.rest(entry, due),
            None => {
                self.make_ready(now, entry);
                self.drop_heads(dead);
            }
        }
    }

    /// Hands the first ready message to the next consumer that has credit.
    pub(super) fn assign(
        &mut self,
        now: Timestamp,
        dead: &mut Vec<Dead>,
        mut has_credit: impl FnMut(ConsumerId) -> bool,
    ) -> Option<Assigned> {
        if self.ready.is_empty() {
            return None;
        }
        self.expire(now, dead);
        let consumer = if self.options.single_active_consumer {
            self.arrivals.first().copied().filter(|c| has_credit(*c))?
        } else {
            let turn = self.consumers.iter().position(|c| has_credit(*c))?;
            // Whoever is skipped for want of credit keeps its place in front.
            let consumer = self.consumers.remove(turn)?;
            self.consumers.push_back(consumer);
            consumer
        };
        let (place, ready) = self.ready.pop_first()?;
        let Ready { mut entry, expires } = ready;
        if let Some(at) = expires {
            self.expiring.remove(&(at, place));
        }
        self.ready_bytes -= entry.bytes;
        self.other_bytes += entry.bytes;
        if entry.deliveries > 0 && !entry.message.redelivered {
            Arc::make_mut(&mut entry.message).redelivered = true;
        }
        entry.deliveries += 1;
        self.delivered.add(now, 1);
        let assigned = Assigned {
            consumer,
            seq: place.1,
            message: entry.message.clone(),
            marks: entry.marks.clone(),
            record: entry.record,
        };
        self.unacked.insert(
            place.1,
            Unacked {
                entry,
                place,
                expires,
            },
        );
        Some(assigned)
    }

    /// Takes a handed-out message away, for good or to move it.
    pub(super) fn remove(&mut self, seq: Seq) -> Option<Entry> {
        let unacked = self.unacked.remove(&seq)?;
        self.other_bytes -= unacked.entry.bytes;
        Some(unacked.entry)
    }

    /// Gives a message back to its original place. `seen` is false when no
    /// reader ever saw it.
    pub(super) fn requeue(
        &mut self,
        now: Timestamp,
        seq: Seq,
        seen: bool,
        dead: &mut Vec<Dead>,
    ) -> bool {
        let Some(Unacked {
            mut entry,
            place,
            expires,
        }) = self.unacked.remove(&seq)
        else {
            return false;
        };
        if !seen {
            entry.deliveries = entry.deliveries.saturating_sub(1);
        }
        self.other_bytes -= entry.bytes;
        self.ready_bytes += entry.bytes;
        if let Some(at) = expires {
            self.expiring.insert((at, place));
        }
        self.ready.insert(place, Ready { entry, expires });
        self.expire(now, dead);
        true
    }

    /// Takes a handed-out message away to try it again, with its attempt
    /// counted.
    pub(super) fn fail(&mut self, seq: Seq, failure: Failure) -> Option<Entry> {
        let mut entry = self.remove(seq)?;
        let message = Arc::make_mut(&mut entry.message);
        message.retry_count = message.retry_count.saturating_add(1);
        // What fails among the dead letters stays one, which no deadline ends.
        if message.state != MessageState::DeadLettered {
            message.state = MessageState::Failed;
        }
        message.error = Some(failure.details.clone());
        Arc::make_mut(&mut entry.marks).failure = Some(Box::new(failure));
        Some(entry)
    }

    /// Takes a message back after [`Queue::fail`], at once or after a rest. It
    /// comes again behind what is ready then.
    pub(super) fn take_back(&mut self, now: Timestamp, entry: Entry, due: Option<Timestamp>) {
        match due {
            None => self.make_ready(now, entry),
            Some(due) => self.rest(entry, due),
        }
    }

    /// Takes a message in that was here before a restart: ready since `ready`,
    /// or resting until then. Nothing is refused, dropped or counted.
    #[cfg(feature = "journal")]
    pub(super) fn restore(&mut self, now: Timestamp, entry: Entry, ready: Timestamp, rests: bool) {
        if rests && ready > now {
            self.rest(entry, ready);
        } else {
            self.make_ready(ready, entry);
        }
    }

    /// Where its messages lie in the log.
    pub(super) fn records(&self) -> impl Iterator<Item = RecordId> {
        let ready = self.ready.values().map(|r| &r.entry);
        let delayed = self.delayed.values().map(|d| &d.entry);
        let unacked = self.unacked.values().map(|u| &u.entry);
        ready.chain(delayed).chain(unacked).filter_map(|e| e.record)
    }

    /// Everything that time brings: rests that end, messages that expire.
    pub(super) fn tick(&mut self, now: Timestamp, dead: &mut Vec<Dead>) {
        while let Some(((at, number), _)) = self.delayed.first_key_value() {
            if *at > now {
                break;
            }
            let key = (*at, *number);
            let Some(Delayed { entry, due }) = self.delayed.remove(&key) else {
                break;
            };
            self.other_bytes -= entry.bytes;
            let over = expires_at(&entry.message).is_some_and(|at| at <= now);
            if due > now && over {
                dead.push(Dead {
                    entry,
                    reason: EXPIRED,
                });
            } else {
                self.make_ready(now, entry);
                self.drop_heads(dead);
            }
        }
        self.expire(now, dead);
    }

    /// When [`Queue::tick`] has something to do next.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        let expiry = self.expiring.first().map(|(at, _)| *at);
        let rest = self.delayed.first_key_value().map(|((at, _), _)| *at);
        [expiry, rest, self.unused_until()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether the queue has been unused for as long as it may live unused.
    pub(super) fn has_expired(&self, now: Timestamp) -> bool {
        self.unused_until().is_some_and(|at| at <= now)
    }

    /// Whether its last consumer has gone and it goes with it.
    pub(super) fn is_abandoned(&self) -> bool {
        self.options.auto_delete && self.had_consumer && self.consumers.is_empty()
    }

    /// Notes that somebody used it (redeclared it, took from it).
    pub(super) fn touch(&mut self, now: Timestamp) {
        self.last_used = now;
    }

    /// Lets a consumer in.
    ///
    /// # Errors
    /// Why not: somebody has it exclusively, or is to have it.
    pub(super) fn attach(
        &mut self,
        now: Timestamp,
        consumer: ConsumerId,
        exclusive: bool,
    ) -> std::result::Result<(), &'static str> {
        self.admits(exclusive)?;
        if exclusive {
            self.exclusive = Some(consumer);
        }
        self.consumers.push_back(consumer);
        self.arrivals.push(consumer);
        self.had_consumer = true;
        self.last_used = now;
        Ok(())
    }

    /// Whether a consumer would be let in.
    pub(super) fn admits(&self, exclusive: bool) -> std::result::Result<(), &'static str> {
        if self.exclusive.is_some() {
            return Err("another consumer has it exclusively");
        }
        if exclusive && !self.consumers.is_empty() {
            return Err("it has consumers and cannot be consumed exclusively");
        }
        Ok(())
    }

    /// Takes a consumer out; what it holds stays handed out until settled.
    pub(super) fn detach(&mut self, now: Timestamp, consumer: ConsumerId) {
        self.consumers.retain(|c| *c != consumer);
        self.arrivals.retain(|c| *c != consumer);
        if self.exclusive == Some(consumer) {
            self.exclusive = None;
        }
        self.last_used = now;
    }

    /// Deletes what is ready and says how many that were; `gone` gets where
    /// they lay in the log.
    pub(super) fn purge(&mut self, gone: &mut Vec<RecordId>) -> u64 {
        let n = self.ready_len();
        gone.extend(self.ready.values().filter_map(|r| r.entry.record));
        self.ready.clear();
        self.expiring.clear();
        self.ready_bytes = 0;
        n
    }

    fn unused_until(&self) -> Option<Timestamp> {
        let expires = self.options.expires_ms?;
        self.consumers
            .is_empty()
            .then(|| self.last_used + Duration::from_millis(expires))
    }

    fn make_ready(&mut self, now: Timestamp, entry: Entry) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let highest = self.options.max_priority.unwrap_or(Priority::MAX);
        let priority = entry.message.priority.value().min(highest);
        let place = (u8::MAX - priority, seq);
        let ttl = self
            .options
            .message_ttl_ms
            .map(|ms| now + Duration::from_millis(ms));
        let expires = match (expires_at(&entry.message), ttl) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if let Some(at) = expires {
            self.expiring.insert((at, place));
        }
        self.ready_bytes += entry.bytes;
        self.ready.insert(place, Ready { entry, expires });
    }

    fn rest(&mut self, entry: Entry, due: Timestamp) {
        // What expires while it rests is looked at when it expires.
        let at = expires_at(&entry.message).map_or(due, |e| e.min(due));
        let number = self.next_delayed;
        self.next_delayed += 1;
        self.other_bytes += entry.bytes;
        self.delayed.insert((at, number), Delayed { entry, due });
    }

    fn expire(&mut self, now: Timestamp, dead: &mut Vec<Dead>) {
        while let Some((at, place)) = self.expiring.first().copied() {
            if at > now {
                break;
            }
            self.expiring.remove(&(at, place));
            if let Some(Ready { entry, .. }) = self.ready.remove(&place) {
                self.ready_bytes -= entry.bytes;
                dead.push(Dead {
                    entry,
                    reason: EXPIRED,
                });
            }
        }
    }

    /// Enforces the bounds under `drop-head`. The head is the oldest message of
    /// the lowest priority: what would be handed out last among the oldest.
    fn drop_heads(&mut self, dead: &mut Vec<Dead>) {
        if self.overflow != Overflow::DropHead {
            return;
        }
        let over = |queue: &Self| {
            let long = queue
                .options
                .max_length
                .is_some_and(|max| queue.ready.len() as u64 > max);
            let large = queue
                .options
                .max_length_bytes
                .is_some_and(|max| queue.ready_bytes > max);
            long || large
        };
        while over(self) {
            let Some((lowest, _)) = self.ready.last_key_value().map(|(place, _)| *place) else {
                return;
            };
            let Some(place) = self
                .ready
                .range((lowest, 0)..)
                .next()
                .map(|(place, _)| *place)
            else {
                return;
            };
            if let Some(Ready { entry, expires }) = self.ready.remove(&place) {
                if let Some(at) = expires {
                    self.expiring.remove(&(at, place));
                }
                self.ready_bytes -= entry.bytes;
                dead.push(Dead {
                    entry,
                    reason: OVERFLOW,
                });
            }
        }
    }
}

/// When the queue lets go of it. A dead letter is kept, whatever its deadline was.
fn expires_at(message: &Message) -> Option<Timestamp> {
    match message.state {
        MessageState::DeadLettered => message.expiration,
        _ => message.expires_at(),
    }
}

/// When a message may be handed out first, if it says so.
pub(super) fn scheduled(message: &Message) -> Option<Timestamp> {
    message.task.as_ref().and_then(|task| task.scheduled_at)
}

/// Checks the options that are text and says what holds at the bound.
fn check(options: &QueueOptions) -> Result<Overflow> {
    let overflow = match options.overflow.as_deref() {
        None | Some("drop-head") => Overflow::DropHead,
        Some("reject-publish") => Overflow::Reject,
        Some("reject-publish-dlx") => Overflow::RejectDeadLetter,
        Some(other) => {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!("overflow {other:?}; use drop-head, reject-publish or reject-publish-dlx"),
            ));
        }
    };
    match options.dead_letter_strategy.as_deref() {
        None | Some("at-most-once" | "at-least-once") => Ok(overflow),
        Some(other) => Err(Error::rejected(
            ErrorCode::InvalidConfig,
            format!("dead_letter_strategy {other:?}; use at-most-once or at-least-once"),
        )),
    }
}

/// Reason of what expired.
pub(super) const EXPIRED: &str = "expired";
/// Reason of what was dropped at the bound.
pub(super) const OVERFLOW: &str = "maxlen";

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
