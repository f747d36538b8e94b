//! Client settings: what every librdkafka client of this adapter is given. It
//! refuses settings that the adapter depends on; it opens no connection.

use std::time::Duration;

use rdkafka::ClientConfig;

use super::{
    config::{KafkaConfig, RequiredAcks},
    error::invalid,
};
use crate::{broker::Compression, error::Result};

/// Settings that every client shares: addresses, security, reconnects.
///
/// # Errors
/// `INVALID_CONFIG` naming the setting that is wrong.
pub(super) fn base(config: &KafkaConfig) -> Result<ClientConfig> {
    if config.brokers.iter().all(|b| b.trim().is_empty()) {
        return Err(invalid(
            "kafka.brokers is empty; give at least one host:port",
        ));
    }
    let mut c = ClientConfig::new();
    c.set("bootstrap.servers", config.brokers.join(","))
        .set("client.id", &config.client_id)
        .set("socket.keepalive.enable", "true")
        .set("socket.nagle.disable", "true")
        .set(
            "socket.connection.setup.timeout.ms",
            clamp_ms(config.connection_timeout, 1000, 60_000),
        )
        .set("reconnect.backoff.ms", first_backoff(config))
        .set("reconnect.backoff.max.ms", longest_backoff(config))
        .set("retry.backoff.ms", first_backoff(config))
        .set("retry.backoff.max.ms", longest_backoff(config))
        .set(
            "topic.metadata.refresh.interval.ms",
            clamp_ms(config.metadata_refresh, 100, 3_600_000),
        );
    security(config, &mut c);
    for (name, value) in &config.settings {
        if OURS.contains(&name.as_str()) {
            return Err(invalid(format!(
                "kafka.settings.{name}: the adapter depends on this setting and sets it itself; remove it"
            )));
        }
        c.set(name, value);
    }
    Ok(c)
}

/// A producer's settings.
///
/// # Errors
/// `INVALID_CONFIG` naming the setting that is wrong.
pub(super) fn producer(
    config: &KafkaConfig,
    compression: Compression,
    batch_bytes: usize,
) -> Result<ClientConfig> {
    if config.enable_idempotence && config.required_acks != RequiredAcks::All {
        return Err(invalid(
            "kafka.enable_idempotence needs kafka.required_acks: all; set it, or turn idempotence off",
        ));
    }
    let mut c = base(config)?;
    // Headers and key come on top of the payload that the limit is about.
    let message_bytes = config
        .max_message_bytes
        .saturating_add(RECORD_OVERHEAD)
        .clamp(1000, 1_000_000_000);
    c.set("enable.idempotence", config.enable_idempotence.to_string())
        .set("acks", acks(config.required_acks))
        .set("compression.type", codec(compression))
        .set("linger.ms", clamp_ms(config.linger, 0, 900_000))
        .set(
            "batch.size",
            batch_bytes.clamp(1, i32::MAX as usize).to_string(),
        )
        .set("message.max.bytes", message_bytes.to_string())
        // Never: librdkafka lets records of a partition expire one by one, and
        // what was published a moment later would be stored before what has to
        // be written again. A producer that stands still is given up as a whole.
        .set("delivery.timeout.ms", "0")
        // What the metadata does not know after this long is unknown.
        .set("topic.metadata.propagation.max.ms", "2000")
        .set("queue.buffering.max.messages", QUEUED_MESSAGES.to_string())
        .set("queue.buffering.max.kbytes", QUEUED_KBYTES.to_string());
    Ok(c)
}

/// The settings of a producer of transactions. It is idempotent and waits for all
/// replicas, whatever other producers do.
///
/// # Errors
/// `INVALID_CONFIG` naming the setting that is wrong.
pub(super) fn transactional(
    config: &KafkaConfig,
    id: &str,
    compression: Compression,
    batch_bytes: usize,
) -> Result<ClientConfig> {
    let config = KafkaConfig {
        enable_idempotence: true,
        required_acks: RequiredAcks::All,
        ..config.clone()
    };
    let mut c = producer(&config, compression, batch_bytes)?;
    let timeout = clamp_ms(config.transaction_timeout, 1000, 900_000);
    c.set("transactional.id", id)
        .set("transaction.timeout.ms", &timeout)
        // A record that expires costs its transaction, so here it may.
        .set("delivery.timeout.ms", &timeout);
    if c.get("socket.timeout.ms").is_none() {
        // The library's own choice is nearly the transaction's time, which a
        // connection that went silent would use up.
        let patience = config.message_timeout.min(config.transaction_timeout);
        c.set("socket.timeout.ms", clamp_ms(patience, 1000, 60_000));
    }
    Ok(c)
}

/// The settings of a client that only asks.
///
/// # Errors
/// `INVALID_CONFIG` naming the setting that is wrong.
pub(super) fn asking(config: &KafkaConfig) -> Result<ClientConfig> {
    let mut c = base(config)?;
    c.set("allow.auto.create.topics", "false");
    Ok(c)
}

/// Milliseconds as librdkafka takes them, within its bounds.
pub(super) fn clamp_ms(d: Duration, least: u128, most: u128) -> String {
    d.as_millis().clamp(least, most).to_string()
}

/// A codec's name.
pub(super) const fn codec(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "none",
        Compression::Gzip => "gzip",
        Compression::Snappy => "snappy",
        Compression::Lz4 => "lz4",
        Compression::Zstd => "zstd",
    }
}

const fn acks(required: RequiredAcks) -> &'static str {
    match required {
        RequiredAcks::All => "all",
        RequiredAcks::Leader => "1",
        RequiredAcks::None => "0",
    }
}

fn first_backoff(config: &KafkaConfig) -> String {
    let longest = config.max_reconnect_delay.as_millis() * 2 / 3;
    config
        .reconnect_delay
        .as_millis()
        .clamp(1, longest.max(1))
        .to_string()
}

/// librdkafka's jitter adds up to a half, so two thirds keep the longest pause
/// under what was asked for.
fn longest_backoff(config: &KafkaConfig) -> String {
    (config.max_reconnect_delay.as_millis() * 2 / 3)
        .max(1)
        .to_string()
}

fn security(config: &KafkaConfig, c: &mut ClientConfig) {
    let protocol = match (&config.tls, &config.sasl) {
        (None, None) => "plaintext",
        (Some(_), None) => "ssl",
        (None, Some(_)) => "sasl_plaintext",
        (Some(_), Some(_)) => "sasl_ssl",
    };
    c.set("security.protocol", protocol);
    if let Some(tls) = &config.tls {
        // The TLS library is linked in and knows no system folder of its own;
        // "probe" looks where systems keep their authorities.
        let ca = tls.ca_file.as_ref().map_or_else(
            || "probe".to_owned(),
            |path| path.to_string_lossy().into_owned(),
        );
        c.set("ssl.ca.location", ca);
        if let Some(path) = &tls.cert_file {
            c.set("ssl.certificate.location", path.to_string_lossy());
        }
        if let Some(path) = &tls.key_file {
            c.set("ssl.key.location", path.to_string_lossy());
        }
    }
    if let Some(sasl) = &config.sasl {
        c.set("sasl.mechanism", sasl.mechanism.as_str())
            .set("sasl.username", &sasl.username)
            .set("sasl.password", sasl.password.expose());
    }
}

/// Messages that wait in a producer at most; lanes wait for room above it.
const QUEUED_MESSAGES: usize = 200_000;

/// Kibibytes that wait in a producer at most.
const QUEUED_KBYTES: usize = 512 * 1024;

/// Room for key and headers above the payload's limit.
const RECORD_OVERHEAD: usize = 64 * 1024;

/// Settings with a field of their own, or that delivery and offsets depend on.
const OURS: &[&str] = &[
    "acks",
    "allow.auto.create.topics",
    "auto.commit.interval.ms",
    "auto.offset.reset",
    "batch.size",
    "bootstrap.servers",
    "client.id",
    "compression.codec",
    "compression.type",
    "delivery.timeout.ms",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.gapless.guarantee",
    "enable.idempotence",
    "enable.partition.eof",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "isolation.level",
    "linger.ms",
    "log.queue",
    "message.max.bytes",
    "message.send.max.retries",
    "message.timeout.ms",
    "metadata.broker.list",
    "partition.assignment.strategy",
    "partitioner",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "queue.buffering.max.ms",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "request.required.acks",
    "retries",
    "retry.backoff.max.ms",
    "retry.backoff.ms",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.password",
    "sasl.username",
    "security.protocol",
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "socket.connection.setup.timeout.ms",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.key.location",
    "topic.metadata.propagation.max.ms",
    "topic.metadata.refresh.interval.ms",
    "transaction.timeout.ms",
    "transactional.id",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;

    #[test]
    fn every_address_is_given_to_the_client() {
        let config = KafkaConfig {
            brokers: vec!["a:1".into(), "b:2".into()],
            ..KafkaConfig::default()
        };
        let c = base(&config).unwrap();
        assert_eq!(c.get("bootstrap.servers"), Some("a:1,b:2"));
    }

    #[test]
    fn settings_that_the_adapter_depends_on_are_refused_by_name() {
        for name in OURS {
            let mut config = KafkaConfig::default();
            config.settings.insert((*name).to_owned(), "x".to_owned());
            let error = base(&config).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidConfig);
            assert!(error.message().contains(name), "{error}");
        }
    }

    #[test]
    fn producer_settings_follow_the_configuration() {
        let config = KafkaConfig {
            linger: Duration::from_millis(7),
            ..KafkaConfig::default()
        };
        let c = producer(&config, Compression::Zstd, 4096).unwrap();
        assert_eq!(c.get("linger.ms"), Some("7"));
        assert_eq!(c.get("compression.type"), Some("zstd"));
        assert_eq!(c.get("enable.idempotence"), Some("true"));
        assert_eq!(c.get("acks"), Some("all"));
        assert_eq!(c.get("batch.size"), Some("4096"));
    }

    #[test]
    fn idempotence_without_all_acks_is_refused() {
        let config = KafkaConfig {
            required_acks: RequiredAcks::Leader,
            ..KafkaConfig::default()
        };
        assert!(producer(&config, Compression::None, 1).is_err());
    }
}
