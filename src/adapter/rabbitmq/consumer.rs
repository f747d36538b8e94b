//! Starts consumers: checks what was asked for, finds the queues, and keeps
//! one reader for each, also for queues that are declared later.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    board::Board,
    courier::Courier,
    error::unsupported,
    queue,
    reader::{Queue, Reader},
    session::Plan,
    shared::Shared,
};
use crate::{
    broker::{
        Consumer, ConsumerControl, OffsetReset, RetryMode, Source, StartFrom, StreamOptions,
        SubscribeOptions,
    },
    duration,
    error::Result,
    topic::{Pattern, Topic},
};

/// Starts a consumer.
///
/// # Errors
/// A refusal: an option that RabbitMQ cannot honour, a queue that is not there.
pub(super) async fn consume(
    shared: &Arc<Shared>,
    courier: &Courier,
    source: &Source,
    options: &SubscribeOptions,
) -> Result<Consumer> {
    check(shared, source, options)?;
    let pattern = source.pattern();
    let stream = matches!(source, Source::Stream(_));
    let declares = !options.queue_arguments.is_empty();
    if let (Source::Queue(_), Some(topic), false) = (source, pattern.literal(), declares) {
        // Only a server can say so; without one it is found out later.
        if let Ok(link) = shared.current() {
            queue::look(&link, shared.topology.canonical(&topic)).await?;
        }
    }
    let (deliveries, receiver) = mpsc::channel(if stream {
        options.buffer_size.min(options.stream.buffer_size).max(1)
    } else {
        options.buffer_size.max(1)
    });
    let (control, stopping, report) = ConsumerControl::new();
    let group = Group {
        board: Arc::new(Board::new(report)),
        shared: shared.clone(),
        courier: courier.clone(),
        source: source.clone(),
        options: options.clone(),
        deliveries,
        stopping,
    };
    shared.recorder.active_subscriptions.inc();
    shared.tasks.spawn(group.run());
    Ok(Consumer {
        deliveries: receiver,
        control,
        retry: if stream {
            RetryMode::InLane
        } else {
            RetryMode::Broker
        },
    })
}

/// The readers of one consumer.
struct Group {
    shared: Arc<Shared>,
    courier: Courier,
    source: Source,
    options: SubscribeOptions,
    deliveries: mpsc::Sender<Vec<crate::broker::Delivery>>,
    stopping: CancellationToken,
    board: Arc<Board>,
}

impl Group {
    async fn run(self) {
        let mut declarations = self.shared.declarations.subscribe();
        let mut readers = JoinSet::new();
        let mut running: HashMap<String, CancellationToken> = HashMap::new();
        loop {
            declarations.mark_unchanged();
            let targets = self.targets();
            running.retain(|name, stop| {
                let wanted = targets.contains_key(name);
                if !wanted {
                    stop.cancel();
                }
                wanted
            });
            for (name, queue) in targets {
                if running.contains_key(&name) {
                    continue;
                }
                let stop = self.stopping.child_token();
                self.board.set(&name, false);
                readers.spawn(self.reader(queue, stop.clone()).run());
                running.insert(name, stop);
            }
            if running.is_empty() {
                self.board.refresh();
            }
            tokio::select! {
                () = self.stopping.cancelled() => break,
                () = self.shared.closing.cancelled() => break,
                () = self.deliveries.closed() => break,
                changed = declarations.changed() => if changed.is_err() { break },
                // A reader that was told to stop because its queue is deleted.
                Some(_) = readers.join_next() => {}
            }
        }
        while readers.join_next().await.is_some() {}
        self.shared.recorder.active_subscriptions.dec();
        self.board.stopped();
    }

    /// Every queue to be read now, by name.
    fn targets(&self) -> BTreeMap<String, Queue> {
        let shared = &self.shared;
        let queue = match &self.source {
            Source::Stream(pattern) => stream_queue(shared, pattern, &self.options),
            Source::Queue(pattern) => match pattern.literal() {
                Some(topic) => {
                    let name = shared.topology.canonical(&topic).to_owned();
                    if self.options.queue_arguments.is_empty() {
                        Queue::Existing(name)
                    } else {
                        Queue::Own {
                            name,
                            live: false,
                            arguments: self.options.queue_arguments.clone(),
                            binding: None,
                        }
                    }
                }
                None => {
                    return matching(shared, pattern)
                        .into_iter()
                        .map(|name| (name.clone(), Queue::Existing(name)))
                        .collect();
                }
            },
        };
        BTreeMap::from([(queue.name().to_owned(), queue)])
    }

    fn reader(&self, queue: Queue, stopping: CancellationToken) -> Reader {
        let stream = matches!(self.source, Source::Stream(_));
        let live = stream && self.options.group_id.is_none();
        let made = || format!("messaging-hub.{}", uuid::Uuid::now_v7().simple());
        Reader {
            plan: Plan {
                tag: self.options.consumer_tag.clone().unwrap_or_else(made),
                prefetch: if stream {
                    u16::try_from(self.options.max_poll_records).unwrap_or(u16::MAX)
                } else if self.options.prefetch == SubscribeOptions::DEFAULT_PREFETCH {
                    // A subscription that carries the default has said nothing.
                    self.shared.config.prefetch_count
                } else {
                    self.options.prefetch
                },
                exclusive: self.options.exclusive,
                unsettled: live || self.options.auto_ack,
                stream,
                topic: Topic::new(queue.name()).unwrap_or_else(|_| fallback_topic()),
            },
            shared: self.shared.clone(),
            courier: self.courier.clone(),
            queue,
            deliveries: self.deliveries.clone(),
            stopping,
            board: self.board.clone(),
        }
    }
}

/// All known queues that a pattern covers, but for those in which messages
/// rest: retries and dead letters are read by name only.
fn matching(shared: &Shared, pattern: &Pattern) -> Vec<String> {
    let topology = &shared.topology;
    let known = topology.queues.iter().map(|q| q.name.clone());
    let mut names: Vec<String> = known.chain(shared.declared().into_keys()).collect();
    names.sort_unstable();
    names.dedup();
    names.retain(|n| {
        pattern.matches(n) && !topology.is_retry_queue(n) && !topology.keeps_dead_letters(n)
    });
    names
}

/// The queue that stands in for a stream's reader: a group has a durable one of
/// its own, others have one that goes with their connection.
fn stream_queue(shared: &Shared, pattern: &Pattern, options: &SubscribeOptions) -> Queue {
    let binding = Some((
        shared.topology.event_exchange().to_owned(),
        pattern.as_str().to_owned(),
    ));
    match &options.group_id {
        Some(group) => Queue::Own {
            name: group_queue(group, pattern),
            live: false,
            arguments: options.queue_arguments.clone(),
            binding,
        },
        None => Queue::Own {
            name: "messaging-hub.live".to_owned(),
            live: true,
            arguments: options.queue_arguments.clone(),
            binding,
        },
    }
}

/// `{group}.{pattern}` in the characters of topic names. What cannot be kept is
/// replaced, and a checksum of the whole keeps different names different.
pub(super) fn group_queue(group: &str, pattern: &Pattern) -> String {
    let whole = format!("{group}.{}", pattern.as_str());
    let mut clean = String::with_capacity(whole.len());
    for c in whole.chars() {
        match c {
            '*' => clean.push_str("any"),
            '#' => clean.push_str("all"),
            c if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') => clean.push(c),
            _ => clean.push('_'),
        }
    }
    if clean == whole && clean.len() <= MOST_NAME {
        return clean;
    }
    clean.truncate(MOST_NAME - 9);
    format!("{clean}-{:08x}", crc32fast::hash(whole.as_bytes()))
}

fn check(shared: &Shared, source: &Source, options: &SubscribeOptions) -> Result<()> {
    let defaults = SubscribeOptions::default();
    let refuse = |why: String| Err(unsupported(why).on(source.pattern().as_str()));
    for (set, name) in [
        (options.group_instance_id.is_some(), "group_instance_id"),
        (
            options.session_timeout != defaults.session_timeout,
            "session_timeout",
        ),
        (
            options.heartbeat_interval != defaults.heartbeat_interval,
            "heartbeat_interval",
        ),
        (options.start != StartFrom::Latest, "start"),
    ] {
        if set {
            return refuse(format!(
                "RabbitMQ has no {name}: it keeps no history and no group members; leave it out"
            ));
        }
    }
    if options.long_running {
        return refuse("long_running is the hub's to do; subscribe through a hub".to_owned());
    }
    if let Some(limit) = options.handler_timeout
        && limit > CONSUMER_TIMEOUT
    {
        return refuse(format!(
            "RabbitMQ closes a channel whose delivery is unsettled for {CONSUMER_TIMEOUT:?} (consumer_timeout); handler_timeout {limit:?} is longer: set long_running, which hands each task over to the hub's own disk first"
        ));
    }
    if options.prefetch == 0 {
        return refuse("prefetch must be at least 1: it is what bounds the consumer".to_owned());
    }
    match source {
        Source::Queue(pattern) => {
            if let Some(delay) = options.retry_delay
                && shared.topology.retry_tier(delay).is_none()
            {
                let tiers: Vec<String> = shared
                    .topology
                    .retry_tiers()
                    .map(|tier| duration::format(tier.delay))
                    .collect();
                return refuse(format!(
                    "retry_delay {}: failed tasks rest in retry queues, and there are those of {}; choose one, or give it to a route",
                    duration::format(delay),
                    tiers.join(", ")
                ));
            }
            if !options.queue_arguments.is_empty() && pattern.literal().is_none() {
                return refuse(
                    "queue_arguments are for one queue; this pattern may cover several".to_owned(),
                );
            }
        }
        Source::Stream(_) => {
            if let Some(reset @ (OffsetReset::Earliest | OffsetReset::None)) = options.offset_reset
            {
                return refuse(format!(
                    "offset_reset {reset:?}: over RabbitMQ a group's queue begins when it is made; use latest"
                ));
            }
            let StreamOptions {
                min_bytes,
                max_bytes,
                max_wait,
                partition,
                ref until,
                buffer_size: _,
            } = options.stream;
            let d = StreamOptions::default();
            if min_bytes != d.min_bytes
                || max_bytes != d.max_bytes
                || max_wait != d.max_wait
                || partition.is_some()
                || until.is_some()
            {
                return refuse("RabbitMQ pushes messages one by one and keeps no log: min_bytes, max_bytes, max_wait, partition and until do not apply; leave them out".to_owned());
            }
            if options.max_poll_records == 0 {
                return refuse("max_poll_records must be at least 1".to_owned());
            }
        }
    }
    Ok(())
}

fn fallback_topic() -> Topic {
    // A queue of ours always has a topic's name; one read by its name has been
    // checked as a pattern. What is left has no name that a topic could have.
    Topic::new("unnamed").unwrap_or_else(|_| unreachable!("a constant that is a topic"))
}

/// How long a delivery may be unsettled before RabbitMQ closes its channel.
const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// The most characters of a topic, and so of a queue that is asked for as one.
const MOST_NAME: usize = crate::topic::MAX_TOPIC_LEN;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_groups_queue_has_a_name_that_a_topic_could_have_and_no_other_group_has() {
        let name = |g: &str, p: &str| group_queue(g, &Pattern::new(p).unwrap());
        assert_eq!(
            name("audit", "helixagent.events.x"),
            "audit.helixagent.events.x"
        );
        let names = [
            name("audit", "events.#"),
            name("audit", "events.*"),
            name("audit", "events.all"),
            name("a/b", "x"),
            name("a_b", "x"),
            name(&"g".repeat(300), "x"),
            name(&"g".repeat(301), "x"),
        ];
        for (i, a) in names.iter().enumerate() {
            Topic::new(a).unwrap();
            assert!(names[i + 1..].iter().all(|b| a != b), "{a}");
        }
    }
}
