//! Which of a consumer's queues have their subscription, as one state.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use tokio::sync::watch;

use crate::broker::consumer::ConsumerState;

/// The state of every queue of one consumer.
pub(super) struct Board {
    queues: Mutex<BTreeMap<String, bool>>,
    report: watch::Sender<ConsumerState>,
}

impl Board {
    pub(super) fn new(report: watch::Sender<ConsumerState>) -> Self {
        Self {
            queues: Mutex::default(),
            report,
        }
    }

    /// A queue gained or lost its subscription.
    pub(super) fn set(&self, queue: &str, active: bool) {
        let mut queues = self.queues();
        queues.insert(queue.to_owned(), active);
        self.tell(&queues);
    }

    /// A queue is not read any more.
    pub(super) fn remove(&self, queue: &str) {
        self.queues().remove(queue);
    }

    /// Reports anew; a pattern that matches no queue yet has all that it can.
    pub(super) fn refresh(&self) {
        self.tell(&self.queues());
    }

    /// The last report.
    pub(super) fn stopped(&self) {
        self.report.send_replace(ConsumerState::Stopped);
    }

    fn tell(&self, queues: &BTreeMap<String, bool>) {
        let state = if queues.values().all(|active| *active) {
            ConsumerState::Active
        } else {
            ConsumerState::Starting
        };
        self.report.send_if_modified(|s| {
            let changed = *s != state;
            *s = state;
            changed
        });
    }

    fn queues(&self) -> MutexGuard<'_, BTreeMap<String, bool>> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.queues.lock().unwrap_or_else(|e| e.into_inner())
    }
}
