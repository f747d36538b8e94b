//! `topology check|apply|export`, asked of a running hub.

use std::process::ExitCode;

use clap::Subcommand;
use reqwest::Method;
use serde_json::Value;

use super::{Failure, Target, client::Client, say, state::text};

/// Compare, make, or print the topology.
#[derive(Debug, Subcommand)]
pub(super) enum Topology {
    /// Say what is missing or differs; exit status 1 when anything is, or when a
    /// broker could not be asked.
    Check,
    /// Make what is missing; what differs is reported and left alone.
    Apply,
    /// Print what should exist, as JSON, which a configuration file takes.
    Export,
}

impl Topology {
    pub(super) async fn run(self, target: &Target) -> Result<ExitCode, Failure> {
        let client = Client::new(target)?;
        let request = match self {
            Self::Check => client.request(Method::GET, &["v1", "topology"]),
            Self::Apply => client.request(Method::POST, &["v1", "topology", "apply"]),
            Self::Export => client.request(Method::GET, &["v1", "topology", "wanted"]),
        };
        let answer = client.json(request).await?;
        if matches!(self, Self::Export) {
            say(if target.json {
                answer.to_string()
            } else {
                format!("{answer:#}")
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        if target.json {
            say(answer.to_string())?;
        } else {
            report(&answer)?;
        }
        let clean = ["missing", "drift", "unreachable"]
            .iter()
            .all(|kind| list(&answer, kind).next().is_none());
        Ok(if clean {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn report(answer: &Value) -> Result<(), Failure> {
    say(format!("ok: {}", list(answer, "ok").count()))?;
    for kind in ["created", "missing", "not_checked", "unreachable"] {
        for object in list(answer, kind) {
            say(format!("{}: {}", kind.replace('_', " "), text(object, "")))?;
        }
    }
    for drift in list(answer, "drift") {
        say(format!(
            "differs: {} {}: {} is {}, expected {}",
            text(drift, "/broker"),
            text(drift, "/object"),
            text(drift, "/argument"),
            text(drift, "/actual"),
            text(drift, "/expected"),
        ))?;
    }
    Ok(())
}

fn list<'a>(answer: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    answer
        .get(name)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}
