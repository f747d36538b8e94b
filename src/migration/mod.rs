//! Moving from one messaging system to another while both run: `legacy`, then
//! `dual_write`, then `messaging`, one step at a time, and back from any of them.
//!
//! ```text
//!              advance              advance
//!   legacy --------------> dual ---------------> messaging
//!      ^                    |                        |
//!      `--- rollback -------'------ rollback --------'     by hand, or by error rate
//! ```
//!
//! While both are written each message has one owner, stamped on it when it is
//! published: the share of consumer traffic that the new system already has. The
//! consumers of both sides obey the stamp, so each message is handled on one side,
//! also while the share changes and after a rollback.
//!
//! It refuses to be clever about the old system: that is whatever implements
//! [`System`], a hub, a broker, or somebody's HTTP client.

mod machine;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::sync::watch;

use self::machine::{Machine, Plan};
pub use self::machine::{Phase, Progress};
use crate::{
    broker::{Handler, HandlerFuture, ReadyFuture, Received, SubscribeOptions, Subscription, Turn},
    error::{Error, ErrorCode, Result},
    hub::MessagingHub,
    message::Message,
};

/// One of the two systems.
#[async_trait]
pub trait System: Send + Sync {
    /// Publishes a message and waits until it is accepted.
    ///
    /// # Errors
    /// It was not, or that is unknown.
    async fn publish(&self, topic: &str, message: Message) -> Result<()>;

    /// Hands what arrives to a handler.
    ///
    /// # Errors
    /// The subscription cannot be made.
    async fn subscribe(
        &self,
        pattern: &str,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription>;
}

#[async_trait]
impl System for MessagingHub {
    async fn publish(&self, topic: &str, message: Message) -> Result<()> {
        MessagingHub::publish(self, topic, message).await.map(drop)
    }

    async fn subscribe(
        &self,
        pattern: &str,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        MessagingHub::subscribe(self, pattern, options, handler).await
    }
}

/// How a migration goes.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrationSettings {
    /// Percent of the messages that are written to both which the new system's
    /// consumers handle. Default 0.
    pub consumer_percent: u8,
    /// The share of failed publishes to the new system, 0 to 1, at which it is
    /// rolled back to legacy. Default 0.05. 0: never.
    pub rollback_error_rate: f64,
    /// What the rate is taken over. Default 60 s.
    pub window: Duration,
    /// Publishes in the window below which nothing is concluded. Default 100.
    pub least: u64,
}

impl Default for MigrationSettings {
    fn default() -> Self {
        Self {
            consumer_percent: 0,
            rollback_error_rate: 0.05,
            window: Duration::from_secs(60),
            least: 100,
        }
    }
}

/// A migration under way. Clones are the same.
///
/// ```
/// # async fn run(old: messaging_hub::hub::MessagingHub, new: messaging_hub::hub::MessagingHub) -> messaging_hub::Result<()> {
/// use std::sync::Arc;
/// use messaging_hub::{Message, migration::{Migration, MigrationSettings}};
/// let migration = Migration::new(Arc::new(old), Arc::new(new), MigrationSettings::default())?;
/// migration.publish("tasks", Message::new("t", "x")).await?;    // legacy alone
/// migration.advance()?;                                           // both
/// migration.set_consumer_percent(10)?;
/// migration.publish("tasks", Message::new("t", "y")).await?;
/// migration.rollback("not today");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Migration(Arc<Inner>);

struct Inner {
    legacy: Arc<dyn System>,
    target: Arc<dyn System>,
    machine: Mutex<Machine>,
    progress: watch::Sender<Progress>,
}

/// The stamp: who handles a message that both have.
const OWNER: &str = "migration-owner";
const LEGACY: &str = "legacy";
const TARGET: &str = "messaging";

impl Migration {
    /// Begins in the phase `legacy`.
    ///
    /// # Errors
    /// `INVALID_CONFIG`.
    pub fn new(
        legacy: Arc<dyn System>,
        target: Arc<dyn System>,
        settings: MigrationSettings,
    ) -> Result<Self> {
        percent(settings.consumer_percent)?;
        if !(0.0..=1.0).contains(&settings.rollback_error_rate) {
            return Err(invalid(
                "rollback_error_rate must be from 0 to 1; 0 is never",
            ));
        }
        if settings.window.is_zero() {
            return Err(invalid("window must be longer than nothing"));
        }
        let machine = Machine::new(settings);
        let progress = watch::channel(machine.progress()).0;
        Ok(Self(Arc::new(Inner {
            legacy,
            target,
            machine: Mutex::new(machine),
            progress,
        })))
    }

    /// Publishes as the phase says. Written to both, the answer is the old
    /// system's; a message that the new one did not take is the old one's alone.
    ///
    /// # Errors
    /// As the system's that answers. In `dual_write` an error may leave the message
    /// in the new system; publish it again under its id.
    ///
    /// # Cancel safety
    /// Dropped in the middle, it may have been written to one of the two.
    pub async fn publish(&self, topic: &str, mut message: Message) -> Result<()> {
        let plan = self.lock().plan(message.id.as_str());
        match plan {
            Plan::Legacy => self.0.legacy.publish(topic, message).await,
            Plan::Target => {
                let outcome = self.0.target.publish(topic, message).await;
                self.told(outcome.is_err());
                outcome
            }
            Plan::Both { to_target } => {
                let owner = if to_target { TARGET } else { LEGACY };
                let mut copy = message.clone();
                copy.headers.insert(OWNER.to_owned(), owner.to_owned());
                // First to the new one: what it refuses must not be waited for there.
                let copied = self.0.target.publish(topic, copy).await;
                self.told(copied.is_err());
                let owner = if copied.is_ok() { owner } else { LEGACY };
                message.headers.insert(OWNER.to_owned(), owner.to_owned());
                self.0.legacy.publish(topic, message).await
            }
        }
    }

    /// Subscribes on both sides with one handler: each message reaches it once, from
    /// the side that owns it.
    ///
    /// # Errors
    /// One of the subscriptions cannot be made; then there is none.
    pub async fn subscribe(
        &self,
        pattern: &str,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<(Subscription, Subscription)> {
        let of = |mine: &'static str| -> Arc<dyn Handler> {
            Arc::new(Owned {
                mine,
                handler: handler.clone(),
            })
        };
        let legacy = self
            .0
            .legacy
            .subscribe(pattern, options.clone(), of(LEGACY))
            .await?;
        match self.0.target.subscribe(pattern, options, of(TARGET)).await {
            Ok(target) => Ok((legacy, target)),
            Err(error) => {
                // Half of a migration's consumers would leave the other half unread.
                legacy.unsubscribe().await;
                Err(error)
            }
        }
    }

    /// One step on.
    ///
    /// # Errors
    /// `INVALID_CONFIG`: there is none.
    pub fn advance(&self) -> Result<Phase> {
        let mut machine = self.lock();
        let phase = machine
            .advance()
            .ok_or_else(|| invalid("the migration is in its last phase already"))?;
        drop(machine);
        self.show();
        Ok(phase)
    }

    /// Back to `legacy`, from any step. What the new system has is handled by its
    /// consumers, who go on.
    pub fn rollback(&self, why: &str) {
        self.lock().rollback(why);
        self.show();
    }

    /// Percent of the messages that are written to both from now on which the new
    /// system's consumers handle.
    ///
    /// # Errors
    /// `INVALID_CONFIG`: above 100.
    pub fn set_consumer_percent(&self, share: u8) -> Result<()> {
        percent(share)?;
        self.lock().set_percent(share);
        self.show();
        Ok(())
    }

    /// Where it stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.lock().progress()
    }

    /// Where it stands, and each change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.0.progress.subscribe()
    }

    /// The new system took a publish, or did not.
    fn told(&self, failed: bool) {
        let rolled_back = self.lock().told(Instant::now(), failed);
        if let Some(rate) = rolled_back {
            tracing::error!(
                rate,
                "the new system refuses too much; the migration is rolled back to legacy"
            );
        }
        self.show();
    }

    fn show(&self) {
        let now = self.lock().progress();
        self.0.progress.send_if_modified(|shown| {
            let news = shown.phase != now.phase || shown.consumer_percent != now.consumer_percent;
            *shown = now;
            news
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Machine> {
        self.0
            .machine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Migration").field(&self.progress()).finish()
    }
}

/// A handler that leaves to the other side what is that one's.
struct Owned {
    mine: &'static str,
    handler: Arc<dyn Handler>,
}

impl Owned {
    /// What has no stamp was written to one side only.
    fn leaves(mine: &str, received: &Received) -> bool {
        received
            .headers
            .get(OWNER)
            .is_some_and(|owner| owner != mine)
    }
}

impl Handler for Owned {
    fn handle(&self, received: Received) -> HandlerFuture {
        if Self::leaves(self.mine, &received) {
            return Box::pin(std::future::ready(Ok(())));
        }
        self.handler.handle(received)
    }

    fn ready(&self) -> Option<ReadyFuture> {
        let (ready, mine) = (self.handler.ready()?, self.mine);
        Some(Box::pin(async move {
            let (call, judge) = ready.await.into_parts();
            Turn::new(move |received: Received| -> HandlerFuture {
                if Self::leaves(mine, &received) {
                    return Box::pin(std::future::ready(Ok(())));
                }
                call(received)
            })
            .judged_by(judge)
        }))
    }
}

fn percent(share: u8) -> Result<()> {
    if share > 100 {
        return Err(invalid("consumer_percent must be from 0 to 100"));
    }
    Ok(())
}

fn invalid(why: &str) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, why)
}
