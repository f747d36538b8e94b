//! Taking one task at a time: a consumer of one message that lives as long as
//! the wait, and whose delivery is settled by a task of its own.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Notify, mpsc};

use super::{
    consumer::{Port, settle_all},
    queue::ConsumerId,
    shared::{Shared, canceled},
    state::QueueConsumer,
};
use crate::{
    broker::{BrokerType, Delivery},
    error::{Error, ErrorCode, Result},
    topic::{Pattern, Topic},
};

/// Takes one message, waiting up to `wait` for one.
///
/// # Errors
/// `QUEUE_NOT_FOUND`, `SUBSCRIBE_FAILED` when another consumer has the queue
/// exclusively, `OPERATION_CANCELED` when the broker closes meanwhile.
///
/// # Cancel safety
/// A message that was assigned just then goes back to its place.
pub(super) async fn take_one(
    shared: &Arc<Shared>,
    queue: &Topic,
    worker_id: &str,
    wait: Duration,
) -> Result<Option<Delivery>> {
    shared.usable()?;
    let notify = Arc::new(Notify::new());
    let id = shared.step(|state, now| {
        let id = state.known_queue(queue)?;
        let name = state.queues.get(&id).map_or(queue.as_str(), |q| &q.name);
        let pattern = Pattern::new(name)?;
        state.add_queue_consumer(now, QueueConsumer::new(pattern, 1, notify.clone()))
    })?;
    let guard = Waiting {
        shared: shared.clone(),
        id,
        handed_over: false,
    };
    // The first look comes before any wait, so that a wait of zero takes what
    // is ready.
    let mut taken = shared.step(|state, now| state.take_outbox(now, id));
    if taken.is_empty() && !wait.is_zero() {
        tokio::select! {
            biased;
            () = shared.closed.cancelled() => return Err(canceled()),
            () = notify.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
        taken = shared.step(|state, now| state.take_outbox(now, id));
    }
    let Some((tag, mut received)) = taken.pop() else {
        if shared.closed.is_cancelled() {
            return Err(canceled());
        }
        shared.step(|state, _| state.known_queue(queue))?;
        return Ok(None);
    };
    if received.message.task.is_some()
        && let Some(task) = &mut Arc::make_mut(&mut received.message).task
    {
        task.worker_id = Some(worker_id.to_owned());
        task.started_at = Some(shared.now());
    }
    let (settle, settlements) = mpsc::unbounded_channel();
    shared.recorder.messages_received.inc();
    shared.recorder.messages_consumed.inc();
    shared.recorder.touch_receive();
    let delivery = Delivery::new(received, settle, tag);
    guard.hand_over(settlements);
    Ok(Some(delivery))
}

/// Takes the consumer away again, whichever way the wait ends.
struct Waiting {
    shared: Arc<Shared>,
    id: ConsumerId,
    handed_over: bool,
}

impl Waiting {
    /// The message is in the worker's hands: nothing more is assigned, and its
    /// verdict is carried out when it comes.
    fn hand_over(mut self, mut settlements: mpsc::UnboundedReceiver<crate::broker::Settlement>) {
        self.handed_over = true;
        let (shared, id) = (self.shared.clone(), self.id);
        shared.step(|state, now| state.detach_consumer(now, id));
        let by_task = shared.clone();
        shared.tasks.spawn(async move {
            let verdict = tokio::select! {
                () = by_task.closed.cancelled() => None,
                verdict = settlements.recv() => verdict,
            };
            if let Some(verdict) = verdict {
                settle_all(&by_task, Port::Queue(id), &mut vec![verdict]);
            }
            by_task.step(|state, now| state.remove_consumer(now, id));
        });
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.handed_over {
            let id = self.id;
            self.shared
                .step(|state, now| state.remove_consumer(now, id));
        }
    }
}

/// The error of a worker id that says nothing.
pub(super) fn check_worker(worker_id: &str) -> Result<()> {
    if worker_id.is_empty() {
        return Err(Error::rejected(
            ErrorCode::InvalidConfig,
            "the worker id is empty; name the worker that takes the task",
        )
        .at(BrokerType::InMemory));
    }
    Ok(())
}
