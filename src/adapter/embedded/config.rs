//! Settings of the embedded broker.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    broker::direct::DEFAULT_MAX_MESSAGE_BYTES,
    error::{Error, ErrorCode, Result},
    topic::Pattern,
};

/// How much the embedded broker may hold and how it treats unknown names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbeddedConfig {
    /// Make queues and streams that are published to or subscribed to and
    /// missing. Default true.
    pub auto_declare: bool,
    /// Names that become queues when `auto_declare` meets them; every other
    /// name becomes a stream. Default `helixagent.tasks.#`, `tasks.#` (which
    /// covers `tasks`), `task.#`.
    pub queue_patterns: Vec<Pattern>,
    /// Partitions of a stream that is made without being asked for a number.
    /// Default 3.
    pub default_partitions: i32,
    /// Bytes that all queues and streams may hold together. Default 1 GiB. At
    /// the bound publishes are answered as overload.
    pub max_bytes: u64,
    /// Messages of a queue that sets no `max_length`. Default 1,000,000. At the
    /// bound publishes are answered as overload.
    pub max_messages: u64,
    /// Bytes that one stream may hold. Default 256 MiB. At the bound publishes
    /// are answered as overload, unless a retention in bytes makes room.
    pub max_stream_bytes: u64,
    /// Bytes that one partition keeps, the oldest go first: Kafka's
    /// `retention.bytes` for topics that do not set it. Default none.
    pub retention_bytes: Option<u64>,
    /// Largest payload of a direct publish, in bytes. Default 16 MiB. Lanes take
    /// what their owner has checked.
    pub max_message_bytes: usize,
    /// Where what is kept survives restarts. Default nowhere: in memory only.
    /// Needs the feature `journal`.
    pub journal: Option<JournalConfig>,
}

/// The embedded broker's place on disk. Queues and streams have a log each, in
/// the folders `queues` and `streams` under `dir`: a month of a stream would keep
/// the disk of all tasks that were done in that time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JournalConfig {
    /// The folder; made when missing, held by one broker at a time.
    pub dir: PathBuf,
    /// Bytes on disk that the log of the queues may take. Default 2 GiB. At the
    /// bound publishes are answered as overload.
    pub queue_bytes: u64,
    /// Bytes on disk that the log of the streams may take. Default 2 GiB. At the
    /// bound publishes are answered as overload.
    pub stream_bytes: u64,
    /// Size of one file of a log in bytes. Default 16 MiB.
    pub segment_bytes: u64,
}

impl Default for JournalConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::new(),
            queue_bytes: 2 * 1024 * 1024 * 1024,
            stream_bytes: 2 * 1024 * 1024 * 1024,
            segment_bytes: 16 * 1024 * 1024,
        }
    }
}

impl JournalConfig {
    /// Defaults, in a folder.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            ..Self::default()
        }
    }
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            auto_declare: true,
            queue_patterns: ["helixagent.tasks.#", "tasks.#", "task.#"]
                .into_iter()
                .filter_map(|p| Pattern::new(p).ok())
                .collect(),
            default_partitions: 3,
            max_bytes: 1024 * 1024 * 1024,
            max_messages: 1_000_000,
            max_stream_bytes: 256 * 1024 * 1024,
            retention_bytes: None,
            max_message_bytes: DEFAULT_MAX_MESSAGE_BYTES,
            journal: None,
        }
    }
}

impl EmbeddedConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// `INVALID_CONFIG` that names the field.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field: &str| {
            Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!("embedded.{field} must be at least 1"),
            ))
        };
        if self.default_partitions < 1 {
            return wrong("default_partitions");
        }
        if self.max_bytes == 0 {
            return wrong("max_bytes");
        }
        if self.max_messages == 0 {
            return wrong("max_messages");
        }
        if self.max_stream_bytes == 0 {
            return wrong("max_stream_bytes");
        }
        if self.max_message_bytes == 0 {
            return wrong("max_message_bytes");
        }
        if let Some(journal) = &self.journal {
            if journal.dir.as_os_str().is_empty() {
                return Err(Error::rejected(
                    ErrorCode::MissingConfig,
                    "embedded.journal.dir names no folder",
                ));
            }
            for (field, value) in [
                ("journal.queue_bytes", journal.queue_bytes),
                ("journal.stream_bytes", journal.stream_bytes),
                ("journal.segment_bytes", journal.segment_bytes),
            ] {
                if value == 0 {
                    return wrong(field);
                }
            }
            if !cfg!(feature = "journal") {
                return Err(Error::rejected(
                    ErrorCode::InvalidConfig,
                    "embedded.journal is set but this build has no journal; build with the feature journal, or leave it out",
                ));
            }
        }
        Ok(())
    }
}
