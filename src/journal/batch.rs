//! What a caller hands over: puts and removes that become durable together.

use bytes::Bytes;

use super::{
    EntryId,
    format::{FRAME_HEADER, PUT_HEADER, REMOVE_LEN},
};

/// Puts and removes that become durable together or not at all.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(super) puts: Vec<Bytes>,
    pub(super) removes: Vec<EntryId>,
    pub(super) urgent: bool,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry and says which put of this batch it is: its id will be
    /// [`Appended::first`](super::Appended::first) plus that.
    pub fn put(&mut self, body: impl Into<Bytes>) -> usize {
        self.puts.push(body.into());
        self.puts.len() - 1
    }

    /// Removes an entry. One that is not there is ignored.
    pub fn remove(&mut self, id: EntryId) {
        self.removes.push(id);
    }

    /// Has it synced at once, where syncs may otherwise be late
    /// ([`JournalOptions::sync_delay`](super::JournalOptions::sync_delay)).
    pub fn hurry(&mut self) {
        self.urgent = true;
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.removes.is_empty()
    }

    /// Bytes that it takes in the log.
    pub(super) fn encoded_len(&self) -> u64 {
        let puts: u64 = self
            .puts
            .iter()
            .map(|body| (PUT_HEADER + body.len()) as u64)
            .sum();
        (FRAME_HEADER + self.removes.len() * REMOVE_LEN) as u64 + puts
    }
}
