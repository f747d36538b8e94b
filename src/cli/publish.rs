//! `publish`: one message, or a stream of envelopes.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::Args;
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Map, Value, json};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use super::{Failure, Target, client::Client, say};
use crate::{
    Timestamp, duration,
    gateway::http::lines::{Line, Lines},
};

/// Publish a message. The payload is --payload, --file, or what stdin brings.
#[derive(Debug, Args)]
pub(super) struct Publish {
    /// Where to publish.
    topic: String,
    /// The payload as text.
    #[arg(long, value_name = "TEXT", conflicts_with = "file")]
    payload: Option<String>,
    /// The payload from a file; with --ndjson the envelopes.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The message's type.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// The key that order is kept by.
    #[arg(long)]
    key: Option<String>,
    /// A header, as name=value; may come again.
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// 0 to 10, or low, normal, high, critical.
    #[arg(long)]
    priority: Option<String>,
    /// The message's id; a repeat of it is recognised.
    #[arg(long)]
    id: Option<String>,
    /// Media type of the payload.
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// When it stops being worth handling, as an RFC 3339 time.
    #[arg(long, value_name = "TIME")]
    expiration: Option<String>,
    /// Hand it out at this time, and not before (RFC 3339).
    #[arg(long, value_name = "TIME", value_parser = time, conflicts_with = "delay")]
    at: Option<Timestamp>,
    /// Hand it out after this long, such as 30s, and not before.
    #[arg(long, value_name = "DURATION", value_parser = delay)]
    delay: Option<Duration>,
    /// Links a reply to its request.
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// Where a reply goes.
    #[arg(long, value_name = "TOPIC")]
    reply_to: Option<String>,
    /// Read envelopes, one on each line; answer each with a line of JSON.
    #[arg(long, conflicts_with_all = ["payload", "kind", "key", "headers", "priority", "id", "content_type", "expiration", "at", "delay", "correlation_id", "reply_to"])]
    ndjson: bool,
    /// Read envelopes, one on each line or as a JSON array, and publish all of them or
    /// none; the topic's primary must be Kafka.
    #[arg(long, conflicts_with_all = ["ndjson", "payload", "kind", "key", "headers", "priority", "id", "content_type", "expiration", "at", "delay", "correlation_id", "reply_to"])]
    atomic: bool,
}

impl Publish {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        if self.ndjson {
            return self.lines(&client).await;
        }
        if self.atomic {
            return self.as_one(&client, target).await;
        }
        let request = client
            .request(Method::POST, &["v1", "topics", &self.topic, "messages"])
            .header("content-type", "application/vnd.messaging-hub+json")
            .body(self.envelope().await?.to_string());
        let receipt = client.json(request).await?;
        if target.json {
            say(receipt.to_string())?;
        } else {
            say(describe(&receipt))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Publishes all envelopes of the input, or none.
    async fn as_one(&self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        let request = client
            .request(Method::POST, &["v1", "topics", &self.topic, "messages"])
            .query(&[("atomic", "true")])
            .header("content-type", "application/vnd.messaging-hub+json")
            .body(as_array(&self.input().await?)?);
        let receipts = client.json(request).await?;
        if target.json {
            say(receipts.to_string())?;
        } else {
            for receipt in receipts.as_array().into_iter().flatten() {
                say(describe(receipt))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The file, or stdin.
    async fn input(&self) -> Result<Vec<u8>, Failure> {
        if let Some(file) = &self.file {
            return tokio::fs::read(file)
                .await
                .map_err(|e| unreadable(file, &e));
        }
        let mut bytes = Vec::new();
        tokio::io::stdin()
            .read_to_end(&mut bytes)
            .await
            .map_err(|e| Failure::new(format!("stdin cannot be read: {e}")))?;
        Ok(bytes)
    }

    async fn envelope(&self) -> Result<Value, Failure> {
        let payload = match &self.payload {
            Some(text) => text.clone().into_bytes(),
            None => self.input().await?,
        };
        let mut envelope = Map::new();
        envelope.insert("payload".into(), BASE64_STANDARD.encode(payload).into());
        for (name, value) in [
            ("type", &self.kind),
            ("key", &self.key),
            ("id", &self.id),
            ("content_type", &self.content_type),
            ("expiration", &self.expiration),
            ("correlation_id", &self.correlation_id),
            ("reply_to", &self.reply_to),
        ] {
            if let Some(value) = value {
                envelope.insert(name.into(), json!(value));
            }
        }
        let delayed = self.delay.map(|delay| Timestamp::now() + delay);
        if let Some(at) = self.at.or(delayed) {
            envelope.insert("task".into(), json!({ "scheduled_at": at }));
        }
        if let Some(priority) = &self.priority {
            let value = priority
                .parse::<u64>()
                .map_or_else(|_| json!(priority), |n| json!(n));
            envelope.insert("priority".into(), value);
        }
        if !self.headers.is_empty() {
            let headers: Map<String, Value> = self
                .headers
                .iter()
                .map(|(name, value)| (name.clone(), json!(value)))
                .collect();
            envelope.insert("headers".into(), headers.into());
        }
        Ok(envelope.into())
    }

    /// Streams the input up while the answers come down.
    async fn lines(self, client: &Client) -> Result<ExitCode, Failure> {
        let body = match &self.file {
            Some(path) => {
                let file = tokio::fs::File::open(path)
                    .await
                    .map_err(|e| unreadable(path, &e))?;
                reqwest::Body::wrap_stream(ReaderStream::new(file))
            }
            None => reqwest::Body::wrap_stream(ReaderStream::new(tokio::io::stdin())),
        };
        let request = client
            .request(Method::POST, &["v1", "topics", &self.topic, "messages"])
            .header("content-type", "application/x-ndjson")
            .body(body);
        let mut pieces = client.send(request).await?.bytes_stream();
        let mut lines = Lines::new(MAX_ANSWER);
        let mut failed = 0_u64;
        while let Some(piece) = pieces.next().await {
            lines.push(&piece.map_err(|e| client.broken(&e))?);
            while let Some(line) = lines.next_line() {
                let Line::Whole(line) = line else { continue };
                let answer: Value = serde_json::from_slice(&line)
                    .map_err(|e| Failure::new(format!("an answer is not JSON: {e}")))?;
                failed += u64::from(answer.get("error").is_some());
                say(&line)?;
            }
        }
        if failed > 0 {
            return Err(Failure::new(format!(
                "{failed} lines were not published; their answers say why"
            )));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A JSON array as it stands, or one of the lines.
fn as_array(input: &[u8]) -> Result<Vec<u8>, Failure> {
    if input.trim_ascii_start().starts_with(b"[") {
        return Ok(input.to_vec());
    }
    let mut array = vec![b'['];
    let lines = input.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
    for (number, line) in lines.enumerate().filter(|(_, line)| !line.is_empty()) {
        // Two values on a line would be two elements, or none.
        serde_json::from_slice::<serde::de::IgnoredAny>(line)
            .map_err(|e| Failure::new(format!("line {} is not JSON: {e}", number + 1)))?;
        if array.len() > 1 {
            array.push(b',');
        }
        array.extend_from_slice(line);
    }
    array.push(b']');
    Ok(array)
}

fn describe(receipt: &Value) -> String {
    let text = |field: &str| receipt.get(field).and_then(Value::as_str).unwrap_or("?");
    let id = text("id");
    match text("outcome") {
        "spooled" => {
            let durable = receipt.get("durable").and_then(Value::as_bool);
            let how = if durable == Some(true) {
                "durably"
            } else {
                "in memory"
            };
            format!("{id} spooled {how}")
        }
        outcome => {
            let number = |field: &str| receipt.pointer(&format!("/position/{field}")).cloned();
            match (number("partition"), number("offset")) {
                (Some(p), Some(o)) => {
                    format!("{id} {outcome} via {} at {p}/{o}", text("via"))
                }
                _ => format!("{id} {outcome} via {}", text("via")),
            }
        }
    }
}

fn unreadable(path: &std::path::Path, e: &std::io::Error) -> Failure {
    Failure::new(format!("{} cannot be read: {e}", path.display()))
}

fn header(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| "write name=value".to_owned())
}

fn time(word: &str) -> Result<Timestamp, String> {
    word.parse()
        .map_err(|_| "write a time such as 2026-01-31T12:00:00Z".to_owned())
}

fn delay(word: &str) -> Result<Duration, String> {
    duration::parse(word).map_err(|e| e.message().to_owned())
}

/// Bytes of one answer.
const MAX_ANSWER: usize = 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_an_array_and_an_array_stays_one() {
        let array = |text: &str| as_array(text.as_bytes()).map_err(|_| ());
        assert_eq!(array("{\"a\":1}\n\n {} \r\n").unwrap(), b"[{\"a\":1},{}]");
        assert_eq!(array(" [1]").unwrap(), b" [1]");
        assert_eq!(array("").unwrap(), b"[]");
        assert!(array("{} {}").is_err() && array("{").is_err());
    }
}
