//! The hub's side of every scenario, by its public API alone: publishing in a
//! window, in batches or one by one. Consuming is `readers`'. It knows nothing
//! of brokers but what a configuration says.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio::task::JoinSet;

use super::{
    load::Load,
    published::Published,
    run::{ARRIVAL, wait_until},
};
use crate::{
    MessagingSystem, Outcome, Receipt,
    broker::{QueueOptions, QueueType, TopicOptions},
    cli::Failure,
    config::MessagingConfig,
    hub::{MessagingHub, Pending, Publisher},
    topology::{QueueSpec, TopicSpec, Topology, TopologyMode},
};

/// A configuration without a broker, whose topology is the bench's own alone:
/// nothing of anybody's is declared.
pub(super) fn config(
    queues: &[(&str, QueueType)],
    topics: &[(&str, TopicOptions)],
) -> MessagingConfig {
    let queues = queues.iter().map(|(name, kind)| QueueSpec {
        name: (*name).to_owned(),
        options: QueueOptions {
            queue_type: Some(*kind),
            ..QueueOptions::default()
        },
        bindings: Vec::new(),
        aliases: Vec::new(),
    });
    let topics = topics.iter().map(|(name, options)| TopicSpec {
        name: (*name).to_owned(),
        options: options.clone(),
    });
    MessagingConfig {
        topology: Topology {
            queues: queues.collect(),
            topics: topics.collect(),
            ..Topology::default()
        },
        topology_mode: TopologyMode::Ignore,
        ..MessagingConfig::builtin()
    }
}

/// Starts a hub and waits for its brokers.
pub(super) async fn start(config: MessagingConfig) -> Result<MessagingSystem, Failure> {
    let system = MessagingSystem::start(config).await?;
    let hub = system.hub();
    wait_until(
        CONNECT,
        || {
            format!(
                "the hub did not connect within {} s; is the broker there, and the address right?",
                CONNECT.as_secs()
            )
        },
        || hub.state().brokers.iter().all(|b| b.connected),
    )
    .await?;
    Ok(system)
}

/// How a producer waits for outcomes.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    /// A window of them outstanding; a window of 1 awaits each.
    Window,
    /// So many published together and awaited together.
    Batches(usize),
}

/// Publishes what the loads say, each by a publisher of its own.
pub(super) async fn publish(
    hub: &MessagingHub,
    topic: &str,
    loads: Vec<Load>,
    how: How,
) -> Result<Published, Failure> {
    let mut producers = JoinSet::new();
    for load in loads {
        let publisher = hub.publisher(topic)?;
        producers.spawn(async move {
            match how {
                How::Window => windowed(&publisher, &load).await,
                How::Batches(size) => batches(&publisher, &load, size).await,
            }
        });
    }
    gather(producers).await
}

/// Waits for producers and adds up what they were answered.
pub(super) async fn gather(
    mut producers: JoinSet<Result<Published, Failure>>,
) -> Result<Published, Failure> {
    let mut all = Published::new();
    while let Some(ended) = producers.join_next().await {
        let published = ended.map_err(|e| Failure::new(format!("a producer ended early: {e}")))?;
        all.add(published?);
    }
    Ok(all)
}

/// Outcomes are taken in the order of publishing, as a caller would.
async fn windowed(publisher: &Publisher, load: &Load) -> Result<Published, Failure> {
    let mut turns = load.turns()?;
    let mut flight = VecDeque::with_capacity(load.window);
    let mut done = Published::new().traced(load.traced);
    let mut n = 0;
    loop {
        while flight.len() >= load.window
            && let Some(answer) = oldest(&mut flight).await
        {
            done.answered(answer)?;
        }
        let due = if turns.is_paced() {
            loop {
                tokio::select! {
                    biased;
                    Some(answer) = oldest(&mut flight) => done.answered(answer)?,
                    due = turns.next() => break due,
                }
            }
        } else {
            while let Some(Some(answer)) = oldest(&mut flight).now_or_never() {
                done.answered(answer)?;
            }
            turns.next().await
        };
        let Some(due) = due else { break };
        flight.push_back((due, publisher.enqueue(load.message(n, due)).await?));
        n += 1;
        if let Some(backlog) = &load.backlog {
            backlog.add(1);
        }
    }
    while let Some(answer) = oldest(&mut flight).await {
        done.answered(answer)?;
    }
    Ok(done)
}

async fn batches(publisher: &Publisher, load: &Load, size: usize) -> Result<Published, Failure> {
    let mut turns = load.turns()?;
    let mut done = Published::new();
    let mut n = 0;
    while let Some(first) = turns.next().await {
        let mut due = vec![first];
        while due.len() < size
            && let Some(next) = turns.next().await
        {
            due.push(next);
        }
        let messages = due.iter().zip(n..).map(|(at, n)| load.message(n, *at));
        let messages: Vec<_> = messages.collect();
        n += due.len() as u64;
        if let Some(backlog) = &load.backlog {
            backlog.add(due.len() as u64);
        }
        for (at, receipt) in due.iter().zip(publisher.publish_batch(messages).await) {
            done.answered((*at, receipt))?;
        }
    }
    Ok(done)
}

type Answer = (Instant, crate::Result<Receipt>);

/// The outcome of the oldest publish; none when nothing is outstanding.
///
/// # Cancel safety
/// Nothing is taken out before its outcome is there.
async fn oldest(flight: &mut VecDeque<(Instant, Pending)>) -> Option<Answer> {
    let (due, pending) = flight.front_mut()?;
    let answer = (*due, pending.await);
    flight.pop_front();
    Some(answer)
}

impl Published {
    /// Counts an outcome; anything but acceptance fails the run.
    pub(super) fn answered(&mut self, (due, receipt): Answer) -> Result<(), Failure> {
        match receipt?.outcome {
            Outcome::Delivered { .. } => self.note(due),
            Outcome::Spooled { .. } => self.note_spooled(due),
            Outcome::Sent { .. } => {
                return Err(Failure::new("a publish ended without a confirm"));
            }
        }
        Ok(())
    }
}

/// Waits until the spool is empty, so that one run leaves nothing to the next.
#[cfg_attr(
    not(any(feature = "rabbitmq", feature = "kafka")),
    allow(dead_code, reason = "nothing is spooled without a broker")
)]
pub(super) async fn drained(hub: &MessagingHub) -> Result<(), Failure> {
    wait_until(
        ARRIVAL,
        || "the spool was not drained: the broker stalls; look at its log and alarms".to_owned(),
        || {
            hub.spool(&crate::hub::operator::SpoolFilter::default(), 0)
                .total
                .messages
                == 0
        },
    )
    .await
}

/// How long a broker may take to be there.
pub(super) const CONNECT: Duration = Duration::from_secs(30);
