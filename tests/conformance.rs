//! The conformance suite over every broker there is. A failed check that a
//! broker declared fails the test; the table is printed either way.
//!
//! `CONFORMANCE_BROKERS` (such as `embedded,hub over embedded`) and `CONFORMANCE_CHECKS`
//! (parts of check names, comma-separated) choose; `CONFORMANCE_JSON` names a
//! file for the figures.
#![cfg(feature = "conformance")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(any(feature = "rabbitmq", feature = "kafka"))]
#[path = "support/mod.rs"]
mod support;

#[cfg(any(feature = "rabbitmq", feature = "kafka"))]
#[path = "conformance/live.rs"]
mod live;

use std::{io::Write as _, path::Path, sync::Arc};

use futures_util::future::join_all;
#[cfg(feature = "journal")]
use messaging_hub::conformance::killed::KilledEmbedded;
use messaging_hub::{
    broker::MessageBroker,
    conformance::{
        Factory, Filter, Report, Table,
        embedded::{self, EmbeddedFactory},
        hub::HubFactory,
        run,
    },
    hub::{HubConfig, MessagingHub},
};
use tokio::sync::Semaphore;

/// Backends on one server: the checks that kill it must meet no other.
type Neighbours = Vec<Arc<dyn Factory>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_broker_conforms() {
    log_to_stderr();
    let chosen = std::env::var("CONFORMANCE_BROKERS").unwrap_or_default();
    let chosen: Vec<_> = chosen.split(',').map(str::trim).collect();
    let wanted = |name: &str| chosen.iter().any(|c| c.is_empty() || name == *c);
    let checks = std::env::var("CONFORMANCE_CHECKS").unwrap_or_default();
    let filter = Filter::containing(&checks);

    let folder = tempfile::tempdir().expect("a folder for journals");
    let folder = folder.path();
    let mut reports = over_all(&wanted, &filter, Phase::Together, folder).await;
    // On servers of their own: one that recovers the leavings of all the other
    // checks takes long to come back, each time.
    let killed = over_all(&wanted, &filter, Phase::Kills, folder).await;
    for (report, killed) in reports.iter_mut().zip(killed) {
        *report = std::mem::take(report).with(killed);
    }
    let table = Table::new(&reports);
    // Past the capture of the test harness: the table is wanted of a run that
    // passes, too.
    writeln!(std::io::stdout(), "\n{table}").expect("standard output");
    if let Ok(file) = std::env::var("CONFORMANCE_JSON") {
        std::fs::write(&file, format!("{:#}\n", table.to_json())).expect("CONFORMANCE_JSON");
    }
    let ran: usize = reports.iter().map(|r| r.rows.len()).sum();
    assert!(ran > 0, "no check matches CONFORMANCE_CHECKS={checks}");
    let failed: usize = reports.iter().map(|r| r.failures().count()).sum();
    assert_eq!(failed, 0, "checks failed; see the table");
}

#[derive(Clone, Copy)]
enum Phase {
    /// What leaves servers alone, several checks at a time.
    Together,
    /// What kills them.
    Kills,
}

/// One report for each wanted backend, in the order of the table.
async fn over_all(
    wanted: &impl Fn(&str) -> bool,
    filter: &Filter,
    phase: Phase,
    folder: &Path,
) -> Vec<Report> {
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    let servers = backends(wanted, phase, folder).await;
    let running = servers
        .into_iter()
        .map(|neighbours| over(neighbours, filter, phase, &at_once));
    join_all(running).await.concat()
}

async fn over(
    neighbours: Neighbours,
    filter: &Filter,
    phase: Phase,
    at_once: &Arc<Semaphore>,
) -> Vec<Report> {
    let kills = matches!(phase, Phase::Kills);
    let filter = filter.kills(kills);
    let running = neighbours
        .into_iter()
        .map(|backend| run(backend, &filter, at_once.clone()));
    if !kills {
        return join_all(running).await;
    }
    let mut reports = Vec::new();
    for one in running {
        reports.push(one.await);
    }
    reports
}

/// The backends that are wanted and can be had here.
async fn backends(wanted: &impl Fn(&str) -> bool, phase: Phase, folder: &Path) -> Vec<Neighbours> {
    let mut all: Vec<Neighbours> = Vec::new();
    if wanted("embedded") {
        all.push(vec![Arc::new(EmbeddedFactory::new())]);
    }
    #[cfg(feature = "journal")]
    if wanted(EmbeddedFactory::ON_DISK) {
        let dir = folder.join(match phase {
            Phase::Together => "together",
            Phase::Kills => "kills",
        });
        all.push(vec![match phase {
            Phase::Together => Arc::new(EmbeddedFactory::on_disk(dir)),
            Phase::Kills => Arc::new(KilledEmbedded::start(dir).await.expect("a journal")),
        }]);
    }
    #[cfg(not(feature = "journal"))]
    let _ = (phase, folder);
    if wanted(HUB_OVER_EMBEDDED) {
        all.push(vec![Arc::new(hub_over_embedded())]);
    }
    #[cfg(any(feature = "rabbitmq", feature = "kafka"))]
    all.extend(live::backends(wanted).await);
    all
}

/// The hub with no other broker than its fallback.
fn hub_over_embedded() -> HubFactory {
    let backend = Arc::new(EmbeddedFactory::new());
    let over = backend.clone();
    HubFactory::new(HUB_OVER_EMBEDDED, over, move || {
        let broker = backend.broker();
        Box::pin(async move {
            broker.connect().await?;
            let hub = MessagingHub::new(HubConfig::default(), embedded::topology());
            hub.set_fallback_broker(broker)?;
            Ok(hub)
        })
    })
}

/// What the library says of itself, where RUST_LOG asks for it.
fn log_to_stderr() {
    #[cfg(feature = "server")]
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .init();
    }
}

const HUB_OVER_EMBEDDED: &str = "hub over embedded";

/// Checks that run at a time. Most of a check is waiting, for what must not
/// come; more at once than this and two cores make each other late.
const AT_ONCE: usize = 3;
