//! Takes secrets out of text that is shown: source lines, messages, addresses.
//! It prefers hiding too much.

/// Credentials in an address (`amqp://user:password@host`) become `***`. Several
/// comma-separated addresses are taken one by one.
pub(super) fn address(text: &str) -> String {
    // A comma may be part of a password, so a new address begins only where a
    // scheme does.
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (scheme, tail) = rest.split_at(at + 3);
        out.push_str(scheme);
        let end = next_scheme(tail);
        let (this, next) = tail.split_at(end);
        match this.rfind('@') {
            Some(at) => {
                out.push_str("***");
                out.push_str(this.get(at..).unwrap_or_default());
            }
            None => out.push_str(this),
        }
        rest = next;
    }
    out.push_str(rest);
    out
}

/// The addresses of a comma-separated list.
pub(super) fn addresses(text: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let scheme = rest.find("://").map_or(0, |at| at + 3);
        let end = scheme + next_scheme(rest.get(scheme..).unwrap_or_default());
        let (this, next) = rest.split_at(end);
        out.push(this.trim().trim_end_matches(','));
        rest = next.trim_start_matches(',').trim_start();
    }
    out
}

/// The password of an address, as it is written there.
pub(super) fn password(address: &str) -> Option<&str> {
    let (_, tail) = address.split_once("://")?;
    let (credentials, _) = tail.rsplit_once('@')?;
    Some(credentials.split_once(':')?.1)
}

/// The host of an address, without brackets.
pub(super) fn host(address: &str) -> &str {
    let tail = address.split_once("://").map_or(address, |(_, tail)| tail);
    let tail = tail.rsplit_once('@').map_or(tail, |(_, host)| host);
    let tail = tail.split(['/', '?']).next().unwrap_or_default();
    match tail.strip_prefix('[') {
        Some(inner) => inner.split(']').next().unwrap_or_default(),
        None => tail.rsplit_once(':').map_or(tail, |(host, _)| host),
    }
}

/// Where the next comma-separated address begins.
fn next_scheme(text: &str) -> usize {
    text.match_indices(',')
        .find(|(at, _)| {
            let after = text.get(at + 1..).unwrap_or_default().trim_start();
            after.find("://").is_some_and(|end| {
                after
                    .get(..end)
                    .is_some_and(|s| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric()))
            })
        })
        .map_or(text.len(), |(at, _)| at)
}

/// Whether the name of a setting or variable says that its value is secret. It
/// looks for parts of words, so that most misspellings are covered.
pub(super) fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    !name.ends_with("_file")
        && [
            "pass", "pasw", "pwd", "secret", "token", "cred", "jaas", "url", "uri",
        ]
        .iter()
        .any(|part| name.contains(part))
}

#[cfg(feature = "yaml")]
pub(super) use in_source::{lines, message, value_of_key};

#[cfg(feature = "yaml")]
mod in_source {
    use std::collections::BTreeMap;

    use super::{address, is_secret_name};

    /// A source line as it may be shown.
    pub(in super::super) struct Line {
        /// Without secrets.
        pub(in super::super) text: String,
        /// Column (from 1) at which a secret begins.
        from: Option<usize>,
    }

    impl Line {
        /// Whether a secret stands at this column (from 1).
        pub(in super::super) fn secret_at(&self, column: usize) -> bool {
            self.from.is_some_and(|from| column >= from)
        }
    }

    /// Every line of a source text, without the values of secret keys, be they
    /// on the key's line or below it.
    pub(in super::super) fn lines(text: &str) -> Vec<Line> {
        let mut out = Vec::new();
        // A secret that goes on below its key: the key's indentation, and the
        // quote that is still open.
        let mut open: Option<(usize, Option<char>)> = None;
        for line in text.lines() {
            let indent = line.len() - line.trim_start().len();
            if let Some((key_indent, quote)) = open {
                let inside = quote.is_some() || line.trim().is_empty() || indent > key_indent;
                if inside {
                    if quote.is_some_and(|q| line.contains(q)) {
                        open = None;
                    }
                    out.push(Line {
                        text: "***".to_owned(),
                        from: Some(1),
                    });
                    continue;
                }
                open = None;
            }
            let Some((start, value)) = secret_value(line) else {
                out.push(Line {
                    text: address(line),
                    from: None,
                });
                continue;
            };
            let bare = value.trim();
            let quote = bare
                .chars()
                .next()
                .filter(|q| matches!(q, '"' | '\'') && bare.matches(*q).count() % 2 == 1);
            open = Some((indent, quote));
            let prefix = line.get(..start).unwrap_or_default();
            out.push(Line {
                text: format!("{}***", address(prefix)),
                from: Some(prefix.chars().count() + 1),
            });
        }
        out
    }

    /// Where the value of the first secret key of a line begins (in bytes).
    fn secret_value(line: &str) -> Option<(usize, &str)> {
        line.match_indices(':').find_map(|(at, _)| {
            let before = line.get(..at)?;
            let key = before
                .rsplit(|c: char| matches!(c, '{' | ',' | '[' | ' ' | '\t'))
                .next()?
                .trim_matches(['"', '\'']);
            let value = line.get(at + 1..)?;
            let spaces = value.len() - value.trim_start().len();
            is_secret_name(key).then(|| (at + 1 + spaces, value))
        })
    }

    /// The line with the value of the key at `column` hidden.
    pub(in super::super) fn value_of_key(line: &str, column: usize) -> String {
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
    pub(in super::super) fn message(
        what: &str,
        text: &str,
        env: &BTreeMap<String, String>,
    ) -> String {
        let in_source = text.lines().filter_map(secret_value).map(|(_, value)| {
            value
                .trim()
                .trim_matches(['"', '\''])
                .trim_end_matches(['}', ']'])
        });
        let in_env = env
            .iter()
            .filter(|(name, _)| is_secret_name(name))
            .map(|(_, value)| value.as_str());
        let mut secrets: Vec<&str> = in_source
            .chain(in_env)
            // Shorter ones would take ordinary words apart and hide nothing.
            .filter(|s| s.len() >= 4 && !s.starts_with("${"))
            .collect();
        // The longest first, or a secret's beginning would hide only a part.
        secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
        secrets
            .into_iter()
            .fold(address(what), |out, secret| out.replace(secret, "***"))
    }
}
