//! The parts of the configuration that belong to neither hub nor broker:
//! fallback, listeners, log.

use serde::{Deserialize, Serialize};

/// What stands in while a primary is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FallbackSettings {
    /// Default true. Danger: false makes every outage the caller's, and a start
    /// without brokers an error. The same switch as `hub.fallback_enabled`: off
    /// where either is off.
    pub enabled: bool,
    /// Where it keeps messages. Default memory.
    pub kind: FallbackKind,
}

/// Where the fallback keeps messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FallbackKind {
    /// In the data folder, where there is one: survives the brokers' death and
    /// the hub's.
    #[default]
    Journal,
    /// In this process, whatever the data folder: survives the brokers' death,
    /// not the hub's.
    Memory,
}

/// Where clients reach the hub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address of HTTP, as `host:port`. Default `127.0.0.1:8090`. Danger: beyond
    /// loopback everyone who reaches it may publish and read.
    pub http: String,
    /// Address of the TCP gateway, as `host:port`. Default: off. Refused as long
    /// as [`super::HAS_TCP_GATEWAY`] is false.
    pub tcp: Option<String>,
    /// Values of `Host` that are answered, besides the loopback names. Default
    /// none.
    pub allowed_hosts: Vec<String>,
    /// Values of `Origin` that are answered, besides the server's own. Default
    /// none.
    pub allowed_origins: Vec<String>,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Default text.
    pub format: LogFormat,
    /// A level (`error`, `warn`, `info`, `debug`, `trace`, `off`), or filters
    /// such as `info,messaging_hub=debug`. Default `info`.
    pub level: String,
}

/// Forms of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for FallbackSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            kind: FallbackKind::Journal,
        }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            http: "127.0.0.1:8090".to_owned(),
            tcp: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
        }
    }
}

impl ServerConfig {
    /// Whether HTTP listens on this machine only.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let Some((host, _)) = split_address(&self.http) else {
            return false;
        };
        host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback())
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            level: "info".to_owned(),
        }
    }
}

/// Host (without brackets) and port of `host:port`.
pub(super) fn split_address(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']')?,
        // An IPv6 address without brackets cannot be told from its port.
        None if host.contains(':') => return None,
        None => host,
    };
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if host.is_empty() || !host.chars().all(known) {
        return None;
    }
    Some((host, port.parse().ok()?))
}
