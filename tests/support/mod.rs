//! What the integration tests share: real brokers, a faulty network, waiting.
//!
//! A test takes a node of its own (`Rabbit::start`, `Kafka::start`) when it
//! kills, pauses or restarts it, and the shared ones (`shared_rabbit`,
//! `shared_kafka`) otherwise. Nothing here stands in for a broker: without
//! one a live test fails (in CI) or says that it was skipped.

// Every test binary compiles this module and uses a part of it.
#![allow(dead_code, unused_imports, unused_macros, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod broker;
pub mod launcher;
pub mod proxy;
pub mod wait;

pub use broker::{
    Kafka, NodeOptions, Rabbit, RabbitVersion, Registry, shared_kafka, shared_rabbit,
};
pub use launcher::{NodeInfo, Unavailable};
pub use proxy::{Direction, TcpProxy};

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The broker, or the end of this test: a failure where brokers are required
/// (`CI=true` or `MESSAGING_REQUIRE_BROKERS=1`), otherwise a line that says
/// what was skipped and why. Takes the value to return as a second argument
/// where the test returns one.
macro_rules! need {
    ($broker:expr) => {
        $crate::support::need!($broker, ())
    };
    ($broker:expr, $otherwise:expr) => {
        match $broker {
            Ok(broker) => broker,
            Err(unavailable) => {
                unavailable.skip_or_fail();
                return $otherwise;
            }
        }
    };
}
pub(crate) use need;

/// What a topology without the built-in one must have beside its own, as lines
/// under `exchanges`, `queues` and `topics`: where failed work goes.
pub const RETRY_EXCHANGE: &str = "    - {name: helixagent.retry, kind: topic}\n";
pub const RETRY_QUEUES: &str = "    - {name: helixagent.dlq}
    - name: helixagent.retry
      bindings: [{exchange: helixagent.retry, routing_key: \"#\"}]
      options: {message_ttl_ms: 60000, dead_letter_exchange: \"\", dead_letter_strategy: at-least-once, overflow: reject-publish}
";
pub const DEAD_EVENTS: &str = "    - {name: helixagent.dlq.events, options: {partitions: 1}}\n";

/// A name that no other test, process or earlier run uses, for topics and
/// queues on shared nodes.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("the clock is past 1970");
    format!(
        "{prefix}-{:x}-{:x}-{}",
        now.as_micros(),
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A port on which nobody listens: whoever connects there is refused.
pub fn vacant_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
