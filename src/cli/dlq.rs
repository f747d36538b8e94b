//! `dlq list|show|reprocess|edit|discard|purge`, asked of a running hub.

use std::{path::PathBuf, process::ExitCode};

use base64::{Engine, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{Failure, Target, client::Client, say, state};

/// Look at dead letters, publish them again, give them up.
#[derive(Debug, Subcommand)]
pub(super) enum Dlq {
    /// Show dead letters, oldest failure first.
    List(List),
    /// Show everything about one, its payload included.
    Show(Show),
    /// Publish a copy to where it came from; one, or with filters all they mean.
    Reprocess(Reprocess),
    /// Change one's message and publish it.
    Edit(Edit),
    /// Give one up. It can still be reprocessed until it is purged.
    Discard(Discard),
    /// Take processed and discarded letters away for good. Never open ones.
    Purge(Purge),
}

/// Which letters.
#[derive(Debug, Args)]
struct Filter {
    /// pending, retrying, processed, discarded or expired.
    #[arg(long, value_parser = ["pending", "retrying", "processed", "discarded", "expired"])]
    status: Option<String>,
    #[command(flatten)]
    of: Of,
}

/// Which letters, whatever became of them.
#[derive(Debug, Args)]
struct Of {
    /// The topic they failed in, or a pattern over such topics.
    #[arg(long, value_name = "PATTERN")]
    topic: Option<String>,
    /// Exactly this failure reason, such as handler_error.
    #[arg(long)]
    reason: Option<String>,
    /// The broker that has them.
    #[arg(long, value_parser = ["rabbitmq", "kafka", "inmemory"])]
    broker: Option<String>,
    /// The message type.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct List {
    #[command(flatten)]
    filter: Filter,
    /// Letters to show, at most 1000.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1000))]
    limit: u64,
    /// Letters to leave out at the beginning.
    #[arg(long, value_name = "N", default_value_t = 0)]
    offset: u64,
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// A letter's id, or its message's.
    id: String,
}

#[derive(Debug, Args)]
pub(super) struct Reprocess {
    /// A letter's id, or its message's.
    id: Option<String>,
    /// Every open letter that the filters mean.
    #[arg(long, conflicts_with = "id")]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    /// Letters to reprocess at most, up to 1000. Default 100.
    #[arg(long, value_name = "N", conflicts_with = "id", value_parser = clap::value_parser!(u64).range(1..=1000))]
    limit: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct Edit {
    /// A letter's id, or its message's.
    id: String,
    /// A JSON merge patch over the message, such as '{"headers":{"a":"1"}}'.
    #[arg(long, value_name = "JSON")]
    patch: Option<String>,
    /// The new payload, as text.
    #[arg(long, value_name = "TEXT", conflicts_with = "file")]
    payload: Option<String>,
    /// A file with the new payload.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The new key.
    #[arg(long)]
    key: Option<String>,
    /// The new priority, 0 to 10 or low, normal, high, critical.
    #[arg(long)]
    priority: Option<String>,
    /// Where to publish it instead.
    #[arg(long)]
    topic: Option<String>,
    /// A header to set, NAME=VALUE; NAME= alone removes it.
    #[arg(long = "header", value_name = "NAME=VALUE")]
    headers: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct Discard {
    /// A letter's id, or its message's.
    id: String,
    /// Why; it is kept with the letter.
    #[arg(long)]
    reason: String,
}

#[derive(Debug, Args)]
pub(super) struct Purge {
    /// Only processed or only discarded ones.
    #[arg(long, value_parser = ["processed", "discarded"])]
    status: Option<String>,
    #[command(flatten)]
    of: Of,
}

impl Dlq {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        match self {
            Self::List(list) => list.run(&client, target).await,
            Self::Show(show) => show.run(&client, target).await,
            Self::Reprocess(reprocess) => reprocess.run(&client, target).await,
            Self::Edit(edit) => edit.run(&client, target).await,
            Self::Discard(discard) => {
                let path = ["v1", "dead-letters", &discard.id, "discard"];
                let body = json!({"reason": discard.reason});
                let answer = post(&client, &path, &body).await?;
                tell(target, &answer, |a| format!("discarded {}", said(a, "/id")))
            }
            Self::Purge(purge) => {
                let body = filled(purge.of.fields(purge.status));
                let answer = post(&client, &["v1", "dead-letters", "purge"], &body).await?;
                tell(target, &answer, |a| {
                    format!("purged {}", said(a, "/purged"))
                })?;
                Ok(seen_all(&answer))
            }
        }
    }
}

impl Of {
    /// As the hub names them, with the status.
    fn fields(self, status: Option<String>) -> [(&'static str, Option<String>); 5] {
        [
            ("status", status),
            ("topic", self.topic),
            ("reason", self.reason),
            ("broker", self.broker),
            ("type", self.kind),
        ]
    }
}

impl Filter {
    fn fields(self) -> [(&'static str, Option<String>); 5] {
        self.of.fields(self.status)
    }

    fn is_empty(&self) -> bool {
        let of = &self.of;
        let said = [&self.status, &of.topic, &of.reason, &of.broker, &of.kind];
        said.iter().all(|f| f.is_none())
    }
}

impl List {
    async fn run(self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        let mut query: Vec<(&str, String)> = vec![
            ("limit", self.limit.to_string()),
            ("offset", self.offset.to_string()),
        ];
        for (name, value) in self.filter.fields() {
            query.extend(value.map(|v| (name, v)));
        }
        let request = client
            .request(Method::GET, &["v1", "dead-letters"])
            .query(&query);
        let answer = client.json(request).await?;
        if target.json {
            say(answer.to_string())?;
            return Ok(seen_all(&answer));
        }
        say(format!(
            "{:<42} {:<10} {:<24} {:<32} {:<16} {:>5} {:<24}  DETAILS",
            "LETTER", "STATUS", "MESSAGE", "TOPIC", "REASON", "TRIES", "LAST FAILURE"
        ))?;
        let letters = array(&answer, "letters");
        for letter in letters {
            let mut details = said(letter, "/failure_details");
            for (name, word) in [("/next_retry", "next try"), ("/decision/note", "decided")] {
                let more = said(letter, name);
                if !more.is_empty() {
                    details.push_str(&format!("; {word}: {more}"));
                }
            }
            say(format!(
                "{:<42} {:<10} {:<24} {:<32} {:<16} {:>5} {:<24}  {details}",
                said(letter, "/id"),
                said(letter, "/status"),
                said(letter, "/message_id"),
                said(letter, "/original_topic"),
                said(letter, "/failure_reason"),
                said(letter, "/retry_count"),
                said(letter, "/last_failure"),
            ))?;
        }
        say(format!("{} of {}", letters.len(), said(&answer, "/total")))?;
        if answer.get("complete").and_then(Value::as_bool) == Some(false) {
            eprintln!(
                "there are letters that were not seen; decide about some of these first, or see below"
            );
        }
        Ok(seen_all(&answer))
    }
}

impl Show {
    async fn run(self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        let request = client.request(Method::GET, &["v1", "dead-letters", &self.id]);
        let answer = client.json(request).await?;
        if target.json {
            say(answer.to_string())?;
            return Ok(ExitCode::SUCCESS);
        }
        let pretty = serde_json::to_string_pretty(&answer)
            .map_err(|e| Failure::new(format!("the letter cannot be shown: {e}")))?;
        say(pretty)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Reprocess {
    async fn run(self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        if let Some(id) = &self.id {
            if !self.filter.is_empty() {
                return Err(Failure::usage(
                    "name one letter, or filters for many; not both",
                ));
            }
            let path = ["v1", "dead-letters", id, "reprocess"];
            let answer = post(client, &path, &json!({})).await?;
            return outcome(target, &answer);
        }
        if !self.all && self.filter.is_empty() {
            return Err(Failure::usage(
                "which letters? name one, filters, or --all for every open one",
            ));
        }
        let mut body = filled(self.filter.fields());
        if let (Some(limit), Some(fields)) = (self.limit, body.as_object_mut()) {
            fields.insert("limit".to_owned(), limit.into());
        }
        let answer = post(client, &["v1", "dead-letters", "reprocess"], &body).await?;
        let results = array(&answer, "results");
        if target.json {
            say(answer.to_string())?;
        } else {
            for result in results {
                say(line(result))?;
            }
            say(format!("{} letters", results.len()))?;
            if answer.get("complete").and_then(Value::as_bool) == Some(false) {
                eprintln!("there are more letters than these; run it again");
            }
        }
        let failed = results.iter().any(|r| said(r, "/result") == "failed");
        if failed {
            return Ok(ExitCode::FAILURE);
        }
        Ok(seen_all(&answer))
    }
}

impl Edit {
    async fn run(self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        let path = ["v1", "dead-letters", self.id.as_str(), "edit"];
        let patch = self.patch()?;
        let answer = post(client, &path, &json!({"patch": patch})).await?;
        outcome(target, &answer)
    }

    fn patch(&self) -> Result<Value, Failure> {
        let mut patch: Map<String, Value> = match &self.patch {
            None => Map::new(),
            Some(text) => serde_json::from_str(text)
                .map_err(|e| Failure::usage(format!("--patch is not a JSON object: {e}")))?,
        };
        let payload = match (&self.payload, &self.file) {
            (Some(text), _) => Some(text.clone().into_bytes()),
            (None, Some(path)) => Some(
                std::fs::read(path)
                    .map_err(|e| Failure::new(format!("{} cannot be read: {e}", path.display())))?,
            ),
            (None, None) => None,
        };
        if let Some(payload) = payload {
            patch.insert("payload".into(), BASE64_STANDARD.encode(payload).into());
        }
        if let Some(key) = &self.key {
            patch.insert("key".into(), key.as_str().into());
        }
        if let Some(priority) = &self.priority {
            let value = match priority.parse::<u8>() {
                Ok(number) => Value::from(number),
                Err(_) => Value::from(priority.as_str()),
            };
            patch.insert("priority".into(), value);
        }
        if let Some(topic) = &self.topic {
            patch.insert("topic".into(), topic.as_str().into());
        }
        for header in &self.headers {
            let (name, value) = header
                .split_once('=')
                .ok_or_else(|| Failure::usage(format!("--header {header:?} is not NAME=VALUE")))?;
            let value = if value.is_empty() {
                Value::Null
            } else {
                Value::from(value)
            };
            let headers = patch
                .entry("headers")
                .or_insert_with(|| Value::Object(Map::new()));
            headers
                .as_object_mut()
                .ok_or_else(|| {
                    Failure::usage(
                        "headers in --patch is no object, so --header has no place in it",
                    )
                })?
                .insert(name.to_owned(), value);
        }
        if patch.is_empty() {
            return Err(Failure::usage(
                "nothing is changed; `dlq reprocess` publishes a letter as it is",
            ));
        }
        Ok(Value::Object(patch))
    }
}

async fn post(client: &Client, path: &[&str], body: &Value) -> Result<Value, Failure> {
    client
        .json(client.request(Method::POST, path).json(body))
        .await
}

fn outcome(target: &Target, answer: &Value) -> Result<ExitCode, Failure> {
    tell(target, answer, line)
}

fn tell(
    target: &Target,
    answer: &Value,
    words: impl FnOnce(&Value) -> String,
) -> Result<ExitCode, Failure> {
    if target.json {
        say(answer.to_string())?;
    } else {
        say(words(answer))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One result in words.
fn line(result: &Value) -> String {
    let letter = said(result, "/letter");
    match said(result, "/result").as_str() {
        "processed" => format!(
            "{letter} {} to {}",
            said(result, "/outcome"),
            said(result, "/topic")
        ),
        "left_open" => format!(
            "{letter} published to {}, and stays open: {}",
            said(result, "/topic"),
            said(result, "/reason")
        ),
        "already_processed" => format!("{letter} was processed before"),
        _ => format!(
            "{letter} failed: {}: {}",
            said(result, "/error/code"),
            said(result, "/error/detail")
        ),
    }
}

/// Names what could not be seen; that is a failure.
fn seen_all(answer: &Value) -> ExitCode {
    let away = array(answer, "away");
    for place in away {
        eprintln!(
            "not seen: {} at {}: {}",
            said(place, "/place"),
            said(place, "/broker"),
            said(place, "/reason")
        );
    }
    if away.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn filled<const N: usize>(fields: [(&str, Option<String>); N]) -> Value {
    let said = fields.into_iter().filter_map(|(name, value)| {
        let value = Value::from(value?);
        Some((name.to_owned(), value))
    });
    Value::Object(said.collect())
}

/// A field as text; nothing where there is none.
fn said(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        None | Some(Value::Null) => String::new(),
        Some(_) => state::text(value, pointer),
    }
}

fn array<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value
        .get(name)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}
