//! Idempotent intake (C14): a publish that brings its own id is accepted once
//! within a window; a repeat joins the one in flight or gets its outcome.

use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use super::{
    intake::{Intake, IntakeWindow, Origin, Ticket},
    lock,
};
use crate::{
    broker::{Outcome, Receipt},
    config::WindowSettings,
    error::{Error, ErrorCode, Result},
    message::{MessageId, Timestamp},
    topic::Topic,
};

type Joiner = oneshot::Sender<Result<Receipt>>;

/// The window of accepted ids.
#[derive(Debug)]
pub(crate) struct Accepted {
    /// Outcomes without their ids: a million receipts would hold a million texts.
    window: Mutex<IntakeWindow<Outcome, Joiner>>,
}

/// What to do with a publish.
pub(super) enum Offer {
    /// Publish it; the outcome is told to `Seen`, where there is one.
    Fresh(Option<Seen>),
    /// It is on its way already.
    Joined(oneshot::Receiver<Result<Receipt>>),
    /// It was accepted before.
    Done(Receipt),
}

/// The duty to tell what became of an accepted id. Dropped untold, the id
/// leaves the window and whoever joined gets an error.
pub(crate) struct Seen {
    accepted: Arc<Accepted>,
    ticket: Option<Ticket>,
    /// Somebody may have sent it by now.
    handed_over: bool,
}

impl Accepted {
    pub(super) fn new(settings: &WindowSettings) -> Self {
        let ids = usize::try_from(settings.ids).unwrap_or(usize::MAX);
        Self {
            window: Mutex::new(IntakeWindow::new(ids, settings.age)),
        }
    }

    /// Asks what to do with a publish.
    ///
    /// # Errors
    /// `TIMEOUT` when too many wait for the same id already.
    pub(super) fn offer(self: &Arc<Self>, topic: &Topic, id: &MessageId) -> Result<Offer> {
        self.offer_in(&mut lock(&self.window), topic, id)
    }

    /// The same for the ids of a batch, as one: of two that bring the same ids at once
    /// one publishes all of them, and the other none.
    pub(super) fn offer_all<'a>(
        self: &Arc<Self>,
        ids: impl Iterator<Item = (&'a Topic, &'a MessageId)>,
    ) -> Vec<Result<Offer>> {
        // No offer is dropped before the lock: that would take it again.
        let mut window = lock(&self.window);
        ids.map(|(topic, id)| self.offer_in(&mut window, topic, id))
            .collect()
    }

    fn offer_in(
        self: &Arc<Self>,
        window: &mut IntakeWindow<Outcome, Joiner>,
        topic: &Topic,
        id: &MessageId,
    ) -> Result<Offer> {
        Ok(
            match window.offer(Timestamp::now(), topic, id, Origin::Caller) {
                Intake::Bypass => Offer::Fresh(None),
                Intake::Done(outcome) => Offer::Done(Receipt {
                    id: id.clone(),
                    outcome,
                }),
                Intake::Fresh(ticket) => Offer::Fresh(Some(Seen {
                    accepted: self.clone(),
                    ticket: Some(ticket),
                    handed_over: false,
                })),
                Intake::InFlight(joining) => {
                    let (tx, rx) = oneshot::channel();
                    // The lock is held since the offer, so only the bound on
                    // joiners can refuse.
                    if window.join(&joining, tx).is_err() {
                        return Err(Error::new(
                            ErrorCode::Timeout,
                            "too many repeats wait for this id already; wait for their answer",
                        )
                        .on(topic.as_str())
                        .with_id(id.as_str()));
                    }
                    Offer::Joined(rx)
                }
            },
        )
    }

    /// Forgets what became of an id, because it was called off.
    pub(super) fn forget(&self, topic: &Topic, id: &MessageId) {
        lock(&self.window).forget(topic, id);
    }

    /// Publishes of an id that had been accepted already.
    pub(super) fn joined(&self) -> u64 {
        lock(&self.window).counts().repeats
    }
}

impl Seen {
    /// From here on, or no longer, it may be sent: dropped untold, nobody knows.
    pub(super) fn hand_over(&mut self, handed_over: bool) {
        self.handed_over = handed_over;
    }

    /// Tells the window, and whoever joined, what became of the publish.
    pub(crate) fn settle(mut self, result: &Result<Receipt>) {
        if let Some(ticket) = self.ticket.take() {
            let outcome = result.as_ref().ok().map(|r| r.outcome.clone());
            let joined = lock(&self.accepted.window).finish(Timestamp::now(), ticket, outcome);
            for joiner in joined {
                // Whoever dropped the future abandoned the answer.
                let _ = joiner.send(result.clone());
            }
        }
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let joined = lock(&self.accepted.window).finish(Timestamp::now(), ticket, None);
            for joiner in joined {
                let _ = joiner.send(Err(if self.handed_over {
                    Error::unknown(
                        ErrorCode::OperationCanceled,
                        "the publish that this repeat had joined was given up while it was under way",
                    )
                } else {
                    Error::new(
                        ErrorCode::PublishFailed,
                        "the publish that this repeat had joined was given up before it was accepted; repeat it",
                    )
                }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Assume;

    #[tokio::test]
    async fn whoever_joined_hears_whether_the_publish_may_have_been_sent() {
        let settings = crate::hub::HubConfig::default().intake_window;
        let accepted = Arc::new(Accepted::new(&settings));
        let topic = Topic::new("t").unwrap();
        for (n, handed_over) in [true, false].into_iter().enumerate() {
            let id = MessageId::new(format!("m{n}")).unwrap();
            let Ok(Offer::Fresh(Some(mut seen))) = accepted.offer(&topic, &id) else {
                panic!("it is new");
            };
            let Ok(Offer::Joined(answer)) = accepted.offer(&topic, &id) else {
                panic!("it is on its way");
            };
            seen.hand_over(true);
            seen.hand_over(handed_over);
            drop(seen);
            let meant = match handed_over {
                true => Assume::Unknown,
                false => Assume::NotSent,
            };
            assert_eq!(answer.await.unwrap().unwrap_err().assume(), meant);
            // And it may be published anew.
            assert!(matches!(accepted.offer(&topic, &id), Ok(Offer::Fresh(_))));
        }
    }
}
