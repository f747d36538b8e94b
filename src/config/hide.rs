//! Source lines and messages as an error may show them. A file that does not
//! parse may be broken at its password, or right in the key `password`, so only
//! what stands under a known and harmless key is shown.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
};

use serde_json::Value;

use super::{
    HubSettings, MessagingConfig,
    hub::{RouteKind, RouteSettings},
    redact::{address, is_secret_name},
};
use crate::{
    adapter::{
        kafka::{KafkaConfig, SaslMechanism, config::SaslConfig},
        rabbitmq::{RabbitMqConfig, TlsConfig},
    },
    secret::Secret,
    topic::Pattern,
};

/// A source line as it may be shown.
pub(super) struct Line {
    /// Without secrets.
    pub(super) text: String,
    /// Column (from 1) at which what is hidden begins.
    from: Option<usize>,
}

impl Line {
    /// Whether this column (from 1) is hidden.
    pub(super) fn secret_at(&self, column: usize) -> bool {
        self.from.is_some_and(|from| column >= from)
    }

    fn hidden() -> Self {
        Self {
            text: "***".to_owned(),
            from: Some(1),
        }
    }
}

/// Every line of a source text, without values that are or may be secret, be
/// they on their key's line or below it.
pub(super) fn lines(text: &str) -> Vec<Line> {
    let mut out = Vec::new();
    // A value that goes on below its key: the key's indentation, and the quote
    // that is still open.
    let mut open: Option<(usize, Option<char>)> = None;
    for line in text.lines() {
        let bare = line.trim();
        let indent = line.len() - line.trim_start().len();
        if let Some((key_indent, quote)) = open {
            if quote.is_some() || bare.is_empty() || indent > key_indent {
                if quote.is_some_and(|q| line.contains(q)) {
                    open = None;
                }
                out.push(Line::hidden());
                continue;
            }
            open = None;
        }
        let found = doubtful_value(line);
        out.push(match &found {
            Some(doubt) => {
                let prefix = line.get(..doubt.start).unwrap_or_default();
                Line {
                    text: format!("{}***", without_credentials(prefix)),
                    from: Some(prefix.chars().count() + 1),
                }
            }
            // Neither a key nor an item: the rest of something that broke.
            None if is_loose(bare) => Line::hidden(),
            None => Line {
                text: without_credentials(line),
                from: None,
            },
        });
        if let Some(doubt) = found.filter(|_| !bare.starts_with('#')) {
            open = doubt.goes_on().then_some((indent, doubt.open_quote()));
        }
    }
    out
}

/// The line with the value of the key at `column` hidden.
pub(super) fn value_of_key(line: &str, column: usize) -> String {
    let head: usize = line
        .chars()
        .take(column.saturating_sub(1))
        .map(char::len_utf8)
        .sum();
    let tail = line.get(head..).unwrap_or_default();
    match tail.find(':') {
        Some(at) if !tail.get(at + 1..).unwrap_or_default().trim().is_empty() => {
            format!("{}: ***", line.get(..head + at).unwrap_or_default())
        }
        _ => line.to_owned(),
    }
}

/// A message without the values of secret keys of the source and of secret
/// variables.
pub(super) fn message(what: &str, text: &str, env: &BTreeMap<String, String>) -> String {
    // Shorter ones would take ordinary words apart, and the parser has hidden
    // what it filled in itself.
    let in_source = text
        .lines()
        .filter_map(doubtful_value)
        .filter(|doubt| doubt.secret)
        .map(|doubt| {
            doubt
                .value
                .trim_matches(['"', '\''])
                .trim_end_matches(['}', ']'])
        })
        .filter(|s| s.len() >= 4 && !s.starts_with("${"));
    let in_env = env
        .iter()
        .filter(|(name, value)| is_secret_name(name) && value.len() >= 8)
        .map(|(_, value)| value.as_str());
    let mut secrets: Vec<&str> = in_source.chain(in_env).collect();
    // The longest first, or a secret's beginning would hide only a part.
    secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
    secrets
        .into_iter()
        .fold(without_credentials(what), |out, secret| {
            out.replace(secret, "***")
        })
}

/// Credentials in addresses, and in what may have been one before it broke.
fn without_credentials(text: &str) -> String {
    let text = address(text);
    if !text.contains('@') {
        return text;
    }
    text.split_inclusive([' ', '\t', '`'])
        .map(|word| match word.rfind('@') {
            Some(at) if !word.contains("***") => {
                format!("***{}", word.get(at..).unwrap_or_default())
            }
            _ => word.to_owned(),
        })
        .collect()
}

/// A value that is not shown.
struct Doubt<'a> {
    /// Where it begins on its line, in bytes.
    start: usize,
    value: &'a str,
    /// It looks secret; otherwise its key is not a known one.
    secret: bool,
}

impl<'a> Doubt<'a> {
    fn new(line: &'a str, start: usize, secret: bool) -> Self {
        Self {
            start,
            value: line.get(start..).unwrap_or_default().trim(),
            secret,
        }
    }

    fn open_quote(&self) -> Option<char> {
        let quote = self.value.chars().next()?;
        (matches!(quote, '"' | '\'') && self.value.matches(quote).count() % 2 == 1).then_some(quote)
    }

    /// Whether more of it can stand on the lines below. An unknown key without
    /// a value is rather a section.
    fn goes_on(&self) -> bool {
        self.secret || self.value.starts_with(['|', '>']) || self.open_quote().is_some()
    }
}

/// The first value of a line that is not shown.
fn doubtful_value(line: &str) -> Option<Doubt<'_>> {
    line.match_indices(':').find_map(|(at, _)| {
        let before = line.get(..at)?;
        let words = before
            .rsplit(['{', ',', '['])
            .next()?
            .trim_start_matches([' ', '\t', '-']);
        let key = words.rsplit([' ', '\t']).next()?.trim_matches(['"', '\'']);
        let rest = line.get(at + 1..)?;
        // Without a space it is no key, but the port of an address, say.
        let is_key = rest.is_empty() || rest.starts_with([' ', '\t']);
        let secret = is_secret_name(key);
        if secret {
            let start = at + 1 + (rest.len() - rest.trim_start().len());
            return Some(Doubt::new(line, start, true));
        }
        if !is_key {
            return None;
        }
        if let Some(space) = words.find([' ', '\t']) {
            // A key of several words is a key and a value that lost their colon,
            // or a part of a value.
            let first = words.get(..space)?;
            let shown = if is_secret_name(first) || known_keys().contains(first) {
                space + 1
            } else {
                0
            };
            return Some(Doubt::new(line, at - words.len() + shown, true));
        }
        let doubtful = !rest.trim().is_empty() && !known_keys().contains(key);
        doubtful.then(|| {
            let start = at + 1 + (rest.len() - rest.trim_start().len());
            Doubt::new(line, start, false)
        })
    })
}

fn is_loose(bare: &str) -> bool {
    !(bare.is_empty()
        || bare.starts_with(['#', '-', '[', '{', ']', '}'])
        || bare.contains(": ")
        || bare.ends_with(':')
        || bare == "...")
}

/// Every key that the file can have and whose value is harmless.
fn known_keys() -> &'static BTreeSet<String> {
    static KEYS: OnceLock<BTreeSet<String>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let full = MessagingConfig {
            rabbitmq: Some(RabbitMqConfig {
                tls: Some(TlsConfig::default()),
                ..RabbitMqConfig::default()
            }),
            kafka: Some(KafkaConfig {
                sasl: Some(SaslConfig {
                    mechanism: SaslMechanism::Plain,
                    username: String::new(),
                    password: Secret::default(),
                }),
                ..KafkaConfig::default()
            }),
            hub: HubSettings {
                routes: Pattern::new("#")
                    .map(|all| RouteSettings::new(all, RouteKind::Event))
                    .into_iter()
                    .collect(),
                ..HubSettings::default()
            },
            ..MessagingConfig::builtin()
        };
        let mut keys = BTreeSet::from(["defaults".to_owned()]);
        collect(&serde_json::to_value(full).unwrap_or_default(), &mut keys);
        keys
    })
}

fn collect(value: &Value, keys: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                keys.insert(key.clone());
                collect(value, keys);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, keys)),
        _ => {}
    }
}
