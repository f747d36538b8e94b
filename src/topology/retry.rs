//! Retry tiers: the queues over AMQP in which failed tasks rest, one for each
//! delay. It names them and finds them; the adapter makes and uses them.
//!
//! A tier is a queue with a TTL, whose dead letters go to the default exchange
//! under the key that they came with: back to the queue that the key names. The
//! key is taken up by that, so each tier has an exchange of its own.

use std::time::Duration;

use super::{Binding, ExchangeKind, ExchangeSpec, QueueSpec, Topology};
use crate::{broker::QueueOptions, duration};

/// A queue in which failed tasks rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryTier<'a> {
    /// How long.
    pub delay: Duration,
    /// Where to publish a task so that it rests, with its queue's name as key.
    pub exchange: &'a str,
    /// The queue.
    pub queue: &'a QueueSpec,
}

impl Topology {
    /// The retry tiers, the default one first.
    pub fn retry_tiers(&self) -> impl Iterator<Item = RetryTier<'_>> {
        let of = |own: bool| {
            self.queues.iter().filter_map(move |queue| {
                let binding = queue.bindings.iter().find(|b| match own {
                    true => b.exchange == self.retry_exchange(),
                    false => self.is_tier_exchange(&b.exchange),
                })?;
                Some(RetryTier {
                    delay: Duration::from_millis(queue.options.message_ttl_ms?),
                    exchange: &binding.exchange,
                    queue,
                })
            })
        };
        of(true).take(1).chain(of(false))
    }

    /// The tier of a delay.
    #[must_use]
    pub fn retry_tier(&self, delay: Duration) -> Option<RetryTier<'_>> {
        self.retry_tiers().find(|tier| tier.delay == delay)
    }

    /// Whether failed tasks rest in this queue, which is read by its name only.
    #[must_use]
    pub fn is_retry_queue(&self, name: &str) -> bool {
        self.retry_tiers().any(|tier| tier.queue.name == name)
    }

    /// Whether an exchange is named as that of a tier beside the default one.
    pub(super) fn is_tier_exchange(&self, name: &str) -> bool {
        name.strip_prefix(self.retry_exchange())
            .is_some_and(|rest| rest.starts_with('.'))
    }

    /// The topology with a tier for each of these delays.
    #[must_use]
    pub fn with_retry_tiers(mut self, delays: impl IntoIterator<Item = Duration>) -> Self {
        for delay in delays {
            let name = format!("{}.{}", self.retry_exchange(), duration::format(delay));
            let taken =
                self.exchanges.iter().any(|e| e.name == name) || self.queue(&name).is_some();
            if taken || self.retry_tier(delay).is_some() {
                continue;
            }
            self.exchanges.push(ExchangeSpec {
                name: name.clone(),
                kind: ExchangeKind::Topic,
                durable: true,
            });
            self.queues.push(QueueSpec {
                options: resting(delay),
                bindings: vec![Binding {
                    exchange: name.clone(),
                    routing_key: "#".to_owned(),
                }],
                aliases: Vec::new(),
                name,
            });
        }
        self
    }
}

/// How a queue is declared in which failed tasks rest. The dead-letter exchange is
/// the default one and there is no dead-letter key, so a message returns to the
/// queue whose full name is its routing key, whatever that queue is; with a fixed
/// key it would vanish after its delay. `at-least-once` needs `reject-publish`.
#[must_use]
pub fn resting(delay: Duration) -> QueueOptions {
    QueueOptions {
        message_ttl_ms: Some(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
        dead_letter_exchange: Some(String::new()),
        dead_letter_strategy: Some("at-least-once".to_owned()),
        overflow: Some("reject-publish".to_owned()),
        ..QueueOptions::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_delay_has_a_tier_and_one_that_is_there_is_kept() {
        let seconds = |n| Duration::from_secs(n);
        let plain = Topology::helixagent();
        let before = plain.queues.len();
        let wanted = plain.with_retry_tiers([seconds(60), seconds(5), seconds(5), seconds(600)]);
        assert_eq!(wanted.queues.len(), before + 2);
        let tiers: Vec<(u64, &str)> = wanted
            .retry_tiers()
            .map(|t| (t.delay.as_secs(), t.exchange))
            .collect();
        assert_eq!(
            tiers,
            [
                (60, "helixagent.retry"),
                (5, "helixagent.retry.5s"),
                (600, "helixagent.retry.600s")
            ]
        );
        assert!(wanted.is_retry_queue("helixagent.retry.5s"));
        assert!(!wanted.is_retry_queue("helixagent.tasks.llm"));
        assert_eq!(wanted.retry_tier(seconds(7)), None);
        assert_eq!(wanted.clone().problems(), []);
    }
}
