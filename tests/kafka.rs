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

#[path = "kafka/publishing.rs"]
mod publishing;
