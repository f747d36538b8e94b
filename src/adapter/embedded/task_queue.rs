//! The queue side of the broker's interface.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{EmbeddedBroker, lease};
use crate::{
    broker::{Delivery, QueueOptions, QueueStats, TaskQueueBroker},
    error::{Error, ErrorCode, Result},
    message::{Message, wire::Marks},
    topic::Topic,
};

#[async_trait]
impl TaskQueueBroker for EmbeddedBroker {
    async fn declare_queue(&self, queue: &Topic, options: &QueueOptions) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, now| state.declare_queue(now, queue, options).map(drop))
            .await
    }

    async fn dequeue_task(
        &self,
        queue: &Topic,
        worker_id: &str,
        wait: Duration,
    ) -> Result<Option<Delivery>> {
        lease::check_worker(worker_id)?;
        lease::take_one(&self.shared, queue, worker_id, wait).await
    }

    async fn queue_stats(&self, queue: &Topic) -> Result<QueueStats> {
        self.shared.usable()?;
        self.shared.step(|state, now| {
            let id = state.known_queue(queue)?;
            state.queue_stats(now, id).ok_or_else(|| {
                Error::new(ErrorCode::QueueNotFound, "the queue expired just now")
                    .on(queue.as_str())
            })
        })
    }

    async fn purge_queue(&self, queue: &Topic) -> Result<u64> {
        self.shared.usable()?;
        self.shared
            .durably(|state, now| {
                let id = state.known_queue(queue)?;
                Ok(state.purge_queue(now, id))
            })
            .await
    }

    async fn delete_queue(&self, queue: &Topic) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, _| {
                let id = state.known_queue(queue)?;
                state.delete_queue(id);
                Ok(())
            })
            .await
    }

    async fn dead_letter(&self, queue: &Topic, message: Arc<Message>, marks: Marks) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, now| {
                state
                    .dead_letter_message(now, queue, &message, &marks)
                    .map_err(|e| {
                        Error::new(ErrorCode::DeadLetterFailed, e.message())
                            .on(queue.as_str())
                            .with_id(message.id.as_str())
                    })
            })
            .await
    }
}
