//! Consumers: a polling thread that owns the client, a task that hands out and
//! settles, and the state between them.
//!
//! ```text
//!   broker --poll--> reader thread --take in--> State --hand out--> task --> Consumer
//!                        ^--- offsets to store ---'  <--- settlements ---'
//! ```

mod core;
mod ends;
mod fence;
mod handout;
mod position;
mod reader;
mod state;
mod tracker;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rdkafka::{ClientConfig, config::FromClientConfigAndContext, consumer::Consumer as _};
use tokio::sync::{mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    core::{Client, Context, Core},
    ends::Ends,
    handout::HandOut,
    reader::Reader,
    state::Settle,
};
use super::{
    broker::Backend,
    client::{self, clamp_ms},
    error::{closed, failed, invalid},
    record,
};
use crate::{
    broker::{Consumer, ConsumerControl, OffsetReset, RetryMode, Source, SubscribeOptions},
    error::{ErrorCode, Result},
    topic::Pattern,
};

pub(super) use self::{
    core::{Command, bare_list, list_of, names},
    fence::{Fence, join_anew},
    position::{commit_start, committed, resolve, steady},
    reader::fatal,
    tracker::TopicPartition,
};

/// The consumers of a broker that run.
#[derive(Debug)]
pub(super) struct Consumers {
    /// None once they are closed: one that came then would be stopped by nobody.
    running: Mutex<Option<Vec<Running>>>,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Running {
    group: Option<String>,
    /// Its `group.instance.id`.
    instance: Option<String>,
    core: Arc<Core>,
    stopping: CancellationToken,
    thread: JoinHandle<()>,
}

impl Default for Consumers {
    fn default() -> Self {
        Self {
            running: Mutex::new(Some(Vec::new())),
            tasks: TaskTracker::new(),
        }
    }
}

impl Consumers {
    /// Starts a consumer.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for options that Kafka does not have; that it is closed.
    pub(super) fn start(
        &self,
        backend: &Arc<Backend>,
        source: &Source,
        options: &SubscribeOptions,
    ) -> Result<Consumer> {
        let plan = Plan::new(backend, source, options)?;
        let (control, stopping, report) = ConsumerControl::new();
        // Held until this one is among them: no id is given twice.
        let mut running = self.running();
        let running = running.as_mut().ok_or_else(closed)?;
        // Said before it reports its end, which its thread outlives for a moment.
        running.retain(|r| !r.core.has_left());
        let instance = instance_id(running, backend, options, plan.group.as_deref());
        let settings = plan.settings(backend, options, instance.as_deref())?;
        let core = Arc::new(Core::new(
            Arc::clone(&backend.link),
            plan.settle,
            plan.reset,
            plan.member,
            options.session_timeout,
        ));
        let client = Client::from_config_and_context(&settings, Context(Arc::clone(&core)))
            .map_err(|e| failed(ErrorCode::InvalidConfig, "the consumer's settings", e))?;
        if plan.member {
            client
                .subscribe(&[&subscribed(source.pattern())])
                .map_err(|e| failed(ErrorCode::SubscribeFailed, "subscribing", e))?;
        }
        let (to_reader, deliveries) = mpsc::channel(plan.batches);
        let hand_out = HandOut {
            core: Arc::clone(&core),
            backend: Arc::clone(backend),
            deliveries: to_reader,
            stopping: stopping.clone(),
            batch: plan.batch,
        };
        let reader = Reader {
            core: Arc::clone(&core),
            client,
            settings,
            pattern: source.pattern().clone(),
            start: options.start.clone(),
            only: options.stream.partition,
            window: plan.window,
            refresh: backend.config.metadata_refresh.max(LEAST_REFRESH),
            stopping: stopping.clone(),
            report,
            assigned: HashSet::new(),
            topics: record::Topics::default(),
            missing_since: None,
            next_look: Instant::now(),
            ends: Ends::new(options.stream.until.as_ref()),
        };
        let thread = std::thread::Builder::new()
            .name("kafka-consumer".to_owned())
            .spawn(move || reader.run())
            .map_err(|e| invalid("the system gives no thread for a consumer").caused_by(e))?;
        self.tasks.spawn(hand_out.run());
        running.push(Running {
            group: plan.group,
            instance,
            core,
            stopping,
            thread,
        });
        Ok(Consumer {
            deliveries,
            control,
            retry: RetryMode::InLane,
        })
    }

    /// Gives a command to every member of a group in this process and returns
    /// the partitions that one of them carried it out for.
    pub(super) async fn command(
        &self,
        group: &str,
        make: impl Fn() -> Command,
    ) -> Result<Vec<TopicPartition>> {
        let cores: Vec<_> = self
            .running()
            .iter()
            .flatten()
            .filter(|r| r.group.as_deref() == Some(group))
            .map(|r| Arc::clone(&r.core))
            .collect();
        let mut carried_out = Vec::new();
        for core in cores {
            let (tx, answer) = oneshot::channel();
            core.order((make(), tx));
            match tokio::time::timeout(ORDER, answer).await {
                Ok(Ok(result)) => carried_out.extend(
                    result.map_err(|e| failed(ErrorCode::ConsumeFailed, "moving a group", e))?,
                ),
                // The member left just now.
                Ok(Err(_)) => {}
                Err(_) => {
                    return Err(crate::error::Error::new(
                        ErrorCode::Timeout,
                        "a member of the group did not answer in time",
                    ));
                }
            }
        }
        Ok(carried_out)
    }

    /// Stops all, waiting `grace` for readers to settle what they hold.
    pub(super) async fn close(&self, grace: Duration) {
        let running = self.running().take().unwrap_or_default();
        for r in &running {
            r.stopping.cancel();
            r.core.wake();
        }
        let cores: Vec<_> = running.iter().map(|r| Arc::clone(&r.core)).collect();
        let joined = tokio::task::spawn_blocking(move || {
            for r in running {
                // A thread that panicked has ended too.
                let _ = r.thread.join();
            }
        });
        tokio::pin!(joined);
        if tokio::time::timeout(grace, &mut joined).await.is_err() {
            for core in &cores {
                core.abort();
            }
            let _ = joined.await;
        }
        for core in &cores {
            core.abort();
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<Vec<Running>>> {
        // Nothing under this lock can stop half-way.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Static membership. An id of the configuration serves every consumer of the process,
/// so the second of a group gets a number of its own: two members of one id would
/// fence each other.
fn instance_id(
    running: &[Running],
    backend: &Backend,
    options: &SubscribeOptions,
    group: Option<&str>,
) -> Option<String> {
    if let Some(id) = &options.group_instance_id {
        return Some(id.clone());
    }
    let id = backend.config.group_instance_id.as_ref()?;
    let is_free = |wanted: &String| {
        running
            .iter()
            .all(|r| r.group.as_deref() != group || r.instance.as_ref() != Some(wanted))
    };
    let numbered = (1..=running.len()).map(|n| format!("{id}-{n}"));
    // Of so many names one more than there are members, one is free.
    std::iter::once(id.clone()).chain(numbered).find(is_free)
}

/// What options come to.
pub(super) struct Plan {
    pub(super) group: Option<String>,
    pub(super) member: bool,
    settle: Settle,
    pub(super) reset: OffsetReset,
    pub(super) window: usize,
    /// Batches that wait for the reader at most.
    batches: usize,
    /// Deliveries of one batch at most.
    batch: usize,
}

impl Plan {
    pub(super) fn new(
        backend: &Backend,
        source: &Source,
        options: &SubscribeOptions,
    ) -> Result<Self> {
        if options.exclusive {
            return Err(invalid(
                "exclusive: Kafka cannot refuse other consumers; use a group of its own",
            ));
        }
        if !options.queue_arguments.is_empty() {
            return Err(invalid(
                "queue_arguments are AMQP's; a Kafka topic is made with create_topic",
            ));
        }
        let queue = matches!(source, Source::Queue(_));
        // A work queue on Kafka is a topic that one group shares.
        let group = match (&options.group_id, queue) {
            (Some(group), _) => Some(group.clone()),
            (None, true) => Some(backend.config.group_id.clone()),
            (None, false) => None,
        };
        if group.is_none() && options.offset_reset == Some(OffsetReset::None) {
            return Err(invalid(
                "offset_reset: none needs a group; a reader without one begins where start says",
            ));
        }
        if options.stream.until.is_some() {
            if group.is_some() {
                return Err(invalid(
                    "stream.until is for a reader without a group; leave one of the two out",
                ));
            }
            if source.pattern().literal().is_none() {
                return Err(invalid(
                    "stream.until needs one topic, not a pattern: offsets are a topic's own",
                ));
            }
        }
        let only = options.stream.partition;
        if only.is_some_and(|p| p < 0) {
            return Err(invalid("stream.partition must not be negative"));
        }
        let settle = match (&group, options.auto_ack) {
            (None, _) => Settle::Never,
            (Some(_), true) => Settle::WhenHandedOut,
            (Some(_), false) => Settle::ByReader,
        };
        let member = group.is_some() && only.is_none();
        let batches = options.buffer_size.clamp(1, MOST_BATCHES);
        let (window, batches, batch) = if settle == Settle::ByReader {
            let window = if queue {
                usize::from(options.prefetch)
            } else {
                options.max_poll_records
            };
            (window.max(1), batches, LARGEST_BATCH)
        } else {
            // Nothing is settled, so what waits is the bound: half of it here,
            // half in the reader's channel.
            let half = (options.stream.buffer_size / 2).max(1);
            let batches = batches.min(half);
            (half, batches, (half / batches).clamp(1, LARGEST_BATCH))
        };
        let reset = options.offset_reset.unwrap_or(if group.is_some() {
            OffsetReset::Earliest
        } else {
            OffsetReset::Latest
        });
        Ok(Self {
            group,
            member,
            settle,
            reset,
            window,
            batches,
            batch,
        })
    }

    /// The client's settings.
    pub(super) fn settings(
        &self,
        backend: &Backend,
        options: &SubscribeOptions,
        instance: Option<&str>,
    ) -> Result<ClientConfig> {
        let mut c = client::asking(&backend.config)?;
        let group = self.group.clone().unwrap_or_else(|| {
            // The client library reads through a group's queue even where no
            // group is joined and nothing is committed.
            format!(
                "{}-reader-{}",
                backend.config.client_id,
                uuid::Uuid::now_v7()
            )
        });
        if let Some(tag) = &options.consumer_tag {
            c.set("client.id", format!("{}-{tag}", backend.config.client_id));
        }
        let reset = match (self.member, self.reset) {
            (true, OffsetReset::Latest) => "latest",
            (true, OffsetReset::None) => "error",
            // Positions are given by hand; one that retention has deleted
            // meanwhile goes on at the oldest that is left.
            (true, OffsetReset::Earliest) | (false, _) => "earliest",
        };
        let session = clamp_ms(options.session_timeout, 1000, 3_600_000);
        let fetch_bytes = options.stream.max_bytes.clamp(1024, 1_000_000_000);
        c.set("group.id", group)
            .set("enable.auto.commit", self.group.is_some().to_string())
            .set("enable.auto.offset.store", "false")
            .set(
                "auto.commit.interval.ms",
                clamp_ms(options.commit_interval, 1, 86_400_000),
            )
            .set("auto.offset.reset", reset)
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("isolation.level", backend.config.isolation_level.as_str())
            .set("session.timeout.ms", &session)
            .set(
                "heartbeat.interval.ms",
                clamp_ms(options.heartbeat_interval, 1, 3_600_000),
            )
            .set(
                "fetch.min.bytes",
                options.stream.min_bytes.clamp(1, 100_000_000).to_string(),
            )
            .set("fetch.max.bytes", fetch_bytes.to_string())
            .set(
                "fetch.message.max.bytes",
                fetch_bytes.min(MOST_PARTITION_BYTES).to_string(),
            )
            .set("message.max.bytes", fetch_bytes.max(1000).to_string())
            .set("receive.message.max.bytes", RECEIVE_BYTES)
            .set(
                "fetch.wait.max.ms",
                clamp_ms(options.stream.max_wait, 0, 50_000),
            )
            .set("queued.max.messages.kbytes", PREFETCH_KBYTES)
            // After the prefetch was full: its default of a second is a stall.
            .set("fetch.queue.backoff.ms", "10")
            .set("topic.blacklist", "^__.*")
            // How a reader with an end knows that the rest of it does not exist.
            .set(
                "enable.partition.eof",
                options.stream.until.is_some().to_string(),
            );
        if let Ok(ms) = session.parse::<u64>() {
            c.set("max.poll.interval.ms", ms.max(300_000).to_string());
        }
        if let (Some(id), true) = (instance, self.member) {
            c.set("group.instance.id", id);
        }
        Ok(c)
    }
}

/// A pattern as the client library takes it.
pub(super) fn subscribed(pattern: &Pattern) -> String {
    pattern
        .literal()
        .map_or_else(|| pattern.to_regex(), |t| t.as_str().to_owned())
}

/// Deliveries of one batch at most.
const LARGEST_BATCH: usize = 256;

/// Batches that wait for a reader at most, whatever is asked for.
const MOST_BATCHES: usize = 100_000;

/// Fetched ahead at most, in kibibytes, for each consumer.
const PREFETCH_KBYTES: &str = "16384";

/// Of one partition in one fetch, in bytes; larger records come alone.
const MOST_PARTITION_BYTES: usize = 1024 * 1024;

/// The largest response; above the largest fetch by what librdkafka asks for.
const RECEIVE_BYTES: &str = "1073741824";

/// New topics are looked for no more often than this.
const LEAST_REFRESH: Duration = Duration::from_millis(100);

/// How long a member may take to carry out an order.
const ORDER: Duration = Duration::from_secs(15);
