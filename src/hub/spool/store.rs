//! Where a spool is kept, as far as the lanes need to know. The journal is one;
//! without any a spool is in memory.

use bytes::Bytes;
use tokio::sync::watch;

use crate::error::Result;

/// What a store calls something that it keeps.
pub(crate) type KeptId = u64;

/// How far a store has come: the number up to which everything is on the disk,
/// and why nothing later ever will be.
#[cfg(feature = "journal")]
pub(crate) use crate::journal::Durable as Synced;

/// As the journal's, which is not built.
#[cfg(not(feature = "journal"))]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Synced {
    pub(crate) lsn: u64,
    pub(crate) poisoned: Option<std::sync::Arc<str>>,
    pub(crate) closed: bool,
}

/// Something written, not necessarily synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// The first of what was put; the others follow, each one more.
    pub(crate) id: KeptId,
    /// On the disk when [`Synced`]'s `lsn` has reached this.
    pub(crate) number: u64,
}

/// Keeps spooled messages.
pub(crate) trait SpoolStore: Send + Sync {
    /// Keeps some and lets go of others: all of it survives, or none. Never
    /// waits for a disk.
    fn write(&self, puts: Vec<Bytes>, removals: &[KeptId]) -> Result<Written>;

    /// Reads back what was put; none where it was let go of. Blocks.
    fn read(&self, ids: &[KeptId]) -> Result<Vec<Option<Bytes>>>;

    /// How far the disk has come.
    fn synced(&self) -> watch::Receiver<Synced>;
}
