//! The hub's own dead letters: what expired in the spool and what the primary
//! refused while it was drained. They go to the embedded broker's dead-letter
//! queue, by one task, in order.

use std::sync::Arc;

use tokio::{sync::mpsc, task::JoinHandle};

use super::lane::keeper::Release;
use crate::{
    broker::MessageBroker,
    message::{Message, wire::Failure},
    topic::Topic,
};

struct Letter {
    topic: Topic,
    message: Arc<Message>,
    failure: Failure,
    /// What is still kept in the spool until the letter is safe.
    release: Option<Release>,
}

/// Takes dead letters from the lanes. Clones feed the same task.
#[derive(Clone)]
pub(crate) struct DeadLetters(mpsc::UnboundedSender<Letter>);

impl DeadLetters {
    /// Starts the task; it ends when every clone is gone.
    pub(crate) fn start(broker: Arc<dyn MessageBroker>) -> (Self, JoinHandle<()>) {
        // No bound of its own: only spooled messages come here, each once, so
        // the spool's budget is the bound.
        let (tx, mut rx) = mpsc::unbounded_channel::<Letter>();
        let task = tokio::spawn(async move {
            while let Some(letter) = rx.recv().await {
                let reason = letter.failure.reason.clone();
                let id = letter.message.id.clone();
                let topic = letter.topic.clone();
                let done = match broker.task_queue() {
                    Some(queues) => {
                        queues
                            .dead_letter(&letter.topic, letter.message, letter.failure)
                            .await
                    }
                    None => Err(crate::Error::new(
                        crate::ErrorCode::DeadLetterFailed,
                        "the fallback keeps no queues, and so no dead letters",
                    )),
                };
                match done {
                    Ok(()) => {
                        if let Some(Err(error)) = letter.release.map(Release::done) {
                            tracing::error!(%topic, %id, %error, "the spool still keeps a dead letter");
                        }
                        tracing::warn!(%topic, %id, reason, "a spooled message went to the hub's dead letters");
                    }
                    Err(error) => {
                        tracing::error!(%topic, %id, reason, %error, "a dead letter could not be kept");
                    }
                }
            }
        });
        (Self(tx), task)
    }

    pub(crate) fn bury(
        &self,
        topic: &Topic,
        message: Arc<Message>,
        failure: Failure,
        release: Option<Release>,
    ) {
        let letter = Letter {
            topic: topic.clone(),
            message,
            failure,
            release,
        };
        if let Err(mpsc::error::SendError(letter)) = self.0.send(letter) {
            tracing::error!(topic = %letter.topic, id = %letter.message.id, "the dead-letter task is gone");
        }
    }
}
