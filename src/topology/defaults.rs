//! The topology that holds where the configuration says nothing else: the task
//! queues, event topics and dead letters that agent services share. It refuses
//! to depend on the environment: the same everywhere, and spelled out once more
//! for people in `configs/messaging.yaml`.

use std::time::Duration;

use super::{Binding, ExchangeKind, ExchangeSpec, QueueSpec, TopicSpec, Topology, resting};
use crate::broker::{QueueOptions, TopicOptions};

impl Topology {
    /// Exchanges, queues, bindings, topics and groups of the `helixagent`
    /// services and of their verifier.
    #[must_use]
    pub fn helixagent() -> Self {
        Self {
            exchanges: vec![
                exchange(TASKS, ExchangeKind::Direct),
                exchange("helixagent.events", ExchangeKind::Topic),
                exchange("helixagent.notifications", ExchangeKind::Fanout),
                exchange(DEAD_LETTERS, ExchangeKind::Direct),
                exchange(RETRY, ExchangeKind::Topic),
            ],
            queues: vec![
                task_queue("background", None),
                // Only classic queues know ten priorities; see `QueueOptions`.
                task_queue("llm", Some(10)),
                task_queue("debate", None),
                task_queue("verification", None),
                task_queue("notifications", None),
                QueueSpec {
                    name: DEAD_LETTER_QUEUE.to_owned(),
                    options: QueueOptions::default(),
                    bindings: vec![binding(DEAD_LETTERS, DEAD_LETTER_KEY)],
                    aliases: Vec::new(),
                },
                retry_queue(),
            ],
            topics: topics(),
            groups: [
                "helixagent-workers",
                "helixagent-notifications",
                "helixagent-analytics",
                "helixagent-audit",
                "helixagent-dlq-processor",
            ]
            .map(str::to_owned)
            .to_vec(),
            event_exchange: Some("helixagent.events".to_owned()),
            retry_exchange: Some(RETRY.to_owned()),
            dead_letter_queue: Some(DEAD_LETTER_QUEUE.to_owned()),
            dead_letter_topic: Some("helixagent.dlq.events".to_owned()),
        }
    }
}

fn exchange(name: &str, kind: ExchangeKind) -> ExchangeSpec {
    ExchangeSpec {
        name: name.to_owned(),
        kind,
        durable: true,
    }
}

fn binding(exchange: &str, routing_key: &str) -> Binding {
    Binding {
        exchange: exchange.to_owned(),
        routing_key: routing_key.to_owned(),
    }
}

fn task_queue(short: &str, max_priority: Option<u8>) -> QueueSpec {
    QueueSpec {
        name: format!("{TASKS}.{short}"),
        options: QueueOptions {
            dead_letter_exchange: Some(DEAD_LETTERS.to_owned()),
            dead_letter_routing_key: Some(DEAD_LETTER_KEY.to_owned()),
            max_priority,
            ..QueueOptions::default()
        },
        bindings: vec![binding(TASKS, short)],
        aliases: vec![short.to_owned()],
    }
}

/// Holds a failed task for a minute and gives it back.
fn retry_queue() -> QueueSpec {
    QueueSpec {
        name: RETRY.to_owned(),
        options: resting(RETRY_DELAY),
        bindings: vec![binding(RETRY, "#")],
        aliases: Vec::new(),
    }
}

fn topics() -> Vec<TopicSpec> {
    let large = Some(10 * 1024 * 1024);
    let topic =
        |name: &str, partitions, retention_ms, cleanup: &str, max_message_bytes| TopicSpec {
            name: name.to_owned(),
            options: TopicOptions {
                partitions,
                retention_ms,
                cleanup_policy: cleanup.to_owned(),
                max_message_bytes,
                ..TopicOptions::default()
            },
        };
    let plain = |name: &str, partitions, retention_ms| {
        topic(name, partitions, retention_ms, "delete", None)
    };
    vec![
        topic(
            "helixagent.events.llm.responses",
            6,
            7 * DAY,
            "delete",
            large,
        ),
        topic(
            "helixagent.events.debate.rounds",
            6,
            7 * DAY,
            "delete",
            large,
        ),
        topic(
            "helixagent.events.verification.results",
            3,
            30 * DAY,
            "compact,delete",
            None,
        ),
        plain("helixagent.events.provider.health", 3, DAY),
        plain("helixagent.events.audit", 6, 30 * DAY),
        plain("helixagent.events.metrics", 3, DAY),
        plain("helixagent.events.errors", 3, 30 * DAY),
        plain("helixagent.stream.tokens", 12, HOUR),
        plain("helixagent.stream.sse", 6, HOUR),
        plain("helixagent.stream.websocket", 6, HOUR),
        plain("helixagent.dlq.tasks", 3, 30 * DAY),
        // The largest message, and what is said of its failure.
        topic(
            "helixagent.dlq.events",
            3,
            30 * DAY,
            "delete",
            Some(11 * 1024 * 1024),
        ),
        plain("llmsverifier.events.verification", 3, 7 * DAY),
        plain("llmsverifier.events.provider", 3, 7 * DAY),
        plain("llmsverifier.events.model", 3, 7 * DAY),
        plain("llmsverifier.events.team", 3, 7 * DAY),
        plain("llmsverifier.events.system", 3, 7 * DAY),
    ]
}

const TASKS: &str = "helixagent.tasks";
const DEAD_LETTERS: &str = "helixagent.dlx";
const DEAD_LETTER_KEY: &str = "dlq";
const DEAD_LETTER_QUEUE: &str = "helixagent.dlq";
const RETRY: &str = "helixagent.retry";
const RETRY_DELAY: Duration = Duration::from_secs(60);
const HOUR: i64 = 3600 * 1000;
const DAY: i64 = 24 * HOUR;
