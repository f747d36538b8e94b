//! How a subscription hands out, resolved from its options.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    broker::{Delays, Source, SubscribeOptions, options::Filter},
    metrics::MetricsRecorder,
};

/// How to hand out what a consumer brings.
#[derive(Clone, Debug)]
pub struct DispatchSettings {
    /// Keep the order of each key (streams); else hand out as it comes (queues).
    pub ordered: bool,
    /// Handlers that run at once at most.
    pub concurrency: usize,
    /// Messages held at most, handled ones included, before no further batch is
    /// taken from the consumer.
    pub max_held: usize,
    /// What is handed out; the rest is acked.
    pub filter: Option<Filter>,
    /// Ack before handling: at most once, so a failure is counted and that is
    /// all.
    pub auto_ack: bool,
    /// Try a failed message again.
    pub retry_on_error: bool,
    /// Overrides the message's own limit.
    pub max_retries: Option<u32>,
    /// How long a failed message rests.
    pub retry_delays: Delays,
    /// How long a handler may take.
    pub handler_timeout: Option<Duration>,
    /// Where it is counted.
    pub recorder: Arc<MetricsRecorder>,
    /// Ends the patience with handlers that still run after a stop: they are
    /// dropped at their next await and their messages given back. Whoever stops
    /// cancels it when its grace is over.
    pub give_up: CancellationToken,
}

impl DispatchSettings {
    /// The settings that `options` ask for.
    #[must_use]
    pub fn new(
        source: &Source,
        options: &SubscribeOptions,
        recorder: &Arc<MetricsRecorder>,
    ) -> Self {
        let (ordered, concurrency, held, retry_delay) = match source {
            Source::Queue(_) => (
                false,
                usize::from(options.prefetch),
                usize::from(options.prefetch),
                TASK_RETRY_DELAY,
            ),
            Source::Stream(_) => (
                true,
                STREAM_CONCURRENCY,
                options.max_poll_records,
                EVENT_RETRY_DELAY,
            ),
        };
        let concurrency = options.concurrency.unwrap_or(concurrency).max(1);
        Self {
            ordered,
            concurrency,
            max_held: held.max(concurrency),
            filter: options.filter.clone(),
            auto_ack: options.auto_ack,
            retry_on_error: options.retry_on_error,
            max_retries: options.max_retries,
            retry_delays: Delays::every(options.retry_delay.unwrap_or(retry_delay)),
            handler_timeout: options.handler_timeout,
            recorder: recorder.clone(),
            give_up: CancellationToken::new(),
        }
    }
}

/// Handlers of a stream that run at once, each for another key, unless the
/// subscription says otherwise.
pub const STREAM_CONCURRENCY: usize = 64;
/// How long a failed task rests, unless the subscription says otherwise.
pub const TASK_RETRY_DELAY: Duration = Duration::from_secs(60);
/// How long a failed event rests, unless the subscription says otherwise.
pub const EVENT_RETRY_DELAY: Duration = Duration::from_secs(1);
