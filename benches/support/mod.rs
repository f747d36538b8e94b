//! What benchmarks share: brokers to run on, payloads, and pairs of rates.

pub(crate) mod raw_amqp;
pub(crate) mod raw_kafka;

use std::{path::PathBuf, process::Command, time::Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use messaging_hub::Message;

/// Where RabbitMQ and Kafka are; those started here end with this.
pub(crate) struct Brokers {
    pub(crate) rabbitmq: String,
    pub(crate) kafka: String,
    started: Vec<PathBuf>,
}

impl Brokers {
    /// Those that the environment names, otherwise new ones.
    pub(crate) fn find() -> Result<Self> {
        let given = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let mut brokers = Self {
            rabbitmq: String::new(),
            kafka: String::new(),
            started: Vec::new(),
        };
        brokers.rabbitmq = match given("RABBITMQ_URL") {
            Some(url) => url,
            None => brokers.start("rabbitmq-4", "/url")?,
        };
        brokers.kafka = match given("KAFKA_BROKERS") {
            Some(servers) => servers,
            None => format!("127.0.0.1:{}", brokers.start("kafka-4", "/port")?),
        };
        Ok(brokers)
    }

    /// Starts one; the field of what the launcher says of it.
    fn start(&mut self, kind: &str, field: &str) -> Result<String> {
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
        self.started.push(folder);
        let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let found = said.pointer(field).context("the launcher's answer")?;
        Ok(found
            .as_str()
            .map_or_else(|| found.to_string(), str::to_owned))
    }
}

impl Drop for Brokers {
    fn drop(&mut self) {
        for folder in &self.started {
            // The launcher's keeper does it too, when this process has ended.
            let _ = Command::new(LAUNCHER).arg("remove").arg(folder).status();
        }
    }
}

/// 128 bytes that do not compress, one of a few.
fn body(n: usize) -> Bytes {
    static BODIES: std::sync::OnceLock<Vec<Bytes>> = std::sync::OnceLock::new();
    let bodies = BODIES.get_or_init(|| {
        let mut random = fastrand::Rng::with_seed(1);
        (0..BODIES_KEPT)
            .map(|_| (0..PAYLOAD).map(|_| random.u8(..)).collect())
            .collect()
    });
    bodies.get(n % BODIES_KEPT).cloned().unwrap_or_default()
}

/// One of a few keys, so that every partition is used.
pub(crate) fn key(n: usize) -> String {
    format!("key-{}", n % KEYS)
}

/// The message of both sides.
pub(crate) fn message(n: usize, keyed: bool) -> Message {
    let message = Message::new(KIND, body(n)).with_content_type("application/json");
    if keyed {
        message.with_key(key(n))
    } else {
        message
    }
}

/// Messages a second.
pub(crate) fn rate(count: usize, since: Instant) -> f64 {
    #[allow(clippy::cast_precision_loss)]
    let count = count as f64;
    count / since.elapsed().as_secs_f64()
}

/// The machine's load, as Linux tells it.
pub(crate) fn load() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|s| s.split(' ').next().map(str::to_owned))
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Rates of two sides, pair by pair.
pub(crate) struct Pairs {
    name: String,
    rates: Vec<(f64, f64)>,
}

impl Pairs {
    pub(crate) fn new(name: &str) -> Self {
        println!("{name}");
        Self {
            name: name.to_owned(),
            rates: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, raw: f64, hub: f64) {
        println!(
            "  pair {}: raw {raw:>9.0}/s  hub {hub:>9.0}/s  hub/raw {:.3}  load {}",
            self.rates.len() + 1,
            hub / raw,
            load()
        );
        self.rates.push((raw, hub));
    }

    pub(crate) fn print(&self) {
        let of = |f: fn(&(f64, f64)) -> f64| {
            let mut values: Vec<f64> = self.rates.iter().map(f).collect();
            values.sort_by(f64::total_cmp);
            let at = |n: usize| values.get(n).copied().unwrap_or_default();
            (
                at(values.len() / 2),
                at(0),
                at(values.len().saturating_sub(1)),
            )
        };
        let (raw, raw_min, raw_max) = of(|r| r.0);
        let (hub, hub_min, hub_max) = of(|r| r.1);
        let (ratio, ratio_min, ratio_max) = of(|r| r.1 / r.0);
        println!(
            "{}: median (min-max) of {} pairs",
            self.name,
            self.rates.len()
        );
        println!("  raw     {raw:.0}/s ({raw_min:.0}-{raw_max:.0})");
        println!("  hub     {hub:.0}/s ({hub_min:.0}-{hub_max:.0})");
        println!("  hub/raw {ratio:.3} ({ratio_min:.3}-{ratio_max:.3})");
    }
}

const LAUNCHER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/brokers");
/// Bytes of a payload.
pub(crate) const PAYLOAD: usize = 128;
const KIND: &str = "bench";
const BODIES_KEPT: usize = 1024;
const KEYS: usize = 60;
