//! What a bench says at its end: a table for people, or JSON for machines.

use serde_json::{Map, Value, json};

use super::{
    latency::Latencies,
    load::Shape,
    machine,
    run::Runs,
    stats::{self, Ratio, Spread},
};
use crate::{config::MessagingConfig, hub::state::BrokerState};

/// All rows, and under which conditions they were measured.
pub(super) struct Report {
    scenario: &'static str,
    groups: Vec<Vec<RowReport>>,
    settings: Map<String, Value>,
    notes: Vec<String>,
}

/// One row.
pub(super) struct RowReport {
    pub(super) name: String,
    pub(super) durability: String,
    pub(super) rate: Spread,
    pub(super) latencies: Latencies,
    pub(super) ratio: Option<Ratio>,
    /// Of this process, in microseconds.
    pub(super) cpu_per_message: Option<f64>,
    pub(super) spooled: u64,
}

impl Report {
    /// A report of groups whose first row is the hub, to which the others'
    /// ratios are.
    pub(super) fn of_runs(scenario: &'static str, shape: &Shape, groups: Vec<Vec<Runs>>) -> Self {
        let groups = groups.into_iter().map(|group| {
            let hub: Vec<f64> = group.first().map(rates).unwrap_or_default();
            group
                .iter()
                .map(|runs| RowReport::new(runs, &hub))
                .collect()
        });
        let mut report = Self::new(scenario, shape, groups.collect());
        report.set("pairs", shape.pairs);
        if report.groups.iter().flatten().any(|row| row.spooled > 0) {
            report.note("what was spooled had no confirm within the hedge: the broker stalled, or the machine is too busy for the window");
        }
        report
    }

    pub(super) fn new(scenario: &'static str, shape: &Shape, groups: Vec<Vec<RowReport>>) -> Self {
        let mut report = Self {
            scenario,
            groups,
            settings: Map::new(),
            notes: Vec::new(),
        };
        report.set("version", env!("CARGO_PKG_VERSION"));
        report.set("debug_build", cfg!(debug_assertions));
        report.set("time_s", shape.time.as_secs_f64());
        report.set("size", shape.size);
        report.set("producers", shape.producers);
        report.set("confirm", shape.window);
        report.set("rate", shape.rate);
        report.set("cores", machine::cores());
        report.set("load_average", machine::load());
        if shape.consumers > 0 {
            report.set("consumers", shape.consumers);
            report.set("qos", shape.prefetch);
        }
        if cfg!(debug_assertions) {
            report.note("a debug build: its numbers say nothing about the hub");
        }
        report
    }

    /// A further condition.
    pub(super) fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.settings.insert(name.to_owned(), value.into());
    }

    /// A sentence that readers of the table need.
    pub(super) fn note(&mut self, sentence: &str) {
        self.notes.push(sentence.to_owned());
        let notes = self.settings.entry("notes").or_insert_with(|| json!([]));
        if let Some(notes) = notes.as_array_mut() {
            notes.push(sentence.into());
        }
    }

    /// Which guarantees the hub's configuration weakened.
    pub(super) fn weakened(&mut self, config: &MessagingConfig) {
        let weakened: Vec<String> = config
            .weakened()
            .iter()
            .map(|w| format!("{} ({})", w.what, w.clause))
            .collect();
        self.set("weakened", weakened);
    }

    /// Which servers it was.
    #[cfg_attr(
        not(any(feature = "rabbitmq", feature = "kafka")),
        allow(dead_code, reason = "there is no server")
    )]
    pub(super) fn servers(&mut self, brokers: &[BrokerState]) {
        let servers = brokers.iter().filter_map(|b| {
            let version = b.server_version.as_ref()?;
            Some(json!({"type": b.kind, "version": version}))
        });
        let servers: Vec<Value> = servers.collect();
        self.set("servers", servers);
    }

    pub(super) fn json(&self) -> Value {
        let rows: Vec<Value> = self.groups.iter().flatten().map(RowReport::json).collect();
        json!({"scenario": self.scenario, "rows": rows, "settings": self.settings})
    }

    pub(super) fn table(&self) -> String {
        let width = |row: &RowReport| row.name.chars().count();
        let names = self.groups.iter().flatten().map(width).max().unwrap_or(0);
        let mut out = format!(
            "{:names$}  {:>10} {:>21} {:>9} {:>9} {:>9}  {:<24} {:>8} {:<10}\n",
            "ROW",
            "MSG/S",
            "MIN-MAX",
            "P50 MS",
            "P99 MS",
            "P99.9 MS",
            "HUB/ROW",
            "CPU US",
            "DURABLE",
        );
        for group in &self.groups {
            for row in group {
                out.push_str(&row.line(names));
                out.push('\n');
            }
            out.push('\n');
        }
        let said: Vec<String> = SHOWN
            .iter()
            .filter_map(|(name, label)| match self.settings.get(*name)? {
                Value::Null => None,
                Value::String(text) => Some(format!("{label} {text}")),
                other => Some(format!("{label} {other}")),
            })
            .collect();
        out.push_str(&said.join(", "));
        out.push('\n');
        let weakened = self.settings.get("weakened").and_then(Value::as_array);
        for what in weakened.into_iter().flatten().filter_map(Value::as_str) {
            out.push_str(&format!("weakened: {what}\n"));
        }
        for note in &self.notes {
            out.push_str(&format!("note: {note}\n"));
        }
        out
    }
}

impl RowReport {
    #[allow(clippy::cast_precision_loss, reason = "counts are below 2^52")]
    fn new(runs: &Runs, hub: &[f64]) -> Self {
        let rates = rates(runs);
        let mut latencies = Latencies::new();
        for run in &runs.runs {
            latencies.add(&run.latencies);
        }
        let messages: u64 = runs.runs.iter().map(|r| r.messages).sum();
        let cpu: Option<f64> = runs.runs.iter().map(|r| Some(r.cpu?.as_secs_f64())).sum();
        Self {
            name: runs.name.clone(),
            durability: runs.durability.to_owned(),
            rate: stats::spread(&rates),
            latencies,
            ratio: stats::ratio(hub, &rates),
            cpu_per_message: cpu.map(|s| s * 1e6 / messages.max(1) as f64),
            spooled: runs.runs.iter().map(|r| r.spooled).sum(),
        }
    }

    fn json(&self) -> Value {
        let quantile = |share| self.latencies.quantile_us(share).map(tenths);
        let interval = self.ratio.and_then(|r| r.interval);
        json!({
            "name": self.name,
            "durability": self.durability,
            "rate": tenths(self.rate.median),
            "rate_min": tenths(self.rate.min),
            "rate_max": tenths(self.rate.max),
            "p50_us": quantile(0.5),
            "p99_us": quantile(0.99),
            "p999_us": quantile(0.999),
            "ratio": self.ratio.map(|r| thousandths(r.value)),
            "ratio_low": interval.map(|i| thousandths(i.0)),
            "ratio_high": interval.map(|i| thousandths(i.1)),
            "ratio_confidence": interval.and(self.ratio).map(|r| thousandths(r.confidence)),
            "no_difference_shown": self.ratio.filter(|r| r.interval.is_some()).map(|r| r.shows_no_difference()),
            "cpu_us_per_message": self.cpu_per_message.map(thousandths),
            "spooled": self.spooled,
        })
    }

    fn line(&self, names: usize) -> String {
        let ms = |share| {
            let us = self.latencies.quantile_us(share);
            us.map_or_else(|| "-".to_owned(), |us| format!("{:.2}", us / 1000.0))
        };
        let ratio = self.ratio.map_or_else(String::new, |r| match r.interval {
            Some((low, high)) => format!("{:.3} ({low:.3}-{high:.3})", r.value),
            None => format!("{:.3}", r.value),
        });
        let cpu = self.cpu_per_message.map(|us| format!("{us:.2}"));
        let mut line = format!(
            "{:names$}  {:>10.0} {:>21} {:>9} {:>9} {:>9}  {ratio:<24} {:>8} {}",
            self.name,
            self.rate.median,
            format!("{:.0}-{:.0}", self.rate.min, self.rate.max),
            ms(0.5),
            ms(0.99),
            ms(0.999),
            cpu.unwrap_or_else(|| "-".to_owned()),
            self.durability,
        );
        if self
            .ratio
            .is_some_and(|r| r.shows_no_difference() && !r.is_of_itself())
        {
            line.push_str("  no difference shown");
        }
        if self.spooled > 0 {
            line.push_str(&format!("  {} spooled", self.spooled));
        }
        line
    }
}

fn rates(runs: &Runs) -> Vec<f64> {
    runs.runs.iter().map(super::run::Run::rate).collect()
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Settings that stand under the table, with what they are called there.
const SHOWN: &[(&str, &str)] = &[
    ("pairs", "pairs"),
    ("time_s", "seconds a run"),
    ("size", "bytes"),
    ("producers", "producers"),
    ("confirm", "window"),
    ("consumers", "consumers"),
    ("qos", "prefetch"),
    ("rate", "messages/s wanted"),
    ("cores", "cores"),
    ("load_average", "load"),
    ("data", "data"),
    ("fault", "fault"),
    ("lost", "lost"),
    ("duplicates", "twice"),
    ("recovery_ms", "recovery ms"),
    ("drain_rate", "drained/s"),
];
