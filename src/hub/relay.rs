//! Deliveries that are passed on by a task between their source and their reader:
//! the reader's verdict comes to the task first, with what it noted on the
//! delivery. It decides nothing itself.

use std::collections::HashMap;

use tokio::sync::{mpsc, oneshot};

use crate::{
    broker::{Delivery, Received, Settlement, Verdict},
    error::Result,
};

/// Where a delivery came from, and its tag there.
pub(super) type Upstream = (mpsc::UnboundedSender<Settlement>, u64);

/// Deliveries in readers' hands, each with a note of the task's.
pub(super) struct Relay<N> {
    settlements: mpsc::UnboundedSender<Settlement>,
    held: HashMap<u64, (Upstream, N)>,
    next: u64,
}

impl<N> Relay<N> {
    /// A relay, and where verdicts come out. The channel has no bound of its own:
    /// each delivery sends at most once.
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<Settlement>) {
        let (settlements, verdicts) = mpsc::unbounded_channel();
        let relay = Self {
            settlements,
            held: HashMap::new(),
            next: 0,
        };
        (relay, verdicts)
    }

    /// A delivery for the reader. One that nobody waits for is not noted.
    pub(super) fn wrap(&mut self, received: Received, from: Option<Upstream>, note: N) -> Delivery {
        let Some(from) = from else {
            return Delivery::unsettled(received);
        };
        self.next += 1;
        self.held.insert(self.next, (from, note));
        Delivery::new(received, self.settlements.clone(), self.next)
    }

    /// What a verdict is about; none if it was settled before.
    pub(super) fn take(&mut self, tag: u64) -> Option<(Upstream, N)> {
        self.held.remove(&tag)
    }

    /// Whether readers hold nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// Passes a verdict on. Where the source is gone the answer is dropped with it,
/// which tells whoever waits.
pub(super) fn pass(to: &Upstream, verdict: Verdict, done: Option<oneshot::Sender<Result<()>>>) {
    let _ = to.0.send(Settlement {
        tag: to.1,
        verdict,
        done,
    });
}
