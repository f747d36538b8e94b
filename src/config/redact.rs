//! Takes secrets out of what is shown: addresses, names. It prefers hiding too
//! much.

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

/// Whether a setting of librdkafka is a secret.
pub(super) fn is_secret_setting(name: &str) -> bool {
    ["password", "secret", ".pem", "jaas", "oauthbearer.config"]
        .iter()
        .any(|part| name.contains(part))
}
