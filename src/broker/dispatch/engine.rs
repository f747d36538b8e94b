//! The task of a subscription: takes batches, starts handlers, keeps order.

use std::sync::Arc;

use futures_util::future::OptionFuture;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};

use super::{
    DispatchSettings,
    attempt::{Attempt, Outcome, turn_of},
    lanes::{LaneId, Lanes},
};
use crate::{
    broker::{Consumer, Delivery, Handler, RetryMode, Turn, handler::ReadyFuture},
    metrics::MetricsRecorder,
};

/// Hands what `consumer` brings to `handler`, until the consumer is stopped or
/// fails for good. Counts into `settings.recorder` what was received, handled,
/// failed, retried and dead-lettered, so consumers do not count these.
///
/// After a stop nothing more is started, what was not started is given back,
/// and the task ends once the running handlers have.
///
/// Must be called within a Tokio runtime.
pub fn dispatch(
    consumer: Consumer,
    handler: Arc<dyn Handler>,
    settings: DispatchSettings,
) -> JoinHandle<()> {
    tokio::spawn(run(consumer, handler, settings))
}

/// What [`dispatch`] spawns.
pub async fn run(consumer: Consumer, handler: Arc<dyn Handler>, settings: DispatchSettings) {
    let _active = Active::new(&settings.recorder);
    Engine {
        mode: consumer.retry,
        handler,
        turn: Next::Unasked,
        lanes: Lanes::default(),
        running: JoinSet::new(),
        settings: Arc::new(settings),
        received: 0,
    }
    .run(consumer)
    .await;
}

struct Engine {
    mode: RetryMode,
    handler: Arc<dyn Handler>,
    turn: Next,
    settings: Arc<DispatchSettings>,
    lanes: Lanes<Attempt>,
    running: JoinSet<(LaneId, Outcome)>,
    /// Counts messages of queues, each of which is a lane of its own.
    received: u64,
}

/// The handler's next turn.
enum Next {
    /// Asked for when there is a message for it, not before: a breaker that
    /// probes must not wait for one.
    Unasked,
    Waiting(ReadyFuture),
    Here(Turn),
}

impl Next {
    async fn wait(&mut self) -> Turn {
        match self {
            Self::Waiting(ready) => ready.await,
            Self::Unasked | Self::Here(_) => std::future::pending().await,
        }
    }
}

impl Engine {
    async fn run(mut self, mut consumer: Consumer) {
        let began = Instant::now();
        let control = consumer.control.clone();
        let activation = control.active();
        tokio::pin!(activation);
        let mut activating = true;
        let mut open = true;
        loop {
            // A stop is seen before anything else is started.
            if control.is_stopping() {
                break;
            }
            self.start();
            if !open && self.lanes.held() == 0 {
                break;
            }
            let wake: OptionFuture<_> = self.lanes.next_wake().map(sleep_until).into();
            // While the handler takes nothing, and something waits for it, no
            // more is taken in: so it reaches the broker.
            let waits = matches!(self.turn, Next::Waiting(_));
            let room = self.lanes.held() < self.settings.max_held && !waits;
            tokio::select! {
                biased;
                () = control.stopping() => break,
                active = &mut activation, if activating => {
                    activating = false;
                    if active {
                        self.settings.recorder.subscribe_latency.record(began.elapsed());
                    }
                }
                Some(done) = self.running.join_next() => self.finished(done),
                Some(()) = wake => self.lanes.wake(Instant::now()),
                turn = self.turn.wait(), if waits => self.turn = Next::Here(turn),
                batch = consumer.deliveries.recv(), if open && room => match batch {
                    Some(batch) => self.take(batch),
                    None => open = false,
                },
            }
        }
        self.stop(consumer).await;
    }

    fn take(&mut self, batch: Vec<Delivery>) {
        let recorder = &self.settings.recorder;
        recorder.messages_received.add(batch.len() as u64);
        recorder.touch_receive();
        let bytes: usize = batch.iter().map(|d| d.message.payload.len()).sum();
        recorder.bytes_received.add(bytes as u64);
        for delivery in batch {
            let attempt = Attempt::first(delivery);
            let id = if self.settings.ordered {
                LaneId::in_stream(attempt.received())
            } else {
                self.received += 1;
                LaneId::Alone(self.received)
            };
            self.lanes.push(id, attempt);
        }
    }

    fn start(&mut self) {
        while self.running.len() < self.settings.concurrency && self.lanes.has_ready() {
            let turn = match std::mem::replace(&mut self.turn, Next::Unasked) {
                Next::Here(turn) => Some(turn),
                Next::Unasked => match turn_of(|| self.handler.ready()) {
                    None => None,
                    Some(ready) => {
                        self.turn = Next::Waiting(ready);
                        break;
                    }
                },
                waiting @ Next::Waiting(_) => {
                    self.turn = waiting;
                    break;
                }
            };
            let Some((id, attempt)) = self.lanes.pop() else {
                break;
            };
            let (handler, settings, mode) =
                (self.handler.clone(), self.settings.clone(), self.mode);
            self.running
                .spawn(async move { (id, attempt.run(handler, turn, settings, mode).await) });
        }
    }

    fn finished(&mut self, done: Result<(LaneId, Outcome), tokio::task::JoinError>) {
        match done {
            Ok((id, Outcome::Settled)) => self.lanes.finish(id),
            Ok((id, Outcome::Again(attempt, delay))) => {
                self.lanes.rest(id, *attempt, Instant::now() + delay);
            }
            Ok((id, Outcome::Held(attempt))) => self.lanes.put_back(id, *attempt),
            // Panics of handlers are caught inside, and nothing is aborted
            // before the stop; were it otherwise, the lane would stay shut.
            Err(error) => tracing::error!(%error, "a dispatch task ended without an outcome"),
        }
    }

    /// Gives back what was not started and waits for the handlers that run.
    async fn stop(mut self, consumer: Consumer) {
        consumer.control.begin_stop();
        self.turn = Next::Unasked;
        self.lanes.clear();
        // Batches in the channel, and those that the source sends until it has
        // noticed, are dropped, which gives them back.
        drop(consumer.deliveries);
        let give_up = self.settings.give_up.clone();
        loop {
            tokio::select! {
                biased;
                done = self.running.join_next() => {
                    // A message that is to be tried again here is dropped with
                    // its outcome, which gives it back.
                    if done.is_none() {
                        return;
                    }
                }
                () = give_up.cancelled() => break,
            }
        }
        tracing::warn!(
            handlers = self.running.len(),
            "handlers still ran when the grace was over; their messages are given back"
        );
        self.running.shutdown().await;
    }
}

/// Counts a subscription while it runs, also when its task is dropped.
struct Active(Arc<MetricsRecorder>);

impl Active {
    fn new(recorder: &Arc<MetricsRecorder>) -> Self {
        recorder.active_subscriptions.inc();
        Self(recorder.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active_subscriptions.dec();
    }
}
