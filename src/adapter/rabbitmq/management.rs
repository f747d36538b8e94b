//! The little that only the management API tells: version, unacked counts,
//! bytes, rates. Nothing depends on it; without an address, or without an
//! answer, those figures are absent.

use std::time::Duration;

use serde::Deserialize;

use super::{RabbitMqConfig, address};

/// What the management API says of a queue.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct QueueFigures {
    #[serde(default)]
    pub(super) messages_unacknowledged: Option<u64>,
    #[serde(default)]
    pub(super) message_bytes: Option<u64>,
    #[serde(default)]
    message_stats: Option<Stats>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Stats {
    #[serde(default)]
    publish_details: Option<Rate>,
    #[serde(default)]
    deliver_get_details: Option<Rate>,
}

#[derive(Clone, Debug, Deserialize)]
struct Rate {
    rate: f64,
}

impl QueueFigures {
    pub(super) fn publish_rate(&self) -> Option<f64> {
        Some(self.message_stats.as_ref()?.publish_details.as_ref()?.rate)
    }

    pub(super) fn deliver_rate(&self) -> Option<f64> {
        Some(
            self.message_stats
                .as_ref()?
                .deliver_get_details
                .as_ref()?
                .rate,
        )
    }
}

/// The figures of a queue, if they can be had.
pub(super) async fn queue(config: &RabbitMqConfig, queue: &str) -> Option<QueueFigures> {
    let vhost = address::endpoints(config).ok()?.first()?.vhost.clone();
    get(
        config,
        &format!("queues/{}/{}", encode(&vhost), encode(queue)),
    )
    .await
}

/// The server's version, if it can be had.
pub(super) async fn server_version(config: &RabbitMqConfig) -> Option<String> {
    #[derive(Deserialize)]
    struct Overview {
        rabbitmq_version: String,
    }
    get::<Overview>(config, "overview")
        .await
        .map(|o| o.rabbitmq_version)
}

async fn get<T: serde::de::DeserializeOwned>(config: &RabbitMqConfig, path: &str) -> Option<T> {
    let base = config.management_url.as_ref()?.expose();
    let client = reqwest::Client::builder().timeout(PATIENCE).build().ok()?;
    // reqwest turns user and password of the address into a header.
    let url = format!("{}/api/{path}", base.trim_end_matches('/'));
    let answer = client.get(url).send().await.ok()?.error_for_status().ok()?;
    answer.json().await.ok()
}

fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

/// How long the management API may take; it is never waited for longer.
const PATIENCE: Duration = Duration::from_secs(1);
