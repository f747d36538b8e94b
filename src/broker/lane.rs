//! Publishing lanes: the pipelined way into a broker.
//!
//! A [`Lane`] stands for one generation of one publishing channel. It is owned
//! by one task of the adapter and fed by one task of the hub. Every submission
//! gets exactly one [`Confirmation`], also when the generation ends: then the
//! adapter answers for each message whether it was written ([`Fate::Unknown`])
//! or not ([`Fate::Unsent`]), in order, and closes the confirmation channel. A
//! closed lane never comes back; the owner opens another.
//!
//! Dropping the lane ends the generation: the adapter stops writing and closes
//! its channel; what was in flight may still arrive at the broker.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{Position, options::Compression};
use crate::{
    error::Error,
    message::{Key, Message, wire::Marks},
};

/// What order is kept by: the key, or, without one, the publisher.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum OrderKey {
    /// The message's own key.
    Key(Key),
    /// A publisher, by its number in this process.
    Publisher(u64),
}

/// One message on its way to a lane.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Chosen by the submitter, given back in the confirmation.
    pub token: u64,
    /// The message.
    pub message: Arc<Message>,
    /// What order is kept by.
    pub order: OrderKey,
    /// What the hub notes on it.
    pub marks: Marks,
    /// False: answered [`Fate::Confirmed`] once written, without asking.
    pub confirm: bool,
}

/// The answer to one submission.
#[derive(Clone, Debug)]
pub struct Confirmation {
    /// The submission's token.
    pub token: u64,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a submission.
#[derive(Clone, Debug)]
pub enum Fate {
    /// The broker has it, as durable as it makes it.
    Confirmed(Option<Position>),
    /// The broker looked at it and refused it; it is not stored. Trying the
    /// same again is pointless (unroutable, too large, 403/404/406, unknown topic).
    Refused(Error),
    /// The broker is overloaded; it is not stored, try again later (nack of a
    /// full queue, NOT_ENOUGH_REPLICAS, local queue full).
    Overloaded(Error),
    /// Written, never answered; it may be stored.
    Unknown(Error),
    /// Never written; it is not stored.
    Unsent(Error),
}

/// What a topic is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicKind {
    /// Each message goes to one consumer.
    Queue,
    /// Each group reads all of it.
    Stream,
}

/// Settings of a lane.
#[derive(Clone, Debug)]
pub struct LaneOptions {
    /// Most messages in flight; the submitter keeps to it. Default 1000.
    pub window: usize,
    /// Ask for a confirm of each message. Default true.
    pub confirm: bool,
    /// Refuse what no queue takes. Default true.
    pub mandatory: bool,
    /// Compression of what is written. Default: the broker's setting.
    pub compression: Option<Compression>,
    /// AMQP: publish to this exchange with this routing key instead of where
    /// the topology maps the topic.
    pub address: Option<(String, String)>,
    /// What the topic is where neither the topology nor the broker knows it.
    /// Default: what the broker takes it for.
    pub kind: Option<TopicKind>,
    /// How long an opened lane may take to be ready. Default 10 s.
    pub open_timeout: Duration,
}

impl Default for LaneOptions {
    fn default() -> Self {
        Self {
            window: 1000,
            confirm: true,
            mandatory: true,
            compression: None,
            address: None,
            kind: None,
            open_timeout: Duration::from_secs(10),
        }
    }
}

/// The submitter's end of a lane.
#[derive(Debug)]
pub struct Lane {
    /// Takes batches; bounded at [`Lane::BATCHES`]. Closed when the generation
    /// has ended.
    pub submissions: mpsc::Sender<Vec<Submission>>,
    /// Gives confirmations, in any order; at most a window of them wait.
    /// Closed, after the last answer, when the generation has ended.
    pub confirmations: mpsc::Receiver<Confirmation>,
}

/// The adapter's end of a lane.
#[derive(Debug)]
pub struct LanePort {
    /// Batches to write.
    pub submissions: mpsc::Receiver<Vec<Submission>>,
    /// Where answers go. With a submitter that keeps to the window `try_send`
    /// always finds room, so that callbacks which must not wait can answer.
    pub confirmations: mpsc::Sender<Confirmation>,
}

impl Lane {
    /// Batches that may wait before the adapter takes them up.
    pub const BATCHES: usize = 16;

    /// Both ends of a new lane.
    #[must_use]
    pub fn pair(options: &LaneOptions) -> (Self, LanePort) {
        let (submissions, from_submitter) = mpsc::channel(Self::BATCHES);
        let (to_submitter, confirmations) = mpsc::channel(options.window.max(1));
        (
            Self {
                submissions,
                confirmations,
            },
            LanePort {
                submissions: from_submitter,
                confirmations: to_submitter,
            },
        )
    }
}
