//! Which guarantees a configuration weakens, said at start and in `/v1/state`.
//! Nothing here is an error: each is somebody's choice, and should be known.

use serde::Serialize;

use super::{HubSettings, MessagingConfig, redact};
use crate::{
    adapter::{
        kafka::KafkaConfig,
        kafka::config::{IsolationLevel, RequiredAcks},
        rabbitmq::RabbitMqConfig,
    },
    broker::QueueType,
};

/// A guarantee that does not hold in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Weakened {
    /// What weakens it, such as `fallback.kind is memory`.
    pub what: String,
    /// Which clauses of the contract, such as `C2`; `security` for what the
    /// contract does not cover.
    pub clause: String,
    /// What can happen.
    pub why: String,
}

/// Everything that this configuration weakens.
#[must_use]
pub fn weakened(config: &MessagingConfig) -> Vec<Weakened> {
    let mut found = Found(Vec::new());
    let brokers = config.active_rabbitmq().is_some() || config.active_kafka().is_some();
    if !brokers {
        if config.journal_dir().is_none() {
            found.add(
                "no broker is used, and nothing is kept on a disk",
                "C2, C6",
                "messages live in this process and do not survive it, nor does what is known of them",
            );
        }
    } else if !config.fallback.enabled {
        found.add(
            "the fallback is off",
            "C3, C4, C7",
            "while a broker is away its publishes fail",
        );
    } else {
        if config.journal_dir().is_none() {
            found.add(
                "the fallback keeps messages in memory",
                "C2, C6",
                "what is spooled survives the brokers, but not this process; what was handled and not settled may be handed out again after a restart",
            );
        }
        hub(&config.hub, &mut found);
    }
    if let Some(rabbitmq) = config.active_rabbitmq() {
        rabbit(rabbitmq, &mut found);
        queues(config, &mut found);
    }
    if let Some(k) = config.active_kafka() {
        kafka(k, &mut found);
        topics(config, &mut found);
    }
    if !config.server.is_loopback() {
        found.add(
            format!("HTTP listens on {}", config.server.http),
            "security",
            "it is beyond loopback; everyone who has the token may publish and read",
        );
    }
    found.0
}

impl MessagingConfig {
    /// As [`weakened`].
    #[must_use]
    pub fn weakened(&self) -> Vec<Weakened> {
        weakened(self)
    }
}

fn hub(hub: &HubSettings, found: &mut Found) {
    if !hub.use_fallback_on_error {
        found.add(
            "hub.use_fallback_on_error is false",
            "C1, C3",
            "a publish that fails or has no outcome is the caller's error",
        );
    }
    for route in hub.routes.iter().filter(|r| !r.spool) {
        found.add(
            format!("the route {} does not spool", route.pattern),
            "C3, C4",
            "while its broker is away its publishes fail",
        );
    }
    for route in hub.routes.iter().filter(|r| r.long_running) {
        found.add(
            format!("the route {} is long_running", route.pattern),
            "C2",
            "its tasks are kept by this hub's disk alone while they are handled; should the hub die, they wait for its return",
        );
    }
}

fn rabbit(rabbitmq: &RabbitMqConfig, found: &mut Found) {
    if !rabbitmq.publisher_confirm {
        found.add(
            "rabbitmq.publisher_confirm is false",
            "C1, C2, C3, C4",
            "nobody knows whether a message arrived",
        );
    }
    if rabbitmq.consumer_check_interval.is_zero() {
        found.add(
            "rabbitmq.consumer_check_interval is 0",
            "C7",
            "a queue whose consumer the server has lost is not noticed",
        );
    }
    let (passwords, clear): (Vec<String>, bool) = match &rabbitmq.url {
        Some(url) => {
            let addresses = redact::addresses(url.expose());
            (
                addresses
                    .iter()
                    .filter_map(|a| redact::password(a))
                    .map(str::to_owned)
                    .collect(),
                addresses
                    .iter()
                    .any(|a| a.starts_with("amqp://") && !is_local_address(a)),
            )
        }
        None => (
            vec![rabbitmq.password.expose().to_owned()],
            rabbitmq.tls.is_none() && !is_local(&rabbitmq.host),
        ),
    };
    if passwords
        .iter()
        .any(|p| DEFAULT_PASSWORDS.contains(&p.as_str()))
    {
        found.add(
            "RabbitMQ has a default password",
            "security",
            "everyone knows it; set RABBITMQ_PASSWORD",
        );
    }
    if clear && rabbitmq.tls.is_none() {
        found.add(
            "RabbitMQ is reached without TLS",
            "security",
            "password and messages cross the network in the clear",
        );
    }
}

fn queues(config: &MessagingConfig, found: &mut Found) {
    let classic: Vec<&str> = config
        .topology
        .queues
        .iter()
        .filter(|q| q.options.effective_type() == QueueType::Classic)
        .map(|q| q.name.as_str())
        .collect();
    if !classic.is_empty() {
        found.add(
            format!("classic queues: {}", classic.join(", ")),
            "C2",
            "one node, not replicated; a power cut takes what is in its page cache",
        );
    }
}

fn kafka(kafka: &KafkaConfig, found: &mut Found) {
    if kafka.required_acks != RequiredAcks::All {
        found.add(
            "kafka.required_acks is not all",
            "C1, C2",
            "an acknowledged message is lost with the broker that took it",
        );
    }
    if !kafka.enable_idempotence {
        found.add(
            "kafka.enable_idempotence is false",
            "C5, C6",
            "a retried batch can come twice, or behind a later one",
        );
    }
    if kafka.isolation_level == IsolationLevel::ReadUncommitted {
        found.add(
            "kafka.isolation_level is read_uncommitted",
            "C6",
            "readers get what a transaction wrote and then aborted; its retry is a second copy",
        );
    }
    if kafka.tls.is_none() && kafka.brokers.iter().any(|b| !is_local_address(b)) {
        found.add(
            "Kafka is reached without TLS",
            "security",
            "messages cross the network in the clear",
        );
    }
    if kafka
        .sasl
        .as_ref()
        .is_some_and(|s| DEFAULT_PASSWORDS.contains(&s.password.expose()))
    {
        found.add(
            "Kafka has a default password",
            "security",
            "everyone knows it; set KAFKA_SASL_PASSWORD",
        );
    }
}

fn topics(config: &MessagingConfig, found: &mut Found) {
    let topics = &config.topology.topics;
    let single: Vec<&str> = topics
        .iter()
        .filter(|t| t.options.replication == 1)
        .map(|t| t.name.as_str())
        .collect();
    if !single.is_empty() {
        let what = if single.len() == topics.len() {
            "every topic has one replica".to_owned()
        } else {
            format!("topics with one replica: {}", single.join(", "))
        };
        found.add(
            what,
            "C2",
            "they are away while their broker is, and lost with its disk",
        );
    }
}

fn is_local_address(address: &str) -> bool {
    let host = redact::host(address);
    is_local(host)
}

fn is_local(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

struct Found(Vec<Weakened>);

impl Found {
    fn add(&mut self, what: impl Into<String>, clause: &str, why: &str) {
        self.0.push(Weakened {
            what: what.into(),
            clause: clause.to_owned(),
            why: why.to_owned(),
        });
    }
}

/// What servers and well-known examples come with.
const DEFAULT_PASSWORDS: &[&str] = &["guest", "helixagent123", "stage7password"];
