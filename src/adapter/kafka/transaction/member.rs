//! A transform as a member of its group: what it holds, and the callbacks that
//! librdkafka makes on its thread when partitions come and go.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext, Rebalance},
    error::KafkaError,
};

use super::held::Held;
use crate::{
    adapter::kafka::{
        consumer::{Fence, commit_start, names},
        link::{Link, log},
    },
    broker::OffsetReset,
};

/// What the thread and the callbacks share.
pub(super) struct Member {
    link: Arc<Link>,
    held: Mutex<Held>,
    /// Partitions were assigned (none included): the group has us.
    joined: AtomicBool,
    fence: Fence,
    pub(super) reset: OffsetReset,
}

impl Member {
    pub(super) fn new(link: Arc<Link>, reset: OffsetReset, session: Duration) -> Self {
        Self {
            link,
            held: Mutex::default(),
            joined: AtomicBool::new(false),
            fence: Fence::new(session),
            reset,
        }
    }

    /// What is held. Never across a poll, whose callbacks take it.
    pub(super) fn held(&self) -> MutexGuard<'_, Held> {
        // A panic under this lock is impossible short of exhausted memory.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_joined(&self) -> bool {
        self.joined.load(Ordering::Acquire)
    }

    /// Whether the broker forgot this member, and fences it for that.
    pub(super) fn is_forgotten(&self, error: &KafkaError) -> bool {
        self.fence.is_forgotten(error, &self.link)
    }

    /// It is a member no longer, and holds nothing.
    pub(super) fn leave(&self) {
        self.joined.store(false, Ordering::Release);
        let mut held = self.held();
        for (place, _) in held.places() {
            held.revoke(&place);
        }
    }
}

/// rdkafka's way to the callbacks.
pub(super) struct Context(pub(super) Arc<Member>);

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.link.report(&error, reason);
    }
}

impl ConsumerContext for Context {
    fn pre_rebalance(&self, client: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => {
                let partitions = names(list);
                // Before anything is fetched, so that what is published from here on
                // is found even after a restart.
                commit_start(client, &partitions, self.0.reset);
                let mut held = self.0.held();
                for place in partitions {
                    held.assign(place);
                }
            }
            // Nothing to commit: what was done is committed with what was written.
            Rebalance::Revoke(list) => {
                let mut held = self.0.held();
                for place in names(list) {
                    held.revoke(&place);
                }
            }
            Rebalance::Error(error) => {
                tracing::warn!(target: "messaging_hub::kafka", %error, "rebalance failed");
            }
        }
    }

    fn post_rebalance(&self, client: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(_) => {
                self.0.fence.joined();
                self.0.joined.store(true, Ordering::Release);
            }
            Rebalance::Revoke(_) if client.assignment_lost() => {
                self.0.joined.store(false, Ordering::Release);
            }
            _ => {}
        }
    }
}
