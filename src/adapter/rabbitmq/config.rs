//! Settings of the RabbitMQ adapter.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::secret::Secret;

/// How to reach RabbitMQ and how to behave there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RabbitMqConfig {
    /// Used at all. Default true where the section stands.
    pub enabled: bool,
    /// `amqp://` or `amqps://` addresses, comma-separated for a cluster; when
    /// set it wins over the parts below.
    pub url: Option<Secret>,
    /// Default `localhost`.
    pub host: String,
    /// Default 5672 (5671 with TLS).
    pub port: Option<u16>,
    /// Default `guest`.
    pub username: String,
    /// Default `guest`.
    pub password: Secret,
    /// Default `/`.
    pub vhost: String,
    /// `http://user:password@host:15672`, for unacked counts, bytes, rates and
    /// binding checks. Default: not asked.
    pub management_url: Option<Secret>,
    /// TLS; on when set, or with an `amqps` address.
    pub tls: Option<TlsConfig>,
    /// Ask for confirms. Default true; false voids C1-C4.
    pub publisher_confirm: bool,
    /// Unsettled deliveries of a consumer. Default 10.
    pub prefetch_count: u16,
    /// Messages in flight of a lane. Default 1000.
    pub window: usize,
    /// A dead peer is noticed after twice this. Default 5 s.
    #[serde(with = "crate::duration")]
    pub heartbeat: Duration,
    /// Default 10 s.
    #[serde(with = "crate::duration")]
    pub connection_timeout: Duration,
    /// First pause before a reconnect. Default 50 ms; doubles, jittered.
    #[serde(with = "crate::duration")]
    pub reconnect_delay: Duration,
    /// Longest pause before a reconnect. Default 250 ms.
    #[serde(with = "crate::duration")]
    pub max_reconnect_delay: Duration,
    /// How often the server is asked whether a queue still has its consumer,
    /// which is subscribed again if not. Default 30 s; 0: never.
    #[serde(with = "crate::duration")]
    pub consumer_check_interval: Duration,
    /// Name shown in the management pages. Default `messaging-hub`.
    pub connection_name: String,
}

/// TLS to a broker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM file of the certificate authority. Default: the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM file of our certificate chain.
    pub cert_file: Option<PathBuf>,
    /// PEM file of our key (PKCS#8).
    pub key_file: Option<PathBuf>,
}

impl Default for RabbitMqConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            url: None,
            host: "localhost".to_owned(),
            port: None,
            username: "guest".to_owned(),
            password: Secret::new("guest"),
            vhost: "/".to_owned(),
            management_url: None,
            tls: None,
            publisher_confirm: true,
            prefetch_count: 10,
            window: 1000,
            heartbeat: Duration::from_secs(5),
            connection_timeout: Duration::from_secs(10),
            reconnect_delay: Duration::from_millis(50),
            max_reconnect_delay: Duration::from_millis(250),
            consumer_check_interval: Duration::from_secs(30),
            connection_name: "messaging-hub".to_owned(),
        }
    }
}
