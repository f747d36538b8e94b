//! Topic names and the patterns that match them. No I/O, no broker knowledge:
//! how a topic maps to an exchange or a Kafka topic is `topology`'s business.

mod pattern;

use std::{borrow::Borrow, fmt, ops::Deref, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorCode, Result};

pub use pattern::Pattern;

/// The most characters a topic name may have: Kafka's own limit.
pub const MAX_TOPIC_LEN: usize = 249;

/// A valid topic name: 1 to 249 of `a-z A-Z 0-9 . _ -`, not `.` or `..` (what
/// Kafka accepts, so that every topic can live on every broker). Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Topic(Arc<str>);

impl Topic {
    /// Checks and wraps a name.
    ///
    /// # Errors
    /// `MESSAGE_INVALID` naming the character or length that is wrong.
    pub fn new(name: impl AsRef<str>) -> Result<Self> {
        let name = name.as_ref();
        let bad = if name.is_empty() {
            Some("a topic name must not be empty".to_owned())
        } else if name.len() > MAX_TOPIC_LEN {
            Some(format!(
                "a topic name has at most {MAX_TOPIC_LEN} characters, this one has {}",
                name.len()
            ))
        } else if name == "." || name == ".." {
            Some(format!("{name:?} is not a topic name"))
        } else {
            name.chars()
                .find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')))
                .map(|c| {
                    format!(
                        "topic name {name:?} has the character {c:?}; use letters, digits, '.', '_' and '-'"
                    )
                })
        };
        match bad {
            Some(why) => Err(Error::rejected(ErrorCode::MessageInvalid, why)),
            None => Ok(Self(name.into())),
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, shared.
    #[cfg(feature = "kafka")]
    pub(crate) fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }
}

impl Deref for Topic {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Topic {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl TryFrom<String> for Topic {
    type Error = Error;
    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl TryFrom<&str> for Topic {
    type Error = Error;
    fn try_from(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl From<Topic> for String {
    fn from(topic: Topic) -> Self {
        topic.0.as_ref().to_owned()
    }
}
