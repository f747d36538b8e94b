//! Durations in configuration: text such as `500ms`, `5s`, `2m`, `7d`, or a
//! whole number of milliseconds. Use with `#[serde(with = "crate::duration")]`.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serializer};

use crate::error::{Error, ErrorCode, Result};

/// Reads a duration.
///
/// # Errors
/// `INVALID_CONFIG` that shows the forms which are understood.
pub fn parse(text: &str) -> Result<Duration> {
    let text = text.trim();
    if let Ok(ms) = text.parse::<u64>() {
        return Ok(Duration::from_millis(ms));
    }
    let wrong = || {
        Error::rejected(
            ErrorCode::InvalidConfig,
            format!("{text:?} is not a duration; write 500ms, 5s, 2m, 1h, 7d or milliseconds"),
        )
    };
    // Days are not part of jiff's absolute durations, and retention needs them.
    if let Some(days) = text
        .strip_suffix('d')
        .and_then(|d| d.trim().parse::<u64>().ok())
    {
        return days
            .checked_mul(24 * 3600)
            .map(Duration::from_secs)
            .ok_or_else(wrong);
    }
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|d| Duration::try_from(d).ok())
        .ok_or_else(wrong)
}

/// The text form, such as `5s` or `250ms`.
#[must_use]
pub fn format(d: Duration) -> String {
    let ms = d.as_millis();
    if ms > 0 && ms.is_multiple_of(86_400_000) {
        format!("{}d", ms / 86_400_000)
    } else if ms > 0 && ms.is_multiple_of(1000) {
        format!("{}s", ms / 1000)
    } else {
        format!("{ms}ms")
    }
}

/// For serde.
///
/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&format(*d))
}

/// For serde.
///
/// # Errors
/// As [`parse`].
pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Millis(u64),
        Text(String),
    }
    match Form::deserialize(d).map_err(|_| {
        serde::de::Error::custom("a duration must be text such as 5s, or milliseconds")
    })? {
        Form::Millis(ms) => Ok(Duration::from_millis(ms)),
        Form::Text(text) => parse(&text).map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_forms_are_read() {
        for (text, ms) in [
            ("500ms", 500),
            ("5s", 5000),
            ("2m", 120_000),
            ("7d", 604_800_000),
            ("250", 250),
        ] {
            assert_eq!(parse(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        assert!(parse("soon").is_err());
        assert!(parse("-5s").is_err());
    }
}
