//! What is wrong with a whole configuration, every problem at once, each under
//! the path by which the file names it. Parsing has refused wrong types and
//! unknown keys before; here settings are held against each other.

use std::{fmt, time::Duration};

use super::{
    DuringOutage, HAS_JOURNAL, HAS_TCP_GATEWAY, MessagingConfig, RouteKind, redact,
    settings::split_address,
};
use crate::{
    adapter::{kafka::KafkaConfig, kafka::config::RequiredAcks, rabbitmq::RabbitMqConfig},
    broker::BrokerType,
};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where, such as `kafka.linger`.
    pub path: String,
    /// What, and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

impl MessagingConfig {
    /// Looks for everything that is wrong.
    ///
    /// # Errors
    /// All problems, in the order of the file's sections.
    pub fn validate(&self) -> Result<(), Vec<Problem>> {
        let mut found = Found(Vec::new());
        self.check_general(&mut found);
        self.check_hub(&mut found);
        self.check_routes(&mut found);
        if let Some(rabbitmq) = &self.rabbitmq {
            check_rabbitmq(rabbitmq, &mut found);
            self.check_retry_delay(&mut found);
        }
        if let Some(kafka) = &self.kafka {
            check_kafka(kafka, &mut found);
            if kafka.max_message_bytes as u64 > self.max_message_bytes {
                found.add(
                    "kafka.max_message_bytes",
                    "must not be above max_message_bytes, which holds everywhere",
                );
            }
        }
        for (path, message) in self.topology.problems() {
            found.add(path, message);
        }
        if found.0.is_empty() {
            Ok(())
        } else {
            Err(found.0)
        }
    }

    fn check_general(&self, found: &mut Found) {
        if self.max_message_bytes == 0 || self.max_message_bytes > MAX_MESSAGE_BYTES {
            found.add(
                "max_message_bytes",
                "must be 1 to 134217728 (128 MiB, RabbitMQ's own limit)",
            );
        }
        if self.data_dir.is_some() && !HAS_JOURNAL {
            found.add(
                "data_dir",
                "this version keeps nothing on disk; leave it out (the spool is in memory)",
            );
        }
        if split_address(&self.server.http).is_none() {
            found.add("server.http", "must be host:port, such as 127.0.0.1:8090");
        }
        if self.server.tcp.is_some() && !HAS_TCP_GATEWAY {
            found.add(
                "server.tcp",
                "this version has no TCP gateway; leave it out",
            );
        }
        if self.log.level.trim().is_empty() {
            found.add("log.level", "must not be empty; use off for no log");
        }
    }

    fn check_hub(&self, found: &mut Found) {
        let hub = &self.hub;
        for (value, path) in [
            (hub.health_check_interval, "hub.health_check_interval"),
            (hub.breaker.timeout, "hub.breaker.timeout"),
            (hub.hedge.min, "hub.hedge.min"),
            (hub.suspect_timeout, "hub.suspect_timeout"),
            (hub.intake_window.age, "hub.intake_window.age"),
            (hub.dedup_window.age, "hub.dedup_window.age"),
        ] {
            positive(value, path, found);
        }
        if hub.hedge.max < hub.hedge.min {
            found.add("hub.hedge.max", "must not be below hub.hedge.min");
        }
        if hub.suspect_timeout < hub.hedge.max {
            found.add(
                "hub.suspect_timeout",
                "must not be below hub.hedge.max, or a slow confirm ends the connection",
            );
        }
        for (value, path) in [
            (u64::from(hub.breaker.threshold), "hub.breaker.threshold"),
            (hub.spool.max_messages, "hub.spool.max_messages"),
            (hub.intake_window.ids, "hub.intake_window.ids"),
            (hub.dedup_window.ids, "hub.dedup_window.ids"),
        ] {
            if value == 0 {
                found.add(path, "must be 1 or more");
            }
        }
        if hub.spool.max_bytes < self.max_message_bytes {
            found.add(
                "hub.spool.max_bytes",
                "must not be below max_message_bytes, or a message may never fit",
            );
        }
    }

    fn check_routes(&self, found: &mut Found) {
        for (i, route) in self.hub.routes.iter().enumerate() {
            let path = format!("hub.routes[{i}]");
            if let Some(j) = self
                .hub
                .routes
                .iter()
                .take(i)
                .position(|r| r.pattern == route.pattern)
            {
                found.add(
                    format!("{path}.pattern"),
                    format!("hub.routes[{j}] has the same pattern and holds"),
                );
            }
            let missing = match route.primary {
                Some(BrokerType::RabbitMq) if self.rabbitmq.is_none() => Some("rabbitmq"),
                Some(BrokerType::Kafka) if self.kafka.is_none() => Some("kafka"),
                _ => None,
            };
            if let Some(section) = missing {
                found.add(
                    format!("{path}.primary"),
                    format!("names {section}, which has no section"),
                );
            }
            if route.primary == Some(BrokerType::Kafka) && route.kind == RouteKind::Task {
                found.add(
                    format!("{path}.primary"),
                    "Kafka has no task queues; use rabbitmq or inmemory, or kind: event",
                );
            }
            if !route.spool && route.during_outage == Some(DuringOutage::Local) {
                found.add(
                    format!("{path}.during_outage"),
                    "local hands out spooled messages, and spool is false",
                );
            }
        }
    }

    /// The delay of tasks is the TTL of RabbitMQ's retry queue.
    fn check_retry_delay(&self, found: &mut Found) {
        let exchange = self.topology.retry_exchange();
        let tiers: Vec<u64> = self
            .topology
            .queues
            .iter()
            .filter(|q| q.bindings.iter().any(|b| b.exchange == exchange))
            .filter_map(|q| q.options.message_ttl_ms)
            .collect();
        let fits = |delay: Duration| {
            tiers
                .iter()
                .any(|ttl| u128::from(*ttl) == delay.as_millis())
        };
        let known = || {
            let list: Vec<String> = tiers
                .iter()
                .map(|ttl| crate::duration::format(Duration::from_millis(*ttl)))
                .collect();
            format!(
                "must be the message_ttl_ms of a retry queue in the topology ({})",
                if list.is_empty() {
                    "there is none".to_owned()
                } else {
                    list.join(", ")
                }
            )
        };
        if !fits(self.hub.retry.task_delay) {
            found.add("hub.retry.task_delay", known());
        }
        for (i, route) in self.hub.routes.iter().enumerate() {
            let on_rabbitmq = matches!(route.primary, None | Some(BrokerType::RabbitMq));
            if route.kind == RouteKind::Task
                && on_rabbitmq
                && route.retry_delay.is_some_and(|delay| !fits(delay))
            {
                found.add(format!("hub.routes[{i}].retry_delay"), known());
            }
        }
    }
}

fn check_rabbitmq(rabbitmq: &RabbitMqConfig, found: &mut Found) {
    if let Some(url) = &rabbitmq.url {
        let parts = redact::addresses(url.expose());
        if parts
            .iter()
            .any(|a| !(a.starts_with("amqp://") || a.starts_with("amqps://")))
        {
            found.add(
                "rabbitmq.url",
                "every address must begin with amqp:// or amqps:// (several are separated by commas)",
            );
        }
    }
    if let Some(url) = &rabbitmq.management_url
        && !(url.expose().starts_with("http://") || url.expose().starts_with("https://"))
    {
        found.add(
            "rabbitmq.management_url",
            "must begin with http:// or https://",
        );
    }
    if rabbitmq.url.is_none() {
        if rabbitmq.host.is_empty() || rabbitmq.host.contains(['/', '@', ' ', ',']) {
            found.add(
                "rabbitmq.host",
                "must be one host name or address; several go into url",
            );
        }
        if rabbitmq.port == Some(0) {
            found.add("rabbitmq.port", "must be 1 to 65535");
        }
        if rabbitmq.username.is_empty() {
            found.add("rabbitmq.username", "must not be empty");
        }
        if rabbitmq.vhost.is_empty() {
            found.add("rabbitmq.vhost", "must not be empty; the usual one is /");
        }
    }
    if rabbitmq.prefetch_count == 0 {
        found.add(
            "rabbitmq.prefetch_count",
            "must be 1 or more; 0 would mean no bound",
        );
    }
    if rabbitmq.window == 0 {
        found.add("rabbitmq.window", "must be 1 or more");
    }
    if rabbitmq.heartbeat < Duration::from_secs(1) || rabbitmq.heartbeat > Duration::from_secs(60) {
        found.add(
            "rabbitmq.heartbeat",
            "must be 1s to 60s: AMQP counts whole seconds, and a dead peer is noticed after twice this",
        );
    }
    positive(
        rabbitmq.connection_timeout,
        "rabbitmq.connection_timeout",
        found,
    );
    reconnect(
        rabbitmq.reconnect_delay,
        rabbitmq.max_reconnect_delay,
        "rabbitmq",
        found,
    );
    if let Some(tls) = &rabbitmq.tls {
        client_certificate(tls, "rabbitmq.tls", found);
    }
}

fn check_kafka(kafka: &KafkaConfig, found: &mut Found) {
    if kafka.brokers.is_empty() {
        found.add("kafka.brokers", "must name at least one host:port");
    }
    for (i, broker) in kafka.brokers.iter().enumerate() {
        if split_address(broker).is_none() {
            found.add(
                format!("kafka.brokers[{i}]"),
                "must be host:port, such as localhost:9092",
            );
        }
    }
    for (text, path) in [
        (&kafka.client_id, "kafka.client_id"),
        (&kafka.group_id, "kafka.group_id"),
    ] {
        if text.is_empty() {
            found.add(path, "must not be empty");
        }
    }
    if kafka.enable_idempotence && kafka.required_acks != RequiredAcks::All {
        found.add(
            "kafka.enable_idempotence",
            "needs required_acks: all; set that, or enable_idempotence: false",
        );
    }
    for (value, path) in [
        (kafka.message_timeout, "kafka.message_timeout"),
        (kafka.connection_timeout, "kafka.connection_timeout"),
        (kafka.metadata_refresh, "kafka.metadata_refresh"),
    ] {
        positive(value, path, found);
    }
    if kafka.linger >= kafka.message_timeout {
        found.add("kafka.linger", "must be below kafka.message_timeout");
    }
    for (value, path) in [
        (kafka.batch_size, "kafka.batch_size"),
        (kafka.window, "kafka.window"),
        (kafka.max_message_bytes, "kafka.max_message_bytes"),
    ] {
        if value == 0 {
            found.add(path, "must be 1 or more");
        }
    }
    reconnect(
        kafka.reconnect_delay,
        kafka.max_reconnect_delay,
        "kafka",
        found,
    );
    if let Some(sasl) = &kafka.sasl
        && (sasl.username.is_empty() || sasl.password.is_empty())
    {
        found.add("kafka.sasl", "needs a username and a password");
    }
    if let Some(tls) = &kafka.tls {
        client_certificate(tls, "kafka.tls", found);
    }
}

fn client_certificate(tls: &crate::adapter::rabbitmq::TlsConfig, path: &str, found: &mut Found) {
    if tls.cert_file.is_some() != tls.key_file.is_some() {
        found.add(path, "cert_file and key_file belong together");
    }
}

fn reconnect(first: Duration, most: Duration, section: &str, found: &mut Found) {
    positive(first, &format!("{section}.reconnect_delay"), found);
    if most < first {
        found.add(
            format!("{section}.max_reconnect_delay"),
            "must not be below reconnect_delay",
        );
    }
}

fn positive(value: Duration, path: &str, found: &mut Found) {
    if value.is_zero() {
        found.add(path, "must be more than 0");
    }
}

struct Found(Vec<Problem>);

impl Found {
    fn add(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem {
            path: path.into(),
            message: message.into(),
        });
    }
}

const MAX_MESSAGE_BYTES: u64 = 128 * 1024 * 1024;
