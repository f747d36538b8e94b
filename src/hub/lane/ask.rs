//! What others may ask of a lane's task: pages of its spool, and a word that
//! what operators want is in force. Answers are bounded, whatever the spool
//! holds.

use tokio::sync::oneshot;

use super::machine::Machine;
use crate::hub::spool::{Entry, Seq, Status};

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
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) entries: Vec<(Seq, Entry, Status)>,
    /// Where the next page begins, if there is one.
    pub(crate) next: Option<Seq>,
    /// The number of the next publish, at the time of this page.
    pub(crate) end: Seq,
}

/// Questions that wait for a lane's task.
pub(crate) const ASKS_BOUND: usize = 16;

/// Messages of one page at most.
pub(crate) const MAX_PAGE: usize = 1_000;

/// Bytes after which a page is full; one message always fits.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// The page that was asked for.
pub(super) fn page<W>(machine: &Machine<W>, wanted: PageWanted) -> Page {
    let end = machine.next_seq();
    let until = wanted.until.unwrap_or(end);
    let limit = wanted.limit.min(MAX_PAGE);
    let mut entries = Vec::new();
    let mut bytes = 0_usize;
    let mut next = None;
    for (seq, entry, status) in machine.from(wanted.from) {
        if seq >= until {
            break;
        }
        let full = bytes.saturating_add(entry.size) > PAGE_BYTES && !entries.is_empty();
        if full || entries.len() >= limit {
            next = Some(seq);
            break;
        }
        bytes = bytes.saturating_add(entry.size);
        entries.push((seq, entry.clone(), status));
    }
    Page { entries, next, end }
}
