//! Dead letters: looking at what failed for good, and deciding about it. The
//! same on every broker, because a broker keeps them in one of two ways:
//!
//! ```text
//!   a queue   its messages are the open letters; one that is decided moves,
//!             as a record, to the queue `<dead-letter queue>.decided`
//!   a log     its records are the letters; a decision is a record behind its
//!             letter, in the same partition
//! ```
//!
//! A letter is reprocessed by publishing a copy to where it came from. It leaves
//! its queue, or is marked in its log, only when the copy is safe. Dying in
//! between leaves it open, and the copies of one letter are one to whoever
//! handles them (`copy`), so that doing it again does nothing twice.
//!
//! A queue can be looked at only by taking its messages and giving them back:
//! while one hub looks, others do not see what it holds. It refuses to hold
//! more than [`MOST_LETTERS`] letters or [`MOST_BYTES`] of them at a time, and
//! says when there were more. Nothing is ever dropped because it did not fit.

mod backoff;
mod copy;
mod desk;
mod edit;
mod letter;
mod log;
mod place;
mod process;
mod query;
mod queue;

pub use backoff::Backoff;
pub use desk::{Purged, ReprocessedMany};
pub use edit::Edit;
pub use letter::{DeadLetter, Decision, LetterStatus};
pub use process::{DeadLetterProcessor, ProcessorOptions};
pub use query::{Away, LetterPage, LetterQuery};

pub(crate) use desk::{Desk, Outlet};
pub(crate) use place::Place;
pub(crate) use process::run;

use serde::Serialize;

use crate::broker::Receipt;

/// What became of one letter that was to be reprocessed.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Reprocessed {
    /// Its copy is safe, and the letter is done with.
    Processed {
        /// Which letter.
        letter: String,
        /// Where the copy went.
        topic: String,
        /// What became of the copy.
        #[serde(flatten)]
        receipt: Receipt,
    },
    /// A copy was published, and the letter stays open all the same: the copy is
    /// in this process's memory only, or the letter could not be taken away.
    /// Doing it again does nothing twice.
    LeftOpen {
        /// Which letter.
        letter: String,
        /// Where the copy went.
        topic: String,
        /// What became of the copy.
        #[serde(flatten)]
        receipt: Receipt,
        /// Why.
        reason: String,
    },
    /// It was done with before; nothing was published.
    AlreadyProcessed {
        /// Which letter.
        letter: String,
    },
    /// Nothing was published, or nobody knows; the letter stays open.
    Failed {
        /// Which letter.
        letter: String,
        /// Why.
        #[serde(skip)]
        error: crate::Error,
    },
}

impl Reprocessed {
    /// Which letter.
    #[must_use]
    pub fn letter(&self) -> &str {
        match self {
            Self::Processed { letter, .. }
            | Self::LeftOpen { letter, .. }
            | Self::AlreadyProcessed { letter }
            | Self::Failed { letter, .. } => letter,
        }
    }
}

/// Letters that are held at a time, of one place: what an operator reads, and
/// what a quorum queue hands out and takes back in a second or two.
pub const MOST_LETTERS: usize = 5_000;

/// Bytes of letters that are held at a time, of one place.
pub const MOST_BYTES: usize = 64 * 1024 * 1024;

/// Decided letters that a queue keeps until they are purged. When it holds so
/// many, further ones are logged only.
pub const MOST_DECIDED: u64 = 10_000;
