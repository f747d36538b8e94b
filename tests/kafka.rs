//! The Kafka adapter against real brokers.
#![cfg(feature = "kafka")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/mod.rs"]
mod support;

#[path = "kafka/common.rs"]
mod common;

#[path = "kafka/consuming.rs"]
mod consuming;

#[path = "kafka/faults.rs"]
mod faults;

#[path = "kafka/foreign.rs"]
mod foreign;

#[cfg(feature = "server")]
#[path = "process/mod.rs"]
mod process;

#[cfg(feature = "server")]
#[path = "kafka/killed_hub.rs"]
mod killed_hub;

#[path = "kafka/membership.rs"]
mod membership;

#[path = "kafka/publishing.rs"]
mod publishing;

#[path = "kafka/transactions.rs"]
mod transactions;

#[path = "kafka/transforms.rs"]
mod transforms;
