//! Publishing requests over HTTP: what they carry, and whether an answer accepts
//! all of it. It sends none.

use std::time::Instant;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde_json::json;

use super::load::Load;
use crate::cli::Failure;

/// What a request carries.
#[derive(Clone, Copy)]
pub(super) enum Body {
    /// One payload.
    Single,
    /// So many envelopes, a line each.
    Lines,
}

impl Body {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Single => "a message a request",
            Self::Lines => "1,000 lines a request",
        }
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Single => "application/octet-stream",
            Self::Lines => "application/x-ndjson",
        }
    }

    pub(super) fn messages(self) -> u64 {
        match self {
            Self::Single => 1,
            Self::Lines => LINES,
        }
    }

    /// The whole of it; made once, since it is the server that is measured.
    pub(super) fn bytes(self, load: &Load) -> Bytes {
        let now = Instant::now();
        match self {
            Self::Single => load.body(0, now),
            Self::Lines => {
                let lines = (0..LINES).map(|n| {
                    let payload = BASE64_STANDARD.encode(load.body(n, now));
                    format!("{}\n", json!({"type": "bench", "payload": payload}))
                });
                Bytes::from(lines.collect::<String>())
            }
        }
    }
}

/// Whether every line of an answer says that its message was accepted.
pub(super) fn accepted(answer: &[u8]) -> Result<(), Failure> {
    let text = String::from_utf8_lossy(answer);
    let lines = text.lines().count() as u64;
    let refused = text.lines().find(|line| line.contains("\"error\":"));
    match refused {
        None if lines == LINES => Ok(()),
        None => Err(Failure::new(format!(
            "the hub answered {lines} of {LINES} lines"
        ))),
        Some(line) => Err(Failure::new(format!("the hub refused a line: {line}"))),
    }
}

/// Lines of an NDJSON request.
pub(super) const LINES: u64 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_accepts_all_lines_or_says_which_not() {
        let good = "{\"line\":1,\"outcome\":\"delivered\"}\n".repeat(1000);
        accepted(good.as_bytes()).unwrap();
        let short = accepted(good.trim_end().rsplit_once('\n').unwrap().0.as_bytes());
        assert!(short.unwrap_err().message.contains("999 of 1000"));
        let bad = good.replacen("\"outcome\":\"delivered\"", "\"error\":{}", 1);
        assert!(
            accepted(bad.as_bytes())
                .unwrap_err()
                .message
                .contains("refused")
        );
    }
}
