//! Patterns over dotted names: `*` stands for exactly one word, `#` for any
//! number of words, none included (AMQP's topic exchange). `**` is read as `#`,
//! because `#` cannot stand in a URL unescaped.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{MAX_TOPIC_LEN, Topic};
use crate::error::{Error, ErrorCode, Result};

/// A checked pattern. A pattern without wildcards matches one topic.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

impl Pattern {
    /// Checks and wraps a pattern.
    ///
    /// # Errors
    /// `INVALID_CONFIG` that names what is wrong.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        let text: String = text
            .as_ref()
            .split('.')
            .map(|w| if w == "**" { "#" } else { w })
            .collect::<Vec<_>>()
            .join(".");
        let wrong = |why: &str| {
            Err(Error::rejected(
                ErrorCode::InvalidConfig,
                format!("pattern {text:?}: {why}"),
            ))
        };
        if text.is_empty() {
            return wrong("it is empty; use '#' for every topic");
        }
        if text.len() > MAX_TOPIC_LEN {
            return wrong("it has more than 249 characters");
        }
        for word in text.split('.') {
            if word == "*" || word == "#" {
                continue;
            }
            if word.contains(['*', '#']) {
                return wrong("'*' and '#' stand for whole words, between dots");
            }
            if let Some(c) = word
                .chars()
                .find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-')))
            {
                return wrong(&format!("the character {c:?} cannot be part of a topic"));
            }
        }
        Ok(Self(text))
    }

    /// Every topic that begins with `prefix` (which ends with a dot), and
    /// nothing else.
    ///
    /// # Errors
    /// As [`Pattern::new`].
    pub fn prefix(prefix: &str) -> Result<Self> {
        Self::new(format!("{prefix}#"))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The topic, when the pattern has no wildcard.
    #[must_use]
    pub fn literal(&self) -> Option<Topic> {
        if self.0.split('.').any(|w| w == "*" || w == "#") {
            None
        } else {
            Topic::new(&self.0).ok()
        }
    }

    /// Whether the pattern covers `name`.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        if self.0 == "#" {
            return true;
        }
        let pattern: Vec<&str> = self.0.split('.').collect();
        let words: Vec<&str> = name.split('.').collect();
        // Greedy match with one point of return: the last '#' seen. Linear in
        // practice, quadratic at worst, never exponential.
        let (mut p, mut w) = (0, 0);
        let mut back: Option<(usize, usize)> = None;
        loop {
            match (pattern.get(p), words.get(w)) {
                (None, None) => return true,
                (Some(&"#"), _) => {
                    back = Some((p + 1, w));
                    p += 1;
                }
                (Some(&pw), Some(&ww)) if pw == "*" || pw == ww => {
                    p += 1;
                    w += 1;
                }
                _ => match back {
                    Some((bp, bw)) if bw < words.len() => {
                        back = Some((bp, bw + 1));
                        p = bp;
                        w = bw + 1;
                    }
                    _ => return false,
                },
            }
        }
    }

    /// The same pattern as a regular expression anchored at both ends, in the
    /// form that librdkafka and Rust's `regex` both read.
    #[must_use]
    pub fn to_regex(&self) -> String {
        const WORD: &str = "[a-zA-Z0-9_-]*";
        let words: Vec<&str> = self.0.split('.').collect();
        if words.iter().all(|w| *w == "#") {
            return "^.*".to_owned();
        }
        let mut out = String::from("^");
        // Whether a dot must come before the next word.
        let mut dot = false;
        for (i, word) in words.iter().enumerate() {
            match *word {
                "#" if dot => out.push_str(&format!("(\\.{WORD})*")),
                "#" => {
                    // Leading '#': any words, each followed by its dot; the
                    // last word of the pattern may follow without one.
                    if i + 1 == words.len() {
                        out.push_str(".*");
                    } else {
                        out.push_str(&format!("({WORD}\\.)*"));
                    }
                }
                word => {
                    if dot {
                        out.push_str("\\.");
                    }
                    out.push_str(if word == "*" { WORD } else { word });
                    dot = true;
                }
            }
        }
        out.push('$');
        out
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl TryFrom<String> for Pattern {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        Self::new(text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.0
    }
}

impl From<&Topic> for Pattern {
    fn from(topic: &Topic) -> Self {
        Self(topic.as_str().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        Pattern::new(pattern).unwrap().matches(name)
    }

    #[test]
    fn stars_and_hashes_match_as_in_amqp() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("a.#", "a", true),
            ("a.#", "a.b.c", true),
            ("#.c", "a.b.c", true),
            ("#.c", "c", true),
            ("a.#.d", "a.d", true),
            ("a.#.d", "a.b.c.d", true),
            ("a.#.d", "a.b.c", false),
            ("#.b.#.d", "a.b.b.c.d", true),
            ("**", "x.y", true),
            ("a.**", "a.b", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} over {name}");
        }
    }

    #[test]
    fn a_wildcard_inside_a_word_is_refused() {
        assert!(Pattern::new("a.b*").is_err());
        assert!(Pattern::new("").is_err());
        assert!(Pattern::new("a b").is_err());
    }
}
