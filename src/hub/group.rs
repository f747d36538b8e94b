//! A group that handles each id once: the dedup window with the deliveries that
//! are parked in it.

use std::{borrow::Cow, sync::Mutex};

use super::{
    dedup::{DedupWindow, Ended, Offer},
    lock,
};
use crate::{
    broker::{Delivery, Verdict},
    config::WindowSettings,
    message::Timestamp,
};

pub(crate) use super::dedup::Lease;

/// What became of a delivery that was offered.
pub(crate) enum Taken {
    /// Hand it out; the lease, if any, ends with its settlement.
    New(Delivery, Option<Lease>),
    /// It waits, unsettled, for what comes of another copy; or it was a copy of
    /// something handled and has been acked.
    Kept,
}

/// A group's window.
#[derive(Debug)]
pub(crate) struct Group {
    window: Mutex<DedupWindow<Delivery>>,
}

impl Group {
    pub(crate) fn new(settings: &WindowSettings) -> Self {
        let ids = usize::try_from(settings.ids).unwrap_or(usize::MAX);
        Self {
            window: Mutex::new(DedupWindow::new(ids, settings.age)),
        }
    }

    /// Looks whether the group has seen this message.
    pub(crate) fn take_in(&self, delivery: Delivery) -> Taken {
        if delivery.message.id.is_generated() {
            // A foreign message without an id: its id was made just now and says
            // nothing about whether it came before.
            return Taken::New(delivery, None);
        }
        // The copy of a dead letter is known by its number too: its id was
        // handled before, and is to be handled once more. No id has the
        // character that stands between.
        let id = match delivery.marks.reprocess {
            0 => Cow::Borrowed(delivery.message.id.as_str()),
            n => Cow::Owned(format!("{}\u{0}{n}", delivery.message.id)),
        };
        let mut window = lock(&self.window);
        let offer = window.offer(
            Timestamp::now(),
            (&delivery.topic, &id),
            delivery.message.retry_count,
        );
        match offer {
            Offer::New(lease) => Taken::New(delivery, Some(lease)),
            Offer::Leased(parking) => match window.park(parking, delivery) {
                Ok(()) => Taken::Kept,
                // Cannot be: the lock is held since the offer. Were it so, the
                // message would only be handed out.
                Err(delivery) => Taken::New(delivery, None),
            },
            Offer::Committed => {
                drop(window);
                delivery.settle_now(Verdict::Ack);
                Taken::Kept
            }
        }
    }

    /// The id was handled, or is in the dead letters.
    pub(crate) fn commit(&self, lease: Lease) {
        let ended = lock(&self.window).commit(Timestamp::now(), lease);
        self.finish(ended);
    }

    /// This attempt is over, another was given to the broker.
    pub(crate) fn retried(&self, lease: Lease) {
        let ended = lock(&self.window).retried(Timestamp::now(), lease);
        self.finish(ended);
    }

    /// It was not handled and comes again.
    pub(crate) fn release(&self, lease: Lease) {
        let ended = lock(&self.window).release(lease);
        self.finish(ended);
    }

    /// Forgets everything that was handled, because the group's position was
    /// moved on purpose.
    pub(crate) fn forget(&self) {
        lock(&self.window).forget_all();
    }

    pub(crate) fn suppressed(&self) -> u64 {
        lock(&self.window).counts().duplicates
    }

    pub(crate) fn overflows(&self) -> u64 {
        lock(&self.window).counts().forgotten_early
    }

    fn finish(&self, mut ended: Ended<Delivery>) {
        loop {
            for duplicate in ended.duplicates {
                duplicate.settle_now(Verdict::Ack);
            }
            // The copy goes back to where it came from and is offered again:
            // only its source knows which reader has room.
            let Some((lease, delivery)) = ended.promoted else {
                return;
            };
            drop(delivery);
            ended = lock(&self.window).release(lease);
        }
    }
}
