//! A place that keeps dead letters: a queue or a log of one broker, looked at and
//! decided in by the same words.

use std::sync::Arc;

use super::{
    DeadLetter, Decision, LetterStatus,
    log::{self, Position, Wanted},
    queue,
};
use crate::{
    broker::{BrokerType, ConsumerControl, Delivery, MessageBroker},
    error::{Error, ErrorCode, Result},
    topic::Topic,
};

/// One place of one broker.
pub(crate) struct Place {
    broker: Arc<dyn MessageBroker>,
    topic: Topic,
    kind: Kind,
}

enum Kind {
    Queue { decided: Topic },
    Log,
}

/// What is in our hands of a letter. Dropped, the letter stays as it is.
pub(super) enum Grip {
    Open(Delivery),
    Decided(Delivery),
    Log(Position),
}

/// What a look at a place brought.
#[derive(Default)]
pub(super) struct Look {
    pub(super) letters: Vec<(DeadLetter, Grip)>,
    pub(super) complete: bool,
    pub(super) controls: Vec<ConsumerControl>,
}

impl Place {
    pub(crate) fn queue(broker: Arc<dyn MessageBroker>, topic: Topic, decided: Topic) -> Self {
        Self {
            broker,
            topic,
            kind: Kind::Queue { decided },
        }
    }

    pub(crate) fn log(broker: Arc<dyn MessageBroker>, topic: Topic) -> Self {
        Self {
            broker,
            topic,
            kind: Kind::Log,
        }
    }

    pub(super) fn broker(&self) -> BrokerType {
        self.broker.broker_type()
    }

    pub(super) fn name(&self) -> &str {
        &self.topic
    }

    /// Takes the wanted letters into our hands.
    ///
    /// # Errors
    /// Why they could not be seen.
    pub(super) async fn look(
        &self,
        wanted: &Wanted<'_>,
        is_queue: &(dyn Fn(&str) -> bool + Send + Sync),
    ) -> Result<Look> {
        if !self.broker.is_connected() {
            let state = self.broker.connection().borrow().clone();
            let why = state.reason.as_deref().unwrap_or("it is not connected");
            return Err(Error::new(ErrorCode::BrokerUnavailable, why.to_owned()).at(self.broker()));
        }
        let Kind::Queue { decided } = &self.kind else {
            let read = log::read(&*self.broker, &self.topic, wanted, is_queue).await?;
            return Ok(Look {
                letters: read
                    .letters
                    .into_iter()
                    .map(|(letter, position)| (letter, Grip::Log(position)))
                    .collect(),
                complete: read.complete,
                controls: Vec::new(),
            });
        };
        let mut look = Look {
            complete: true,
            ..Look::default()
        };
        if wanted.open {
            let taken = queue::take(&*self.broker, &self.topic).await?;
            look.complete &= taken.complete;
            look.controls.extend(taken.controls);
            for delivery in taken.deliveries {
                let letter = DeadLetter::of(delivery.received(), None, is_queue);
                if (wanted.keep)(&letter) {
                    look.letters.push((letter, Grip::Open(delivery)));
                }
            }
        }
        if wanted.decided {
            let taken = queue::take(&*self.broker, decided).await?;
            look.complete &= taken.complete;
            look.controls.extend(taken.controls);
            for delivery in taken.deliveries {
                if let Some(letter) = queue::decided(&delivery).filter(|l| (wanted.keep)(l)) {
                    look.letters.push((letter, Grip::Decided(delivery)));
                }
            }
        }
        Ok(look)
    }

    /// Carries a decision out. The letter is kept with it before it is taken
    /// away, so that a death in between leaves it twice rather than nowhere.
    ///
    /// # Errors
    /// The letter is as it was.
    pub(super) async fn settle(
        &self,
        letter: &DeadLetter,
        grip: Grip,
        decision: Decision,
    ) -> Result<()> {
        match (grip, &self.kind) {
            (Grip::Log(position), _) => {
                log::decide(&*self.broker, &self.topic, position, Some(&decision)).await
            }
            (Grip::Open(delivery) | Grip::Decided(delivery), Kind::Queue { decided }) => {
                let status = decision.status;
                let record = letter.clone().decided(decision);
                match queue::keep(&*self.broker, decided, &record).await {
                    Ok(true) => {}
                    Ok(false) => tracing::warn!(
                        letter = letter.id, queue = %decided,
                        "the queue of decided letters is full; purge it, or this stays in the log only"
                    ),
                    // Its copy is safe, so it goes; a discarded one has none.
                    Err(error) if status == LetterStatus::Processed => {
                        tracing::warn!(letter = letter.id, %error, "a processed letter could not be kept");
                    }
                    Err(error) => return Err(error),
                }
                delivery.ack().await
            }
            (_, Kind::Log) => Ok(()),
        }
    }

    /// Takes a decided letter away for good.
    ///
    /// # Errors
    /// It is still there.
    pub(super) async fn purge(&self, grip: Grip) -> Result<()> {
        match grip {
            Grip::Log(position) => log::decide(&*self.broker, &self.topic, position, None).await,
            Grip::Decided(delivery) => delivery.ack().await,
            // Not decided: dropped, it goes back.
            Grip::Open(_) => Ok(()),
        }
    }
}

impl Look {
    /// Gives back what is still held, and waits until it is.
    pub(super) async fn end(self) {
        drop(self.letters);
        queue::given_back(&self.controls).await;
    }
}
