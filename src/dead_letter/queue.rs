//! Dead letters in a queue. To be seen they are taken and given back, so what is
//! taken is bounded in number and bytes, and is given back as soon as it was
//! looked at. A message that a quorum queue would soon drop for having come back
//! too often is moved to the queue's end by its adapter; nothing here counts.

use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::{DeadLetter, MOST_BYTES, MOST_DECIDED, MOST_LETTERS};
use crate::{
    broker::{
        Consumer, ConsumerControl, Delivery, MessageBroker, PublishOptions, QueueOptions, Source,
        SubscribeOptions, TaskQueueBroker,
    },
    error::{Error, ErrorCode, Result},
    message::Message,
    topic::{Pattern, Topic},
};

/// Messages in our hands. Dropped, they go back.
pub(super) struct Taken {
    pub(super) deliveries: Vec<Delivery>,
    /// Whether the queue had no more.
    pub(super) complete: bool,
    /// Those that handed them out; they are stopping.
    pub(super) controls: Vec<ConsumerControl>,
}

/// Takes what is in a queue, up to the bounds. A queue that does not exist is
/// empty.
///
/// # Errors
/// Why the broker could not be asked.
///
/// # Cancel safety
/// What was taken goes back.
pub(super) async fn take(broker: &dyn MessageBroker, queue: &Topic) -> Result<Taken> {
    let mut taken = Taken {
        deliveries: Vec::new(),
        complete: true,
        controls: Vec::new(),
    };
    let queues = queues_of(broker, queue)?;
    let depth = match queues.queue_depth(queue).await {
        Ok(depth) => usize::try_from(depth).unwrap_or(usize::MAX),
        Err(e) if e.code() == ErrorCode::QueueNotFound => return Ok(taken),
        Err(e) => return Err(e),
    };
    let source = Source::Queue(Pattern::from(queue));
    let (mut bytes, mut largest) = (0, 0);
    loop {
        let room = room(taken.deliveries.len(), bytes, largest);
        if room == 0 {
            taken.complete = taken.deliveries.len() >= depth;
            return Ok(taken);
        }
        let options = SubscribeOptions {
            prefetch: room,
            buffer_size: usize::from(room),
            ..SubscribeOptions::default()
        };
        let mut consumer = broker.consume(&source, &options).await?;
        let expected = depth.saturating_sub(taken.deliveries.len());
        let got = gather(&mut consumer, usize::from(room), expected, queue).await;
        // What it handed out stays in our hands; it hands out no more.
        consumer.control.begin_stop();
        taken.controls.push(consumer.control.clone());
        let got = got?;
        let full = got.len() >= usize::from(room);
        for delivery in &got {
            let size = delivery.message.size();
            bytes += size;
            largest = largest.max(size);
        }
        taken.deliveries.extend(got);
        if !full {
            return Ok(taken);
        }
    }
}

/// How many more may be taken. The first few tell how large messages are here.
fn room(held: usize, bytes: usize, largest: usize) -> u16 {
    if held == 0 {
        return FIRST;
    }
    let by_bytes = MOST_BYTES.saturating_sub(bytes) / largest.max(1);
    let by_count = MOST_LETTERS.saturating_sub(held);
    u16::try_from(by_bytes.min(by_count)).map_or(MOST_AT_ONCE, |n| n.min(MOST_AT_ONCE))
}

async fn gather(
    consumer: &mut Consumer,
    room: usize,
    expected: usize,
    queue: &Topic,
) -> Result<Vec<Delivery>> {
    let mut got = Vec::new();
    // The broker may be about to lose its connection: then there is no wait for
    // a subscription that comes some day.
    let _ = timeout(SUBSCRIBED, consumer.control.active()).await;
    while got.len() < room {
        // A count may be a moment behind what was given back just before.
        let patience = if got.len() < expected { SLOW } else { QUIET };
        match timeout_at(Instant::now() + patience, consumer.deliveries.recv()).await {
            Ok(Some(batch)) => got.extend(batch),
            Ok(None) => {
                let why = consumer.control.failure();
                let why = why.as_deref().unwrap_or("the broker ended the consumer");
                return Err(Error::new(
                    ErrorCode::ConsumeFailed,
                    format!("the dead letters could not be looked at: {why}"),
                )
                .on(queue.as_str()));
            }
            Err(_) => break,
        }
    }
    Ok(got)
}

/// Waits until everything that was not settled has gone back.
pub(super) async fn given_back(controls: &[ConsumerControl]) {
    for control in controls {
        if timeout(GIVING_BACK, control.stop()).await.is_err() {
            tracing::warn!("dead letters that were looked at are still on their way back");
        }
    }
}

/// Keeps what was decided. False: there is no room, it is only logged.
///
/// # Errors
/// Why it could not be kept.
pub(super) async fn keep(
    broker: &dyn MessageBroker,
    decided: &Topic,
    letter: &DeadLetter,
) -> Result<bool> {
    let queues = queues_of(broker, decided)?;
    match queues.queue_depth(decided).await {
        Ok(depth) if depth >= MOST_DECIDED => return Ok(false),
        Ok(_) => {}
        Err(e) if e.code() == ErrorCode::QueueNotFound => {
            let options = QueueOptions::default();
            queues.declare_queue(decided, &options).await?;
        }
        Err(e) => return Err(e),
    }
    let record = Message::json(RECORD, letter)?;
    let options = PublishOptions {
        timeout: KEEPING,
        ..PublishOptions::default()
    };
    broker.publish(decided, record, &options).await?;
    Ok(true)
}

/// A letter from the record of its decision; none when it is no such record.
pub(super) fn decided(delivery: &Delivery) -> Option<DeadLetter> {
    if delivery.message.kind != RECORD {
        return None;
    }
    serde_json::from_slice(&delivery.message.payload).ok()
}

fn queues_of<'a>(broker: &'a dyn MessageBroker, queue: &Topic) -> Result<&'a dyn TaskQueueBroker> {
    broker.task_queue().ok_or_else(|| {
        Error::rejected(ErrorCode::InvalidConfig, "this broker has no queues")
            .at(broker.broker_type())
            .on(queue.as_str())
    })
}

/// Messages of the first look, before anything is known of their size.
const FIRST: u16 = 32;

/// Messages that one consumer holds at most.
const MOST_AT_ONCE: u16 = 1_000;

/// How long a subscription may take.
const SUBSCRIBED: Duration = Duration::from_secs(2);

/// How long messages that should be there are waited for.
const SLOW: Duration = Duration::from_secs(2);

/// How long nothing must come for the queue to count as empty.
const QUIET: Duration = Duration::from_millis(80);

/// How long giving back may take.
const GIVING_BACK: Duration = Duration::from_secs(5);

/// How long keeping a decision may take.
const KEEPING: Duration = Duration::from_secs(10);

/// The type of a record of a decided letter.
const RECORD: &str = "hub.dead-letter";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_bounded_in_number_and_bytes() {
        assert_eq!(room(0, 0, 0), FIRST);
        assert_eq!(room(32, 32 * 100, 100), MOST_AT_ONCE);
        assert_eq!(room(MOST_LETTERS - 7, 100, 100), 7);
        assert_eq!(room(MOST_LETTERS, 100, 100), 0);
        let mib = 1024 * 1024;
        assert_eq!(room(6, 60 * mib, 2 * mib), 2);
        assert_eq!(room(6, 64 * mib, 10 * mib), 0);
    }
}
