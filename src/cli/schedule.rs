//! `schedule list|show|cancel`, asked of a running hub. A task is scheduled by
//! `publish --at` or `--delay`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::Value;

use super::{Failure, Target, client::Client, say, state::text};

/// Look at what waits for its time, and call it off.
#[derive(Debug, Subcommand)]
pub(super) enum Schedule {
    /// List what is scheduled, in the order of its time.
    List(List),
    /// Show one.
    Show(One),
    /// Call one off.
    Cancel(One),
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Only of this topic.
    #[arg(long)]
    topic: Option<String>,
    /// At most so many.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
}

#[derive(Debug, Args)]
pub(super) struct One {
    /// Its topic.
    topic: String,
    /// Its id.
    id: String,
}

/// Entries that are asked for at a time.
const PAGE: usize = 1000;

impl Schedule {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        match self {
            Self::List(list) => list.run(&client, target).await,
            Self::Show(one) => one.run(&client, target, Method::GET).await,
            Self::Cancel(one) => one.run(&client, target, Method::DELETE).await,
        }
    }
}

impl List {
    async fn run(self, client: &Client, target: &Target) -> Result<ExitCode, Failure> {
        let mut left = self.limit;
        let mut after: Option<String> = None;
        if !target.json {
            say(format!(
                "{:<38} {:<32} {:<26} {}",
                "ID", "TOPIC", "AT", "FAILURES"
            ))?;
        }
        while left > 0 {
            let limit = left.min(PAGE).to_string();
            let mut query = vec![("limit", limit)];
            query.extend(self.topic.clone().map(|topic| ("topic", topic)));
            query.extend(after.take().map(|place| ("after", place)));
            let request = client
                .request(Method::GET, &["v1", "scheduled"])
                .query(&query);
            let page = client.json(request).await?;
            let empty = Vec::new();
            let entries = page
                .get("scheduled")
                .and_then(Value::as_array)
                .unwrap_or(&empty);
            for entry in entries {
                line(target, entry)?;
            }
            left = left.saturating_sub(entries.len());
            after = page.get("next").and_then(Value::as_str).map(str::to_owned);
            if after.is_none() {
                break;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl One {
    async fn run(
        self,
        client: &Client,
        target: &Target,
        method: Method,
    ) -> Result<ExitCode, Failure> {
        let path = ["v1", "scheduled", &self.topic, &self.id];
        let entry = client.json(client.request(method, &path)).await?;
        line(target, &entry)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn line(target: &Target, entry: &Value) -> Result<(), Failure> {
    if target.json {
        say(entry.to_string())?;
        return Ok(());
    }
    say(format!(
        "{:<38} {:<32} {:<26} {}",
        text(entry, "/id"),
        text(entry, "/topic"),
        text(entry, "/scheduled_at"),
        text(entry, "/failures"),
    ))?;
    if entry.get("error").is_some() {
        say(format!("  {}", text(entry, "/error")))?;
    }
    Ok(())
}
