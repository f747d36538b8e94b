//! Replays: over the embedded broker, over Kafka with a bare client as judge, and
//! through the binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(feature = "server")]
mod process;
mod support;

#[path = "replay/embedded.rs"]
mod embedded;

#[cfg(feature = "kafka")]
#[path = "replay/kafka.rs"]
mod kafka;

#[cfg(feature = "server")]
#[path = "replay/outside.rs"]
mod outside;
