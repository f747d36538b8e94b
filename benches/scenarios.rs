//! Runs `messaging-hub bench`, scenario by scenario, on brokers that it starts
//! for that and ends afterwards. What is measured, and how, is the command's.
//!
//! ```text
//! cargo bench --bench scenarios                          # all of them
//! cargo bench --bench scenarios -- kafka -x 2 -z 5       # one, with flags of the command
//! RABBITMQ_URL=... KAFKA_BROKERS=... cargo bench --bench scenarios
//! ```
//!
//! With a given RabbitMQ failover cuts the link to it; one that was started here
//! is killed.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` builds this and runs it too; a measurement says
    // nothing there.
    if !arguments.iter().any(|a| a == "--bench") {
        return Ok(());
    }
    let mut flags: Vec<String> = arguments.into_iter().filter(|a| a != "--bench").collect();
    let one = flags.first().is_some_and(|a| !a.starts_with('-'));
    let one = one.then(|| flags.remove(0));
    let mut brokers = Brokers::default();
    let mut failed = Vec::new();
    for scenario in SCENARIOS {
        if one.as_deref().is_some_and(|o| o != *scenario) {
            continue;
        }
        println!("bench {scenario}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_messaging-hub"));
        command.args(["bench", scenario]).args(&flags);
        if matches!(*scenario, "rabbitmq" | "journal" | "failover") {
            let rabbitmq = brokers.find("rabbitmq-4", "RABBITMQ_URL", "/url")?;
            command.env("RABBITMQ_URL", &rabbitmq.address);
            if *scenario == "failover"
                && let Some(folder) = &rabbitmq.started
            {
                let with = |word| format!("'{LAUNCHER}' {word} '{}'", folder.display());
                command.args(["--broker-kill", &with("kill")]);
                command.args(["--broker-start", &with("restart")]);
            }
        }
        if *scenario == "kafka" {
            let kafka = brokers.find("kafka-4", "KAFKA_BROKERS", "/url")?;
            command.env("KAFKA_BROKERS", &kafka.address);
        }
        if !command.status()?.success() {
            failed.push(*scenario);
        }
        println!();
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Where brokers are; those that were started here end with this.
#[derive(Default)]
struct Brokers(Vec<Broker>);

struct Broker {
    kind: &'static str,
    address: String,
    /// Its folder, if it was started here.
    started: Option<PathBuf>,
}

impl Brokers {
    /// The one that the environment names, otherwise a new one.
    fn find(&mut self, kind: &'static str, variable: &str, field: &str) -> Result<&Broker> {
        let at = self.0.iter().position(|b| b.kind == kind);
        let given = std::env::var(variable).ok().filter(|v| !v.is_empty());
        let at = match (at, given) {
            (Some(at), _) => at,
            (None, Some(address)) => {
                let started = None;
                self.0.push(Broker {
                    kind,
                    address,
                    started,
                });
                self.0.len() - 1
            }
            (None, None) => {
                let broker = start(kind, field)?;
                self.0.push(broker);
                self.0.len() - 1
            }
        };
        self.0.get(at).context("a broker")
    }
}

/// Starts one; the field of what the launcher says is its address.
fn start(kind: &'static str, field: &str) -> Result<Broker> {
    let id = std::process::id();
    let folder = std::env::temp_dir().join(format!("hub-bench-{id}-{kind}"));
    let output = Command::new(LAUNCHER)
        .args(["start", kind])
        .arg(&folder)
        // Whatever ends this process ends the broker, and its data goes.
        .args(["--parent-pid", &id.to_string(), "--temporary"])
        .output()
        .context("scripts/brokers cannot be run")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let found = said.pointer(field).and_then(|v| v.as_str());
    Ok(Broker {
        kind,
        address: found.context("the launcher's answer")?.to_owned(),
        started: Some(folder),
    })
}

impl Drop for Brokers {
    fn drop(&mut self) {
        for folder in self.0.iter().filter_map(|b| b.started.as_ref()) {
            // The launcher's keeper does it too, when this process has ended.
            let _ = Command::new(LAUNCHER).arg("remove").arg(folder).status();
        }
    }
}

const LAUNCHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/brokers");
const SCENARIOS: &[&str] = &[
    "rabbitmq", "kafka", "embedded", "journal", "http", "failover",
];
