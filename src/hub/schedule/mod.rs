//! Messages that wait for their time, on every broker, without a plug-in: the hub
//! keeps a message whose `scheduled_at` lies in the future and publishes it when
//! that has come. With a data folder it is kept there, synced before its publisher
//! is answered; what was due while no hub ran is published at the next start.
//!
//! It refuses to be a cron: nothing repeats, and nothing is handed out early. How
//! late something may be is said: what is due is published in the order of its
//! time as soon as its lane takes it, and a clock that is set is noticed within a
//! second.

#[cfg(feature = "journal")]
mod log;
mod shelf;
mod task;

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::{
    shelf::{Limits, Waiting},
    task::{ASKS_BOUND, Add, Ask, Found, Held, Parts, Status, Task},
};
use super::{
    MessagingHub,
    accepted::Seen,
    close::Left,
    lock,
    publish::TopicEntry,
    publisher::{Pending, State},
    shutting_down,
    spool::{Entry, codec::LaneName, store::SpoolStore},
};
use crate::{
    broker::Receipt,
    error::{Error, ErrorCode, Result},
    message::{MessageId, Task as Work, Timestamp},
    topic::Topic,
};

/// A message that waits for its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Scheduled {
    /// Its id.
    pub id: MessageId,
    /// Where it will be published.
    pub topic: Topic,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// When it is to be handed out.
    pub scheduled_at: Timestamp,
    /// When it is tried next: later than `scheduled_at` after a failed try.
    pub next_try: Timestamp,
    /// Tries that failed.
    pub failures: u32,
    /// Why the last one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Bytes that it takes.
    pub bytes: u64,
}

/// Some of what is scheduled, in the order of its time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Page {
    /// Messages that are scheduled, of all topics.
    pub total: u64,
    /// Those of this page. What is being published at this moment is not among them.
    pub scheduled: Vec<Scheduled>,
    /// Where the next page begins; none: this is the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<Place>,
}

/// A place in the order of what is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub struct Place {
    at: Timestamp,
    number: u64,
}

/// Schedules tasks, lists them, and calls them off. From
/// [`MessagingHub::scheduler`].
///
/// ```
/// # async fn run(hub: messaging_hub::hub::MessagingHub) -> messaging_hub::Result<()> {
/// use std::time::Duration;
/// use messaging_hub::{Task, Timestamp};
/// let at = Timestamp::now() + Duration::from_secs(3600);
/// let receipt = hub.scheduler().schedule("tasks", Task::new("remind", "x"), at).await?;
/// let cancelled = hub.scheduler().cancel("tasks", receipt.id.as_str()).await?;
/// assert_eq!(cancelled.scheduled_at, at);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TaskScheduler(MessagingHub);

/// Entries of a page unless said otherwise.
pub const DEFAULT_PAGE: usize = 100;

/// Entries of a page at most.
pub const MAX_PAGE: usize = 1000;

/// The task, from the outside.
pub(super) struct Scheduler {
    asks: mpsc::Sender<Ask>,
    status: Arc<Status>,
    #[cfg_attr(
        not(feature = "journal"),
        allow(dead_code, reason = "only who adopts another hub's asks")
    )]
    durable: bool,
    stop: CancellationToken,
    task: Option<(JoinHandle<Left>, oneshot::Sender<Instant>)>,
}

impl TaskScheduler {
    /// Publishes a task at a time. One that has passed already publishes it now.
    /// A task that has a `scheduled_at` and is published in any other way is
    /// scheduled too; this only sets it.
    ///
    /// # Errors
    /// As [`MessagingHub::publish`], and `SPOOL_FULL` when too many wait. What the
    /// broker says when the time has come nobody hears: what it refuses goes to the
    /// hub's dead letters, and what cannot reach it waits and is tried again.
    ///
    /// # Cancel safety
    /// As [`MessagingHub::publish`].
    pub async fn schedule(&self, topic: &str, mut task: Work, at: Timestamp) -> Result<Receipt> {
        task.attributes.scheduled_at = Some(at);
        self.0.publish_task(topic, task).await
    }

    /// Calls a task off, and says which. The same id may be scheduled again.
    ///
    /// # Errors
    /// `SCHEDULE_NOT_FOUND`: it is not scheduled, or was published already.
    /// `OPERATION_CANCELED`: it is being published at this moment, or the data
    /// folder failed.
    ///
    /// # Cancel safety
    /// Once asked it is called off; dropping the future abandons the answer.
    pub async fn cancel(&self, topic: &str, id: &str) -> Result<Scheduled> {
        let topic = self.0.canonical(topic)?;
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Cancel {
            topic: topic.clone(),
            id: id.to_owned(),
            answer,
        };
        match self.ask(ask).await {
            true => answered.await.unwrap_or_else(|_| Err(shutting_down())),
            false => Err(unknown(&topic, id)),
        }
    }

    /// A scheduled task.
    ///
    /// # Errors
    /// `SCHEDULE_NOT_FOUND`.
    pub async fn get(&self, topic: &str, id: &str) -> Result<Scheduled> {
        let topic = self.0.canonical(topic)?;
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Find {
            topic: topic.clone(),
            id: id.to_owned(),
            answer,
        };
        let found = match self.ask(ask).await {
            true => answered.await.map_err(|_| shutting_down())?,
            false => None,
        };
        found.ok_or_else(|| unknown(&topic, id))
    }

    /// What is scheduled, of a topic or of all, in the order of its time, from
    /// behind a place of an earlier page on. At most [`MAX_PAGE`] at a time.
    ///
    /// # Errors
    /// A bad topic name, or the hub is closing.
    pub async fn list(
        &self,
        topic: Option<&str>,
        after: Option<Place>,
        limit: usize,
    ) -> Result<Page> {
        let topic = topic.map(|t| self.0.canonical(t)).transpose()?;
        let (answer, answered) = oneshot::channel();
        let ask = Ask::List {
            topic,
            after,
            limit: limit.clamp(1, MAX_PAGE),
            answer,
        };
        match self.ask(ask).await {
            true => answered.await.map_err(|_| shutting_down()),
            false => Ok(Page::default()),
        }
    }

    /// Asks the task. False: there is none, so nothing is scheduled.
    async fn ask(&self, ask: Ask) -> bool {
        let asks = lock(&self.0.0.schedule).as_ref().map(|s| s.asks.clone());
        match asks {
            Some(asks) => asks.send(ask).await.is_ok(),
            None => false,
        }
    }
}

impl MessagingHub {
    /// Schedules tasks, lists them, and calls them off.
    #[must_use]
    pub fn scheduler(&self) -> TaskScheduler {
        TaskScheduler(self.clone())
    }

    /// How many messages wait for their time, and their bytes.
    #[must_use]
    pub fn scheduled(&self) -> (u64, u64) {
        lock(&self.0.schedule).as_ref().map_or((0, 0), |s| {
            (
                s.status.messages.load(Relaxed),
                s.status.bytes.load(Relaxed),
            )
        })
    }

    /// Whether messages can be scheduled: what is refused when its time has come
    /// needs the hub's dead letters.
    pub(super) fn can_schedule(&self) -> bool {
        lock(&self.0.dead).is_some()
    }

    /// Keeps a message until its time has come.
    #[allow(clippy::too_many_arguments, reason = "all that its publish needs")]
    pub(super) async fn schedule(
        &self,
        entry: &TopicEntry,
        lane: LaneName,
        held: Entry,
        due: Timestamp,
        patience: Duration,
        seen: Option<Seen>,
    ) -> Result<Pending> {
        let asks = self.scheduler_asks()?;
        let (answer, rx) = oneshot::channel();
        let add = Add {
            held: Held { lane, entry: held },
            due,
            patience: patience.min(self.0.config.spool.wait),
            answer,
            seen,
        };
        let Ok(sent) = tokio::time::timeout(patience, asks.send(Ask::Add(Box::new(add)))).await
        else {
            return Err(Error::new(
                ErrorCode::Timeout,
                "no room to schedule within the timeout; the disk is slower than the publishers",
            )
            .on(entry.topic.as_str()));
        };
        sent.map_err(|_| shutting_down())?;
        Ok(Pending(State::Waiting(rx)))
    }

    /// Publishes what was scheduled: nothing is checked again, and it passes the
    /// window of accepted ids, which knows it.
    pub(super) async fn enqueue_due(&self, held: &Held) -> Result<Pending> {
        let resolved = self.entry(&held.lane.topic)?;
        let lanes = self.lane_count(&resolved).await;
        let entry = held.entry.clone();
        let lane = resolved.broker.lane_of(
            &held.lane.topic,
            &entry.order,
            entry.message.partition,
            lanes,
        );
        let name = LaneName {
            lane,
            ..held.lane.clone()
        };
        self.enqueue_kept(resolved, &name, entry).await
    }

    fn scheduler_asks(&self) -> Result<mpsc::Sender<Ask>> {
        if let Some(scheduler) = &*lock(&self.0.schedule) {
            return Ok(scheduler.asks.clone());
        }
        self.start_scheduler(None, Vec::new())
    }

    /// Starts the task, unless it runs.
    fn start_scheduler(
        &self,
        store: Option<Arc<dyn SpoolStore>>,
        found: Vec<Found>,
    ) -> Result<mpsc::Sender<Ask>> {
        let dead = lock(&self.0.dead).as_ref().map(|(dead, _)| dead.clone());
        let dead = dead.ok_or_else(no_fallback)?;
        let mut slot = lock(&self.0.schedule);
        if let Some(scheduler) = &*slot {
            return Ok(scheduler.asks.clone());
        }
        // Under the lock, or a close that looked just before would not end it.
        self.check_open()?;
        let settings = &self.0.config.schedule;
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (asks, asked) = mpsc::channel(ASKS_BOUND);
        let status = Arc::new(Status::default());
        let durable = store.is_some();
        let task = Task::new(Parts {
            hub: Arc::downgrade(&self.0),
            dead,
            limits: Limits {
                messages: size(settings.max_messages),
                bytes: size(settings.max_bytes),
            },
            store,
            found,
            asks: asked,
            status: status.clone(),
        });
        let stop = self.0.closing.child_token();
        let (until, told) = oneshot::channel();
        let running = tokio::spawn(task.run(stop.clone(), told));
        *slot = Some(Scheduler {
            asks: asks.clone(),
            status,
            durable,
            stop,
            task: Some((running, until)),
        });
        Ok(asks)
    }

    /// Ends the task: what is under way gets until then. Says what stays.
    pub(super) async fn stop_scheduler(&self, until: Instant) -> Left {
        let running = lock(&self.0.schedule).as_mut().and_then(|scheduler| {
            scheduler.stop.cancel();
            scheduler.task.take()
        });
        let Some((task, tell)) = running else {
            return Left::default();
        };
        // It waits for this before it ends.
        let _ = tell.send(until);
        task.await.unwrap_or_default()
    }

    /// Whether what is scheduled now outlives the process.
    #[cfg(feature = "journal")]
    pub(super) fn schedule_is_kept(&self) -> bool {
        lock(&self.0.schedule).as_ref().is_some_and(|s| s.durable)
    }
}

impl Scheduled {
    fn of<B>(waiting: &Waiting<B>) -> Self {
        Self {
            id: waiting.name.id.clone(),
            topic: waiting.name.topic.clone(),
            kind: waiting.kind.clone(),
            scheduled_at: waiting.due,
            next_try: waiting.next,
            failures: waiting.failures,
            error: waiting.error.as_deref().map(str::to_owned),
            bytes: waiting.size as u64,
        }
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.at.as_millis(), self.number)
    }
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let read = || {
            let (at, number) = text.rsplit_once('-')?;
            Some(Self {
                at: Timestamp::from_millis(at.parse().ok()?),
                number: number.parse().ok()?,
            })
        };
        read().ok_or_else(|| {
            Error::rejected(
                ErrorCode::MessageInvalid,
                format!("{text:?} is no place in a list; give what an earlier page calls next"),
            )
        })
    }
}

pub(super) fn no_fallback() -> Error {
    Error::rejected(
        ErrorCode::InvalidConfig,
        "scheduled_at lies in the future, and without the fallback the hub keeps nothing; turn the fallback on, leave scheduled_at out, or publish later",
    )
}

fn unknown(topic: &Topic, id: &str) -> Error {
    Error::rejected(
        ErrorCode::ScheduleNotFound,
        "nothing of this id is scheduled here: it was published already, called off, or never scheduled",
    )
    .on(topic.as_str())
    .with_id(id)
}
