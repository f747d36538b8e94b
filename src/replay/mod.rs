//! Replay: what a stream still has of a stretch of time is published again, to
//! the same topic or to another, while its live readers go on undisturbed.
//!
//! ```text
//!   request -> check -> plan (partitions, from, end) -> Job ---- Open, Read ----> source
//!                                                        ^ '---- Publish -------> hub
//!                                                        '------ outcomes --------'
//! ```
//!
//! The job is pure: the time and what happened go in, what to do comes out. The
//! runner is the thin shell around it, over any broker with streams. Who owns the
//! jobs, and how many there may be, is the hub's business.
//!
//! It reads without a group, so it moves nobody's position, and up to an end that
//! is fixed when it starts, so that a replay into the topic that it reads ends.
//! It refuses to read work queues: what was handled there is gone. It keeps
//! nothing on disk: a replay ends with its hub.

mod copy;
mod filter;
mod job;
mod plan;
mod progress;
mod registry;
mod request;
mod runner;
mod seen;

#[cfg(test)]
mod job_tests;

pub use progress::{Replay, ReplayPlace, ReplayProgress, ReplayStatus};
pub use request::{MAX_BATCH, ReplayFilter, ReplayOptions, ReplayRequest};

pub(crate) use copy::Copied;
pub(crate) use job::Job;
pub(crate) use plan::{MAX_TOPICS, Source};
pub(crate) use registry::{Entry, MAX_ACTIVE, Registry};
pub(crate) use request::Wanted;
pub(crate) use runner::{Outcome, Sink, run};
