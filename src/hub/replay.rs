//! Replays through the hub: it knows where a topic is, publishes what is replayed
//! as anything else, owns the tasks, and ends them when it closes.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{Inner, MessagingHub, lock, resting, route::RouteKind};
use crate::{
    broker::PublishOptions,
    compression,
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp},
    replay::{
        Copied, Entry, Job, MAX_TOPICS, Outcome, Replay, ReplayProgress, ReplayRequest, Sink,
        Source, Wanted, run,
    },
    topic::Topic,
};

/// How long a cancel waits for what is under way.
const CANCEL_WAIT: Duration = Duration::from_secs(5);

/// A replay's place among those that are active, until it is known whether it can
/// be done.
struct Place<'a> {
    hub: &'a MessagingHub,
    entry: &'a Entry,
    begun: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.begun {
            self.entry.cancel.cancel();
            lock(&self.hub.0.replays).forget(&self.entry.id);
        }
    }
}

impl MessagingHub {
    /// Replays at once at most.
    pub const MAX_REPLAYS: usize = crate::replay::MAX_ACTIVE;

    /// Starts to publish again what streams have of a stretch of time. It returns
    /// when it is known what there is, and before anything is published. Live
    /// readers and their positions are left alone. What waits in the spool is in no
    /// stream yet and is not replayed.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for a request that makes no sense, or for a work queue;
    /// `REPLAY_LIMIT` when [`MessagingHub::MAX_REPLAYS`] are active;
    /// `REPLAY_EXISTS`; `TOPIC_NOT_FOUND`; why a broker cannot be asked.
    ///
    /// # Cancel safety
    /// Dropped, the replay is cancelled.
    pub async fn start_replay(&self, request: ReplayRequest) -> Result<Replay> {
        self.check_open()?;
        let wanted = Wanted::check(&request, |name| self.canonical(name))?;
        if let Some(target) = &wanted.target {
            // Told now, not at the first publish.
            self.entry(target)?;
        }
        let began = Timestamp::now();
        let (report, progress) = watch::channel(ReplayProgress {
            started_at: Some(began),
            ..ReplayProgress::default()
        });
        let entry = Entry {
            id: wanted.id.clone(),
            request: ReplayRequest {
                id: Some(wanted.id.clone()),
                ..request
            },
            progress,
            cancel: self.0.closing.child_token(),
        };
        // From here on it has its place; dropping `report` frees it.
        lock(&self.0.replays).add(entry.clone())?;
        // Also when whoever asked is gone before it has begun.
        let mut place = Place {
            hub: self,
            entry: &entry,
            begun: false,
        };
        self.start_job(wanted, began, &entry, report).await?;
        place.begun = true;
        Ok(entry.snapshot())
    }

    async fn start_job(
        &self,
        wanted: Wanted,
        began: Timestamp,
        entry: &Entry,
        report: watch::Sender<ReplayProgress>,
    ) -> Result<()> {
        let sources = self.replay_sources(&wanted).await?;
        let sink = HubSink {
            hub: Arc::downgrade(&self.0),
            number: self.number(),
            ordered: entry.request.options.preserve_order,
            cancel: entry.cancel.clone(),
        };
        let (tell, planned) = oneshot::channel();
        let job = Job::new(wanted, began);
        self.0.tasks.spawn(run(
            job,
            sources,
            sink,
            entry.cancel.clone(),
            report,
            // Nobody may be waiting any more.
            |result| drop(tell.send(result)),
        ));
        planned.await.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorCode::OperationCanceled,
                "the hub was closed before the replay began",
            ))
        })
    }

    /// A replay, by its id.
    ///
    /// # Errors
    /// `REPLAY_NOT_FOUND`.
    pub fn replay(&self, id: &str) -> Result<Replay> {
        Ok(lock(&self.0.replays).find(id)?.snapshot())
    }

    /// All replays that are active, and the last that are over; the newest first.
    #[must_use]
    pub fn replays(&self) -> Vec<Replay> {
        let all = lock(&self.0.replays).all();
        all.iter().map(Entry::snapshot).collect()
    }

    /// How many replays are active.
    #[must_use]
    pub fn active_replays(&self) -> usize {
        lock(&self.0.replays).active()
    }

    /// Waits until a replay is over.
    ///
    /// # Errors
    /// `REPLAY_NOT_FOUND`.
    ///
    /// # Cancel safety
    /// Dropping the future abandons only the waiting.
    pub async fn replay_ended(&self, id: &str) -> Result<Replay> {
        let entry = lock(&self.0.replays).find(id)?;
        entry.over().await;
        Ok(entry.snapshot())
    }

    /// Ends a replay: nothing new of it is published. Waits up to 5 s for the
    /// outcomes of what is under way; one that is over stays as it is.
    ///
    /// # Errors
    /// `REPLAY_NOT_FOUND`.
    pub async fn cancel_replay(&self, id: &str) -> Result<Replay> {
        let entry = lock(&self.0.replays).find(id)?;
        entry.cancel.cancel();
        let _ = tokio::time::timeout(CANCEL_WAIT, entry.over()).await;
        Ok(entry.snapshot())
    }

    /// Ends all of them, because the hub closes, and waits until `until`.
    pub(super) async fn stop_replays(&self, until: tokio::time::Instant) {
        let all = lock(&self.0.replays).all();
        for entry in &all {
            entry.cancel.cancel();
        }
        for entry in &all {
            let _ = tokio::time::timeout_at(until, entry.over()).await;
        }
    }

    /// The streams to read, with their brokers.
    async fn replay_sources(&self, wanted: &Wanted) -> Result<Vec<Source>> {
        if let Some(topic) = wanted.topics.literal() {
            let entry = self.entry(&topic)?;
            if entry.route.kind != RouteKind::Event {
                return Err(Error::rejected(
                    ErrorCode::InvalidConfig,
                    "this is a work queue, which keeps nothing that was handled; only streams can be replayed",
                )
                .on(topic.as_str()));
            }
            let broker = entry.broker.clone();
            return Ok(vec![Source { broker, topic }]);
        }
        let mut sources: Vec<Source> = Vec::new();
        // A pattern does not mean them: published into itself, such a log would
        // have each letter twice. They have tools of their own.
        let dead_letters = self.0.topology.dead_letter_topics();
        for topic in self.list_topics().await? {
            let known = |topic: &Topic| sources.iter().any(|s| s.topic == *topic);
            if !wanted.topics.matches(&topic)
                || dead_letters.contains(&topic.as_str())
                // Attempts at what the streams themselves have.
                || resting::is_resting(&topic)
                || wanted.target.as_ref() == Some(&topic)
                || known(&topic)
            {
                continue;
            }
            let entry = self.entry(&topic)?;
            let broker = entry.broker.clone();
            if entry.route.kind == RouteKind::Event && broker.event_stream().is_some() {
                sources.push(Source { broker, topic });
            }
        }
        if sources.is_empty() {
            return Err(Error::new(
                ErrorCode::TopicNotFound,
                format!("no stream matches {}, but for the target", wanted.topics),
            )
            .on(wanted.topics.as_str()));
        }
        if sources.len() > MAX_TOPICS {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!(
                    "{} covers {} streams, and one replay reads {MAX_TOPICS} at most; narrow the pattern",
                    wanted.topics,
                    sources.len()
                ),
            ));
        }
        Ok(sources)
    }
}

/// Publishes through the hub's lanes, so that an outage spools what is replayed as
/// anything else. It does not hold the hub: one that is dropped ends its replays.
struct HubSink {
    hub: Weak<Inner>,
    /// Tells this replay's publishers from all others.
    number: u64,
    ordered: bool,
    cancel: CancellationToken,
}

/// A message as it was published, if a hub compressed it. What cannot be expanded
/// stays as it is, marked.
fn whole(message: Message, most: usize) -> Message {
    if !compression::is_marked(&message) {
        return message;
    }
    match compression::expand(&message, most) {
        Ok(Some(whole)) => whole,
        Ok(None) | Err(_) => message,
    }
}

impl Sink for HubSink {
    fn publish(&self, batch: Vec<Copied>) -> BoxFuture<'static, Vec<Outcome>> {
        let (hub, cancel) = (self.hub.clone(), self.cancel.clone());
        let (number, ordered) = (self.number, self.ordered);
        Box::pin(async move {
            let Some(hub) = hub.upgrade().map(MessagingHub) else {
                return batch.iter().map(|_| Outcome::NotTried).collect();
            };
            let options = PublishOptions::default();
            let mut pending = Vec::with_capacity(batch.len());
            let mut failed = false;
            for copied in batch {
                if cancel.is_cancelled() || (failed && ordered) {
                    pending.push(Err(Outcome::NotTried));
                    continue;
                }
                let publisher = if ordered {
                    publisher(number, copied.source)
                } else {
                    // Messages without a key spread over the lanes.
                    hub.number() << 1
                };
                let Copied {
                    target,
                    message,
                    marks,
                    ..
                } = copied;
                let first = marks.replay.as_ref().map(|r| r.of.clone());
                let message = whole(message, hub.0.max_message_bytes);
                let accepted = tokio::select! {
                    accepted = hub.enqueue_marked(&target, publisher, message, &options, None, marks) => accepted,
                    // Until it is accepted nothing was published.
                    () = cancel.cancelled() => {
                        pending.push(Err(Outcome::NotTried));
                        continue;
                    }
                };
                pending.push(match accepted {
                    Ok(accepted) => Ok((first.unwrap_or_default(), accepted)),
                    Err(error) => {
                        failed = true;
                        Err(Outcome::Failed(error))
                    }
                });
            }
            let mut outcomes = Vec::with_capacity(pending.len());
            for one in pending {
                outcomes.push(match one {
                    Ok((first, answer)) => match answer.await {
                        Ok(_) => Outcome::Published(first),
                        Err(error) => Outcome::Failed(error),
                    },
                    Err(outcome) => outcome,
                });
            }
            outcomes
        })
    }
}

/// Stands for the key of messages without one: those of one partition that is
/// read keep their order. Even, as those that are counted; names are odd.
fn publisher(replay: u64, source: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (replay, source).hash(&mut hasher);
    hasher.finish() & !1
}
