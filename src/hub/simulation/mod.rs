//! A deterministic simulation of the hub: two processes with the real machines,
//! spools, windows and codec, on two simulated brokers and simulated disks, with
//! publishers, consumers and faults, all from one seed in virtual time. After
//! each run every clause of the contract that can be checked is checked.
//!
//! ```text
//! cargo test --lib simulation                        # some seeds
//! SIM_SEEDS=100000 cargo test --lib simulation       # many, with the table
//! SIM_SEED=17 cargo test --lib simulation -- --nocapture   # one, with its trace
//! ```
//!
//! The figures, and the lines of the source that it guards, are in
//! `tests/simulation/README.md`.

mod broker;
mod consumer;
mod disk;
mod faults;
mod oracle;
mod process;
mod publisher;
mod table;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use self::{
    table::Table,
    world::{Report, World},
};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 2_000;

/// Least messages of a run.
const LEAST_MESSAGES: usize = 200;

/// Least faults that strike in a run.
const LEAST_FAULTS: usize = 3;

/// Runs a seed; a panic of the code under test is a violation like any other.
fn run(seed: u64, trace: u8) -> Result<Report, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, trace).run())).map_err(|cause| {
        cause
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| cause.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "a panic".to_owned())
    })
}

fn verdict(result: &Result<Report, String>) -> Option<String> {
    match result {
        Ok(report) => report
            .violation
            .as_ref()
            .map(|v| format!("{}: {}", v.clause, v.text)),
        Err(panic) => Some(format!("panic: {panic}")),
    }
}

/// The failing seed again, with its trace.
fn explain(seed: u64, why: &str, trace: u8) -> String {
    let lines = match run(seed, trace) {
        Ok(report) => report.lines.into_iter().collect::<Vec<_>>().join("\n"),
        Err(_) => "(it panicked; its place is above)".to_owned(),
    };
    format!("{lines}\nSEED {seed} FAILED {why}\nagain with: SIM_SEED={seed}")
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn the_contract_holds_in_every_simulated_run() {
    if let Some(seed) = variable("SIM_SEED") {
        let result = run(seed, 2);
        if let Ok(report) = &result {
            for line in &report.lines {
                eprintln!("{line}");
            }
        }
        assert_eq!(verdict(&result), None, "seed {seed}");
        return;
    }
    let from = variable("SIM_FROM").unwrap_or(0);
    let seeds = variable("SIM_SEEDS").unwrap_or(SEEDS);
    // Looks at all seeds, and lists those that fail instead of the first alone.
    let all = variable("SIM_ALL").is_some();
    let next = AtomicU64::new(from);
    let stop = AtomicBool::new(false);
    let total = Mutex::new((Table::default(), 0_u64, 0_u64));
    let failed: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut table = Table::default();
                let (mut runs, mut messages) = (0, 0);
                while !stop.load(Relaxed) {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= from + seeds {
                        break;
                    }
                    let result = run(seed, 0);
                    if let Some(why) = verdict(&result) {
                        if all {
                            eprintln!("seed {seed}: {why}");
                        }
                        stop.store(!all, Relaxed);
                        let mut failed = failed.lock().unwrap();
                        // Of those that failed at once the first is shown.
                        if failed.as_ref().is_none_or(|(s, _)| seed < *s) {
                            *failed = Some((seed, why));
                        }
                    } else if let Ok(report) = result {
                        assert!(
                            report.messages >= LEAST_MESSAGES,
                            "seed {seed}: {} messages",
                            report.messages
                        );
                        assert!(
                            report.faults >= LEAST_FAULTS,
                            "seed {seed}: {} faults",
                            report.faults
                        );
                        table.add(&report.table);
                        runs += 1;
                        messages += report.messages as u64;
                    }
                }
                let mut total = total.lock().unwrap();
                total.0.add(&table);
                total.1 += runs;
                total.2 += messages;
            });
        }
    });
    if let Some((seed, why)) = failed.into_inner().unwrap() {
        panic!("{}", explain(seed, &why, 1));
    }
    let (table, runs, messages) = total.into_inner().unwrap();
    eprintln!(
        "{runs} seeds from {from}, {messages} messages, {:.1} s\n{table}least: {}",
        begun.elapsed().as_secs_f64(),
        table.least()
    );
    if seeds >= SEEDS {
        assert!(
            table.least() > 0,
            "a fault never struck in a state\n{table}"
        );
    }
}
