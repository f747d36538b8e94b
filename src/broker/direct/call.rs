//! One call of `publish_batch` and its messages: who answers, and exactly what
//! may be said of each when time is up.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicU8,
            Ordering::{AcqRel, Acquire},
        },
    },
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use crate::{
    broker::{BrokerType, Fate, OrderKey, Outcome, PublishOptions, Receipt},
    error::{Assume, Error, ErrorCode, Result},
    message::{Message, MessageId},
    topic::Topic,
};

/// Answers on their way to the caller: which message, and its outcome. As many
/// fit as the call has messages, so giving one never waits.
pub(super) type Answers = mpsc::Receiver<(usize, Result<Receipt>)>;

/// What the messages of a call have in common.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) via: BrokerType,
    pub(super) confirm: bool,
    pub(super) batch_size: usize,
    pub(super) linger: Duration,
    pub(super) deadline: Instant,
    timeout: Duration,
    topic: Topic,
    ids: Vec<MessageId>,
    /// Where each message stands. The lane's task turns WAITING into WRITTEN,
    /// the caller whose time is up turns it into ABANDONED; whoever comes first
    /// decides, so that "not sent" is never said of what is written after.
    states: Box<[AtomicU8]>,
    reply: mpsc::Sender<(usize, Result<Receipt>)>,
}

/// A message of a call on its way through a lane.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) call: Arc<Call>,
    pub(super) message: Arc<Message>,
    pub(super) order: OrderKey,
    index: usize,
}

impl Call {
    pub(super) fn new(
        ids: Vec<MessageId>,
        options: &PublishOptions,
        via: BrokerType,
        topic: &Topic,
        deadline: Instant,
    ) -> (Arc<Self>, Answers) {
        let (reply, answers) = mpsc::channel(ids.len().max(1));
        let call = Self {
            via,
            confirm: options.confirm,
            batch_size: options.batch_size.max(1),
            linger: options.linger,
            deadline,
            timeout: options.timeout,
            topic: topic.clone(),
            states: ids.iter().map(|_| AtomicU8::new(WAITING)).collect(),
            ids,
            reply,
        };
        (Arc::new(call), answers)
    }

    /// Time is up for a message without an answer.
    pub(super) fn give_up(&self, index: usize) -> Error {
        let limit = crate::duration::format(self.timeout);
        if self.change(index, ABANDONED) {
            self.error(
                index,
                Error::new(
                    ErrorCode::Timeout,
                    format!("it was not written within {limit}; it was not sent, so it can be published again"),
                ),
            )
        } else {
            self.error(
                index,
                Error::unknown(
                    ErrorCode::PublishTimeout,
                    format!("the broker did not answer within {limit}; it may have the message"),
                ),
            )
        }
    }

    fn change(&self, index: usize, to: u8) -> bool {
        self.states
            .get(index)
            .is_some_and(|s| s.compare_exchange(WAITING, to, AcqRel, Acquire).is_ok())
    }

    fn error(&self, index: usize, error: Error) -> Error {
        let error = error.at(self.via).on(self.topic.as_str());
        match self.ids.get(index) {
            Some(id) => error.with_id(id.as_str()),
            None => error,
        }
    }
}

impl Job {
    pub(super) fn new(
        call: Arc<Call>,
        index: usize,
        message: Arc<Message>,
        order: OrderKey,
    ) -> Self {
        Self {
            call,
            message,
            order,
            index,
        }
    }

    /// Marks it as written. False: its caller was told that it is not sent, so
    /// it must not be written any more.
    pub(super) fn claim(&self) -> bool {
        self.call.change(self.index, WRITTEN)
    }

    /// Answers with what became of it.
    pub(super) fn resolve(self, fate: Fate) {
        let via = self.call.via;
        let result = match fate {
            Fate::Confirmed(position) => Ok(Receipt {
                id: self.message.id.clone(),
                outcome: if self.call.confirm {
                    Outcome::Delivered { via, position }
                } else {
                    Outcome::Sent { via }
                },
            }),
            Fate::Refused(error) => Err(error.assuming(Assume::Rejected)),
            Fate::Overloaded(error) | Fate::Unsent(error) => Err(error.assuming(Assume::NotSent)),
            Fate::Unknown(error) => Err(error.assuming(Assume::Unknown)),
        };
        self.answer(result);
    }

    /// Answers. A caller that has gone does not mind.
    pub(super) fn answer(self, result: Result<Receipt>) {
        let result = result.map_err(|e| self.call.error(self.index, e));
        let _ = self.call.reply.try_send((self.index, result));
    }
}

/// In the intake or waiting in the lane's task.
const WAITING: u8 = 0;
/// Handed to the lane.
const WRITTEN: u8 = 1;
/// Given up by its caller before it was written.
const ABANDONED: u8 = 2;
