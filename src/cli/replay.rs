//! `replay start|status|cancel|list`, asked of a running hub. With `--follow` it
//! looks again and again until the replay is over, with a bar on a terminal.

use std::{collections::BTreeMap, io::IsTerminal, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{Failure, Target, client::Client, say, state::text};
use crate::{Timestamp, duration};

/// Publish again what streams have of a stretch of time.
#[derive(Debug, Subcommand)]
pub(super) enum Replay {
    /// Start a replay.
    Start(Start),
    /// Show how far a replay is.
    Status(Status),
    /// End a replay; what it has published stays.
    Cancel(Cancel),
    /// Show the replays that are active, and the last that are over.
    List,
}

#[derive(Debug, Args)]
pub(super) struct Start {
    /// The topic to read, or a pattern over topics.
    topics: String,
    /// An id, so that it can be begun again under it. Default: made up.
    #[arg(long)]
    id: Option<String>,
    /// From messages of this time on: RFC 3339, or so long ago, such as 2h.
    #[arg(long, value_name = "TIME", value_parser = time)]
    from: Option<Timestamp>,
    /// Up to messages before this time. Default: what there is now.
    #[arg(long, value_name = "TIME", value_parser = time)]
    to: Option<Timestamp>,
    /// Where to publish. Default: to the topic that a message was read from.
    #[arg(long, value_name = "TOPIC")]
    target: Option<String>,
    /// Only messages of this type, or of types that this pattern covers.
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// Only messages with this header.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    header: Vec<(String, String)>,
    /// Only tasks with this metadata.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Messages published together, 1 to 1000.
    #[arg(long, value_name = "N", default_value_t = 100)]
    batch_size: u64,
    /// The pause between two batches, such as 250ms.
    #[arg(long, value_name = "DURATION", value_parser = pause)]
    delay: Option<String>,
    /// Count what would be replayed, and publish nothing.
    #[arg(long)]
    dry_run: bool,
    /// Go on after a failed publish, and publish several batches at once.
    #[arg(long)]
    unordered: bool,
    /// Skip messages whose id was read before.
    #[arg(long)]
    skip_duplicates: bool,
    /// Stay until it is over.
    #[arg(long)]
    follow: bool,
}

#[derive(Debug, Args)]
pub(super) struct Status {
    /// The replay's id.
    id: String,
    /// Stay until it is over.
    #[arg(long)]
    follow: bool,
}

#[derive(Debug, Args)]
pub(super) struct Cancel {
    /// The replay's id.
    id: String,
}

impl Replay {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        match self {
            Self::Start(start) => {
                let follow = start.follow;
                let request = client
                    .request(Method::POST, &["v1", "replays"])
                    .json(&start.request());
                let replay = client.json(request).await?;
                if follow {
                    return follow_to_the_end(&client, target, replay).await;
                }
                show(target, &replay)?;
                Ok(ExitCode::SUCCESS)
            }
            Self::Status(status) => {
                let replay = look(&client, &status.id).await?;
                if status.follow {
                    return follow_to_the_end(&client, target, replay).await;
                }
                show(target, &replay)?;
                Ok(ExitCode::SUCCESS)
            }
            Self::Cancel(cancel) => {
                let path = ["v1", "replays", &cancel.id, "cancel"];
                let replay = client.json(client.request(Method::POST, &path)).await?;
                show(target, &replay)?;
                Ok(ExitCode::SUCCESS)
            }
            Self::List => {
                let list = client
                    .json(client.request(Method::GET, &["v1", "replays"]))
                    .await?;
                table(target, &list)?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Start {
    /// The request's JSON, without what was not said.
    fn request(self) -> Value {
        let mut options = json!({
            "batch_size": self.batch_size,
            "dry_run": self.dry_run,
            "preserve_order": !self.unordered,
            "skip_duplicates": self.skip_duplicates,
        });
        if let (Some(delay), Some(options)) = (self.delay, options.as_object_mut()) {
            options.insert("delay_between".to_owned(), delay.into());
        }
        let map = |pairs: Vec<(String, String)>| pairs.into_iter().collect::<BTreeMap<_, _>>();
        let mut request = Map::new();
        let what = if self.topics.contains(['*', '#']) {
            "pattern"
        } else {
            "topic"
        };
        request.insert(what.to_owned(), self.topics.into());
        for (name, value) in [
            ("id", self.id),
            ("from_time", self.from.map(|t| t.to_string())),
            ("to_time", self.to.map(|t| t.to_string())),
            ("target_topic", self.target),
        ] {
            if let Some(value) = value {
                request.insert(name.to_owned(), value.into());
            }
        }
        request.insert(
            "filter".to_owned(),
            json!({
                "types": self.types,
                "headers": map(self.header),
                "metadata": map(self.metadata),
            }),
        );
        request.insert("options".to_owned(), options);
        request.into()
    }
}

async fn look(client: &Client, id: &str) -> Result<Value, Failure> {
    client
        .json(client.request(Method::GET, &["v1", "replays", id]))
        .await
}

/// Exit status 0 when it completed and nothing of it failed.
async fn follow_to_the_end(
    client: &Client,
    target: &Target,
    mut replay: Value,
) -> Result<ExitCode, Failure> {
    let id = text(&replay, "/id");
    let bar = (!target.json && std::io::stderr().is_terminal()).then(bar);
    while !is_over(&replay) {
        if let Some(bar) = &bar {
            draw(bar, &replay);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        replay = look(client, &id).await?;
    }
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    show(target, &replay)?;
    let well = text(&replay, "/status") == "completed" && number(&replay, "failed") == 0;
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn bar() -> ProgressBar {
    let form = "{bar:30} {percent:>3}% {msg}";
    let style = ProgressStyle::with_template(form);
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn draw(bar: &ProgressBar, replay: &Value) {
    bar.set_length(number(replay, "offsets_total"));
    bar.set_position(number(replay, "offsets_read"));
    bar.set_message(counts(replay));
}

fn counts(replay: &Value) -> String {
    let rate = replay.get("rate").and_then(Value::as_f64);
    format!(
        "{} of {} replayed, {} skipped, {} failed, {:.0}/s",
        text(replay, "/replayed"),
        text(replay, "/total"),
        text(replay, "/skipped"),
        text(replay, "/failed"),
        rate.unwrap_or_default(),
    )
}

fn show(target: &Target, replay: &Value) -> Result<(), Failure> {
    if target.json {
        say(replay.to_string())?;
        return Ok(());
    }
    let dry = replay.pointer("/request/options/dry_run") == Some(&Value::Bool(true));
    say(format!(
        "{} {}{}: {}",
        text(replay, "/id"),
        text(replay, "/status"),
        if dry { ", a dry run" } else { "" },
        counts(replay)
    ))?;
    if replay.get("error").is_some() {
        say(format!("first error: {}", text(replay, "/error")))?;
    }
    Ok(())
}

fn table(target: &Target, list: &Value) -> Result<(), Failure> {
    if target.json {
        say(list.to_string())?;
        return Ok(());
    }
    say(format!(
        "{:<36} {:<9} {:<32} {:>10} {:>10} {:>10} {:>8}  STARTED",
        "ID", "STATUS", "FROM", "TOTAL", "REPLAYED", "SKIPPED", "FAILED"
    ))?;
    let replays = list.get("replays").and_then(Value::as_array);
    for replay in replays.into_iter().flatten() {
        let topics = replay
            .pointer("/request/topic")
            .or_else(|| replay.pointer("/request/pattern"));
        say(format!(
            "{:<36} {:<9} {:<32} {:>10} {:>10} {:>10} {:>8}  {}",
            text(replay, "/id"),
            text(replay, "/status"),
            topics.and_then(Value::as_str).unwrap_or_default(),
            text(replay, "/total"),
            text(replay, "/replayed"),
            text(replay, "/skipped"),
            text(replay, "/failed"),
            text(replay, "/started_at"),
        ))?;
    }
    say(format!(
        "{} of {} active",
        text(list, "/active"),
        text(list, "/max_active")
    ))?;
    Ok(())
}

fn is_over(replay: &Value) -> bool {
    !matches!(text(replay, "/status").as_str(), "pending" | "running")
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

fn time(word: &str) -> Result<Timestamp, String> {
    if let Ok(time) = word.parse::<Timestamp>() {
        return Ok(time);
    }
    match duration::parse(word) {
        Ok(ago) => Ok(Timestamp::now() - ago),
        Err(_) => {
            Err("write a time such as 2026-01-31T12:00:00Z, or how long ago, such as 2h".to_owned())
        }
    }
}

fn pause(word: &str) -> Result<String, String> {
    duration::parse(word)
        .map(|_| word.to_owned())
        .map_err(|e| e.message().to_owned())
}

fn pair(word: &str) -> Result<(String, String), String> {
    let (name, value) = word.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Between two looks at a replay that is followed.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        replay: Replay,
    }

    fn request(arguments: &str) -> Value {
        let line = Line::try_parse_from(["x"].into_iter().chain(arguments.split(' ')));
        match line.unwrap_or_else(|e| panic!("{e}")).replay {
            Replay::Start(start) => start.request(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_the_command_sends_is_what_the_hub_reads() {
        let sent = request(
            "start a.** --id r --from 2026-01-01T00:00:00Z --target t --type x.* --header a=b=c \
             --metadata m=1 --batch-size 7 --delay 250ms --dry-run --unordered --skip-duplicates",
        );
        let read: crate::replay::ReplayRequest = serde_json::from_value(sent).unwrap();
        assert_eq!(read.pattern.as_deref(), Some("a.**"));
        assert_eq!(read.filter.headers["a"], "b=c");
        assert_eq!(read.options.delay_between, Duration::from_millis(250));
        assert!(read.options.dry_run && read.options.skip_duplicates);
        assert!(!read.options.preserve_order && read.options.batch_size == 7);
        let read: crate::replay::ReplayRequest =
            serde_json::from_value(request("start a.b")).unwrap();
        assert_eq!(read.topic.as_deref(), Some("a.b"));
        assert_eq!(read.options, crate::replay::ReplayOptions::default());
    }

    #[test]
    fn a_time_is_a_time_or_how_long_ago() {
        assert!(time("2026-01-31T12:00:00Z").is_ok());
        let ago = Timestamp::now().since(time("2h").unwrap());
        assert!((7_199..7_210).contains(&ago.as_secs()), "{ago:?}");
        assert!(time("yesterday").is_err() && pair("x").is_err());
    }
}
