//! Message ids.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, ErrorCode, Result};

/// The most characters an id may have.
pub const MAX_ID_LEN: usize = 128;

/// A message's id: 1 to 128 printable ASCII characters, by default a UUIDv7.
/// Knows whether the caller brought it: only a brought id can come twice on
/// purpose, so only those are watched for repeats. Cheap to clone.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MessageId {
    text: Arc<str>,
    generated: bool,
}

impl MessageId {
    /// A new UUIDv7.
    #[must_use]
    pub fn generate() -> Self {
        let mut buffer = Uuid::encode_buffer();
        let text: &str = Uuid::now_v7().hyphenated().encode_lower(&mut buffer);
        Self {
            text: text.into(),
            generated: true,
        }
    }

    /// An id that the hub worked out. Nobody brought it, so it is not watched for
    /// repeats at the entrance; readers know it by its text as any other.
    pub(crate) fn derived(id: Uuid) -> Self {
        let mut buffer = Uuid::encode_buffer();
        let text: &str = id.hyphenated().encode_lower(&mut buffer);
        Self {
            text: text.into(),
            generated: true,
        }
    }

    /// Checks and wraps an id that the caller brought.
    ///
    /// # Errors
    /// `MESSAGE_INVALID` when it is empty, longer than 128 characters, or has a
    /// character that is not printable ASCII.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        let text = text.as_ref();
        if text.is_empty() || text.len() > MAX_ID_LEN {
            return Err(Error::rejected(
                ErrorCode::MessageInvalid,
                format!(
                    "an id has 1 to {MAX_ID_LEN} characters, this one has {}",
                    text.len()
                ),
            ));
        }
        if let Some(c) = text.chars().find(|c| !matches!(c, ' '..='~')) {
            return Err(Error::rejected(
                ErrorCode::MessageInvalid,
                format!("an id has printable ASCII characters only, this one has {c:?}"),
            ));
        }
        Ok(Self {
            text: text.into(),
            generated: false,
        })
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The text, shared.
    #[must_use]
    pub fn shared(&self) -> Arc<str> {
        self.text.clone()
    }

    /// Whether it was made here rather than brought by the caller.
    #[must_use]
    pub fn is_generated(&self) -> bool {
        self.generated
    }
}

impl PartialEq for MessageId {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for MessageId {}

impl std::hash::Hash for MessageId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl TryFrom<String> for MessageId {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        Self::new(text)
    }
}

impl From<MessageId> for String {
    fn from(id: MessageId) -> Self {
        id.text.as_ref().to_owned()
    }
}
