//! What a producer is to do: how many messages, how large, when. It sends
//! nothing itself, so that the hub and the bare clients do the same.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::{
    latency::{Stamp, ns_of},
    pace::{Backlog, Turns},
    payload::Bodies,
};
use crate::{cli::Failure, message::Message};

/// How every run of a scenario is shaped: `PerfTest`'s flags, checked.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// `-x`.
    pub(crate) producers: usize,
    /// `-y`.
    pub(crate) consumers: usize,
    /// `-c`: unconfirmed messages of each producer at most.
    pub(crate) window: usize,
    /// `-q`: unsettled messages of each consumer at most.
    pub(crate) prefetch: u16,
    /// `-A`: messages that a bare consumer acks together.
    pub(crate) ack_every: u64,
    /// `-s`: bytes of a payload.
    pub(crate) size: usize,
    /// `-r`: messages a second of each producer.
    pub(crate) rate: Option<u64>,
    /// `-z`.
    pub(crate) time: Duration,
    /// Runs of each row.
    pub(crate) pairs: usize,
}

/// One run of one producer.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// Which of the run's producers.
    pub(crate) producer: usize,
    pub(crate) producers: usize,
    pub(crate) window: usize,
    pub(crate) rate: Option<u64>,
    pub(crate) started: Instant,
    pub(crate) time: Duration,
    /// Messages at most; a run ends early there.
    pub(crate) most: u64,
    /// Messages between which a number of keys goes round; 0: no key.
    pub(crate) keys: u64,
    pub(crate) bodies: Bodies,
    /// Who gets the messages, where they are waited for.
    pub(crate) backlog: Option<Backlog>,
    /// Ends the run before its time.
    pub(crate) stop: CancellationToken,
    /// Whether every answer is kept by itself.
    pub(crate) traced: bool,
}

impl Load {
    /// The producers' shares of a run that begins now.
    pub(crate) fn split(shape: &Shape, time: Duration, bodies: &Bodies) -> Vec<Self> {
        let started = Instant::now();
        (0..shape.producers)
            .map(|producer| Self {
                producer,
                producers: shape.producers,
                window: shape.window,
                rate: shape.rate,
                started,
                time,
                most: u64::MAX,
                keys: 0,
                bodies: bodies.clone(),
                backlog: None,
                stop: CancellationToken::new(),
                traced: false,
            })
            .collect()
    }

    /// The message that is the producer's `n`th, due at `due`.
    pub(crate) fn message(&self, n: u64, due: Instant) -> Message {
        let message = Message::new(KIND, self.body(n, due)).with_content_type(CONTENT_TYPE);
        match self.key(n) {
            Some(key) => message.with_key(key),
            None => message,
        }
    }

    /// Its payload.
    pub(crate) fn body(&self, n: u64, due: Instant) -> Bytes {
        self.bodies.get(
            n,
            Stamp {
                due_ns: ns_of(due),
                number: self.number(n),
            },
        )
    }

    /// Its number among the messages of all producers.
    pub(crate) fn number(&self, n: u64) -> u64 {
        n * self.producers as u64 + self.producer as u64
    }

    fn key(&self, n: u64) -> Option<String> {
        (self.keys > 0).then(|| format!("key-{}", self.number(n) % self.keys))
    }

    /// When its messages are due.
    pub(crate) fn turns(&self) -> Result<Turns, Failure> {
        Turns::of(self)
    }
}

/// The type of every message.
const KIND: &str = "bench";
/// Media type of every message: the hub's own default.
pub(crate) const CONTENT_TYPE: &str = "application/json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_have_their_size_and_producers_number_apart() {
        let shape = Shape {
            producers: 2,
            consumers: 0,
            window: 1,
            prefetch: 1,
            ack_every: 1,
            size: 40,
            rate: None,
            time: Duration::from_secs(1),
            pairs: 1,
        };
        let bodies = Bodies::new(40, true).unwrap();
        let loads = Load::split(&shape, shape.time, &bodies);
        let numbers: Vec<u64> = loads
            .iter()
            .flat_map(|l| (0..2).map(|n| l.body(n, Instant::now())))
            .map(|body| {
                assert_eq!(body.len(), 40);
                Stamp::read(&body).unwrap().number
            })
            .collect();
        assert_eq!(numbers, [0, 2, 1, 3]);
        assert!(Bodies::new(15, true).is_err());
        assert!(Bodies::new(1, false).is_ok());
    }
}
