//! The table at the end: on the terminal, and as JSON.

use std::fmt::Write as _;

use crate::cell::Cell;
use crate::judge::Row;

/// What became of each cell.
#[derive(Default)]
pub struct Table {
    rows: Vec<Row>,
    /// Cells that broke off, with what they said.
    broken: Vec<(Cell, u64, String)>,
    /// Cells that could not be run, with the reason.
    absent: Vec<(Cell, String)>,
}

impl Table {
    pub fn add(&mut self, row: Row) {
        println!("{}", line(&row));
        for why in &row.why {
            println!("    {}: {why}", row.cell);
        }
        self.rows.push(row);
    }

    pub fn broke(&mut self, cell: Cell, seed: u64, why: String) {
        println!("{cell}: broke off (seed {seed}): {why}");
        self.broken.push((cell, seed, why));
    }

    pub fn not_run(&mut self, cell: Cell, why: String) {
        self.absent.push((cell, why));
    }

    pub fn join(&mut self, other: Self) {
        self.rows.extend(other.rows);
        self.broken.extend(other.broken);
        self.absent.extend(other.absent);
    }

    /// Prints everything; the names of the cells that failed.
    pub fn finish(mut self, seed: u64, seconds: f64) -> Vec<String> {
        self.rows.sort_by(|a, b| a.cell.cmp(&b.cell));
        let mut text = format!("\n{HEAD}\n");
        for row in &self.rows {
            let _ = writeln!(text, "{}", line(row));
        }
        for (cell, own, why) in &self.broken {
            let _ = writeln!(text, "| {cell} | BROKE OFF (seed {own}): {why}");
        }
        let mut reasons: Vec<(String, Vec<String>)> = Vec::new();
        for (cell, why) in &self.absent {
            match reasons.iter_mut().find(|(known, _)| known == why) {
                Some((_, cells)) => cells.push(cell.to_string()),
                None => reasons.push((why.clone(), vec![cell.to_string()])),
            }
        }
        for (why, cells) in &reasons {
            let _ = writeln!(text, "n/a, {why}: {}", cells.join(" "));
        }
        let passed = self.rows.iter().filter(|r| r.passed).count();
        let total = self.rows.len() + self.broken.len();
        let _ = writeln!(
            text,
            "{passed} of {total} cells passed, {} n/a, in {seconds:.0} s; FAULTS_SEED={seed}",
            self.absent.len()
        );
        println!("{text}");
        if let Ok(file) = std::env::var("FAULTS_JSON") {
            let absent: Vec<_> = self
                .absent
                .iter()
                .map(|(cell, why)| serde_json::json!({"cell": cell.to_string(), "why": why}))
                .collect();
            let broken: Vec<_> = self
                .broken
                .iter()
                .map(|(cell, seed, why)| {
                    serde_json::json!({"cell": cell.to_string(), "seed": seed, "why": why})
                })
                .collect();
            let json = serde_json::json!({
                "seed": seed, "seconds": seconds, "rows": self.rows,
                "broken": broken, "not_applicable": absent,
            });
            std::fs::write(&file, json.to_string())
                .unwrap_or_else(|e| panic!("FAULTS_JSON={file}: {e}"));
        }
        let failed = self.rows.iter().filter(|r| !r.passed);
        let failed = failed.map(|r| r.cell.clone());
        failed
            .chain(self.broken.iter().map(|(cell, _, _)| cell.to_string()))
            .collect()
    }
}

fn line(row: &Row) -> String {
    format!(
        "| {} | {} | {} | {}/{}/{}/{} | {} | {} | {}/{:.1}/{:.0}/{:.0} ({:.0}+{:.0}+{:.0}) | {}/{}/{}/{}/{} | {} | {}/{} | {}/{} | {:.0} |",
        if row.passed { "ok" } else { "FAILED" },
        row.cell,
        row.seed,
        row.published,
        row.spooled,
        row.repeated,
        row.failed,
        row.struck_in,
        row.outage_ms,
        row.outage_publishes,
        row.p99_ms,
        row.worst_ms,
        row.limit_ms,
        row.hiccup_ms,
        row.sync_ms,
        row.before_ms,
        row.lost,
        row.unexpected,
        row.corrupted,
        row.reordered,
        row.left_over,
        row.twice_in_process,
        row.duplicates,
        row.bound,
        row.through_duplicates,
        row.through_bound,
        row.seconds,
    )
}

const HEAD: &str = "| | cell | seed | published/spooled/repeated/failed | struck in, spool | outage ms | \
publishes in the outage/p99/worst/limit ms (hiccup+sync+before) | lost/unexpected/corrupted/reordered/left | \
twice in process | foreign duplicates/bound | hub's duplicates/bound | s |";
