//! What is wrong with a topology before any broker sees it. It looks for every
//! problem, and for those that RabbitMQ or Kafka would only show later: as a
//! closed channel, or as messages that vanish.

use std::collections::BTreeSet;

use super::{Binding, ExchangeKind, QueueSpec, TopicSpec, Topology};
use crate::{
    broker::{QueueOptions, QueueType},
    topic::{Pattern, Topic},
};

impl Topology {
    /// Every problem, each with the path of the entry, such as
    /// `topology.queues[2].options.max_priority`.
    #[must_use]
    pub fn problems(&self) -> Vec<(String, String)> {
        let mut found = Found(Vec::new());
        self.check_exchanges(&mut found);
        self.check_queues(&mut found);
        self.check_topics(&mut found);
        self.check_roles(&mut found);
        found.0
    }

    fn check_exchanges(&self, found: &mut Found) {
        let mut seen = BTreeSet::new();
        for (i, exchange) in self.exchanges.iter().enumerate() {
            let path = format!("exchanges[{i}].name");
            check_name(&exchange.name, "an exchange", &path, found);
            if !seen.insert(&exchange.name) {
                found.add(path, format!("the exchange {} stands twice", exchange.name));
            }
        }
    }

    fn check_queues(&self, found: &mut Found) {
        let mut seen = BTreeSet::new();
        for (i, queue) in self.queues.iter().enumerate() {
            let path = format!("queues[{i}]");
            check_name(&queue.name, "a queue", &format!("{path}.name"), found);
            for (name, at) in std::iter::once((&queue.name, format!("{path}.name"))).chain(
                queue
                    .aliases
                    .iter()
                    .enumerate()
                    .map(|(j, alias)| (alias, format!("{path}.aliases[{j}]"))),
            ) {
                if !seen.insert(name) {
                    found.add(at, format!("the name {name} stands for two queues"));
                }
            }
            self.check_bindings(queue, &path, found);
            self.check_options(&queue.options, &format!("{path}.options"), found);
        }
    }

    fn check_bindings(&self, queue: &QueueSpec, path: &str, found: &mut Found) {
        for (j, binding) in queue.bindings.iter().enumerate() {
            let path = format!("{path}.bindings[{j}]");
            let Some(exchange) = self.exchanges.iter().find(|e| e.name == binding.exchange) else {
                found.add(
                    format!("{path}.exchange"),
                    format!("the exchange {:?} is not in exchanges", binding.exchange),
                );
                continue;
            };
            if exchange.kind == ExchangeKind::Direct && binding.routing_key.contains(['*', '#']) {
                found.add(
                    format!("{path}.routing_key"),
                    format!(
                        "{} is a direct exchange, where {:?} is no pattern",
                        exchange.name, binding.routing_key
                    ),
                );
            }
            if exchange.kind == ExchangeKind::Topic
                && let Err(e) = Pattern::new(&binding.routing_key)
            {
                found.add(format!("{path}.routing_key"), e.message());
            }
        }
    }

    fn check_options(&self, options: &QueueOptions, path: &str, found: &mut Found) {
        let quorum = options.effective_type() == QueueType::Quorum;
        if quorum {
            for (wrong, field, why) in [
                (
                    options.max_priority.is_some(),
                    "max_priority",
                    "quorum queues ignore it; set queue_type: classic or leave it out",
                ),
                (
                    options.exclusive,
                    "exclusive",
                    "a quorum queue cannot be exclusive",
                ),
                (
                    options.auto_delete,
                    "auto_delete",
                    "a quorum queue cannot be deleted with its last consumer",
                ),
                (!options.durable, "durable", "a quorum queue is durable"),
            ] {
                if wrong {
                    found.add(format!("{path}.{field}"), why);
                }
            }
        }
        if options.max_priority == Some(0) {
            found.add(format!("{path}.max_priority"), "must be 1 to 255");
        }
        for (value, field) in [
            (options.expires_ms, "expires_ms"),
            (options.max_length, "max_length"),
            (options.max_length_bytes, "max_length_bytes"),
        ] {
            if value == Some(0) {
                found.add(format!("{path}.{field}"), "must be more than 0");
            }
        }
        one_of(
            options.overflow.as_deref(),
            OVERFLOWS,
            &format!("{path}.overflow"),
            found,
        );
        if quorum && options.overflow.as_deref() == Some("reject-publish-dlx") {
            found.add(
                format!("{path}.overflow"),
                "quorum queues do not know reject-publish-dlx; use reject-publish",
            );
        }
        self.check_dead_letters(options, quorum, path, found);
    }

    fn check_dead_letters(
        &self,
        options: &QueueOptions,
        quorum: bool,
        path: &str,
        found: &mut Found,
    ) {
        if let Some(exchange) = &options.dead_letter_exchange
            && !exchange.is_empty()
            && !self.exchanges.iter().any(|e| &e.name == exchange)
        {
            found.add(
                format!("{path}.dead_letter_exchange"),
                format!("the exchange {exchange:?} is not in exchanges"),
            );
        }
        if options.dead_letter_routing_key.is_some() && options.dead_letter_exchange.is_none() {
            found.add(
                format!("{path}.dead_letter_routing_key"),
                "needs dead_letter_exchange",
            );
        }
        let at = format!("{path}.dead_letter_strategy");
        one_of(
            options.dead_letter_strategy.as_deref(),
            STRATEGIES,
            &at,
            found,
        );
        if options.dead_letter_strategy.as_deref() == Some("at-least-once") {
            if !quorum {
                found.add(at, "at-least-once needs a quorum queue");
            } else if options.overflow.as_deref() != Some("reject-publish") {
                found.add(at, "at-least-once needs overflow: reject-publish");
            } else if options.dead_letter_exchange.is_none() {
                found.add(at, "at-least-once needs dead_letter_exchange");
            }
        }
    }

    fn check_topics(&self, found: &mut Found) {
        let mut seen = BTreeSet::new();
        for (i, topic) in self.topics.iter().enumerate() {
            let path = format!("topics[{i}]");
            check_name(&topic.name, "a topic", &format!("{path}.name"), found);
            if !seen.insert(&topic.name) {
                found.add(
                    format!("{path}.name"),
                    format!("the topic {} stands twice", topic.name),
                );
            }
            // A task topic and a stream of one name would leave open which is meant.
            if self.queue(&topic.name).is_some() {
                found.add(
                    format!("{path}.name"),
                    format!("{} is the name of a queue, too", topic.name),
                );
            }
            check_topic_options(topic, &format!("{path}.options"), found);
        }
        let mut seen = BTreeSet::new();
        for (i, group) in self.groups.iter().enumerate() {
            let path = format!("groups[{i}]");
            check_name(group, "a group", &path, found);
            if !seen.insert(group) {
                found.add(path, format!("the group {group} stands twice"));
            }
        }
    }

    /// The entries that the hub itself relies on. Names that are left out take
    /// their defaults and need not stand here: what is missing then is reported
    /// by the broker's topology check.
    fn check_roles(&self, found: &mut Found) {
        for (exchange, role) in [
            (&self.event_exchange, "event_exchange"),
            (&self.retry_exchange, "retry_exchange"),
        ] {
            if let Some(name) = exchange
                && !self.exchanges.iter().any(|e| &e.name == name)
            {
                found.add(role, format!("the exchange {name:?} is not in exchanges"));
            }
        }
        if let Some(name) = &self.dead_letter_queue
            && !self.queues.iter().any(|q| &q.name == name)
        {
            found.add(
                "dead_letter_queue",
                format!("the queue {name:?} is not in queues"),
            );
        }
        if let Some(name) = &self.dead_letter_topic
            && self.topic(name).is_none()
        {
            found.add(
                "dead_letter_topic",
                format!("the topic {name:?} is not in topics"),
            );
        }
        if let Some(name) = &self.retry_exchange
            && self.exchanges.iter().any(|e| &e.name == name)
        {
            self.check_retry(name, found);
        }
    }

    /// A retry queue with a fixed dead-letter key sends every message to one
    /// place, or nowhere.
    fn check_retry(&self, exchange: &str, found: &mut Found) {
        for (i, queue) in self.queues.iter().enumerate() {
            let rests = |b: &Binding| b.exchange == exchange || self.is_tier_exchange(&b.exchange);
            if !queue.bindings.iter().any(rests) {
                continue;
            }
            let path = format!("queues[{i}].options");
            if queue.options.dead_letter_routing_key.is_some() {
                found.add(
                    format!("{path}.dead_letter_routing_key"),
                    "a retry queue has none, so that a message returns to the queue in its routing key",
                );
            }
            if queue.options.dead_letter_exchange.as_deref() != Some("") {
                found.add(
                    format!("{path}.dead_letter_exchange"),
                    "a retry queue needs \"\" (the default exchange)",
                );
            }
            if queue.options.message_ttl_ms.is_none() {
                found.add(
                    format!("{path}.message_ttl_ms"),
                    "a retry queue needs one: it is the delay",
                );
            }
        }
    }
}

struct Found(Vec<(String, String)>);

impl Found {
    fn add(&mut self, path: impl AsRef<str>, why: impl Into<String>) {
        self.0
            .push((format!("topology.{}", path.as_ref()), why.into()));
    }
}

fn check_name(name: &str, what: &str, path: &str, found: &mut Found) {
    if let Err(e) = Topic::new(name) {
        found.add(
            path,
            format!("{what} is named as a topic is: {}", e.message()),
        );
    }
}

fn one_of(value: Option<&str>, known: &[&str], path: &str, found: &mut Found) {
    if let Some(value) = value
        && !known.contains(&value)
    {
        found.add(path, format!("{value:?} is none of {}", known.join(", ")));
    }
}

fn check_topic_options(topic: &TopicSpec, path: &str, found: &mut Found) {
    let options = &topic.options;
    if options.partitions < 1 {
        found.add(format!("{path}.partitions"), "must be 1 or more");
    }
    if options.replication < 1 {
        found.add(format!("{path}.replication"), "must be 1 or more");
    }
    if options.retention_ms < 1 && options.retention_ms != -1 {
        found.add(
            format!("{path}.retention_ms"),
            "must be more than 0, or -1 for ever",
        );
    }
    if options.max_message_bytes == Some(0) {
        found.add(format!("{path}.max_message_bytes"), "must be more than 0");
    }
    one_of(
        Some(&options.cleanup_policy),
        CLEANUPS,
        &format!("{path}.cleanup_policy"),
        found,
    );
    one_of(
        Some(&options.compression),
        COMPRESSIONS,
        &format!("{path}.compression"),
        found,
    );
}

const OVERFLOWS: &[&str] = &["drop-head", "reject-publish", "reject-publish-dlx"];
const STRATEGIES: &[&str] = &["at-most-once", "at-least-once"];
const CLEANUPS: &[&str] = &["delete", "compact", "compact,delete"];
const COMPRESSIONS: &[&str] = &[
    "none",
    "uncompressed",
    "producer",
    "gzip",
    "snappy",
    "lz4",
    "zstd",
];
