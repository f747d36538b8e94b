//! What others may ask of a lane's task: pages of its spool, and a word that
//! what operators want is in force. Answers are bounded, whatever the spool
//! holds; what is on the disk only is read by whoever asked, not by the task.

use tokio::sync::oneshot;

use super::{
    keeper::{Keeper, Loader},
    machine::Machine,
};
use crate::error::Result;
use crate::hub::spool::{ENTRY_OVERHEAD, Entry, Seq, Status};

/// A question to a lane's task. It is answered as soon as the task comes to it;
/// dropped unanswered when the task has ended.
pub(crate) enum Ask {
    /// Whether what operators want by now is in force.
    Obeyed(oneshot::Sender<()>),
    /// A page of the spool.
    Page(PageWanted, oneshot::Sender<Page>),
}

/// Which page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageWanted {
    /// From here on.
    pub(crate) from: Seq,
    /// What was published later is left out.
    pub(crate) until: Option<Seq>,
    /// Messages at most.
    pub(crate) limit: usize,
}

/// Some messages of a spool, in publish order. They stay in the spool.
pub(crate) struct Page {
    pub(crate) entries: Vec<(Seq, Entry, Status)>,
    /// Where the next page begins, if there is one.
    pub(crate) next: Option<Seq>,
    /// The number of the next publish, at the time of this page.
    pub(crate) end: Seq,
    /// Those between that are on the disk only.
    disk: Option<OnDisk>,
}

struct OnDisk {
    seqs: Vec<Seq>,
    loader: Loader,
    /// Everything up to this was left by an earlier process, and may have been
    /// written by it.
    restored: Seq,
}

/// Questions that wait for a lane's task.
pub(crate) const ASKS_BOUND: usize = 16;

/// Messages of one page at most.
pub(crate) const MAX_PAGE: usize = 1_000;

/// Bytes after which a page is full; one message always fits.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// The page that was asked for, but for what is on the disk.
pub(super) fn page<W>(machine: &Machine<W>, keeper: &Keeper<W>, wanted: PageWanted) -> Page {
    let end = machine.next_seq();
    let until = wanted.until.unwrap_or(end);
    let limit = wanted.limit.min(MAX_PAGE);
    let spool = machine.spool();
    let mut here = spool.head_from(wanted.from).peekable();
    let mut there = spool.tail_from(wanted.from).peekable();
    let (mut entries, mut seqs) = (Vec::new(), Vec::new());
    let mut bytes = 0_usize;
    let mut next = None;
    loop {
        let first = here.peek().map(|(seq, ..)| *seq);
        let on_disk = match (first, there.peek()) {
            (Some(seq), Some(other)) => *other < seq,
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (None, None) => break,
        };
        let Some(seq) = (if on_disk {
            there.peek().copied()
        } else {
            first
        }) else {
            break;
        };
        if seq >= until {
            break;
        }
        let size = here
            .peek()
            .filter(|_| !on_disk)
            .map_or(0, |(_, e, _)| e.size);
        let taken = entries.len() + seqs.len();
        if taken >= limit || (taken > 0 && bytes.saturating_add(size) > PAGE_BYTES) {
            next = Some(seq);
            break;
        }
        bytes = bytes.saturating_add(size);
        if on_disk {
            there.next();
            seqs.push(seq);
        } else if let Some((seq, entry, status)) = here.next() {
            entries.push((seq, entry.clone(), status));
        }
    }
    let loader = (!seqs.is_empty())
        .then(|| keeper.loader(seqs.clone()))
        .flatten();
    Page {
        entries,
        next,
        end,
        disk: loader.map(|loader| OnDisk {
            seqs,
            loader,
            restored: machine.restored(),
        }),
    }
}

impl Page {
    /// Whether there is anything to read from the disk.
    pub(crate) fn is_whole(&self) -> bool {
        self.disk.is_none()
    }

    /// Reads what is on the disk only; the page may get shorter, and its
    /// `next` earlier. Blocks.
    ///
    /// # Errors
    /// The disk cannot be read.
    pub(crate) fn read(mut self) -> Result<Self> {
        let Some(disk) = self.disk.take() else {
            return Ok(self);
        };
        let loaded = disk.loader.load()?;
        let read = loaded.entries.len() + loaded.unreadable.len();
        if let Some(unread) = disk.seqs.get(read).copied() {
            // Large messages: the rest is the next page.
            self.next = Some(unread);
            self.entries.retain(|(seq, ..)| *seq < unread);
        }
        for (seq, error) in loaded.unreadable {
            // Most likely it was drained since the page was made.
            tracing::debug!(seq, %error, "a spooled message is not shown");
        }
        for (seq, mut entry) in loaded.entries {
            entry.size = entry.message.size() + ENTRY_OVERHEAD;
            entry.marks.possible_duplicate |= seq <= disk.restored;
            self.entries.push((seq, entry, Status::Ready));
        }
        self.entries.sort_by_key(|(seq, ..)| *seq);
        Ok(self)
    }
}
