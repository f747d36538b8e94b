//! The wanted topology: exchanges, queues, bindings, topics.

use serde::{Deserialize, Serialize};

use crate::broker::{QueueOptions, TopicOptions};

/// Everything that should exist.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Topology {
    /// AMQP exchanges.
    pub exchanges: Vec<ExchangeSpec>,
    /// AMQP queues with their bindings. The embedded broker makes the same.
    pub queues: Vec<QueueSpec>,
    /// Kafka topics. The embedded broker makes the same streams.
    pub topics: Vec<TopicSpec>,
    /// Consumer groups that users agree on.
    pub groups: Vec<String>,
    /// The exchange that events are published to when RabbitMQ serves them.
    /// Default `helixagent.events`.
    pub event_exchange: Option<String>,
    /// The exchange of the retry queue. Default `helixagent.retry`.
    pub retry_exchange: Option<String>,
    /// The queue that dead letters of queues go to. Default `helixagent.dlq`.
    pub dead_letter_queue: Option<String>,
    /// The topic that dead letters of streams go to. Default
    /// `helixagent.dlq.events`.
    pub dead_letter_topic: Option<String>,
}

/// Kinds of exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExchangeKind {
    /// To the queue bound with exactly the key.
    Direct,
    /// To the queues whose pattern matches the key.
    Topic,
    /// To every bound queue.
    Fanout,
}

/// An exchange.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExchangeSpec {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: ExchangeKind,
    /// Survives restarts. Default true.
    #[serde(default = "yes")]
    pub durable: bool,
}

/// A queue with its bindings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSpec {
    /// Its name; also the topic's full name.
    pub name: String,
    /// How it is declared.
    #[serde(default)]
    pub options: QueueOptions,
    /// What it is bound to. The first binding is where its topic is published.
    #[serde(default)]
    pub bindings: Vec<Binding>,
    /// Other names of the topic, such as `llm` for `helixagent.tasks.llm`.
    #[serde(default)]
    pub aliases: Vec<String>,
}

/// A binding of a queue to an exchange.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// The exchange.
    pub exchange: String,
    /// The routing key or pattern.
    pub routing_key: String,
}

/// A topic of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicSpec {
    /// Its name.
    pub name: String,
    /// How it is made.
    #[serde(default)]
    pub options: TopicOptions,
}

/// Where a task topic is published and consumed over AMQP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AmqpAddress {
    /// The exchange; empty for the default exchange.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// The queue that consumers read.
    pub queue: String,
}

impl Topology {
    /// The full name of a topic: aliases are resolved, other names are their own.
    #[must_use]
    pub fn canonical<'a>(&'a self, topic: &'a str) -> &'a str {
        self.queues
            .iter()
            .find(|q| q.aliases.iter().any(|a| a == topic))
            .map_or(topic, |q| q.name.as_str())
    }

    /// The queue of a topic, by full name or alias.
    #[must_use]
    pub fn queue(&self, topic: &str) -> Option<&QueueSpec> {
        let name = self.canonical(topic);
        self.queues.iter().find(|q| q.name == name)
    }

    /// The stream of this name.
    #[must_use]
    pub fn topic(&self, name: &str) -> Option<&TopicSpec> {
        self.topics.iter().find(|t| t.name == name)
    }

    /// Where a task topic lives over AMQP; without an entry: the default
    /// exchange with the topic as key and queue.
    #[must_use]
    pub fn amqp_address(&self, topic: &str) -> AmqpAddress {
        match self.queue(topic) {
            Some(queue) => match queue.bindings.first() {
                Some(binding) => AmqpAddress {
                    exchange: binding.exchange.clone(),
                    routing_key: binding.routing_key.clone(),
                    queue: queue.name.clone(),
                },
                None => AmqpAddress {
                    exchange: String::new(),
                    routing_key: queue.name.clone(),
                    queue: queue.name.clone(),
                },
            },
            None => AmqpAddress {
                exchange: String::new(),
                routing_key: topic.to_owned(),
                queue: topic.to_owned(),
            },
        }
    }

    /// The exchange for events over AMQP.
    #[must_use]
    pub fn event_exchange(&self) -> &str {
        self.event_exchange
            .as_deref()
            .unwrap_or("helixagent.events")
    }

    /// The exchange of the retry queue.
    #[must_use]
    pub fn retry_exchange(&self) -> &str {
        self.retry_exchange.as_deref().unwrap_or("helixagent.retry")
    }

    /// The queue of dead letters of queues.
    #[must_use]
    pub fn dead_letter_queue(&self) -> &str {
        self.dead_letter_queue
            .as_deref()
            .unwrap_or("helixagent.dlq")
    }

    /// The queue that keeps what was decided about dead letters until it is
    /// purged: those that were processed or discarded.
    #[must_use]
    pub fn decided_queue(&self) -> String {
        format!("{}.decided", self.dead_letter_queue())
    }

    /// Whether dead letters lie in this queue, which is read by its name only:
    /// a pattern does not mean it.
    #[must_use]
    pub fn keeps_dead_letters(&self, queue: &str) -> bool {
        queue
            .strip_prefix(self.dead_letter_queue())
            .is_some_and(|rest| rest.is_empty() || rest == ".decided")
    }

    /// The topics that dead letters may lie in: that of streams, and its
    /// siblings in the topology (`helixagent.dlq.tasks`).
    #[must_use]
    pub fn dead_letter_topics(&self) -> Vec<&str> {
        let own = self.dead_letter_topic();
        let family = own.rsplit_once('.').map(|(parent, _)| parent);
        let is_sibling = |name: &str| {
            let parent = name.rsplit_once('.').map(|(parent, _)| parent);
            name != own && parent == family && family.is_some_and(|f| f.ends_with("dlq"))
        };
        let names = self.topics.iter().map(|t| t.name.as_str());
        std::iter::once(own)
            .chain(names.filter(|n| is_sibling(n)))
            .collect()
    }

    /// Whether the dead letters of streams lie in this topic.
    #[must_use]
    pub fn is_dead_letter_topic(&self, topic: &str) -> bool {
        self.dead_letter_topics().contains(&topic)
    }

    /// The topic of dead letters of streams.
    #[must_use]
    pub fn dead_letter_topic(&self) -> &str {
        self.dead_letter_topic
            .as_deref()
            .unwrap_or("helixagent.dlq.events")
    }
}

const fn yes() -> bool {
    true
}
