//! Settings of the Kafka adapter.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{adapter::rabbitmq::TlsConfig, broker::Compression, secret::Secret};

/// How to reach Kafka and how to behave there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KafkaConfig {
    /// Used at all. Default true where the section stands.
    pub enabled: bool,
    /// `host:port` addresses; all are dialled. Default `localhost:9092`.
    pub brokers: Vec<String>,
    /// Default `helixagent`.
    pub client_id: String,
    /// Group of subscriptions that name none. Default `helixagent-group`.
    pub group_id: String,
    /// Static membership.
    pub group_instance_id: Option<String>,
    /// Default lz4.
    pub compression: Compression,
    /// `all` (default), `leader` or `none`; anything but `all` voids C1 and C2.
    pub required_acks: RequiredAcks,
    /// Default true; needs `required_acks: all`.
    pub enable_idempotence: bool,
    /// Default 5 ms.
    #[serde(with = "crate::duration")]
    pub linger: Duration,
    /// Bytes of a batch. Default 128 KiB.
    pub batch_size: usize,
    /// Messages in flight of a lane at most, whatever a lane asks for. Default
    /// 10,000.
    pub window: usize,
    /// Keys go to the partition that Java clients choose (murmur2). Default
    /// false: the one that librdkafka chooses (CRC32).
    pub murmur2_partitioner: bool,
    /// How long a producer that owes outcomes may bring none before it is given
    /// up, and the outcome of all that it holds counts as unknown. Default 10 s.
    #[serde(with = "crate::duration")]
    pub message_timeout: Duration,
    /// Default 10 s.
    #[serde(with = "crate::duration")]
    pub connection_timeout: Duration,
    /// First pause before a reconnect. Default 50 ms; doubles, jittered.
    #[serde(with = "crate::duration")]
    pub reconnect_delay: Duration,
    /// Longest pause before a reconnect. Default 250 ms.
    #[serde(with = "crate::duration")]
    pub max_reconnect_delay: Duration,
    /// How often topics and leaders are looked up. Default 10 s.
    #[serde(with = "crate::duration")]
    pub metadata_refresh: Duration,
    /// What readers see of transactions: `read_committed` (default) or
    /// `read_uncommitted`, which also shows what was aborted. Transforms always
    /// read what is committed.
    pub isolation_level: IsolationLevel,
    /// Beginning of the id under which the hub writes atomic batches; each process
    /// needs one of its own, because a later process of the same id fences the
    /// earlier one. A restart under it ends at once what a killed process left open.
    /// Default: made up at each start, so what a killed process left open holds
    /// up readers until `transaction_timeout`.
    pub transactional_id: Option<String>,
    /// How long a transaction may be open before the brokers abort it. Default
    /// 60 s; 1 s to 15 min, which is what brokers take unless they are told.
    #[serde(with = "crate::duration")]
    pub transaction_timeout: Duration,
    /// Make topics that are published to and missing. Default false.
    pub auto_create_topics: bool,
    /// TLS.
    pub tls: Option<TlsConfig>,
    /// SASL.
    pub sasl: Option<SaslConfig>,
    /// Largest message, as the brokers are set. Default 1 MiB minus overhead is
    /// theirs; ours is 10 MiB, and topics say less.
    pub max_message_bytes: usize,
    /// Further librdkafka settings, by its names; those that the adapter
    /// depends on are refused.
    pub settings: BTreeMap<String, String>,
}

/// What readers see of transactions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IsolationLevel {
    /// Only what was committed, and nothing behind an open transaction.
    #[default]
    ReadCommitted,
    /// Everything, also what was or will be aborted.
    ReadUncommitted,
}

impl IsolationLevel {
    /// The name in configurations and for the client library.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ReadCommitted => "read_committed",
            Self::ReadUncommitted => "read_uncommitted",
        }
    }
}

/// Which acknowledgements a produce waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequiredAcks {
    /// All in-sync replicas.
    #[default]
    All,
    /// The leader's only.
    Leader,
    /// None.
    None,
}

/// SASL authentication.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaslConfig {
    /// Which mechanism.
    pub mechanism: SaslMechanism,
    /// User.
    pub username: String,
    /// Password.
    pub password: Secret,
}

/// SASL mechanisms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaslMechanism {
    /// PLAIN.
    #[serde(rename = "PLAIN")]
    Plain,
    /// SCRAM-SHA-256.
    #[serde(rename = "SCRAM-SHA-256")]
    ScramSha256,
    /// SCRAM-SHA-512.
    #[serde(rename = "SCRAM-SHA-512")]
    ScramSha512,
}

impl SaslMechanism {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            brokers: vec!["localhost:9092".to_owned()],
            client_id: "helixagent".to_owned(),
            group_id: "helixagent-group".to_owned(),
            group_instance_id: None,
            compression: Compression::Lz4,
            required_acks: RequiredAcks::All,
            enable_idempotence: true,
            linger: Duration::from_millis(5),
            batch_size: 128 * 1024,
            window: 10_000,
            murmur2_partitioner: false,
            message_timeout: Duration::from_secs(10),
            connection_timeout: Duration::from_secs(10),
            reconnect_delay: Duration::from_millis(50),
            max_reconnect_delay: Duration::from_millis(250),
            metadata_refresh: Duration::from_secs(10),
            isolation_level: IsolationLevel::ReadCommitted,
            transactional_id: None,
            transaction_timeout: Duration::from_secs(60),
            auto_create_topics: false,
            tls: None,
            sasl: None,
            max_message_bytes: 10 * 1024 * 1024,
            settings: BTreeMap::new(),
        }
    }
}
