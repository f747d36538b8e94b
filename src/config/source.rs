//! Errors in a configuration file, with the source line and a caret, and
//! without the secrets that stand in the file. The parser's words are turned
//! into those of somebody who edits a file, not of its programmer.

use std::collections::BTreeMap;

use serde_saphyr::Error as YamlError;

use super::hide;
use crate::error::{Error, ErrorCode};

/// The parser's error in our form.
pub(super) fn explain(
    error: &YamlError,
    text: &str,
    name: &str,
    env: &BTreeMap<String, String>,
) -> Error {
    let error = error.without_snippet();
    let (what, quotes_value) = words(error);
    let what = hide::message(&what, text, env);
    match error.location().filter(|at| at.line() > 0) {
        Some(at) => {
            let place = Place {
                line: usize::try_from(at.line()).unwrap_or(usize::MAX),
                column: usize::try_from(at.column()).unwrap_or(usize::MAX),
            };
            show(name, text, &place, &what, quotes_value)
        }
        None => invalid(format!("{name}: {what}")),
    }
}

/// `"${NAME}"`: quotes keep it as it stands, and a password that is literally
/// `${RABBITMQ_PASSWORD}` is found out late. Refused.
pub(super) fn refuse_quoted_reference(text: &str, name: &str) -> Result<(), Error> {
    for (i, line) in text.lines().enumerate() {
        if let Some(column) = quoted_reference(line) {
            let place = Place {
                line: i + 1,
                column,
            };
            let what = "quotes keep ${...} as it stands; leave them out, or write $${...} if that is meant";
            return Err(show(name, text, &place, what, false));
        }
    }
    Ok(())
}

/// Counted from 1.
struct Place {
    line: usize,
    column: usize,
}

fn show(name: &str, text: &str, place: &Place, what: &str, quotes_value: bool) -> Error {
    let Place { line, column } = *place;
    let lines = hide::lines(text);
    let Some(shown) = line.checked_sub(1).and_then(|i| lines.get(i)) else {
        return invalid(format!("{name}:{line}:{column}: {what}"));
    };
    let hidden = shown.secret_at(column);
    let what = if hidden && quotes_value {
        "this value cannot be read (it is not shown, as it may be a secret); try single quotes around it"
    } else {
        what
    };
    let source = if what.starts_with(UNKNOWN_FIELD) {
        // A misspelt `password` is an unknown field, too.
        hide::value_of_key(&shown.text, column)
    } else {
        shown.text.clone()
    };
    let caret = " ".repeat(column.saturating_sub(1).min(source.chars().count()));
    let margin = " ".repeat(line.to_string().len());
    invalid(format!(
        "{name}:{line}:{column}: {what}\n{margin} |\n{line} | {source}\n{margin} | {caret}^"
    ))
}

/// What is wrong, and whether these words may quote the value.
fn words(error: &YamlError) -> (String, bool) {
    match error {
        YamlError::UnresolvedProperty { name, .. } => (
            format!("the variable {name} is not set; set it, or write ${{{name}:-default}}"),
            false,
        ),
        YamlError::PropertyRequiredButUnset { name, message, .. } => {
            (required(name, "is not set", message), false)
        }
        YamlError::PropertyRequiredButEmpty { name, message, .. } => {
            (required(name, "is empty", message), false)
        }
        YamlError::DuplicateMappingKey { key, .. } => match key {
            Some(key) if is_plain_key(key) => (format!("the key {key} stands twice"), false),
            _ => ("a key stands twice".to_owned(), false),
        },
        other => {
            let text = other.to_string();
            let text = text.lines().next().unwrap_or_default();
            let text = strip(text);
            if let Some((key, rest)) = text
                .strip_prefix("unknown field `")
                .and_then(|rest| rest.rsplit_once('`'))
                && !is_plain_key(key)
            {
                // `password:secret` without its space is a key, too.
                return (format!("{UNKNOWN_FIELD}{rest}"), false);
            }
            let quotes_value = !text.starts_with(UNKNOWN_FIELD);
            (plain(text).to_owned(), quotes_value)
        }
    }
}

fn is_plain_key(key: &str) -> bool {
    key.len() <= 40
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
}

fn required(name: &str, state: &str, hint: &str) -> String {
    if hint.is_empty() {
        format!("the variable {name} {state}")
    } else {
        format!("the variable {name} {state}: {hint}")
    }
}

/// Without what we say ourselves: the place, and our own error code.
fn strip(message: &str) -> &str {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let message = match message.rfind(" at line ") {
        Some(at) => message.get(..at).unwrap_or(message),
        None => message,
    };
    message
        .strip_prefix(ErrorCode::InvalidConfig.as_str())
        .and_then(|rest| rest.strip_prefix(": "))
        .unwrap_or(message)
}

fn plain(message: &str) -> &str {
    PLAIN
        .iter()
        .find(|(theirs, _)| message.starts_with(theirs))
        .map_or(message, |(_, ours)| ours)
}

/// The column (from 1) of a `${NAME` inside quotes.
fn quoted_reference(line: &str) -> Option<usize> {
    let mut quote = None;
    let mut before = ' ';
    let mut chars = line.chars().enumerate().peekable();
    while let Some((i, c)) = chars.next() {
        match quote {
            // A quote opens a scalar only where a value may begin.
            None if matches!(c, '"' | '\'') && matches!(before, ' ' | '[' | '{' | ',') => {
                quote = Some(c);
            }
            None if c == '#' && before == ' ' => return None,
            None => {}
            Some(q) if c == q => quote = None,
            Some(_)
                if c == '$' && before != '$' && chars.peek().is_some_and(|(_, n)| *n == '{') =>
            {
                return Some(i + 1);
            }
            Some(_) => {}
        }
        before = c;
    }
    None
}

fn invalid(message: String) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, message)
}

const UNKNOWN_FIELD: &str = "unknown field";

const PLAIN: &[(&str, &str)] = &[
    ("invalid u8", "expected a whole number from 0 to 255"),
    ("invalid u16", "expected a whole number from 0 to 65535"),
    (
        "invalid u32",
        "expected a whole number from 0 to 4294967295",
    ),
    ("invalid u64", "expected a whole number, 0 or more"),
    ("invalid i32", "expected a whole number"),
    ("invalid i64", "expected a whole number"),
    ("invalid boolean", "expected true or false"),
    (
        "expected mapping start",
        "expected a section: keys with their values",
    ),
    ("expected sequence start", "expected a list"),
    ("expected string scalar", "expected text"),
];
