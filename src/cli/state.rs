//! `state` and `health`.

use std::process::ExitCode;

use clap::Args;
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::Value;

use super::{Failure, Target, client::Client, say, sse::Events};

/// Show the state.
#[derive(Debug, Args)]
pub(super) struct State {
    /// Go on and print every change.
    #[arg(long)]
    watch: bool,
}

impl State {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        if !self.watch {
            let state = client
                .json(client.request(Method::GET, &["v1", "state"]))
                .await?;
            show(target, &state)?;
            return Ok(ExitCode::SUCCESS);
        }
        let response = client
            .send(client.request(Method::GET, &["v1", "state", "changes"]))
            .await?;
        let mut pieces = response.bytes_stream();
        let mut events = Events::new();
        while let Some(piece) = pieces.next().await {
            events.push(&piece.map_err(|e| client.broken(&e))?);
            while let Some(event) = events.next_event() {
                let data: Value = serde_json::from_str(&event.data)
                    .map_err(|e| Failure::new(format!("an event is not JSON: {e}")))?;
                if event.name == "change" && !target.json {
                    say(change(&data))?;
                } else {
                    show(target, &data)?;
                }
            }
        }
        Err(Failure::new(
            "the hub ended the stream; it is shutting down, or its log says why",
        ))
    }
}

/// Exit status 0 when publishes are accepted, also while degraded.
pub(super) async fn health(target: &Target) -> Result<ExitCode, Failure> {
    let client = Client::new(target)?;
    let health = client
        .json(client.request(Method::GET, &["v1", "health"]))
        .await?;
    let accepting = health.get("accepting").and_then(Value::as_bool) == Some(true);
    if target.json {
        say(health.to_string())?;
    } else {
        let state = text(&health, "/state");
        say(if accepting {
            format!("accepting, {state}")
        } else {
            format!("not accepting, {state}")
        })?;
        for (broker, found) in health
            .get("brokers")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let well = found.get("healthy").and_then(Value::as_bool) == Some(true);
            say(if well {
                format!("{broker}: healthy")
            } else {
                format!("{broker}: {}", text(found, "/reason"))
            })?;
        }
    }
    Ok(if accepting {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn show(target: &Target, state: &Value) -> Result<(), Failure> {
    if target.json {
        say(state.to_string())?;
        return Ok(());
    }
    say(format!(
        "{:<32} {:<6} {:<9} {:<9} {:>9} {:>9}",
        "ROUTE", "KIND", "PRIMARY", "STATE", "SPOOLED", "IN DOUBT"
    ))?;
    for route in rows(state, "routes") {
        say(format!(
            "{:<32} {:<6} {:<9} {:<9} {:>9} {:>9}",
            text(route, "/pattern"),
            text(route, "/kind"),
            text(route, "/primary"),
            state_of(route),
            text(route, "/spool/messages"),
            text(route, "/spool/in_doubt"),
        ))?;
    }
    for broker in rows(state, "brokers") {
        let connected = broker.get("connected").and_then(Value::as_bool) == Some(true);
        say(format!(
            "broker {}: {}",
            text(broker, "/type"),
            if connected { "connected" } else { "away" },
        ))?;
    }
    for weak in rows(state, "weakened") {
        say(format!(
            "weakened {}: {} ({})",
            text(weak, "/clause"),
            text(weak, "/what"),
            text(weak, "/why")
        ))?;
    }
    Ok(())
}

/// Wider than its column when it is paused, which is to be seen.
fn state_of(route: &Value) -> String {
    let state = text(route, "/state");
    if route.get("paused").and_then(Value::as_bool) == Some(true) {
        format!("{state}, paused")
    } else {
        state
    }
}

fn change(change: &Value) -> String {
    format!(
        "{} {} lane {}: {} -> {} ({})",
        text(change, "/at"),
        text(change, "/topic"),
        text(change, "/lane"),
        text(change, "/from"),
        text(change, "/to"),
        text(change, "/reason"),
    )
}

fn rows<'a>(state: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    state
        .get(name)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// A field as text, without quotes.
pub(super) fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}
