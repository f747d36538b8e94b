//! The subscriptions that run on a broker, so that it can end them.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use super::{DispatchSettings, engine};
use crate::{
    broker::{
        BrokerType, ConsumerControl, Handler, MessageBroker, Source, SubscribeOptions, Subscription,
    },
    error::{Error, ErrorCode, Result},
    metrics::MetricsRecorder,
    topic::Pattern,
};

/// The running subscriptions of a broker.
#[derive(Debug, Default)]
pub struct Subscriptions {
    running: Mutex<Running>,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct Running {
    closed: bool,
    entries: Vec<Entry>,
}

/// What is needed to end a subscription. It is no [`Subscription`], so that
/// dropping the caller's last clone still ends it.
#[derive(Clone, Debug)]
struct Entry {
    pattern: Pattern,
    control: ConsumerControl,
    give_up: CancellationToken,
    ended: CancellationToken,
}

impl Subscriptions {
    /// Starts a consumer and dispatches it to a handler.
    ///
    /// # Errors
    /// As [`MessageBroker::consume`]; `OPERATION_CANCELED` after
    /// [`Subscriptions::close`].
    ///
    /// # Cancel safety
    /// Dropped before it is done, nothing was subscribed.
    pub async fn start(
        &self,
        broker: &dyn MessageBroker,
        source: &Source,
        mut options: SubscribeOptions,
        handler: Arc<dyn Handler>,
        recorder: &Arc<MetricsRecorder>,
    ) -> Result<Subscription> {
        if self.lock().closed {
            return Err(closed().at(broker.broker_type()));
        }
        let id = options
            .consumer_tag
            .clone()
            .unwrap_or_else(|| format!("hub-{}", Uuid::now_v7().simple()));
        if broker.broker_type() == BrokerType::RabbitMq {
            options.consumer_tag = Some(id.clone());
        }
        let consumer = broker.consume(source, &options).await.inspect_err(|_| {
            recorder.subscribe_errors.inc();
            recorder.total_errors.inc();
        })?;
        let settings = DispatchSettings::new(source, &options, recorder);
        let entry = Entry {
            pattern: source.pattern().clone(),
            control: consumer.control.clone(),
            give_up: settings.give_up.clone(),
            ended: CancellationToken::new(),
        };
        let control = consumer.control.clone();
        let task = {
            let mut running = self.lock();
            if running.closed {
                // Closed meanwhile; nobody else would end this consumer.
                control.begin_stop();
                return Err(closed().at(broker.broker_type()));
            }
            running.entries.retain(|e| !e.ended.is_cancelled());
            let ended = entry.ended.clone().drop_guard();
            running.entries.push(entry);
            // Spawned under the lock, so that a close sees either no entry or
            // one with its task.
            self.tasks.spawn(async move {
                let _ended = ended;
                engine::run(consumer, handler, settings).await;
            })
        };
        Ok(Subscription::new(
            id,
            source.pattern().clone(),
            vec![control],
            vec![task],
        ))
    }

    /// Ends every subscription to exactly this pattern, after its running
    /// handlers.
    ///
    /// # Errors
    /// `SUBSCRIBE_FAILED` when there is none.
    ///
    /// # Cancel safety
    /// Stopping goes on when the future is dropped; only the waiting ends.
    pub async fn unsubscribe(&self, pattern: &Pattern) -> Result<()> {
        let entries: Vec<Entry> = {
            let mut running = self.lock();
            running.entries.retain(|e| !e.ended.is_cancelled());
            let matching = running.entries.iter().filter(|e| e.pattern == *pattern);
            matching.cloned().collect()
        };
        if entries.is_empty() {
            return Err(Error::new(
                ErrorCode::SubscribeFailed,
                format!(
                    "there is no subscription to \"{}\" to end",
                    pattern.as_str()
                ),
            )
            .on(pattern.as_str()));
        }
        for entry in &entries {
            entry.control.begin_stop();
        }
        for entry in &entries {
            entry.ended.cancelled().await;
            entry.control.stop().await;
        }
        Ok(())
    }

    /// Ends all, waiting [`CLOSE_GRACE`] for handlers that run. Idempotent.
    pub async fn close(&self) {
        self.close_within(CLOSE_GRACE).await;
    }

    /// Ends all. Handlers that still run when `grace` is over are dropped at
    /// their next await and their messages given back. Idempotent.
    ///
    /// # Cancel safety
    /// Stopping goes on when the future is dropped, but the grace then has no
    /// end.
    pub async fn close_within(&self, grace: Duration) {
        let entries = {
            let mut running = self.lock();
            running.closed = true;
            running.entries.clone()
        };
        for entry in &entries {
            entry.control.begin_stop();
        }
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait())
            .await
            .is_err()
        {
            for entry in &entries {
                entry.give_up.cancel();
            }
            self.tasks.wait().await;
        }
        for entry in &entries {
            entry.control.stop().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> Error {
    Error::new(
        ErrorCode::OperationCanceled,
        "the broker is closed; nothing can be subscribed any more",
    )
}

/// How long [`Subscriptions::close`] waits for handlers that run.
pub const CLOSE_GRACE: Duration = Duration::from_secs(30);
