//! The counters of a broker.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::{Histogram, LatencySummary};
use crate::message::Timestamp;

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Takes one off; for the few that go both ways.
    pub fn dec(&self) {
        let _ = self
            .0
            .fetch_update(Relaxed, Relaxed, |v| Some(v.saturating_sub(1)));
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts what one broker, or the hub, does. Shared, lock-free but for
        /// the histograms.
        #[derive(Debug)]
        pub struct MetricsRecorder {
            $($(#[$doc])* pub $name: Counter,)*
            /// From publish to outcome.
            pub publish_latency: Histogram,
            /// From subscribe to active.
            pub subscribe_latency: Histogram,
            /// From message timestamp to handler.
            pub delivery_latency: Histogram,
            last_publish: AtomicI64,
            last_receive: AtomicI64,
            start_time: Timestamp,
        }

        /// A snapshot of a broker's counters.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        pub struct BrokerMetrics {
            $($(#[$doc])* pub $name: u64,)*
            /// Nanoseconds spent publishing, in all.
            pub publish_latency_total: u64,
            /// Publishes in that time.
            pub publish_latency_count: u64,
            /// From publish to outcome.
            pub publish_latency: LatencySummary,
            /// Nanoseconds spent subscribing, in all.
            pub subscribe_latency_total: u64,
            /// Subscribes in that time.
            pub subscribe_latency_count: u64,
            /// From message timestamp to handler.
            pub delivery_latency: LatencySummary,
            /// When counting began.
            pub start_time: Timestamp,
            /// When something was published last.
            pub last_publish: Option<Timestamp>,
            /// When something was received last.
            pub last_receive: Option<Timestamp>,
        }

        impl Default for MetricsRecorder {
            fn default() -> Self {
                Self {
                    $($name: Counter::default(),)*
                    publish_latency: Histogram::default(),
                    subscribe_latency: Histogram::default(),
                    delivery_latency: Histogram::default(),
                    last_publish: AtomicI64::new(0),
                    last_receive: AtomicI64::new(0),
                    start_time: Timestamp::now(),
                }
            }
        }

        impl MetricsRecorder {
            /// A snapshot.
            #[must_use]
            pub fn snapshot(&self) -> BrokerMetrics {
                let publish = self.publish_latency.summary();
                let subscribe = self.subscribe_latency.summary();
                BrokerMetrics {
                    $($name: self.$name.get(),)*
                    publish_latency_total: publish.sum_us.saturating_mul(1000),
                    publish_latency_count: publish.count,
                    publish_latency: publish,
                    subscribe_latency_total: subscribe.sum_us.saturating_mul(1000),
                    subscribe_latency_count: subscribe.count,
                    delivery_latency: self.delivery_latency.summary(),
                    start_time: self.start_time,
                    last_publish: at(&self.last_publish),
                    last_receive: at(&self.last_receive),
                }
            }
        }
    };
}

counters! {
    /// Connections tried.
    connection_attempts,
    /// Connections made.
    connection_successes,
    /// Connections that could not be made.
    connection_failures,
    /// Connections tried again after a loss.
    reconnection_attempts,
    /// Consumers that the server had lost and that were subscribed again.
    consumers_revived,
    /// Connections that stand now.
    current_connections,
    /// Messages given to be published.
    messages_published,
    /// Publishes with a good outcome.
    publish_successes,
    /// Publishes with an error.
    publish_failures,
    /// Confirms received.
    publish_confirmations,
    /// Publishes without an outcome in time.
    publish_timeouts,
    /// Bytes of payload published.
    bytes_published,
    /// Batches published.
    batches_published,
    /// Messages received from the broker.
    messages_received,
    /// Messages handed to a reader.
    messages_consumed,
    /// Messages handled well.
    messages_processed,
    /// Messages whose handler failed.
    messages_failed,
    /// Messages given another attempt.
    messages_retried,
    /// Messages moved to the dead letters.
    messages_dead_lettered,
    /// Dead letters that were published again.
    dead_letters_reprocessed,
    /// Dead letters that were discarded.
    dead_letters_discarded,
    /// Messages acked.
    messages_acked,
    /// Messages given back.
    messages_nacked,
    /// Bytes of payload received.
    bytes_received,
    /// Subscriptions that run now.
    active_subscriptions,
    /// Errors of any kind.
    total_errors,
    /// Errors of connections.
    connection_errors,
    /// Errors of publishes.
    publish_errors,
    /// Errors of subscriptions.
    subscribe_errors,
    /// Messages that could not be encoded or decoded.
    serialization_errors,
    /// Queues declared.
    queues_declared,
    /// Topics created.
    topics_created,
}

impl MetricsRecorder {
    /// Notes that something was published now.
    pub fn touch_publish(&self) {
        self.last_publish
            .store(Timestamp::now().as_millis(), Relaxed);
    }

    /// Notes that something was received now.
    pub fn touch_receive(&self) {
        self.last_receive
            .store(Timestamp::now().as_millis(), Relaxed);
    }
}

fn at(ms: &AtomicI64) -> Option<Timestamp> {
    match ms.load(Relaxed) {
        0 => None,
        ms => Some(Timestamp::from_millis(ms)),
    }
}
