//! The hub's consumers: subscriptions whose handler counts and acks, and a run
//! that ends when all has arrived.

use std::{sync::Arc, time::Instant};

use super::{
    latency::Tally,
    published::Published,
    run::{ARRIVAL, Run, wait_until},
    through_hub::CONNECT,
};
use crate::{
    HandlerError, SubscribeOptions, Subscription, broker::Received, cli::Failure, hub::MessagingHub,
};

/// Subscriptions whose handler counts and acks.
pub(super) struct Readers(Vec<Subscription>);

impl Readers {
    /// Consumers of a queue.
    pub(super) async fn of_queue(
        hub: &MessagingHub,
        queue: &str,
        consumers: usize,
        prefetch: u16,
        tally: &Arc<Tally>,
    ) -> Result<Self, Failure> {
        let options = SubscribeOptions::default().with_prefetch(prefetch);
        let options = (0..consumers).map(|_| options.clone());
        Self::start(hub, queue, options, true, tally).await
    }

    /// Members of groups of a stream: one for each name that is given.
    pub(super) async fn of_stream(
        hub: &MessagingHub,
        topic: &str,
        groups: impl Iterator<Item = String>,
        unfinished: u16,
        timed: bool,
        tally: &Arc<Tally>,
    ) -> Result<Self, Failure> {
        let options = groups.map(|group| SubscribeOptions {
            max_poll_records: usize::from(unfinished),
            ..SubscribeOptions::group(group)
        });
        Self::start(hub, topic, options, timed, tally).await
    }

    async fn start(
        hub: &MessagingHub,
        topic: &str,
        options: impl Iterator<Item = SubscribeOptions>,
        timed: bool,
        tally: &Arc<Tally>,
    ) -> Result<Self, Failure> {
        let mut all = Vec::new();
        for options in options {
            let tally = tally.clone();
            let handler = move |received: Received| {
                if timed {
                    tally.take(&received.payload);
                } else {
                    tally.count_one();
                }
                std::future::ready(Ok::<(), HandlerError>(()))
            };
            all.push(hub.subscribe(topic, options, handler).await?);
        }
        for subscription in &all {
            let active = tokio::time::timeout(CONNECT, subscription.active()).await;
            if active != Ok(true) {
                return Err(Failure::new(format!(
                    "the hub could not subscribe to {topic}; what the broker says is in its log"
                )));
            }
        }
        Ok(Self(all))
    }

    /// Ends them after their running handlers.
    pub(super) async fn stop(self) {
        for subscription in &self.0 {
            subscription.unsubscribe().await;
        }
    }
}

/// A run from publish to handled, once all has arrived: the count must be right.
pub(super) async fn arrived(
    tally: &Tally,
    published: &Published,
    copies: u64,
    started: Instant,
) -> Result<Run, Failure> {
    let expected = published.messages() * copies;
    wait_until(
        ARRIVAL,
        || {
            format!(
                "{} of {expected} messages were lost: they did not arrive within {} s",
                expected.saturating_sub(tally.count()),
                ARRIVAL.as_secs()
            )
        },
        || tally.count() >= expected,
    )
    .await?;
    let count = tally.count();
    if count > expected {
        return Err(Failure::new(format!(
            "{expected} messages were published, and {count} arrived"
        )));
    }
    Ok(Run {
        spooled: published.spooled_count(),
        ..Run::new(count, tally.until_last(started), tally.latencies())
    })
}
