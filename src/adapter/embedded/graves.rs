//! The broker's state, as far as it concerns the dead letters of queues: where
//! they go and how they lie there. They are never refused for want of room in
//! a queue, because they are here already.

use std::{sync::Arc, time::Duration};

use super::{
    queue::{Dead, EXPIRED, Entry},
    queues::{cost, entry_for},
    routing,
    state::{QueueId, State},
};
use crate::{
    broker::BrokerType,
    error::{Error, ErrorCode, Result},
    message::{
        Message, MessageState, Timestamp,
        wire::{Failure, Marks},
    },
    topic::Topic,
};

impl State {
    /// Moves a message to the dead letters of `from`.
    pub(super) fn move_dead(
        &mut self,
        now: Timestamp,
        from: QueueId,
        entry: Entry,
        failure: &Failure,
    ) {
        let graves = self.graves(now, from, &entry);
        if graves.is_some_and(|graves| graves == [from]) {
            // It lies there already: with another failure noted it would be another
            // letter of its message. Its reader gets it again after a moment.
            self.recorder.messages_nacked.inc();
            self.retry(now, from, entry, STAYS);
            return;
        }
        let entry = dead_letter(entry, failure.clone());
        // A reader asked for this, so it is kept even where a dead letter of a queue
        // goes to that queue too.
        self.bury_entry(now, from, entry, true, 0);
    }

    /// Puts a message among the dead letters of a queue.
    ///
    /// # Errors
    /// There is no room for it, or the log does not take it.
    pub(super) fn dead_letter_message(
        &mut self,
        now: Timestamp,
        from: &str,
        message: &Arc<Message>,
        marks: &Marks,
    ) -> Result<()> {
        let from_id = self.queue_id(from).unwrap_or(0);
        let name = Topic::new(self.topology.canonical(from))?;
        self.check_room(cost(message))?;
        let failure = match marks.failure.as_deref() {
            Some(failure) => failure.clone(),
            None => Failure::now("dead_lettered", "", &name, None),
        };
        let entry = entry_for(&name, message, &Arc::new(marks.clone()), None);
        let entry = dead_letter(entry, failure);
        let mut copies = self.copies(now, from_id, entry, true, 0).ok_or_else(|| {
            Error::new(
                ErrorCode::DeadLetterFailed,
                "there is no queue for dead letters",
            )
            .at(BrokerType::InMemory)
        })?;
        self.keep(now, None, &mut copies, None)
            .map_err(|refused| refused.error(ErrorCode::DeadLetterFailed))?;
        self.lay(now, copies, 0);
        Ok(())
    }

    pub(super) fn bury(&mut self, now: Timestamp, from: QueueId, dead: Vec<Dead>) {
        for Dead { entry, reason } in dead {
            let topic = entry.message.topic.clone().unwrap_or_default();
            let details = if reason == EXPIRED {
                "the message expired before it was handled"
            } else {
                "the queue was full"
            };
            let mut failure = Failure::now(reason, details, &topic, entry.marks.failure.as_deref());
            failure.last = now;
            let entry = dead_letter(entry, failure);
            self.bury_entry(now, from, entry, false, 0);
        }
    }

    /// Moves a message to the dead letters of `from`. In the log that is one
    /// batch, so that a crash leaves it here or there, never in both or neither.
    fn bury_entry(
        &mut self,
        now: Timestamp,
        from: QueueId,
        mut entry: Entry,
        keep_in_place: bool,
        hops: u8,
    ) {
        let old = entry.record.take();
        // Where nothing can take it, the log keeps it, and it dies there again
        // after a restart.
        let Some(mut copies) = self.copies(now, from, entry, keep_in_place, hops) else {
            return;
        };
        if let Err(refused) = self.keep(now, old, &mut copies, None) {
            // It is here already, so it goes on here. In the log it stays where
            // it was, and dies there again after a crash; whoever is done with
            // the first copy takes that away.
            tracing::warn!("a dead letter is moved in memory only: {}", refused.why());
            if let Some((_, first)) = copies.first_mut() {
                first.record = old;
            }
        }
        self.lay(now, copies, hops);
    }

    /// A dead letter for each queue that it goes to; none when the queue for it
    /// cannot be made.
    fn copies(
        &mut self,
        now: Timestamp,
        from: QueueId,
        mut entry: Entry,
        keep_in_place: bool,
        hops: u8,
    ) -> Option<Vec<(QueueId, Entry)>> {
        self.recorder.messages_dead_lettered.inc();
        entry.deliveries = 0;
        let mut copies = Vec::new();
        for target in self.graves(now, from, &entry)? {
            // What dies by itself in the queue of its own dead letters, or goes
            // round between full queues, ends here, as it does in RabbitMQ.
            if (target == from && !keep_in_place) || hops >= MAX_HOPS {
                tracing::warn!(
                    id = %entry.message.id,
                    "a dead letter that expired, or found no room, is dropped"
                );
                continue;
            }
            let Some(queue) = self.queues.get(&target) else {
                continue;
            };
            let mut copy = entry.clone();
            Arc::make_mut(&mut copy.message).topic = Some(queue.name.as_str().to_owned());
            copies.push((target, copy));
        }
        Some(copies)
    }

    /// Puts dead letters into their queues.
    fn lay(&mut self, now: Timestamp, copies: Vec<(QueueId, Entry)>, hops: u8) {
        for (target, entry) in copies {
            let Some(queue) = self.queues.get_mut(&target) else {
                continue;
            };
            let before = queue.core.bytes();
            let mut dead = Vec::new();
            queue.core.append(now, entry, &mut dead);
            let due = queue.core.next_due();
            self.bytes = self.bytes + queue.core.bytes() - before;
            self.arm(due);
            for Dead { entry, reason } in dead {
                let topic = entry.message.topic.clone().unwrap_or_default();
                let failure = Failure::now(
                    reason,
                    "the queue was full",
                    &topic,
                    entry.marks.failure.as_deref(),
                );
                let entry = dead_letter(entry, failure);
                self.bury_entry(now, target, entry, false, hops + 1);
            }
            self.pump(now, target);
        }
    }

    /// The queues that the dead letters of `from` go to: by its dead-letter
    /// exchange, else, or when that leads nowhere, the topology's queue.
    fn graves(&mut self, now: Timestamp, from: QueueId, entry: &Entry) -> Option<Vec<QueueId>> {
        let by_exchange = self.queues.get(&from).and_then(|queue| {
            let options = queue.core.options();
            let exchange = options.dead_letter_exchange.as_deref()?;
            let key = options
                .dead_letter_routing_key
                .as_deref()
                .or(entry.routing_key.as_deref())
                .unwrap_or(queue.name.as_str());
            routing::route(&self.topology, exchange, key).ok()
        });
        let found: Vec<QueueId> = by_exchange
            .unwrap_or_default()
            .iter()
            .filter_map(|name| self.queue_names.get(name.as_str()).copied())
            .collect();
        if !found.is_empty() {
            return Some(found);
        }
        match self.declare_graveyard(now) {
            Ok(id) => Some(vec![id]),
            Err(error) => {
                tracing::error!(%error, "there is no queue for dead letters; a message is dropped");
                None
            }
        }
    }

    /// The topology's queue for dead letters, made when missing.
    ///
    /// # Errors
    /// As [`State::declare_queue`].
    pub(super) fn declare_graveyard(&mut self, now: Timestamp) -> Result<QueueId> {
        let name = self.topology.dead_letter_queue().to_owned();
        if let Some(id) = self.queue_id(&name) {
            return Ok(id);
        }
        let options = self
            .topology
            .queue(&name)
            .map(|q| q.options.clone())
            .unwrap_or_default();
        self.declare_queue(now, &name, &options)
    }
}

/// The message as it lies among the dead letters. Its expiration is taken off,
/// as AMQP does, or it would be dead there at once; a rest that it asked for is
/// over.
fn dead_letter(mut entry: Entry, failure: Failure) -> Entry {
    let message = Arc::make_mut(&mut entry.message);
    message.state = MessageState::DeadLettered;
    message.error = Some(failure.details.clone());
    message.expiration = None;
    message.redelivered = false;
    if let Some(task) = &mut message.task {
        task.scheduled_at = None;
    }
    Arc::make_mut(&mut entry.marks).failure = Some(Box::new(failure));
    entry
}

/// How long a dead letter rests that its reader would put where it lies already: it is
/// handed out, and refused, again, and not as fast as that goes.
const STAYS: Duration = Duration::from_secs(1);

/// Dead-letterings of one message within one step at most.
const MAX_HOPS: u8 = 8;
