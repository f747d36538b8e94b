//! `spool list|pause|resume|export|adopt`, asked of a running hub.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};
use futures_util::StreamExt;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::{Failure, Target, client::Client, say, state::text};

/// Look at the spool, pause and resume its drain, export it, adopt another.
#[derive(Debug, Subcommand)]
pub(super) enum Spool {
    /// Show what lanes hold, or with --entries the messages.
    List(List),
    /// Pause the drain; publishing goes on.
    Pause(Pause),
    /// Resume what was paused, and limit the drain.
    Resume(Resume),
    /// Write every spooled message as a line of JSON. They stay in the spool.
    Export(Export),
    /// Move the spool of a hub that will not come back into this hub.
    Adopt(Adopt),
}

#[derive(Debug, Args)]
pub(super) struct Adopt {
    /// Its data folder, on the machine of the hub that adopts.
    dir: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Lanes of the route with this pattern, as `state` shows it.
    #[arg(long, value_name = "PATTERN", conflicts_with = "topic")]
    route: Option<String>,
    /// Lanes of a topic, or of topics that a pattern covers.
    #[arg(long, value_name = "PATTERN")]
    topic: Option<String>,
    /// Lanes (at most 10000) or messages (at most 1000) to show. Default 100.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    limit: Option<u64>,
    /// Show messages instead of lanes.
    #[arg(long)]
    entries: bool,
    /// Go on where the last page of messages ended.
    #[arg(long, requires = "entries")]
    cursor: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Pause {
    /// Which topics, those of the future included.
    #[arg(default_value = "#")]
    pattern: String,
    /// Write nothing to the primary at all: everything goes to the spool.
    #[arg(long)]
    degrade: bool,
}

#[derive(Debug, Args)]
pub(super) struct Resume {
    /// Which topics.
    #[arg(default_value = "#")]
    pattern: String,
    /// Messages that each lane drains a second at most, such as 500/s; 0 or
    /// unlimited lifts the limit. Without it the limit stays.
    #[arg(long, value_name = "N/s", value_parser = rate)]
    rate: Option<u32>,
}

#[derive(Debug, Args)]
pub(super) struct Export {
    /// Which topics. Default: all.
    pattern: Option<String>,
    /// A file instead of stdout. It appears, in place of one that was there,
    /// when everything is in it.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Spool {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        match self {
            Self::List(list) => list.run(&client, target).await?,
            Self::Pause(pause) => {
                let body = json!({"pattern": pause.pattern, "degrade": pause.degrade});
                let word = if pause.degrade { "degraded" } else { "paused" };
                order(&client, target, "pause", body, word).await?;
            }
            Self::Resume(resume) => {
                let mut body = json!({"pattern": resume.pattern});
                if let (Some(rate), Some(body)) = (resume.rate, body.as_object_mut()) {
                    body.insert("rate".to_owned(), rate.into());
                }
                order(&client, target, "resume", body, "resumed").await?;
            }
            Self::Export(export) => export.run(&client).await?,
            Self::Adopt(adopt) => return adopt.run(&client, target).await,
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn order(
    client: &Client,
    target: &Target,
    what: &str,
    body: Value,
    word: &str,
) -> Result<(), Failure> {
    let request = client
        .request(Method::POST, &["v1", "spool", what])
        .json(&body);
    let answer = client.json(request).await?;
    if target.json {
        say(answer.to_string())?;
        return Ok(());
    }
    say(format!(
        "{word} {}: {} lanes",
        text(&answer, "/pattern"),
        text(&answer, "/lanes")
    ))?;
    let pending = answer.get("pending").and_then(Value::as_u64).unwrap_or(0);
    if pending > 0 {
        say(format!("{pending} more lanes have not taken it up yet"))?;
    }
    Ok(())
}

impl Adopt {
    async fn run(self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        let dir = std::path::absolute(&self.dir)
            .map_err(|e| Failure::new(format!("{}: {e}", self.dir.display())))?;
        let request = client
            .request(Method::POST, &["v1", "spool", "adopt"])
            .json(&json!({"dir": dir}));
        let answer = client.json(request).await?;
        let left = answer.get("left").and_then(Value::as_u64).unwrap_or(0);
        if target.json {
            say(answer.to_string())?;
        } else {
            say(format!("moved {} messages", text(&answer, "/moved")))?;
        }
        if left == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("{left} messages stay there: {}", text(&answer, "/reason"));
        Ok(ExitCode::FAILURE)
    }
}

impl List {
    async fn run(self, client: &Client, target: &Target) -> Result<(), Failure> {
        let mut query: Vec<(&str, String)> = Vec::new();
        for (name, value) in [
            ("route", self.route),
            ("topic", self.topic),
            ("limit", self.limit.map(|n| n.to_string())),
            ("entries", self.entries.then(|| "1".to_owned())),
            ("cursor", self.cursor),
        ] {
            if let Some(value) = value {
                query.push((name, value));
            }
        }
        let request = client.request(Method::GET, &["v1", "spool"]).query(&query);
        let answer = client.json(request).await?;
        if target.json {
            say(answer.to_string())?;
        } else if self.entries {
            messages(&answer)?;
        } else {
            lanes(&answer)?;
        }
        Ok(())
    }
}

fn lanes(answer: &Value) -> Result<(), Failure> {
    say(format!(
        "{:<32} {:>4} {:<9} {:>8} {:>8} {:>8} {:>7} {:>7} {:>11} {:>8} {:>9} {:>9}  WHY",
        "TOPIC",
        "LANE",
        "STATE",
        "MESSAGES",
        "IN DOUBT",
        "READY",
        "LEASED",
        "RESTING",
        "BYTES",
        "OLDEST",
        "DRAIN/S",
        "LIMIT/S",
    ))?;
    let shown = list(answer, "lanes");
    for lane in shown {
        let flag = |name: &str| lane.get(name).and_then(Value::as_bool) == Some(true);
        let mut why = text(lane, "/why");
        for (is, word) in [
            (flag("forced"), "degraded by force"),
            (flag("paused") && !flag("forced"), "paused"),
            (flag("durable"), "durable"),
        ] {
            if is {
                why = format!("{word}{}{why}", if why.is_empty() { "" } else { "; " });
            }
        }
        let limit = match text(lane, "/drain/limit").as_str() {
            "0" => "none".to_owned(),
            other => other.to_owned(),
        };
        say(format!(
            "{:<32} {:>4} {:<9} {:>8} {:>8} {:>8} {:>7} {:>7} {:>11} {:>8} {:>9.1} {:>9}  {why}",
            text(lane, "/topic"),
            text(lane, "/lane"),
            text(lane, "/state"),
            text(lane, "/messages"),
            text(lane, "/in_doubt"),
            text(lane, "/ready"),
            text(lane, "/leased"),
            text(lane, "/resting"),
            text(lane, "/bytes"),
            seconds(lane, "oldest_age_ms"),
            lane.pointer("/drain/rate")
                .and_then(Value::as_f64)
                .unwrap_or_default(),
            limit,
        ))?;
    }
    let total = text(answer, "/total/lanes");
    if total != shown.len().to_string() {
        say(format!(
            "{} of {total} lanes, the fullest; --limit shows more",
            shown.len()
        ))?;
    }
    say(format!(
        "total: {} messages ({} in doubt), {} bytes",
        text(answer, "/total/messages"),
        text(answer, "/total/in_doubt"),
        text(answer, "/total/bytes")
    ))?;
    Ok(())
}

fn messages(answer: &Value) -> Result<(), Failure> {
    say(format!(
        "{:<32} {:>4} {:>8} {:<36} {:<16} {:<16} {:>4} {:>9} {:>8} {:<9}  NOTES",
        "TOPIC", "LANE", "SEQ", "ID", "TYPE", "KEY", "PRIO", "SIZE", "AGE", "STATUS"
    ))?;
    for message in list(answer, "messages") {
        let mut notes = Vec::new();
        if message.get("possible_duplicate").and_then(Value::as_bool) == Some(true) {
            notes.push("perhaps a duplicate".to_owned());
        }
        if message.get("due").is_some() {
            notes.push(format!("due {}", text(message, "/due")));
        }
        if message.get("expiration").is_some() {
            notes.push(format!("expires {}", text(message, "/expiration")));
        }
        if message.get("failure").is_some() {
            notes.push(format!("failed: {}", text(message, "/failure/details")));
        }
        for group in list(message, "settled") {
            notes.push(format!("handled by {}", text(group, "")));
        }
        say(format!(
            "{:<32} {:>4} {:>8} {:<36} {:<16} {:<16} {:>4} {:>9} {:>8} {:<9}  {}",
            text(message, "/topic"),
            text(message, "/lane"),
            text(message, "/seq"),
            text(message, "/id"),
            text(message, "/type"),
            text(message, "/key"),
            text(message, "/priority"),
            text(message, "/size"),
            seconds(message, "age_ms"),
            text(message, "/status").replace('_', " "),
            notes.join(", "),
        ))?;
    }
    if answer.get("next").is_some() {
        say(format!("more: --cursor {}", text(answer, "/next")))?;
    }
    Ok(())
}

impl Export {
    async fn run(self, client: &Client) -> Result<(), Failure> {
        let mut request = client.request(Method::GET, &["v1", "spool", "export"]);
        if let Some(pattern) = &self.pattern {
            request = request.query(&[("pattern", pattern)]);
        }
        let response = client.send(request).await?;
        match &self.output {
            None => to_stdout(client, response).await,
            Some(path) => {
                let lines = to_file(client, response, path).await?;
                eprintln!("{lines} messages in {}", path.display());
                Ok(())
            }
        }
    }
}

async fn to_stdout(client: &Client, response: Response) -> Result<(), Failure> {
    let mut pieces = response.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|e| client.broken(&e))?;
        std::io::stdout().lock().write_all(&piece)?;
    }
    std::io::stdout().lock().flush()?;
    Ok(())
}

/// Writes beside the file and puts it in place when it is whole: half an export
/// must not be taken for one. Payloads may be private, so only the user may
/// read it.
async fn to_file(client: &Client, response: Response, path: &Path) -> Result<u64, Failure> {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    let part = PathBuf::from(name);
    let wrong =
        |e: std::io::Error| Failure::new(format!("{} cannot be written: {e}", part.display()));
    let mut options = tokio::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    options.mode(0o600);
    let mut file = options.open(&part).await.map_err(wrong)?;
    let mut lines = 0_u64;
    let mut pieces = response.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(e) => {
                let _ = tokio::fs::remove_file(&part).await;
                return Err(client.broken(&e));
            }
        };
        lines += piece.iter().filter(|b| **b == b'\n').count() as u64;
        file.write_all(&piece).await.map_err(wrong)?;
    }
    file.sync_all().await.map_err(wrong)?;
    tokio::fs::rename(&part, path)
        .await
        .map_err(|e| Failure::new(format!("{} cannot be written: {e}", path.display())))?;
    Ok(lines)
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value
        .get(name)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn seconds(value: &Value, name: &str) -> String {
    let ms = value.get(name).and_then(Value::as_u64).unwrap_or(0);
    format!("{:.1}s", ms as f64 / 1000.0)
}

fn rate(text: &str) -> Result<u32, String> {
    if text == "unlimited" {
        return Ok(0);
    }
    text.strip_suffix("/s")
        .unwrap_or(text)
        .parse()
        .map_err(|_| "write messages per second, such as 500/s, or unlimited".to_owned())
}
