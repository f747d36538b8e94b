//! The hub's own dead letters: what expired in the spool and what the primary
//! refused while it was drained. They go to the embedded broker's dead-letter
//! queue, by one task, in order.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use futures_util::future::join_all;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use super::lane::keeper::Release;
use crate::{
    broker::{MessageBroker, Settlement, Verdict},
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

/// With so many on their way no lane reads more of its spool: a long spool may
/// have expired as a whole. What a lane has in memory may still come on top.
const ENOUGH: usize = 4_096;

impl DeadLetters {
    /// Starts the task; it ends when every clone is gone.
    pub(crate) fn start(broker: Arc<dyn MessageBroker>) -> (Self, JoinHandle<()>) {
        // Lanes hand over without waiting; `room` holds them back before they
        // come to have more.
        let (letters, mut rx) = mpsc::unbounded_channel::<Letter>();
        let waiting = Arc::new(Waiting::default());
        let done = waiting.clone();
        let task = tokio::spawn(async move {
            let mut turn = Vec::with_capacity(TURN);
            while rx.recv_many(&mut turn, TURN).await > 0 {
                let count = turn.len();
                join_all(turn.drain(..).map(|letter| keep(&*broker, letter))).await;
                done.count.fetch_sub(count, Relaxed);
                done.fewer.notify_waiters();
            }
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

async fn keep(broker: &dyn MessageBroker, letter: Letter) {
    let Letter {
        topic,
        message,
        marks,
        then,
    } = letter;
    let reason = marks.failure.as_ref().map_or("", |f| f.reason.as_str());
    let (id, reason) = (message.id.clone(), reason.to_owned());
    let kept = match broker.task_queue() {
        Some(queues) => queues.dead_letter(&topic, message, marks).await,
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
        }
        Err(error) => {
            tracing::error!(%topic, %id, reason, %error, "a dead letter could not be kept");
            then.failed();
        }
    }
}
