//! How far a replay is, in the form that people and machines get.

use serde::{Deserialize, Serialize};

use super::request::ReplayRequest;
use crate::{message::Timestamp, topic::Topic};

/// A replay, as it is listed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    /// Its id.
    pub id: String,
    /// How far it is.
    #[serde(flatten)]
    pub progress: ReplayProgress,
    /// What was asked for.
    pub request: ReplayRequest,
}

/// How far a replay is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplayProgress {
    /// Where it stands.
    pub status: ReplayStatus,
    /// Messages of the time range, as far as is known: an estimate by offsets
    /// while it runs, and at the end of a whole run what there was.
    pub total: u64,
    /// Published again; in a dry run, what would have been.
    pub replayed: u64,
    /// Of the time range, but filtered out, or duplicates.
    pub skipped: u64,
    /// Publishes that failed.
    pub failed: u64,
    /// Offsets passed, of `offsets_total`, which it reads through: gaps and what
    /// lies outside of the time range included. What a progress bar shows.
    pub offsets_read: u64,
    /// Offsets between the first message of `from_time` and the end, as it was
    /// at the start.
    pub offsets_total: u64,
    /// When it began.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// The place of the message that was read last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<ReplayPlace>,
    /// The id that the message had at first which was published again last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_id: Option<String>,
    /// Messages published again a second, over the whole run.
    pub rate: f64,
    /// The first thing that went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A place in a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplayPlace {
    /// The topic.
    pub topic: Topic,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
}

/// Where a replay stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplayStatus {
    /// Accepted; it is being found out what there is to read.
    #[default]
    Pending,
    /// Reading and publishing.
    Running,
    /// All was read. Some may have failed, see `failed`.
    Completed,
    /// Ended before all was read, see `error`.
    Failed,
    /// Ended by somebody, or with the hub.
    Cancelled,
}

impl ReplayStatus {
    /// Whether nothing more happens.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// The text, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}
