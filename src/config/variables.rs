//! The environment variables, one row each: name, default, meaning, effect. The
//! same table is read by the loader, by the test of `.env.example`, and by
//! whoever prints help.

use std::path::PathBuf;

use super::{LogFormat, MessagingConfig, settings::split_address, split_list};
use crate::{
    adapter::{
        kafka::{
            KafkaConfig, SaslMechanism,
            config::{IsolationLevel, RequiredAcks, SaslConfig},
        },
        rabbitmq::{RabbitMqConfig, TlsConfig},
    },
    broker::Compression,
    duration,
    secret::Secret,
    topology::TopologyMode,
};

/// An environment variable that is read.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What holds without it, as text; empty for nothing.
    pub default: &'static str,
    /// What it does, in one line.
    pub meaning: &'static str,
    pub(super) effect: Effect,
}

/// What a variable does. A setter's error says what was expected, never the
/// value.
#[derive(Debug)]
pub(super) enum Effect {
    /// Changes a general setting.
    Hub(fn(&mut MessagingConfig, &str) -> Expected),
    /// Changes a setting of RabbitMQ.
    RabbitMq(fn(&mut RabbitMqConfig, &str) -> Expected),
    /// Changes a setting of Kafka.
    Kafka(fn(&mut KafkaConfig, &str) -> Expected),
    /// Another name of a variable, which wins.
    Alternative(&'static str),
    /// A credential of RabbitMQ for where nothing else gives one.
    Credential(fn(&mut RabbitMqConfig, &str)),
    /// Turns a broker on or off; read before the rest.
    Switch,
    /// Asks for what this version does not have.
    Refused(&'static str),
    /// Read where the command line is.
    CommandLine,
}

pub(super) type Expected = Result<(), &'static str>;

const fn hub(
    name: &'static str,
    default: &'static str,
    meaning: &'static str,
    set: fn(&mut MessagingConfig, &str) -> Expected,
) -> Variable {
    Variable {
        name,
        default,
        meaning,
        effect: Effect::Hub(set),
    }
}

const fn rabbit(
    name: &'static str,
    default: &'static str,
    meaning: &'static str,
    set: fn(&mut RabbitMqConfig, &str) -> Expected,
) -> Variable {
    Variable {
        name,
        default,
        meaning,
        effect: Effect::RabbitMq(set),
    }
}

const fn kafka(
    name: &'static str,
    default: &'static str,
    meaning: &'static str,
    set: fn(&mut KafkaConfig, &str) -> Expected,
) -> Variable {
    Variable {
        name,
        default,
        meaning,
        effect: Effect::Kafka(set),
    }
}

const fn other(
    name: &'static str,
    default: &'static str,
    meaning: &'static str,
    effect: Effect,
) -> Variable {
    Variable {
        name,
        default,
        meaning,
        effect,
    }
}

/// Every variable. Later rows win over earlier ones that set the same.
#[rustfmt::skip]
pub const VARIABLES: &[Variable] = &[
    hub("MESSAGING_ENABLED", "true", "false: the embedded broker alone",
        |c, v| set(&mut c.enabled, boolean(v))),
    hub("MESSAGING_FALLBACK_INMEMORY", "true", "keep messages in the embedded broker while a broker is away",
        |c, v| { c.set_fallback(boolean(v)?); Ok(()) }),
    other("MESSAGING_FALLBACK_ENABLED", "true", "another name of MESSAGING_FALLBACK_INMEMORY",
        Effect::Alternative("MESSAGING_FALLBACK_INMEMORY")),
    hub("MESSAGING_USE_FALLBACK_ON_ERROR", "true", "false: a failed publish is the caller's error",
        |c, v| set(&mut c.hub.use_fallback_on_error, boolean(v))),
    hub("HTTP_PORT", "8080", "port of HTTP; without it 8090 holds",
        |c, v| { let port = port(v)?; let host = host_of(&c.server.http); c.server.http = format!("{host}:{port}"); Ok(()) }),
    hub("MESSAGING_HTTP_ADDR", "127.0.0.1:8090", "address of HTTP; wins over HTTP_PORT",
        |c, v| set(&mut c.server.http, address(v))),
    hub("MESSAGING_ALLOWED_HOSTS", "", "further values of Host to answer, comma-separated",
        |c, v| { c.server.allowed_hosts = split_list(v); Ok(()) }),
    hub("MESSAGING_ALLOWED_ORIGINS", "", "further values of Origin to answer, comma-separated",
        |c, v| { c.server.allowed_origins = split_list(v); Ok(()) }),
    hub("MESSAGING_DATA_DIR", "", "folder for what survives the process: spool, queues, streams, handled ids",
        |c, v| { c.data_dir = Some(PathBuf::from(v)); Ok(()) }),
    hub("MESSAGING_MAX_MESSAGE_BYTES", "10485760", "largest message, at every entrance and broker",
        |c, v| set(&mut c.max_message_bytes, number(v))),
    hub("MESSAGING_TOPOLOGY_MODE", "apply", "apply, check or ignore what should exist on the brokers",
        |c, v| set(&mut c.topology_mode, match v {
            "apply" => Ok(TopologyMode::Apply),
            "check" => Ok(TopologyMode::Check),
            "ignore" => Ok(TopologyMode::Ignore),
            _ => Err("expected apply, check or ignore"),
        })),
    hub("MESSAGING_AUTO_DECLARE", "", "make missing queues and topics at first use; only the embedded broker does without it",
        |c, v| { c.hub.auto_declare = Some(boolean(v)?); Ok(()) }),
    hub("MESSAGING_SPOOL_MAX_MESSAGES", "1000000", "messages kept for absent brokers at most",
        |c, v| set(&mut c.hub.spool.max_messages, number(v))),
    hub("MESSAGING_SPOOL_MAX_BYTES", "536870912", "bytes kept for absent brokers at most",
        |c, v| set(&mut c.hub.spool.max_bytes, number(v))),
    hub("MESSAGING_SPOOL_WAIT", "5s", "how long a publish waits for room in a full spool",
        |c, v| set(&mut c.hub.spool.wait, time(v))),
    hub("MESSAGING_SPOOL_DRAIN_RATE", "0", "messages that each lane drains a second at most; 0 for no limit",
        |c, v| set(&mut c.hub.spool.drain_rate, u32::try_from(number(v)?).map_err(|_| "expected a number up to 4294967295"))),
    hub("MESSAGING_SUSPECT_TIMEOUT", "10s", "how long a silent broker keeps its connection",
        |c, v| set(&mut c.hub.suspect_timeout, time(v))),
    hub("MESSAGING_HEALTH_CHECK_INTERVAL", "30s", "how often brokers are asked whether they are well",
        |c, v| set(&mut c.hub.health_check_interval, time(v))),
    hub("MESSAGING_MAX_RETRIES", "3", "tries after the first, for messages that say nothing",
        |c, v| set(&mut c.hub.retry.max_retries, u32::try_from(number(v)?).map_err(|_| "expected a number up to 4294967295"))),
    hub("MESSAGING_COMPRESSION", "none", "none, zstd, lz4 or gzip, for large payloads to RabbitMQ and the embedded broker",
        |c, v| set(&mut c.hub.compression.algorithm, match v {
            "none" => Ok(Compression::None),
            "zstd" => Ok(Compression::Zstd),
            "lz4" => Ok(Compression::Lz4),
            "gzip" => Ok(Compression::Gzip),
            _ => Err("expected none, zstd, lz4 or gzip"),
        })),
    hub("MESSAGING_COMPRESSION_THRESHOLD", "4096", "payloads below stay as they are, in bytes",
        |c, v| set(&mut c.hub.compression.threshold, number(v))),
    hub("MESSAGING_SHUTDOWN_GRACE", "30s", "how long shutdown may take",
        |c, v| set(&mut c.hub.shutdown_grace, time(v))),
    hub("MESSAGING_LOG", "info", "log level, or filters such as info,messaging_hub=debug",
        |c, v| { c.log.level = v.to_owned(); Ok(()) }),
    hub("MESSAGING_LOG_FORMAT", "text", "text or json",
        |c, v| set(&mut c.log.format, match v {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("expected text or json"),
        })),

    other("RABBITMQ_ENABLED", "", "false: not used; true: used, if need be with the defaults", Effect::Switch),
    rabbit("RABBITMQ_URL", "", "amqp:// or amqps:// addresses, comma-separated; wins over the parts below",
        |r, v| { r.url = Some(Secret::new(v)); Ok(()) }),
    rabbit("RABBITMQ_HOST", "localhost", "host",
        |r, v| { r.host = v.to_owned(); Ok(()) }),
    rabbit("RABBITMQ_PORT", "5672", "port; 5671 with TLS",
        |r, v| { r.port = Some(port(v)?); Ok(()) }),
    other("RABBITMQ_DEFAULT_USER", "guest", "user, where nothing else gives one (the server's own variable)",
        Effect::Credential(|r, v| if r.username == RabbitMqConfig::default().username { r.username = v.to_owned() })),
    other("RABBITMQ_DEFAULT_PASS", "guest", "password, likewise",
        Effect::Credential(|r, v| if r.password == RabbitMqConfig::default().password { r.password = Secret::new(v) })),
    other("RABBITMQ_DEFAULT_VHOST", "/", "virtual host, likewise",
        Effect::Credential(|r, v| if r.vhost == RabbitMqConfig::default().vhost { r.vhost = v.to_owned() })),
    rabbit("RABBITMQ_USER", "guest", "user",
        |r, v| { r.username = v.to_owned(); Ok(()) }),
    rabbit("RABBITMQ_PASSWORD", "guest", "password",
        |r, v| { r.password = Secret::new(v); Ok(()) }),
    rabbit("RABBITMQ_VHOST", "/", "virtual host",
        |r, v| { r.vhost = v.to_owned(); Ok(()) }),
    rabbit("RABBITMQ_MANAGEMENT_URL", "", "http://user:password@host:15672, for rates, bytes and bindings",
        |r, v| { r.management_url = Some(Secret::new(v)); Ok(()) }),
    rabbit("RABBITMQ_PUBLISHER_CONFIRM", "true", "ask for confirms; false voids C1-C4",
        |r, v| set(&mut r.publisher_confirm, boolean(v))),
    rabbit("RABBITMQ_PREFETCH_COUNT", "10", "unsettled deliveries of a consumer at most",
        |r, v| set(&mut r.prefetch_count, v.parse().map_err(|_| "expected a number from 1 to 65535"))),
    rabbit("RABBITMQ_HEARTBEAT", "5s", "a dead peer is noticed after twice this",
        |r, v| set(&mut r.heartbeat, time(v))),
    rabbit("RABBITMQ_CONNECTION_TIMEOUT", "10s", "how long connecting may take",
        |r, v| set(&mut r.connection_timeout, time(v))),
    rabbit("RABBITMQ_CONSUMER_CHECK_INTERVAL", "30s", "how often the server is asked for its consumers; 0s: never",
        |r, v| set(&mut r.consumer_check_interval, time(v))),
    rabbit("RABBITMQ_CA_FILE", "", "PEM file of the certificate authority; turns TLS on",
        |r, v| { r.tls.get_or_insert_with(TlsConfig::default).ca_file = Some(PathBuf::from(v)); Ok(()) }),

    other("KAFKA_ENABLED", "", "false: not used; true: used, if need be with the defaults", Effect::Switch),
    kafka("KAFKA_BROKERS", "localhost:9092", "host:port addresses, comma-separated",
        |k, v| { k.brokers = split_list(v); Ok(()) }),
    other("KAFKA_BROKER", "localhost:9092", "another name of KAFKA_BROKERS", Effect::Alternative("KAFKA_BROKERS")),
    kafka("KAFKA_CLIENT_ID", "helixagent", "name shown to the brokers",
        |k, v| { k.client_id = v.to_owned(); Ok(()) }),
    kafka("KAFKA_GROUP_ID", "helixagent-group", "group of subscriptions that name none",
        |k, v| { k.group_id = v.to_owned(); Ok(()) }),
    other("KAFKA_CONSUMER_GROUP", "helixagent-group", "another name of KAFKA_GROUP_ID", Effect::Alternative("KAFKA_GROUP_ID")),
    kafka("KAFKA_GROUP_INSTANCE_ID", "", "static membership of the group",
        |k, v| { k.group_instance_id = Some(v.to_owned()); Ok(()) }),
    kafka("KAFKA_COMPRESSION", "lz4", "none, gzip, snappy, lz4 or zstd",
        |k, v| set(&mut k.compression, match v {
            "none" => Ok(Compression::None),
            "gzip" => Ok(Compression::Gzip),
            "snappy" => Ok(Compression::Snappy),
            "lz4" => Ok(Compression::Lz4),
            "zstd" => Ok(Compression::Zstd),
            _ => Err("expected none, gzip, snappy, lz4 or zstd"),
        })),
    kafka("KAFKA_REQUIRED_ACKS", "all", "all, leader or none; anything but all voids C1 and C2",
        |k, v| set(&mut k.required_acks, match v {
            "all" => Ok(RequiredAcks::All),
            "leader" => Ok(RequiredAcks::Leader),
            "none" => Ok(RequiredAcks::None),
            _ => Err("expected all, leader or none"),
        })),
    kafka("KAFKA_LINGER", "5ms", "how long a batch may wait to fill",
        |k, v| set(&mut k.linger, time(v))),
    kafka("KAFKA_ISOLATION_LEVEL", "read_committed", "read_committed or read_uncommitted, which also shows what was aborted",
        |k, v| set(&mut k.isolation_level, match v {
            "read_committed" => Ok(IsolationLevel::ReadCommitted),
            "read_uncommitted" => Ok(IsolationLevel::ReadUncommitted),
            _ => Err("expected read_committed or read_uncommitted"),
        })),
    kafka("KAFKA_TRANSACTIONAL_ID", "", "id of atomic batches, another one for each process; made up if unset",
        |k, v| { k.transactional_id = Some(v.to_owned()); Ok(()) }),
    kafka("KAFKA_TRANSACTION_TIMEOUT", "60s", "how long a transaction may be open",
        |k, v| set(&mut k.transaction_timeout, time(v))),
    kafka("KAFKA_CA_FILE", "", "PEM file of the certificate authority; turns TLS on",
        |k, v| { k.tls.get_or_insert_with(TlsConfig::default).ca_file = Some(PathBuf::from(v)); Ok(()) }),
    kafka("KAFKA_SASL_MECHANISM", "", "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; turns SASL on",
        |k, v| { let mechanism = match v {
            "PLAIN" => SaslMechanism::Plain,
            "SCRAM-SHA-256" => SaslMechanism::ScramSha256,
            "SCRAM-SHA-512" => SaslMechanism::ScramSha512,
            _ => return Err("expected PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"),
        }; sasl(k).mechanism = mechanism; Ok(()) }),
    kafka("KAFKA_SASL_USERNAME", "", "SASL user",
        |k, v| { sasl(k).username = v.to_owned(); Ok(()) }),
    kafka("KAFKA_SASL_PASSWORD", "", "SASL password",
        |k, v| { sasl(k).password = Secret::new(v); Ok(()) }),

    other("MESSAGING_HTTP_TOKEN", "", "token that HTTP asks for, and that the other commands give (or --http-token)",
        Effect::CommandLine),
    other("MESSAGING_URL", "", "the running hub that the other commands talk to (or --url); http://127.0.0.1:8090 if unset",
        Effect::CommandLine),

    other("MESSAGING_TCP_ADDR", "", "refused: address of the TCP gateway", Effect::Refused(NO_TCP)),
    other("TCP_PORT", "", "refused: port of the TCP gateway", Effect::Refused(NO_TCP)),
    other("DELIVERY_MODE", "", "refused: delivery of the TCP gateway, broadcast or queue", Effect::Refused(NO_TCP)),
    other("MAX_CONSUMERS", "", "refused: consumers of the TCP gateway at most", Effect::Refused(NO_TCP)),
    other("CONSUMER_CHANNEL_BUFFER_SIZE", "", "refused: buffer of a consumer of the TCP gateway", Effect::Refused(NO_TCP)),
];

fn set<T>(field: &mut T, value: Result<T, &'static str>) -> Expected {
    *field = value?;
    Ok(())
}

pub(super) fn boolean(text: &str) -> Result<bool, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("expected true or false"),
    }
}

fn port(text: &str) -> Result<u16, &'static str> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a port, 1 to 65535"),
        Ok(port) => Ok(port),
    }
}

fn number(text: &str) -> Result<u64, &'static str> {
    text.parse().map_err(|_| "expected a whole number")
}

fn time(text: &str) -> Result<std::time::Duration, &'static str> {
    duration::parse(text).map_err(|_| "expected a time such as 500ms, 5s, 2m or 1h")
}

fn address(text: &str) -> Result<String, &'static str> {
    match split_address(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("expected host:port, such as 127.0.0.1:8090"),
    }
}

fn host_of(address: &str) -> &str {
    address
        .rsplit_once(':')
        .map_or("127.0.0.1", |(host, _)| host)
}

fn sasl(kafka: &mut KafkaConfig) -> &mut SaslConfig {
    kafka.sasl.get_or_insert_with(|| SaslConfig {
        mechanism: SaslMechanism::Plain,
        username: String::new(),
        password: Secret::default(),
    })
}

const NO_TCP: &str = "asks for the TCP gateway, which this version does not have; unset it";
