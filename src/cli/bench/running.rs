//! A hub that runs already and is measured from outside: what it says of itself,
//! and taking back what was published to it.

use reqwest::Method;
use serde_json::{Value, json};

use crate::cli::{Failure, client::Client, state::text};

/// The guarantees that its configuration weakens.
pub(super) async fn weakened(client: &Client) -> Result<Vec<String>, Failure> {
    let request = client.request(Method::GET, &["v1", "state"]);
    let state = client.json(request).await?;
    let weakened = state.get("weakened").and_then(Value::as_array);
    Ok(weakened
        .into_iter()
        .flatten()
        .map(|w| format!("{} ({})", text(w, "/what"), text(w, "/clause")))
        .collect())
}

/// Takes everything out of a queue; how much it was.
pub(super) async fn lease_back(client: &Client, queue: &str) -> Result<u64, Failure> {
    let mut count = 0;
    loop {
        let lease = client
            .request(Method::POST, &["v1", "queues", queue, "lease"])
            .json(&json!({"max": AT_ONCE, "wait_ms": PATIENCE_MS}));
        let leased = client.json(lease).await?;
        let deliveries = leased.get("deliveries").and_then(Value::as_array);
        let tokens: Vec<&Value> = deliveries
            .into_iter()
            .flatten()
            .filter_map(|d| d.get("token"))
            .collect();
        if tokens.is_empty() {
            return Ok(count);
        }
        count += tokens.len() as u64;
        let ack = client
            .request(Method::POST, &["v1", "deliveries", "ack"])
            .json(&json!({"tokens": tokens}));
        client.send(ack).await?;
    }
}

/// Deliveries of one lease: as many as a hub gives.
const AT_ONCE: u64 = 1000;
/// How long a queue brings nothing until it counts as empty.
const PATIENCE_MS: u64 = 500;
