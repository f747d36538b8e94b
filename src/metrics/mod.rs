//! Counters and latencies of brokers and of the hub. Counting never fails and
//! never blocks on I/O; rendering for Prometheus is the gateway's business.

mod counters;
mod histogram;

pub use counters::{BrokerMetrics, Counter, MetricsRecorder};
pub use histogram::{Histogram, LatencySummary};
