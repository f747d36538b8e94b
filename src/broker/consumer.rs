//! Consumers: the batched way out of a broker.

use std::{fmt, sync::Arc};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::Delivery;
use crate::topic::Pattern;

/// What to read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The work queues of these topics: each message goes to one consumer.
    Queue(Pattern),
    /// The streams of these topics: each group gets each message once; a
    /// reader without a group gets everything from where it starts.
    Stream(Pattern),
}

impl Source {
    /// The pattern.
    #[must_use]
    pub fn pattern(&self) -> &Pattern {
        match self {
            Self::Queue(p) | Self::Stream(p) => p,
        }
    }
}

/// Who holds a failed message until its next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryMode {
    /// The broker: [`super::Verdict::Retry`] is given.
    Broker,
    /// The reader: it calls its handler again in the message's own lane, which
    /// stops only messages of the same key.
    InLane,
}

/// The reader's end of a source. It outlives the broker's restarts: the adapter
/// subscribes again by itself and discards what the dead connection had
/// buffered; settling a delivery of a dead connection fails.
#[derive(Debug)]
pub struct Consumer {
    /// Batches of deliveries; bounded by the subscription's `buffer_size`.
    /// Closed after [`ConsumerControl::stop`], or when the source failed for
    /// good (see [`ConsumerControl::failure`]).
    pub deliveries: mpsc::Receiver<Vec<Delivery>>,
    /// How to stop it and see how it does.
    pub control: ConsumerControl,
    /// Who holds failed messages.
    pub retry: RetryMode,
}

/// Whether a connection is there, and the how-many-th it is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ConnectionState {
    /// Counts connections made; each is a generation.
    pub generation: u64,
    /// Whether it stands.
    pub connected: bool,
    /// Why it does not, as text.
    pub reason: Option<Arc<str>>,
    /// The broker is there but refuses us (credentials, permissions).
    pub refused: bool,
}

/// A handle on a running consumer. Clones are the same consumer.
#[derive(Clone)]
pub struct ConsumerControl {
    stopping: CancellationToken,
    state: watch::Receiver<ConsumerState>,
}

/// Where a consumer stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ConsumerState {
    /// Not subscribed at the broker yet, or not any more; trying.
    #[default]
    Starting,
    /// Subscribed.
    Active,
    /// Stopped, and everything settled or given back.
    Stopped,
    /// Failed for good, with the reason.
    Failed(Arc<str>),
}

/// Reports where a consumer stands, if that is news: watchers wake for a change only.
pub(crate) fn report(to: &watch::Sender<ConsumerState>, now: &ConsumerState) {
    to.send_if_modified(|state| {
        let new = state != now;
        if new {
            state.clone_from(now);
        }
        new
    });
}

/// Reports whether the broker has the subscription.
#[cfg(feature = "kafka")]
pub(crate) fn report_active(to: &watch::Sender<ConsumerState>, active: bool) {
    let now = if active {
        ConsumerState::Active
    } else {
        ConsumerState::Starting
    };
    report(to, &now);
}

impl ConsumerControl {
    /// A control, the token that tells the adapter to stop, and the sender with
    /// which the adapter reports. The adapter sends `Stopped` (or `Failed`)
    /// last, when nothing of the consumer is left.
    #[must_use]
    pub fn new() -> (Self, CancellationToken, watch::Sender<ConsumerState>) {
        let (report, state) = watch::channel(ConsumerState::Starting);
        let stopping = CancellationToken::new();
        (
            Self {
                stopping: stopping.clone(),
                state,
            },
            stopping,
            report,
        )
    }

    /// Asks the source to stop handing out; what was handed out can still be
    /// settled.
    pub fn begin_stop(&self) {
        self.stopping.cancel();
    }

    /// Stops and waits until everything handed out has been settled or given
    /// back. The caller settles or drops what it holds, or this waits for ever.
    ///
    /// # Cancel safety
    /// Dropping the future abandons only the waiting.
    pub async fn stop(&self) {
        self.begin_stop();
        self.ended().await;
    }

    /// Waits until nothing of it is left, because somebody stopped it or because it
    /// failed for good.
    ///
    /// # Cancel safety
    /// Dropping the future abandons only the waiting.
    pub async fn ended(&self) {
        let mut state = self.state.clone();
        // An error means that the adapter's task is gone, which is stopped too.
        let _ = state
            .wait_for(|s| matches!(s, ConsumerState::Stopped | ConsumerState::Failed(_)))
            .await;
    }

    /// Waits until somebody asks the source to stop.
    pub async fn stopping(&self) {
        self.stopping.cancelled().await;
    }

    /// Whether somebody has asked the source to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Whether the broker has the subscription now.
    #[must_use]
    pub fn is_active(&self) -> bool {
        *self.state.borrow() == ConsumerState::Active
    }

    /// Waits until the broker has the subscription; false when it never will.
    pub async fn active(&self) -> bool {
        let mut state = self.state.clone();
        state
            .wait_for(|s| *s != ConsumerState::Starting)
            .await
            .is_ok_and(|s| *s == ConsumerState::Active)
    }

    /// Why it failed for good, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<str>> {
        match &*self.state.borrow() {
            ConsumerState::Failed(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// Where it stands, to be watched.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<ConsumerState> {
        self.state.clone()
    }
}

impl fmt::Debug for ConsumerControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsumerControl")
            .field("state", &*self.state.borrow())
            .finish()
    }
}
