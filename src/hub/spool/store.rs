//! Where a spool is kept, as far as the lanes need to know. The journal is one;
//! without any a spool is in memory.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use crate::error::Result;

/// What a store calls something that it keeps.
pub(crate) type KeptId = u64;

/// How far a store has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Synced {
    /// Everything written with this number or a smaller one is on the disk.
    pub(crate) up_to: u64,
    /// Why nothing later ever will be.
    pub(crate) broken: Option<Arc<str>>,
}

/// Something written, not necessarily synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) id: KeptId,
    /// On the disk when [`Synced::up_to`] has reached this.
    pub(crate) number: u64,
}

/// Keeps spooled messages. No call waits for a disk.
pub(crate) trait SpoolStore: Send + Sync {
    /// Keeps one more.
    fn put(&self, body: Bytes) -> Result<Written>;

    /// Keeps another form of it, under another name: one or the other survives.
    fn replace(&self, old: KeptId, body: Bytes) -> Result<Written>;

    /// Lets go of one.
    fn remove(&self, id: KeptId) -> Result<()>;

    /// How far the disk has come.
    fn synced(&self) -> watch::Receiver<Synced>;
}
