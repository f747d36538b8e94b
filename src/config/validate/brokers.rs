//! What is wrong with the brokers' sections.

use std::time::Duration;

use super::{Found, positive};
use crate::{
    adapter::{
        kafka::{KafkaConfig, config::RequiredAcks},
        rabbitmq::{RabbitMqConfig, TlsConfig},
    },
    config::{redact, settings::split_address},
};

/// RabbitMQ's section.
pub(super) fn rabbitmq(rabbitmq: &RabbitMqConfig, found: &mut Found) {
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

/// Kafka's section.
pub(super) fn kafka(kafka: &KafkaConfig, found: &mut Found) {
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
    if kafka
        .transactional_id
        .as_deref()
        .is_some_and(|id| !is_id(id))
    {
        found.add(
            "kafka.transactional_id",
            "must be 1 to 200 printable characters without spaces; leave it out for one that is made up",
        );
    }
    if kafka.transaction_timeout < Duration::from_secs(1)
        || kafka.transaction_timeout > Duration::from_secs(900)
    {
        found.add(
            "kafka.transaction_timeout",
            "must be 1s to 15m; brokers refuse more unless they are told (transaction.max.timeout.ms)",
        );
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
    for name in kafka.settings.keys() {
        if redact::is_secret_setting(name) {
            found.add(
                format!("kafka.settings.{name}"),
                "a secret has no place here, where it would be shown; use sasl and tls",
            );
        }
    }
    if let Some(sasl) = &kafka.sasl
        && (sasl.username.is_empty() || sasl.password.is_empty())
    {
        found.add("kafka.sasl", "needs a username and a password");
    }
    if let Some(tls) = &kafka.tls {
        client_certificate(tls, "kafka.tls", found);
    }
}

fn is_id(id: &str) -> bool {
    (1..=200).contains(&id.len()) && id.chars().all(|c| c.is_ascii_graphic())
}

fn client_certificate(tls: &TlsConfig, path: &str, found: &mut Found) {
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
