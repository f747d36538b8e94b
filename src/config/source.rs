//! Errors in a configuration file, with the source line and a caret, and
//! without the secrets that stand in the file.

use std::collections::BTreeMap;

use super::redact;
use crate::error::{Error, ErrorCode};

/// The parser's error in our form.
pub(super) fn explain(
    error: &serde_saphyr::Error,
    text: &str,
    name: &str,
    env: &BTreeMap<String, String>,
) -> Error {
    let location = error
        .location()
        .filter(|at| at.line() > 0)
        .map(|at| (at.line() as usize, at.column() as usize));
    let rendered = error.without_snippet().to_string();
    let mut what = strip_location(rendered.lines().next().unwrap_or_default()).to_owned();
    let Some((line, column)) = location else {
        return invalid(format!("{name}: {}", redact::message(&what, text, env)));
    };
    let source = redact::lines(text);
    let Some(shown) = source.get(line - 1) else {
        return invalid(format!(
            "{name}:{line}:{column}: {}",
            redact::message(&what, text, env)
        ));
    };
    if shown.secret_at(column) {
        // What the parser says may quote the value.
        what = "the value cannot be read (it is not shown: it may be a secret)".to_owned();
    }
    let shown_text = if what.starts_with("unknown field") {
        // A misspelt `password` is an unknown field.
        redact::value_of_key(&shown.text, column)
    } else {
        shown.text.clone()
    };
    let caret = " ".repeat(column.saturating_sub(1).min(shown_text.chars().count()));
    let margin = " ".repeat(line.to_string().len());
    invalid(format!(
        "{name}:{line}:{column}: {what}\n{margin} |\n{line} | {shown_text}\n{margin} | {caret}^",
        what = redact::message(&what, text, env),
    ))
}

fn invalid(message: String) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, message)
}

/// The parser's own words for the place, which stands in front of ours.
fn strip_location(message: &str) -> &str {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    match message.find(": ") {
        Some(at) if message.starts_with("line ") => message.get(at + 2..).unwrap_or(message),
        _ => message
            .rfind(" at line ")
            .and_then(|at| message.get(..at))
            .unwrap_or(message),
    }
}
