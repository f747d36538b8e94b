//! A group that handles each id once: the dedup window with the deliveries that
//! are parked in it.

use std::{
    borrow::Cow,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    dedup::{DedupWindow, Ended, IdHasher, Offer},
    handled::Notes,
    lock,
};
use crate::{
    broker::{Delivery, Received, Verdict},
    config::WindowSettings,
    message::{Timestamp, wire::Failure},
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
    /// What others know it by; none: a live reader, or a queue's consumers.
    name: Option<String>,
    window: Mutex<DedupWindow<Delivery>>,
    /// Deliveries that were marked as settled by this group.
    marked: AtomicU64,
    /// Where it notes what it handled, so that it outlives the process.
    notes: Option<Notes>,
}

/// An empty window of these settings.
pub(crate) fn window(settings: &WindowSettings, hasher: IdHasher) -> DedupWindow<Delivery> {
    let ids = usize::try_from(settings.ids).unwrap_or(usize::MAX);
    DedupWindow::new(ids, settings.age, hasher)
}

impl Group {
    /// A group that is forgotten with the process.
    pub(crate) fn new(name: Option<String>, settings: &WindowSettings) -> Self {
        Self {
            name,
            window: Mutex::new(window(settings, IdHasher::random())),
            marked: AtomicU64::new(0),
            notes: None,
        }
    }

    /// A group whose window, as far as it was filled already, is kept.
    #[cfg(feature = "journal")]
    pub(crate) fn kept(name: Option<String>, window: DedupWindow<Delivery>, notes: Notes) -> Self {
        Self {
            name,
            window: Mutex::new(window),
            marked: AtomicU64::new(0),
            notes: Some(notes),
        }
    }

    /// Looks whether the group has seen this message.
    pub(crate) fn take_in(&self, delivery: Delivery) -> Taken {
        self.take(delivery, of_message)
    }

    /// The same of a dead letter, where dead letters lie.
    pub(crate) fn take_in_letter(&self, delivery: Delivery) -> Taken {
        self.take(delivery, of_letter)
    }

    fn take(&self, delivery: Delivery, identity: fn(&Received) -> Cow<'_, str>) -> Taken {
        // Whichever hub it was that handed it out of its spool: this group has
        // handled it, and another process's window would not know.
        let settled = &delivery.marks.settled;
        if self
            .name
            .as_ref()
            .is_some_and(|name| settled.contains(name))
        {
            self.marked.fetch_add(1, Relaxed);
            delivery.settle_now(Verdict::Ack);
            return Taken::Kept;
        }
        if delivery.message.id.is_generated() {
            // A foreign message without an id: its id was made just now and says
            // nothing about whether it came before.
            return Taken::New(delivery, None);
        }
        let id = identity(delivery.received());
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
        self.end(|window| window.commit(Timestamp::now(), lease));
    }

    /// This attempt is over, another was given to the broker.
    pub(crate) fn retried(&self, lease: Lease) {
        self.end(|window| window.retried(Timestamp::now(), lease));
    }

    /// It was not handled and comes again.
    pub(crate) fn release(&self, lease: Lease) {
        self.end(|window| window.release(lease));
    }

    /// Forgets everything that was handled, because the group's position was
    /// moved on purpose.
    pub(crate) fn forget(&self) {
        lock(&self.window).forget_all();
    }

    pub(crate) fn suppressed(&self) -> u64 {
        lock(&self.window).counts().duplicates + self.marked.load(Relaxed)
    }

    pub(crate) fn overflows(&self) -> u64 {
        lock(&self.window).counts().forgotten_early
    }

    fn end(&self, by: impl FnOnce(&mut DedupWindow<Delivery>) -> Ended<Delivery>) {
        let mut window = lock(&self.window);
        let ended = by(&mut window);
        if let (Some(notes), Some(handled)) = (&self.notes, ended.handled) {
            // Under the lock: an attempt is noted behind the one before it.
            notes.handled(handled);
        }
        drop(window);
        self.finish(ended);
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

/// What a repeat of a message is known by.
fn of_message(received: &Received) -> Cow<'_, str> {
    received.marks.identity(received.message.id.as_str())
}

/// What a repeat of a dead letter is known by. A message that failed in two groups or
/// queues, or more than once, is as many letters under one id: each is known by its
/// failure. Not by its place in a log: a letter whose confirm was lost lies there twice.
fn of_letter(received: &Received) -> Cow<'_, str> {
    let id = of_message(received);
    match &received.marks.failure {
        Some(failure) => {
            let Failure {
                reason,
                details,
                last,
                original_topic,
                ..
            } = &**failure;
            let last = last.as_millis();
            format!("{id}\u{0}{original_topic}\u{0}{last}\u{0}{reason}\u{0}{details}").into()
        }
        None => id,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        broker::{BrokerType, Settlement},
        message::{Message, MessageId, wire::Marks},
        topic::Topic,
    };

    fn group(ids: u64) -> Group {
        let age = Duration::from_secs(60);
        Group::new(Some("g".to_owned()), &WindowSettings { age, ids })
    }

    fn delivery(
        id: &str,
        settled: &[&str],
        settlements: &mpsc::UnboundedSender<Settlement>,
    ) -> Delivery {
        let mut message = Message::new("t", "x");
        message.id = MessageId::new(id).unwrap();
        let received = Received {
            topic: Topic::new("t").unwrap(),
            message: Arc::new(message),
            marks: Arc::new(Marks {
                settled: settled.iter().map(|g| (*g).to_owned()).collect(),
                ..Marks::default()
            }),
            via: BrokerType::InMemory,
        };
        Delivery::new(received, settlements.clone(), 0)
    }

    fn handle(group: &Group, delivery: Delivery) {
        match group.take_in(delivery) {
            Taken::New(delivery, Some(lease)) => {
                group.commit(lease);
                delivery.settle_now(Verdict::Ack);
            }
            _ => panic!("not new"),
        }
    }

    #[test]
    fn what_a_window_and_what_a_mark_keeps_back_is_counted_together() {
        let (settlements, mut verdicts) = mpsc::unbounded_channel();
        let group = group(10);
        handle(&group, delivery("a", &[], &settlements));
        let copies = [
            delivery("a", &[], &settlements),
            delivery("a", &[], &settlements),
            delivery("b", &["other", "g"], &settlements),
        ];
        for copy in copies {
            assert!(matches!(group.take_in(copy), Taken::Kept));
        }
        assert_eq!((group.suppressed(), group.overflows()), (3, 0));
        let acked = |v: Settlement| matches!(v.verdict, Verdict::Ack);
        for _ in 0..4 {
            assert!(verdicts.try_recv().is_ok_and(acked));
        }
    }

    #[test]
    fn letters_of_one_message_are_many_and_each_is_one() {
        let (settlements, _verdicts) = mpsc::unbounded_channel();
        let group = group(10);
        let letter = |change: fn(&mut Failure)| {
            let mut letter = delivery("a", &[], &settlements).received().clone();
            let mut failure = Failure::now("r", "d", "tasks.a", None);
            failure.last = Timestamp::from_millis(5);
            change(&mut failure);
            letter.marks = Arc::new(Marks {
                failure: Some(Box::new(failure)),
                ..Marks::default()
            });
            Delivery::new(letter, settlements.clone(), 0)
        };
        let failures: [fn(&mut Failure); 5] = [
            |_| {},
            |failure| failure.original_topic = "tasks.b".to_owned(),
            |failure| failure.last = Timestamp::from_millis(6),
            |failure| failure.reason = "timeout".to_owned(),
            |failure| failure.details = "in another group".to_owned(),
        ];
        for failure in failures {
            match group.take_in_letter(letter(failure)) {
                Taken::New(_, Some(lease)) => group.commit(lease),
                _ => panic!("not new"),
            }
            let again = group.take_in_letter(letter(failure));
            assert!(matches!(again, Taken::Kept));
        }
        // Elsewhere it is one message, whatever is noted on it.
        handle(&group, letter(failures[0]));
        let otherwise = group.take_in(letter(failures[1]));
        assert!(matches!(otherwise, Taken::Kept));
    }

    #[test]
    fn a_window_that_is_too_short_for_the_group_says_so() {
        let (settlements, _verdicts) = mpsc::unbounded_channel();
        let group = group(1);
        for id in ["a", "b", "c"] {
            handle(&group, delivery(id, &[], &settlements));
        }
        assert_eq!((group.suppressed(), group.overflows()), (0, 2));
    }

    #[test]
    fn a_group_whose_position_was_moved_handles_again_what_it_had_handled() {
        let (settlements, _verdicts) = mpsc::unbounded_channel();
        let group = group(10);
        handle(&group, delivery("a", &[], &settlements));
        group.forget();
        handle(&group, delivery("a", &[], &settlements));
    }
}
