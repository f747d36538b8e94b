//! Priorities.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorCode, Result};

/// 0 to 10, higher first; maps one to one onto AMQP. Default 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Priority(u8);

impl Priority {
    /// 1.
    pub const LOW: Self = Self(1);
    /// 5, the default.
    pub const NORMAL: Self = Self(5);
    /// 8.
    pub const HIGH: Self = Self(8);
    /// 10.
    pub const CRITICAL: Self = Self(10);
    /// The highest value.
    pub const MAX: u8 = 10;

    /// Checks a value.
    ///
    /// # Errors
    /// `MESSAGE_INVALID` above 10.
    pub fn new(value: u8) -> Result<Self> {
        if value > Self::MAX {
            return Err(Error::rejected(
                ErrorCode::MessageInvalid,
                format!(
                    "priority {value} is above 10; use 0 to 10, or low, normal, high, critical"
                ),
            ));
        }
        Ok(Self(value))
    }

    /// A value from the wire; what is above 10 counts as 10.
    #[must_use]
    pub fn clamped(value: u8) -> Self {
        Self(value.min(Self::MAX))
    }

    /// The value.
    #[must_use]
    pub fn value(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self::NORMAL
    }
}

impl std::str::FromStr for Priority {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "low" => Ok(Self::LOW),
            "normal" => Ok(Self::NORMAL),
            "high" => Ok(Self::HIGH),
            "critical" => Ok(Self::CRITICAL),
            other => other.parse::<u8>().map_or_else(
                |_| {
                    Err(Error::rejected(
                        ErrorCode::MessageInvalid,
                        format!("priority {text:?}; use 0 to 10, or low, normal, high, critical"),
                    ))
                },
                Self::new,
            ),
        }
    }
}

impl<'de> Deserialize<'de> for Priority {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Json {
            Number(u64),
            Name(String),
        }
        match Json::deserialize(d).map_err(|_| {
            serde::de::Error::custom("priority must be 0 to 10, or low, normal, high, critical")
        })? {
            Json::Number(n) => u8::try_from(n)
                .map_err(|_| {
                    Error::rejected(
                        ErrorCode::MessageInvalid,
                        format!("priority {n} is above 10"),
                    )
                })
                .and_then(Self::new),
            Json::Name(name) => name.parse(),
        }
        .map_err(serde::de::Error::custom)
    }
}
