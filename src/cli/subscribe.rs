//! `subscribe`: prints what arrives. Streams are read as Server-Sent Events,
//! work queues are leased; a message is committed or acked once it is printed.

use std::{process::ExitCode, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::Args;
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};

use super::{
    Failure, Target,
    client::{self, Client},
    say,
    sse::{Event, Events},
};

/// Print what arrives.
#[derive(Debug, Args)]
pub(super) struct Subscribe {
    /// A topic, a pattern (`*` one word, `#` any number), or a work queue.
    pattern: String,
    /// The group whose position is used and committed (streams only).
    #[arg(long)]
    group: Option<String>,
    /// latest, earliest, an RFC 3339 time or a cursor (streams only).
    #[arg(long)]
    from: Option<String>,
    /// End after this many messages. Default: never.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

impl Subscribe {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        let mut query = vec![("pattern", self.pattern.clone())];
        if let Some(group) = &self.group {
            // Only what was printed is committed: with --count more may have
            // been sent.
            query.push(("group", group.clone()));
            query.push(("ack", "cursor".to_owned()));
        }
        if let Some(from) = &self.from {
            query.push(("from", from.clone()));
        }
        let request = client.request(Method::GET, &["v1", "stream"]).query(&query);
        match client.send(request).await {
            Ok(response) => self.read(&client, target, response).await,
            Err(f) if f.problem.as_deref() == Some("WORK_QUEUE") => {
                if self.group.is_some() || self.from.is_some() {
                    return Err(Failure::usage(format!(
                        "{} is a work queue: it has neither groups nor positions; leave --group and --from out",
                        self.pattern
                    )));
                }
                self.lease(&client, target).await
            }
            Err(f) => Err(f),
        }
    }

    async fn read(
        &self,
        client: &Client,
        target: &Target,
        response: reqwest::Response,
    ) -> Result<ExitCode, Failure> {
        let mut pieces = response.bytes_stream();
        let mut events = Events::new();
        let mut left = self.count;
        while let Some(piece) = pieces.next().await {
            events.push(&piece.map_err(|e| client.broken(&e))?);
            let mut last = None;
            while let Some(event) = events.next_event() {
                if event.name == "problem" {
                    return Err(client::problem(event.data.as_bytes())
                        .unwrap_or_else(|| Failure::new("the stream ended with a problem")));
                }
                let Event { id, data, .. } = event;
                let message: Value = serde_json::from_str(&data)
                    .map_err(|e| Failure::new(format!("an event is not a message: {e}")))?;
                print(target, &message)?;
                last = Some(id);
                left = left.map(|n| n.saturating_sub(1));
                if left == Some(0) {
                    break;
                }
            }
            if let (Some(group), Some(cursor)) = (&self.group, last) {
                let request = client
                    .request(Method::POST, &["v1", "stream", "commit"])
                    .json(&json!({"group": group, "cursor": cursor}));
                client.send(request).await?;
            }
            if left == Some(0) {
                return Ok(ExitCode::SUCCESS);
            }
        }
        Err(Failure::new(
            "the hub ended the stream; it is shutting down, or its log says why",
        ))
    }

    async fn lease(&self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        let mut left = self.count;
        let mut told = false;
        loop {
            let max = left.unwrap_or(BATCH).min(BATCH);
            let request = client
                .request(Method::POST, &["v1", "queues", &self.pattern, "lease"])
                .json(&json!({"max": max, "wait_ms": WAIT_MS}));
            let answer = match client.json(request).await {
                Ok(answer) => answer,
                // As with a file that is followed: it may come yet.
                Err(f) if f.problem.as_deref() == Some("QUEUE_NOT_FOUND") => {
                    if !std::mem::replace(&mut told, true) {
                        eprintln!("there is no queue {} yet; waiting for it", self.pattern);
                    }
                    tokio::time::sleep(LOOK_AGAIN).await;
                    continue;
                }
                Err(f) => return Err(f),
            };
            let deliveries = answer
                .get("deliveries")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default();
            for delivery in deliveries {
                let (Some(token), Some(message)) = (
                    delivery.get("token").and_then(Value::as_str),
                    delivery.get("message"),
                ) else {
                    return Err(Failure::new("a delivery has no token or no message"));
                };
                print(target, message)?;
                let request = client.request(Method::POST, &["v1", "deliveries", token, "ack"]);
                client.send(request).await?;
                left = left.map(|n| n.saturating_sub(1));
            }
            if left == Some(0) {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}

/// For people the payload, as text where it is text; for machines the message.
fn print(target: &Target, message: &Value) -> Result<(), Failure> {
    if target.json {
        say(message.to_string())?;
    } else {
        let payload = message
            .get("payload")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let bytes = BASE64_STANDARD
            .decode(payload)
            .map_err(|e| Failure::new(format!("a payload is not base64: {e}")))?;
        say(bytes)?;
    }
    Ok(())
}

/// Deliveries leased at once.
const BATCH: u64 = 10;

/// How long until a missing queue is looked for again.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// How long one lease request waits.
const WAIT_MS: u64 = 20_000;
