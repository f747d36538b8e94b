//! The live fault matrix: the real binary against real servers, struck from
//! outside while foreign clients publish and read, and judged by the ledger.
//!
//! `FAULTS=all` runs every cell, `FAULTS_CELLS=rabbitmq/kill/draining/hold,...`
//! the ones that are named (a part may be `*`), otherwise a short set runs.
//! `FAULTS_SEED` repeats a run's choices, `FAULTS_JSON` names a file for the
//! table, `FAULTS_PAUSES` the seconds that brokers are paused for.

#![cfg(all(
    feature = "rabbitmq",
    feature = "kafka",
    feature = "conformance",
    feature = "server"
))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// A test binary has no public interface.
#![allow(unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod acceptance;
mod book;
mod cell;
mod disk;
mod foreign;
mod hiccup;
mod hub;
mod judge;
mod publisher;
mod run;
mod site;
mod table;
mod through;

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use cell::{Cell, Fault, Mode, Moment, Target};
use futures_util::FutureExt;
use site::{Node, Site};
use support::{Rabbit, RabbitVersion, Unavailable};
use table::Table;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fault_loses_reorders_or_silently_repeats_a_message() {
    let seed = seed();
    let began = Instant::now();
    println!("FAULTS_SEED={seed}");
    let all = std::env::var("FAULTS").is_ok_and(|v| v == "all");
    let cells = match std::env::var("FAULTS_CELLS") {
        Ok(names) => cell::choose(&names),
        Err(_) if all => Cell::all(),
        Err(_) => cell::choose(cell::SHORT),
    };
    let (events, tasks): (Vec<Cell>, Vec<Cell>) = cells.into_iter().partition(|c| c.uses_kafka());
    // One node of each kind: its cells run one after another.
    let (tasks, events) = tokio::join!(
        lane(tasks, seed, Site::rabbitmq),
        lane(events, seed, Site::kafka)
    );
    let mut table = Table::default();
    for part in [tasks, events] {
        match part {
            Ok(part) => table.join(part),
            Err(unavailable) => unavailable.skip_or_fail(),
        }
    }
    let failed = table.finish(seed, began.elapsed().as_secs_f64());
    assert!(failed.is_empty(), "failed: {}", failed.join(" "));
}

/// A broker that is paused for shorter and longer than the heartbeat (5 s,
/// noticed after twice that).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_paused_for_2_6_and_20_seconds_makes_no_publish_wait() {
    if !std::env::var("FAULTS").is_ok_and(|v| v == "all") {
        println!("runs with FAULTS=all");
        return;
    }
    let seed = seed();
    let began = Instant::now();
    println!("FAULTS_SEED={seed}");
    let (rabbit, kafka) = tokio::join!(
        pauses(Target::RabbitMq, Mode::Hold, seed, Site::rabbitmq),
        pauses(Target::Kafka, Mode::Events, seed, Site::kafka),
    );
    let mut table = Table::default();
    for part in [rabbit, kafka] {
        match part {
            Ok(part) => table.join(part),
            Err(unavailable) => unavailable.skip_or_fail(),
        }
    }
    let failed = table.finish(seed, began.elapsed().as_secs_f64());
    assert!(failed.is_empty(), "failed: {}", failed.join(" "));
}

/// Three kills of the broker and one of the hub under a steady load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_acceptance_run() {
    let Ok(wanted) = std::env::var("ACCEPTANCE") else {
        println!("runs with ACCEPTANCE=rabbitmq,kafka");
        return;
    };
    let rates = std::env::var("ACCEPTANCE_RATES").unwrap_or_else(|_| "5000,20000".to_owned());
    let mut failed = Vec::new();
    for broker in wanted.split(',') {
        let started = match broker {
            "rabbitmq" => Rabbit::start(RabbitVersion::V4).await.map(Node::Rabbit),
            "kafka" => support::Kafka::start().await.map(Node::Kafka),
            other => panic!("ACCEPTANCE: {other} is neither rabbitmq nor kafka"),
        };
        let mut node = match started {
            Ok(node) => node,
            Err(unavailable) => {
                unavailable.skip_or_fail();
                continue;
            }
        };
        for rate in rates.split(',') {
            let rate = rate.parse().expect("ACCEPTANCE_RATES are numbers");
            let folder = tempfile::Builder::new()
                .prefix("hub-acceptance-")
                .tempdir()
                .unwrap();
            let report = acceptance::run(&mut node, rate, folder.path()).await;
            if !report.failed.is_empty() {
                println!("  the hub's log is kept in {}", folder.keep().display());
            }
            failed.extend(
                report
                    .failed
                    .into_iter()
                    .map(|f| format!("{broker} at {rate}: {f}")),
            );
        }
    }
    assert!(failed.is_empty(), "failed:\n{}", failed.join("\n"));
}

async fn pauses(
    target: Target,
    mode: Mode,
    seed: u64,
    site: impl AsyncFnOnce() -> Result<Site, Unavailable>,
) -> Result<Table, Unavailable> {
    let mut site = site().await?;
    let mut table = Table::default();
    let cell = Cell {
        target,
        fault: Fault::Pause,
        moment: Moment::Saturated,
        mode,
    };
    let seconds = std::env::var("FAULTS_PAUSES").unwrap_or_else(|_| "2,6,20".to_owned());
    for seconds in seconds.split(',') {
        let seconds = seconds.parse().expect("FAULTS_PAUSES are seconds");
        println!("{cell}: paused for {seconds} s");
        let lasting = Some(Duration::from_secs(seconds));
        one(cell, &mut site, seed ^ seconds, lasting, &mut table).await;
    }
    Ok(table)
}

async fn lane(
    cells: Vec<Cell>,
    seed: u64,
    site: impl AsyncFnOnce() -> Result<Site, Unavailable>,
) -> Result<Table, Unavailable> {
    let mut table = Table::default();
    let mut site = match cells.iter().any(|c| c.not_applicable().is_none()) {
        true => Some(site().await?),
        false => None,
    };
    if let Some(site) = &site {
        println!("{}", site.node.version());
    }
    for cell in cells {
        match (cell.not_applicable(), &mut site) {
            (None, Some(site)) => one(cell, site, own_seed(seed, cell), None, &mut table).await,
            (reason, _) => table.not_run(cell, reason.unwrap_or("no server").to_owned()),
        }
    }
    Ok(table)
}

async fn one(
    cell: Cell,
    site: &mut Site,
    seed: u64,
    paused_for: Option<Duration>,
    table: &mut Table,
) {
    let folder = tempfile::Builder::new()
        .prefix("hub-fault-")
        .tempdir()
        .unwrap();
    let run = run::cell(cell, site, seed, folder.path(), paused_for);
    let limited = tokio::time::timeout(LONGEST, run);
    let passed = match AssertUnwindSafe(limited).catch_unwind().await {
        Ok(Ok(Ok(mut row))) => {
            if let Some(lasting) = paused_for {
                row.cell = format!("{cell} for {} s", lasting.as_secs());
            }
            let passed = row.passed;
            table.add(row);
            passed
        }
        Ok(Ok(Err(reason))) => {
            table.not_run(cell, reason);
            true
        }
        Ok(Err(_)) => {
            table.broke(cell, seed, format!("not over after {LONGEST:?}"));
            false
        }
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            table.broke(cell, seed, text.unwrap_or_default());
            false
        }
    };
    if !passed {
        println!("{cell}: {}", site.node.last_words().await);
        println!(
            "{cell}: the hub's log is kept in {}",
            folder.keep().display()
        );
    }
}

fn seed() -> u64 {
    match std::env::var("FAULTS_SEED") {
        Ok(text) => text.parse().expect("FAULTS_SEED is a number"),
        Err(_) => u64::from(fastrand::u32(..)),
    }
}

/// A cell's choices do not depend on which cells run before it.
fn own_seed(seed: u64, cell: Cell) -> u64 {
    seed ^ book::hash(cell.to_string().as_bytes()) >> 32
}

const LONGEST: Duration = Duration::from_secs(420);
