//! The configuration as it is shown: at start, and by `config show`.

use std::fmt::Write as _;

use serde_json::Value;

use super::{MessagingConfig, redact};

impl MessagingConfig {
    /// The effective configuration without secrets: passwords are `***`,
    /// addresses keep their hosts.
    #[must_use]
    pub fn redacted(&self) -> Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        let mut put = |path: &str, text: Option<&str>| {
            if let (Some(slot), Some(text)) = (value.pointer_mut(path), text) {
                *slot = Value::from(redact::address(text));
            }
        };
        if let Some(rabbitmq) = &self.rabbitmq {
            let url = rabbitmq.url.as_ref().map(|u| u.expose());
            let management = rabbitmq.management_url.as_ref().map(|u| u.expose());
            put("/rabbitmq/url", url);
            put("/rabbitmq/management_url", management);
        }
        if let Some(Value::Object(settings)) = value.pointer_mut("/kafka/settings") {
            for (name, value) in settings {
                if redact::is_secret_setting(name) {
                    *value = Value::from("***");
                }
            }
        }
        value
    }

    /// What is said at start: which brokers, which guarantees are weakened, what
    /// has no effect.
    #[must_use]
    pub fn report(&self) -> String {
        let mut out = String::from("brokers:\n");
        let shown = self.redacted();
        match self.active_rabbitmq() {
            Some(r) => {
                let at = match shown.pointer("/rabbitmq/url").and_then(Value::as_str) {
                    Some(url) => url.to_owned(),
                    None => {
                        let tls = r.tls.is_some();
                        format!(
                            "{}://{}:{} (virtual host {})",
                            if tls { "amqps" } else { "amqp" },
                            r.host,
                            r.port.unwrap_or(if tls { 5671 } else { 5672 }),
                            r.vhost
                        )
                    }
                };
                line(&mut out, "rabbitmq", &at);
            }
            None => line(&mut out, "rabbitmq", "not used"),
        }
        match self.active_kafka() {
            Some(k) => line(&mut out, "kafka", &k.brokers.join(", ")),
            None => line(&mut out, "kafka", "not used"),
        }
        let alone = self.active_rabbitmq().is_none() && self.active_kafka().is_none();
        let embedded = match self.journal_dir() {
            _ if !self.fallback.enabled && !alone => "off".to_owned(),
            Some(dir) => format!("journal in {}", dir.display()),
            None => "in memory".to_owned(),
        };
        line(&mut out, "embedded", &embedded);
        let _ = writeln!(
            out,
            "http: {}\nlargest message: {} bytes\ntopology: {} queues, {} topics",
            self.server.http,
            self.max_message_bytes,
            self.topology.queues.len(),
            self.topology.topics.len(),
        );
        let weakened = self.weakened();
        if !weakened.is_empty() {
            out.push_str("weakened guarantees:\n");
            for w in &weakened {
                let _ = writeln!(out, "  {} ({}): {}", w.what, w.clause, w.why);
            }
        }
        if !self.warnings.is_empty() {
            out.push_str("warnings:\n");
            for warning in &self.warnings {
                let _ = writeln!(out, "  {warning}");
            }
        }
        out
    }
}

fn line(out: &mut String, name: &str, text: &str) {
    // Writing into a string cannot fail.
    let _ = writeln!(out, "  {name}: {text}");
}
