//! The hub's own dead letters: what expired in the spool and what the primary
//! refused while it was drained. They go to the embedded broker's dead-letter
//! queue, by one task, in order.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::Instant,
};

use super::{close::Left, lane::keeper::Release};
use crate::{
    broker::{MessageBroker, Settlement, Verdict},
    error::ErrorCode,
    message::{Message, wire::Marks},
    topic::Topic,
};

struct Letter {
    topic: Topic,
    message: Arc<Message>,
    /// With the failure.
    marks: Marks,
    /// What is to be done once the letter is safe, or cannot be kept.
    then: Then,
    /// It was said already that it cannot be kept.
    told: bool,
}

/// What the letter's lane waits for.
enum Then {
    /// The message is still kept in the spool until the letter is safe.
    Release(Option<Release>),
    /// The letter is a copy, for one group: the lane is told whether the group
    /// has settled the message or has to get it again.
    Settle(mpsc::UnboundedSender<Settlement>, u64),
}

/// Takes dead letters from the lanes. Clones feed the same task.
#[derive(Clone)]
pub(crate) struct DeadLetters {
    letters: mpsc::UnboundedSender<Letter>,
    waiting: Arc<Waiting>,
}

/// How many letters are on their way.
#[derive(Default)]
struct Waiting {
    count: AtomicUsize,
    fewer: Notify,
}

/// Letters that are written at a time, with one sync for all.
const TURN: usize = 256;

/// Between two tries to keep letters for which there was no room.
const AGAIN: Duration = Duration::from_secs(1);

/// With so many on their way no lane reads more of its spool: a long spool may
/// have expired as a whole. What a lane has in memory may still come on top.
const ENOUGH: usize = 4_096;

impl DeadLetters {
    /// Starts the task; it ends when every clone is gone. A spooled message whose letter
    /// cannot be kept now (no room, a disk that fails) is tried again until then: it
    /// is in no lane any more. What cannot be kept until the end is told.
    pub(crate) fn start(broker: Arc<dyn MessageBroker>) -> (Self, JoinHandle<Left>) {
        // Lanes hand over without waiting; `room` holds them back before they
        // come to have more.
        let (letters, mut rx) = mpsc::unbounded_channel::<Letter>();
        let waiting = Arc::new(Waiting::default());
        let done = waiting.clone();
        let task = tokio::spawn(async move {
            let mut turn = Vec::with_capacity(TURN);
            let mut stuck: VecDeque<Letter> = VecDeque::new();
            let mut again = Instant::now();
            loop {
                tokio::select! {
                    came = rx.recv_many(&mut turn, TURN) => {
                        if came == 0 {
                            break;
                        }
                    }
                    () = tokio::time::sleep_until(again), if !stuck.is_empty() => {
                        turn.extend(stuck.drain(..stuck.len().min(TURN)));
                        again = Instant::now() + AGAIN;
                    }
                }
                let count = turn.len();
                let kept = turn.drain(..).map(|letter| keep(&*broker, letter));
                let back: Vec<Letter> = join_all(kept).await.into_iter().flatten().collect();
                done.count.fetch_sub(count - back.len(), Relaxed);
                done.fewer.notify_waiters();
                if stuck.is_empty() {
                    again = Instant::now() + AGAIN;
                }
                // Counted on: with many of them no lane reads more of its spool.
                stuck.extend(back);
            }
            let mut left = Left::default();
            let last = stuck.drain(..).map(|letter| keep(&*broker, letter));
            for letter in join_all(last).await.into_iter().flatten() {
                match letter.then {
                    Then::Release(Some(_)) => left.kept += 1,
                    _ => left.in_memory += 1,
                }
            }
            left
        });
        (Self { letters, waiting }, task)
    }

    /// Waits while many letters are on their way.
    ///
    /// Cancel safe.
    pub(crate) async fn room(&self) {
        loop {
            // Listening begins before the look, or the last one that is written
            // in between would be told to nobody.
            let mut fewer = pin!(self.waiting.fewer.notified());
            fewer.as_mut().enable();
            if self.waiting.count.load(Relaxed) < ENOUGH {
                return;
            }
            tokio::select! {
                () = fewer => {}
                // Nobody writes any more.
                () = self.letters.closed() => return,
            }
        }
    }

    pub(crate) fn bury(
        &self,
        topic: &Topic,
        message: Arc<Message>,
        marks: Marks,
        release: Option<Release>,
    ) {
        self.send(Letter {
            topic: topic.clone(),
            message,
            marks,
            then: Then::Release(release),
            told: false,
        });
    }

    /// Keeps a copy of a message that stays where it is, and then settles it
    /// under its tag: acked, or given back when no copy could be kept.
    pub(crate) fn copy(
        &self,
        topic: &Topic,
        message: Arc<Message>,
        marks: Marks,
        settlements: &mpsc::UnboundedSender<Settlement>,
        tag: u64,
    ) {
        self.send(Letter {
            topic: topic.clone(),
            message,
            marks,
            then: Then::Settle(settlements.clone(), tag),
            told: false,
        });
    }

    fn send(&self, letter: Letter) {
        self.waiting.count.fetch_add(1, Relaxed);
        if let Err(mpsc::error::SendError(letter)) = self.letters.send(letter) {
            self.waiting.count.fetch_sub(1, Relaxed);
            tracing::error!(topic = %letter.topic, id = %letter.message.id, "the dead-letter task is gone");
            letter.then.failed();
        }
    }
}

impl Then {
    fn kept(self) -> crate::Result<()> {
        match self {
            Self::Release(release) => release.map_or(Ok(()), Release::done),
            Self::Settle(settlements, tag) => {
                settle(&settlements, tag, Verdict::Ack);
                Ok(())
            }
        }
    }

    fn failed(self) {
        if let Self::Settle(settlements, tag) = self {
            settle(&settlements, tag, Verdict::Requeue);
        }
    }
}

fn settle(settlements: &mpsc::UnboundedSender<Settlement>, tag: u64, verdict: Verdict) {
    // A lane that is gone has let go of what it had handed out.
    let _ = settlements.send(Settlement {
        tag,
        verdict,
        done: None,
    });
}

/// Gives back a letter that is to be tried again.
async fn keep(broker: &dyn MessageBroker, letter: Letter) -> Option<Letter> {
    let Letter {
        topic,
        message,
        marks,
        then,
        told,
    } = letter;
    let reason = marks.failure.as_ref().map_or("", |f| f.reason.as_str());
    let (id, reason) = (message.id.clone(), reason.to_owned());
    let queues = broker.task_queue();
    let kept = match queues {
        Some(queues) => {
            queues
                .dead_letter(&topic, message.clone(), marks.clone())
                .await
        }
        None => Err(crate::Error::new(
            crate::ErrorCode::DeadLetterFailed,
            "the fallback keeps no queues, and so no dead letters",
        )),
    };
    match kept {
        Ok(()) => {
            if let Err(error) = then.kept() {
                tracing::error!(%topic, %id, %error, "the spool still keeps a dead letter");
            }
            tracing::warn!(%topic, %id, reason, "a spooled message went to the hub's dead letters");
            None
        }
        Err(error) => {
            if !told {
                tracing::error!(%topic, %id, reason, %error, "a dead letter could not be kept");
            }
            let closed = error.code() == ErrorCode::OperationCanceled;
            if matches!(then, Then::Release(_)) && queues.is_some() && !closed {
                return Some(Letter {
                    topic,
                    message,
                    marks,
                    then,
                    told: true,
                });
            }
            then.failed();
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
        broker::{PublishOptions, TaskQueueBroker},
        topology::Topology,
    };

    #[tokio::test(start_paused = true)]
    async fn a_letter_without_room_is_tried_until_there_is_some_and_else_counted() {
        let config = EmbeddedConfig {
            max_bytes: 4096,
            ..EmbeddedConfig::default()
        };
        let broker = EmbeddedBroker::new(config, Arc::new(Topology::default()));
        broker.connect().await.unwrap();
        let (full, dlq) = (
            Topic::new("tasks.full").unwrap(),
            Topic::new("helixagent.dlq").unwrap(),
        );
        let fill = async || {
            let message = || Message::new("t", "x");
            while broker
                .publish(&full, message(), &PublishOptions::default())
                .await
                .is_ok()
            {}
        };
        fill().await;
        let (letters, task) = DeadLetters::start(broker.clone());
        let bury = || {
            let message = Arc::new(Message::new("t", "expired"));
            letters.bury(&full, message, Marks::default(), None);
        };
        bury();
        tokio::time::sleep(AGAIN * 3).await;
        assert_eq!(broker.queue_depth(&dlq).await.unwrap_or(0), 0);
        broker.purge_queue(&full).await.unwrap();
        tokio::time::sleep(AGAIN * 3).await;
        assert_eq!(broker.queue_depth(&dlq).await.unwrap(), 1);
        // Without any it is said at the end.
        fill().await;
        bury();
        drop(letters);
        let left = Left {
            in_memory: 1,
            kept: 0,
        };
        assert_eq!(task.await.unwrap(), left);
        broker.close().await.unwrap();
    }
}
