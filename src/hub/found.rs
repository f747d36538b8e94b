//! What a publisher remembers of its last publish. It only remembers: whatever
//! it does not know, or no longer holds, is looked up by the hub.

use std::{
    fmt,
    sync::{Arc, Mutex, Weak},
};

use super::{lane::task::LaneHandle, lock, publish::TopicEntry};

/// What a publisher found when it published last, so that it need not look
/// again: its topic, resolved, and the lanes it has used.
#[derive(Default)]
pub(super) struct Found(Mutex<Option<FoundAt>>);

struct FoundAt {
    entry: Arc<TopicEntry>,
    /// By lane number. Weak: a lane ends when the hub lets go of it.
    lanes: Vec<Weak<LaneHandle>>,
}

/// Lanes that a publisher remembers; those of higher numbers are looked up.
const LANES_FOUND: u32 = 1024;

impl Found {
    /// The topic, unless brokers were plugged in since it was resolved.
    pub(super) fn entry(&self, epoch: u64) -> Option<Arc<TopicEntry>> {
        let found = lock(&self.0);
        let found = found.as_ref().filter(|f| f.entry.epoch == epoch)?;
        Some(found.entry.clone())
    }

    pub(super) fn keep_entry(&self, entry: &Arc<TopicEntry>) {
        *lock(&self.0) = Some(FoundAt {
            entry: entry.clone(),
            lanes: Vec::new(),
        });
    }

    /// A lane of the topic as it was resolved then.
    pub(super) fn lane(&self, entry: &Arc<TopicEntry>, lane: u32) -> Option<Arc<LaneHandle>> {
        let found = lock(&self.0);
        let found = found.as_ref().filter(|f| Arc::ptr_eq(&f.entry, entry))?;
        found.lanes.get(lane as usize)?.upgrade()
    }

    pub(super) fn keep_lane(&self, entry: &Arc<TopicEntry>, lane: u32, handle: &Arc<LaneHandle>) {
        let mut found = lock(&self.0);
        if lane < LANES_FOUND
            && let Some(found) = found.as_mut().filter(|f| Arc::ptr_eq(&f.entry, entry))
        {
            let lane = lane as usize;
            if found.lanes.len() <= lane {
                found.lanes.resize_with(lane + 1, Weak::new);
            }
            if let Some(place) = found.lanes.get_mut(lane) {
                *place = Arc::downgrade(handle);
            }
        }
    }
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Found").finish_non_exhaustive()
    }
}
