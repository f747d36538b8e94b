//! A durable log of entries: put, read, remove, each durable when it says so.
//! The spool, and the embedded broker's queues and streams, keep their messages
//! in one, each in a folder of its own. It knows nothing of messages, and it is
//! no database: entries have a number and a body, and no order but the log's.
//!
//! ```text
//!   append --> queue --> writer thread --> segment, segment, segment
//!                 \          |                 |            |
//!                  \         '- one fdatasync  |            '- oldest: deleted when
//!   read <--- memory or file    for all that   |               nothing in it lives,
//!                               was queued     '- 1 frame      emptied when little does
//!                                                 = 1 batch
//! ```
//!
//! What holds:
//! - A batch is durable whole or not at all, and never before the ones appended
//!   earlier. What [`Journal::synced`] has confirmed survives a power cut, as far
//!   as the disk honours a sync.
//! - After a failed write or sync nothing more is confirmed, ever, until the
//!   journal is opened again; the cause is in every error.
//! - Damage in what was durable is an error that names the place; only the torn
//!   end of the last segment, which nobody was told is durable, is cut off.
//! - Memory does not grow with the backlog, but for some bits for each live entry.
//!
//! ```
//! use messaging_hub::journal::{Batch, Journal, JournalOptions};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! let opened = Journal::open(folder.path(), JournalOptions::default())?;
//! let journal = opened.recover(|id, body| println!("{id} is still here: {body:?}"))?;
//!
//! let mut batch = Batch::new();
//! batch.put("hello");
//! let appended = journal.append(batch)?;
//! journal.synced(appended.lsn).await?;
//! assert_eq!(journal.read(&[appended.first])?, [Some("hello".into())]);
//! journal.close()?;
//! # Ok(())
//! # }
//! ```

mod batch;
mod compact;
mod cursor;
mod error;
mod format;
mod handle;
mod index;
mod lock;
mod opening;
mod options;
mod reader;
mod recovery;
mod segment;
mod shared;
mod state;
mod storage;
mod writer;

#[cfg(test)]
mod tests;

pub use batch::Batch;
pub use error::JournalError;
pub use handle::{Appended, Durable, Journal, Usage};
pub use opening::{Opened, RecoveryReport};
pub use options::JournalOptions;
pub use recovery::TornTail;

/// An entry's number: given by the journal, rising without gaps from 1, never
/// given again.
pub type EntryId = u64;

/// A batch's number, rising from 1 with each opening of the journal.
pub type Lsn = u64;
