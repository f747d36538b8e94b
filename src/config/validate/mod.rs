//! What is wrong with a whole configuration, every problem at once, each under
//! the path by which the file names it. Parsing has refused wrong types and
//! unknown keys before; here settings are held against each other.

mod brokers;

use std::{collections::BTreeSet, fmt, time::Duration};

use super::{
    CanarySettings, DuringOutage, HAS_TCP_GATEWAY, MessagingConfig, RetryBy, RouteKind,
    RouteSettings, SchemaSettings, settings::split_address,
};
use crate::{broker::BrokerType, compression::unusable};

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
        self.check_registry(&mut found);
        if let Some(rabbitmq) = &self.rabbitmq {
            brokers::rabbitmq(rabbitmq, &mut found);
            self.check_retry_delays(&mut found);
        }
        if let Some(kafka) = &self.kafka {
            brokers::kafka(kafka, &mut found);
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
            (hub.schedule.max_messages, "hub.schedule.max_messages"),
            (hub.intake_window.ids, "hub.intake_window.ids"),
            (hub.dedup_window.ids, "hub.dedup_window.ids"),
        ] {
            if value == 0 {
                found.add(path, "must be 1 or more");
            }
        }
        if !(0.0..=1.0).contains(&hub.dead_letter_alarm.0) {
            found.add("hub.dead_letter_alarm", "must be from 0 to 1; 0 is never");
        }
        if let Some(why) = unusable(hub.compression.algorithm) {
            found.add("hub.compression.algorithm", why);
        }
        if hub.schedule.max_bytes < self.max_message_bytes {
            found.add(
                "hub.schedule.max_bytes",
                "must not be below max_message_bytes, or a message may never fit",
            );
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
            let by_kafka = match route.primary {
                Some(primary) => primary == BrokerType::Kafka,
                None => route.kind == RouteKind::Event && self.kafka.is_some(),
            };
            if !by_kafka && let Some(why) = route.compression.and_then(unusable) {
                found.add(format!("{path}.compression"), why);
            }
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
            if route.retry_by == RetryBy::Topic && route.kind == RouteKind::Task {
                found.add(
                    format!("{path}.retry_by"),
                    "topic is for events; failed tasks rest in a queue anyway",
                );
            }
            if route.long_running && route.kind == RouteKind::Event {
                found.add(
                    format!("{path}.long_running"),
                    "is for tasks; an event's reader may take as long as it likes",
                );
            }
            if let Some(schema) = &route.schema {
                self.check_schema(&format!("{path}.schema"), schema, found);
            }
            if let Some(canary) = &route.canary {
                check_canary(&format!("{path}.canary"), route, canary, found);
            }
            if !route.spool && route.during_outage == Some(DuringOutage::Local) {
                found.add(
                    format!("{path}.during_outage"),
                    "local hands out spooled messages, and spool is false",
                );
            }
        }
    }

    fn check_schema(&self, path: &str, schema: &SchemaSettings, found: &mut Found) {
        if cfg!(not(feature = "schema")) {
            found.add(path, "this program was built without the feature `schema`");
        }
        if schema.check.is_empty() {
            found.add(
                format!("{path}.check"),
                "is empty; name publish, consume or both, or leave the schema out",
            );
        }
        if schema.uses_registry() && self.schemas.registry.is_none() {
            found.add(
                path,
                "takes its schema from the registry, and schemas.registry is not there; name a file, or the registry",
            );
        }
        if schema.register && (schema.file.is_none() || schema.subject.is_none()) {
            found.add(
                format!("{path}.register"),
                "needs a file to register, and the subject",
            );
        }
    }

    fn check_registry(&self, found: &mut Found) {
        let Some(registry) = &self.schemas.registry else {
            return;
        };
        if !registry.url.starts_with("http://") && !registry.url.starts_with("https://") {
            found.add(
                "schemas.registry.url",
                "must begin with http:// or https://",
            );
        }
        positive(registry.timeout, "schemas.registry.timeout", found);
        positive(registry.refresh, "schemas.registry.refresh", found);
        if registry.password.is_some() && registry.user.is_none() {
            found.add("schemas.registry.password", "needs a user beside it");
        }
    }

    /// Each delay of tasks is a retry queue at RabbitMQ.
    fn check_retry_delays(&self, found: &mut Found) {
        let delays: BTreeSet<Duration> = self.task_delays().collect();
        if delays.iter().any(|d| d.as_millis() == 0) {
            found.add(
                "hub.retry",
                "a failed task rests for a millisecond at least: RabbitMQ's retry queues count in them",
            );
        }
        if delays.len() > MOST_TIERS {
            found.add(
                "hub.routes",
                format!(
                    "{} different delays of tasks: each is a queue at RabbitMQ, and {MOST_TIERS} is the most; use fewer",
                    delays.len()
                ),
            );
        }
    }
}

/// Retry queues at RabbitMQ at most.
const MOST_TIERS: usize = 32;

fn check_canary(path: &str, route: &RouteSettings, canary: &CanarySettings, found: &mut Found) {
    positive(canary.every, &format!("{path}.every"), found);
    positive(canary.within, &format!("{path}.within"), found);
    if !route.pattern.matches(&canary.topic) {
        found.add(
            format!("{path}.topic"),
            format!(
                "{} is not a topic of the route's pattern {}",
                canary.topic, route.pattern
            ),
        );
    }
    if route.primary == Some(BrokerType::InMemory) {
        found.add(
            path,
            "the embedded broker is in this process and needs no canary; leave it out",
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
