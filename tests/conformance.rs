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

use std::sync::Arc;

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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_broker_conforms() {
    let chosen = std::env::var("CONFORMANCE_BROKERS").unwrap_or_default();
    let chosen: Vec<_> = chosen.split(',').map(str::trim).collect();
    let wanted = |name: &str| chosen.iter().any(|c| c.is_empty() || name == *c);
    let checks = std::env::var("CONFORMANCE_CHECKS").unwrap_or_default();
    let filter = Filter::containing(&checks);

    let mut reports: Vec<Report> = Vec::new();
    for factory in factories(&wanted).await {
        let report = run(factory, &filter).await;
        println!("{report}");
        reports.push(report);
    }
    let table = Table::new(&reports);
    if reports.len() > 1 {
        println!("{table}");
    }
    if let Ok(file) = std::env::var("CONFORMANCE_JSON") {
        std::fs::write(&file, format!("{:#}\n", table.to_json())).expect("CONFORMANCE_JSON");
    }
    let ran: usize = reports.iter().map(|r| r.rows.len()).sum();
    assert!(ran > 0, "no check matches CONFORMANCE_CHECKS={checks}");
    let failed: usize = reports.iter().map(|r| r.failures().count()).sum();
    assert_eq!(failed, 0, "checks failed; see the table");
}

/// The backends that are wanted and can be had here.
async fn factories(wanted: &impl Fn(&str) -> bool) -> Vec<Arc<dyn Factory>> {
    let mut all: Vec<Arc<dyn Factory>> = Vec::new();
    if wanted("embedded") {
        all.push(Arc::new(EmbeddedFactory::new()));
    }
    if wanted("hub over embedded") {
        all.push(Arc::new(hub_over_embedded()));
    }
    #[cfg(feature = "rabbitmq")]
    for version in support::RabbitVersion::ALL {
        if wanted(live::rabbit_name(version)) {
            all.push(Arc::new(support::need!(
                live::RabbitFactory::start(version).await,
                all
            )));
        }
    }
    #[cfg(feature = "kafka")]
    if wanted("kafka") {
        all.push(Arc::new(support::need!(
            live::KafkaFactory::start().await,
            all
        )));
    }
    all
}

/// The hub with no other broker than its fallback.
fn hub_over_embedded() -> HubFactory {
    let backend = Arc::new(EmbeddedFactory::new());
    let over = backend.clone();
    HubFactory::new("hub over embedded", over, move || {
        let broker = backend.broker();
        Box::pin(async move {
            broker.connect().await?;
            let hub = MessagingHub::new(HubConfig::default(), embedded::topology());
            hub.set_fallback_broker(broker)?;
            Ok(hub)
        })
    })
}
