//! What should exist on the brokers, what does, and the difference. This
//! module decides; the adapters look and declare.

mod drift;
mod spec;

pub use drift::{Drift, TopologyMode, TopologyReport};
pub use spec::{AmqpAddress, Binding, ExchangeKind, ExchangeSpec, QueueSpec, TopicSpec, Topology};
