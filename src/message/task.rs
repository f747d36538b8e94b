//! Tasks: work that one worker does once.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Message, MessageId, Priority, Timestamp};

/// What a task has beyond a message. Travels as `hub-task-*` headers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskAttributes {
    /// Latest time at which starting it makes sense.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Earliest time at which it may start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduled_at: Option<Timestamp>,
    /// When a worker took it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Timestamp>,
    /// Who works on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<String>,
    /// The task that it is part of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_task_id: Option<String>,
    /// Free metadata.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Made, not queued.
    #[default]
    Pending,
    /// In a queue.
    Queued,
    /// In a worker's hands.
    Running,
    /// Done.
    Completed,
    /// Failed.
    Failed,
    /// Called off.
    Canceled,
    /// In the dead letters.
    DeadLettered,
}

/// A unit of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Task {
    /// Unique id, default a UUIDv7.
    pub id: MessageId,
    /// What is to be done.
    #[serde(rename = "type")]
    pub kind: String,
    /// The input.
    pub payload: Bytes,
    /// 0 to 10, default 5.
    pub priority: Priority,
    /// Where it stands.
    pub state: TaskState,
    /// Default 3.
    pub max_retries: u32,
    /// Attempts that failed so far.
    pub retry_count: u32,
    /// When it was made.
    pub created_at: Timestamp,
    /// Trace id.
    pub trace_id: Option<String>,
    /// Correlation id.
    pub correlation_id: Option<String>,
    /// What came of it.
    pub result: Option<Bytes>,
    /// Why it failed last.
    pub error: Option<String>,
    /// Everything that only tasks have.
    #[serde(flatten)]
    pub attributes: TaskAttributes,
}

impl Default for Task {
    fn default() -> Self {
        Message::default().into()
    }
}

impl Task {
    /// A task of a type, with its input.
    pub fn new(kind: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        Message::new(kind, payload).into()
    }
}

impl From<Task> for Message {
    fn from(task: Task) -> Self {
        Self {
            id: task.id,
            kind: task.kind,
            payload: task.payload,
            priority: task.priority,
            max_retries: task.max_retries,
            retry_count: task.retry_count,
            timestamp: task.created_at,
            trace_id: task.trace_id,
            correlation_id: task.correlation_id,
            error: task.error,
            task: Some(Box::new(task.attributes)),
            ..Self::default()
        }
    }
}

impl From<Message> for Task {
    fn from(message: Message) -> Self {
        Self {
            id: message.id,
            kind: message.kind,
            payload: message.payload,
            priority: message.priority,
            state: TaskState::Pending,
            max_retries: message.max_retries,
            retry_count: message.retry_count,
            created_at: message.timestamp,
            trace_id: message.trace_id,
            correlation_id: message.correlation_id,
            result: None,
            error: message.error,
            attributes: message.task.map(|t| *t).unwrap_or_default(),
        }
    }
}
