//! From a consumer to handlers: order, concurrency, panics, time-outs, retries.
//!
//! - Queues: as many handlers at once as the subscription allows, in any order.
//! - Streams: messages of one topic and key strictly one after the other,
//!   keyless ones by topic and partition, different keys side by side.
//! - A failed message is given to the broker to rest, or tried again in its own
//!   lane, whichever the consumer says; after the last attempt it goes to the
//!   dead letters. Attempts = 1 + retries.
//!
//! It does not decode, reconnect or acknowledge by itself: that is the
//! consumer's business.

mod attempt;
mod engine;
mod lanes;
mod router;
mod settings;
mod subscriptions;
#[cfg(test)]
mod subscriptions_tests;
#[cfg(test)]
mod tests;

pub(crate) use attempt::call;
pub use engine::{dispatch, run};
pub use router::TypeRouter;
pub use settings::{DispatchSettings, EVENT_RETRY_DELAY, STREAM_CONCURRENCY, TASK_RETRY_DELAY};
pub use subscriptions::{CLOSE_GRACE, Subscriptions};
