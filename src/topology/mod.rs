//! What should exist on the brokers, what does, and the difference. This
//! module decides; the adapters look and declare.

mod defaults;
mod drift;
mod retry;
mod spec;
mod validate;

pub use drift::{Drift, TopologyMode, TopologyReport};
pub use retry::{RetryTier, resting};
pub use spec::{AmqpAddress, Binding, ExchangeKind, ExchangeSpec, QueueSpec, TopicSpec, Topology};
