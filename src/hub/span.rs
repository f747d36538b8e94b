//! A consumer that spans a primary broker and the spool: one stream of
//! deliveries, each message once for its group, settled where it came from.
//!
//! ```text
//!   primary consumer --.
//!                       >--- span (dedup) ---> reader
//!   lanes (spool)    --'        <--- verdicts
//! ```

use std::{collections::HashMap, sync::Arc};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    group::{Group, Lease, Taken},
    lane::task::{Reader, Readers},
};
use crate::broker::{
    ConnectionState, Consumer, ConsumerControl, Delivery, Received, Settlement, Verdict,
    consumer::ConsumerState,
};

/// What a span needs.
pub(crate) struct Parts {
    pub(crate) primary: Consumer,
    pub(crate) connection: watch::Receiver<ConnectionState>,
    /// Where spooled messages come from, with what must be done to end that.
    pub(crate) local: Option<Local>,
    pub(crate) group: Arc<Group>,
    /// Batches that wait for the reader at most.
    pub(crate) buffer: usize,
}

/// A reader that is registered with the lanes.
pub(crate) struct Local {
    pub(crate) id: u64,
    pub(crate) deliveries: mpsc::Receiver<Vec<Delivery>>,
    pub(crate) registry: Arc<watch::Sender<Readers>>,
}

impl Drop for Local {
    fn drop(&mut self) {
        let id = self.id;
        self.registry.send_modify(|list| {
            *list = Arc::new(list.iter().filter(|r| r.id != id).cloned().collect());
        });
    }
}

impl Local {
    /// Registers a reader of spooled messages.
    pub(crate) fn register(
        registry: &Arc<watch::Sender<Readers>>,
        id: u64,
        pattern: crate::topic::Pattern,
        limit: usize,
        buffer: usize,
    ) -> Self {
        let (tx, deliveries) = mpsc::channel(buffer.max(1));
        let reader = Arc::new(Reader {
            id,
            pattern,
            deliveries: tx,
            limit,
        });
        registry.send_modify(|list| {
            let mut new: Vec<Arc<Reader>> = list.to_vec();
            new.push(reader);
            *list = Arc::new(new);
        });
        Self {
            id,
            deliveries,
            registry: registry.clone(),
        }
    }
}

/// Starts a span; the returned future is its task, to be spawned by an owner.
pub(crate) fn start(parts: Parts) -> (Consumer, impl Future<Output = ()> + Send + 'static) {
    let (control, stopping, report) = ConsumerControl::new();
    let (out, deliveries) = mpsc::channel(parts.buffer.max(1));
    let (settlements, verdicts) = mpsc::unbounded_channel();
    let retry = parts.primary.retry;
    let task = Span {
        parts,
        out: Some(out),
        settlements,
        held: HashMap::new(),
        next: 0,
        stopping,
        report,
    };
    (
        Consumer {
            deliveries,
            control,
            retry,
        },
        task.run(verdicts),
    )
}

struct Held {
    upstream: (mpsc::UnboundedSender<Settlement>, u64),
    lease: Option<Lease>,
}

struct Span {
    parts: Parts,
    out: Option<mpsc::Sender<Vec<Delivery>>>,
    settlements: mpsc::UnboundedSender<Settlement>,
    held: HashMap<u64, Held>,
    next: u64,
    stopping: CancellationToken,
    report: watch::Sender<ConsumerState>,
}

/// Verdicts taken up in one turn.
const TURN: usize = 256;

impl Span {
    async fn run(mut self, mut verdicts: mpsc::UnboundedReceiver<Settlement>) {
        let mut primary_state = self.parts.primary.control.watch();
        let mut pending: Vec<Delivery> = Vec::new();
        let mut settled: Vec<Settlement> = Vec::with_capacity(TURN);
        let mut primary_open = true;
        loop {
            self.show_state(&primary_state.borrow_and_update());
            let want = pending.is_empty() && self.out.is_some();
            tokio::select! {
                biased;
                n = verdicts.recv_many(&mut settled, TURN) => {
                    debug_assert!(n > 0, "the span holds a sender itself");
                    for s in settled.drain(..) {
                        self.settle(s);
                    }
                }
                () = self.stopping.cancelled(), if self.out.is_some() => {
                    // What the reader has not got is given back by being
                    // dropped; what it has can still be settled.
                    self.out = None;
                    pending.clear();
                    self.parts.primary.control.begin_stop();
                    self.parts.local = None;
                    self.parts.primary.deliveries.close();
                    while self.parts.primary.deliveries.try_recv().is_ok() {}
                }
                sent = hand_over(&self.out, &mut pending), if !pending.is_empty() => {
                    if !sent {
                        // The reader dropped its end without a word.
                        self.stopping.cancel();
                    }
                }
                // Noticed also while nothing arrives: an abandoned reader must
                // not go on holding a subscription that takes from others.
                () = abandoned(&self.out), if self.out.is_some() => self.stopping.cancel(),
                batch = self.parts.primary.deliveries.recv(), if want && primary_open => {
                    match batch {
                        Some(batch) => pending = self.take(batch),
                        None => {
                            primary_open = false;
                            if let Some(why) = self.parts.primary.control.failure() {
                                let _ = self.report.send(ConsumerState::Failed(why));
                                self.out = None;
                                self.parts.local = None;
                            }
                        }
                    }
                }
                Some(batch) = receive(&mut self.parts.local), if want => {
                    pending = self.take(batch);
                }
                Ok(()) = primary_state.changed() => {}
                Ok(()) = self.parts.connection.changed() => {}
            }
            if self.out.is_none() && self.held.is_empty() {
                break;
            }
        }
        self.parts.primary.control.stop().await;
        self.report.send_if_modified(|s| {
            if matches!(s, ConsumerState::Failed(_)) {
                false
            } else {
                *s = ConsumerState::Stopped;
                true
            }
        });
    }

    /// With the primary away, a subscription that reads the spool is live.
    fn show_state(&self, primary: &ConsumerState) {
        if self.out.is_none() {
            return;
        }
        let away = !self.parts.connection.borrow().connected;
        let now = match primary {
            ConsumerState::Starting if away && self.parts.local.is_some() => ConsumerState::Active,
            ConsumerState::Stopped => return,
            other => other.clone(),
        };
        self.report.send_if_modified(|s| {
            let new = *s != now;
            *s = now;
            new
        });
    }

    /// Lets each message of a batch through once.
    fn take(&mut self, batch: Vec<Delivery>) -> Vec<Delivery> {
        let mut out = Vec::with_capacity(batch.len());
        for delivery in batch {
            if let Taken::New(delivery, lease) = self.parts.group.take_in(delivery) {
                let (received, upstream) = delivery.into_parts();
                out.push(self.wrap(received, upstream, lease));
            }
        }
        out
    }

    fn wrap(
        &mut self,
        received: Received,
        upstream: Option<(mpsc::UnboundedSender<Settlement>, u64)>,
        lease: Option<Lease>,
    ) -> Delivery {
        match upstream {
            Some(upstream) => {
                let tag = self.next;
                self.next += 1;
                self.held.insert(tag, Held { upstream, lease });
                Delivery::new(received, self.settlements.clone(), tag)
            }
            None => {
                // Live reading without a group: handing out is all there is.
                if let Some(lease) = lease {
                    self.parts.group.commit(lease);
                }
                Delivery::unsettled(received)
            }
        }
    }

    fn settle(&mut self, settlement: Settlement) {
        let Some(held) = self.held.remove(&settlement.tag) else {
            return;
        };
        if let Some(lease) = held.lease {
            match settlement.verdict {
                Verdict::Requeue => self.parts.group.release(lease),
                Verdict::Retry { .. } => self.parts.group.retried(lease),
                Verdict::Ack | Verdict::DeadLetter { .. } => self.parts.group.commit(lease),
            }
        }
        let (tx, tag) = held.upstream;
        // When the source is gone the answer's sender is dropped with the
        // settlement, which tells the reader.
        let _ = tx.send(Settlement {
            tag,
            verdict: settlement.verdict,
            done: settlement.done,
        });
    }
}

async fn receive(local: &mut Option<Local>) -> Option<Vec<Delivery>> {
    match local {
        Some(local) => local.deliveries.recv().await,
        None => std::future::pending().await,
    }
}

/// Waits until the reader has dropped its end.
async fn abandoned(out: &Option<mpsc::Sender<Vec<Delivery>>>) {
    match out {
        Some(out) => out.closed().await,
        None => std::future::pending().await,
    }
}

/// Passes a batch to the reader once it has room. False when it is gone.
async fn hand_over(out: &Option<mpsc::Sender<Vec<Delivery>>>, batch: &mut Vec<Delivery>) -> bool {
    match out {
        Some(out) => match out.reserve().await {
            Ok(permit) => {
                permit.send(std::mem::take(batch));
                true
            }
            Err(_) => false,
        },
        None => false,
    }
}
