//! Who publishes: with keys and without, in bursts, with ids of their own or
//! the hub's; they repeat what failed, and sometimes what did not.

use std::{sync::Arc, time::Duration};

use super::{
    oracle::{Attempt, Life, Wrote},
    world::{Ev, World},
};
use crate::{
    broker::{OrderKey, Outcome},
    error::Error,
    hub::{
        intake::{Intake as Offer, Origin},
        lane::machine::Intake,
    },
    message::{DeliveryMode, Message, MessageId, Priority, wire::Marks},
};

/// One publisher.
pub(super) struct Publisher {
    /// The process that it publishes through.
    pub(super) process: usize,
    /// 0: the queue; 1: the stream.
    pub(super) topic: usize,
    keyed: bool,
    /// It brings its own ids.
    brings: bool,
    /// So many messages are still to come.
    pub(super) left: u32,
    pace: u64,
}

impl World {
    pub(super) fn make_publishers(&mut self) {
        let mut left = self.plan.messages;
        for i in 0..4 {
            let share = if i == 3 { left } else { self.plan.messages / 4 };
            left -= share;
            self.publishers.push(Publisher {
                process: i % 2,
                topic: i / 2,
                keyed: self.rng.bool(),
                brings: self.rng.bool(),
                left: share,
                pace: self.rng.u64(200_000..3_000_000),
            });
            let after = self.rng.u64(..500_000);
            self.post(after, Ev::Publish(i));
        }
    }

    pub(super) fn publish_burst(&mut self, i: usize) {
        let n = self.rng.u32(1..=12).min(self.publishers[i].left);
        if self.healed || n == 0 {
            return;
        }
        let p = self.publishers[i].process;
        if !self.processes[p].up {
            let after = self.rng.u64(10_000..500_000);
            self.post(after, Ev::Publish(i));
            return;
        }
        for _ in 0..n {
            self.publishers[i].left -= 1;
            self.publish_one(i, None);
            if !self.processes[p].up {
                break;
            }
        }
        let after = self.rng.u64(..self.publishers[i].pace);
        self.post(after, Ev::Publish(i));
    }

    /// A publisher repeats what it published before, under the same id.
    pub(super) fn repeat(&mut self, i: usize, id: &str, attempt: Attempt) {
        if self.healed || !self.processes[self.publishers[i].process].up {
            return;
        }
        self.publish_one(i, Some((id.to_owned(), attempt)));
    }

    fn publish_one(&mut self, i: usize, again: Option<(String, Attempt)>) {
        let publisher = &self.publishers[i];
        let (p, g) = (publisher.process, publisher.topic);
        let (keyed, brings) = (publisher.keyed, publisher.brings);
        let attempt = Attempt::try_from(self.oracle.lives.len()).unwrap();
        let key = self.rng.u8(..3);
        let now = self.at();
        let mut message = Message::new("t", attempt.to_le_bytes().to_vec());
        if let Some((id, _)) = &again {
            message.id = MessageId::new(id).unwrap();
        } else if brings {
            message.id = MessageId::new(format!("b{attempt}")).unwrap();
        }
        if keyed {
            message.key = Some(vec![b'k', key].into());
        }
        if self.rng.u32(..10) == 0 {
            message.priority = Priority::new(self.rng.u8(1..9)).unwrap();
        }
        if self.rng.u32(..10) == 0 {
            message.delivery_mode = DeliveryMode::Transient;
        }
        if self.rng.u32(..25) == 0 {
            message.expiration = Some(now.wall + Duration::from_millis(self.rng.u64(100..8_000)));
        }
        let l = match (g, keyed) {
            (0, _) => 0,
            (_, true) => 1 + usize::from(key % 2),
            (_, false) => 1 + i % 2,
        };
        let order = match &message.key {
            Some(key) => OrderKey::Key(key.clone()),
            None => OrderKey::Publisher(i as u64),
        };
        let wait = match self.rng.u32(..10) {
            0 => self.rng.u64(100_000..3_000_000),
            _ => 30_000_000,
        };
        let confirm = self.rng.u32(..30) != 0;
        let poison = self.rng.u32(..60) == 0;
        self.oracle.lives.push(Life {
            process: p,
            incarnation: self.processes[p].incarnation,
            lane: l,
            stream: (order.clone(), message.priority.value()),
            id: message.id.to_string(),
            publisher: i,
            repeats: again
                .as_ref()
                .map_or(0, |(_, a)| self.oracle.lives[*a as usize].repeats + 1),
            persistent: message.is_persistent(),
            confirm,
            poison,
            deadline: self.now + wait,
            published: self.now,
            written: None,
            filed: None,
            answer: None,
            joined: None,
            wrote: Wrote::Never,
            wrote_in: 0,
            durable: 0,
            unmarked: 0,
            refused: false,
            turned_away: false,
            leased: false,
            handled: None,
            bereaved: false,
            buried: false,
            held: false,
        });
        self.trace(|| format!("publisher {i} publishes {attempt} to process {p} lane {l}"));
        if (brings || again.is_some()) && !self.let_in(p, g, attempt, &message) {
            return;
        }
        if brings && self.rng.u32(..15) == 0 {
            let after = self.rng.u64(..1_500_000);
            self.post(after, Ev::Repeat(i, attempt));
        }
        let deadline = now.at + Duration::from_micros(wait);
        let intake = Intake {
            message: Arc::new(message),
            order,
            marks: Marks::default(),
            confirm,
            deadline,
            waiter: attempt,
        };
        self.with_machine(p, l, |machine, now| machine.publish(now, [intake]));
    }

    /// Asks the intake window. False: it has the answer, or will.
    fn let_in(&mut self, p: usize, g: usize, attempt: Attempt, message: &Message) -> bool {
        let wall = self.at().wall;
        let id = message.id.as_str();
        let topic = self.topics[g].clone();
        let offer = self.processes[p]
            .intake
            .offer(wall, &topic, &message.id, Origin::Caller);
        match offer {
            Offer::Fresh(ticket) => {
                self.oracle.let_through(p, g, id, attempt);
                self.processes[p].tickets.insert(attempt, ticket);
                true
            }
            Offer::Bypass => {
                self.oracle
                    .fail("C14", || format!("the id of {attempt} is not watched"));
                true
            }
            Offer::Done(outcome) => {
                self.oracle.repeated(p, g, id, attempt, true);
                self.joined_answer(attempt, &Ok(outcome));
                false
            }
            Offer::InFlight(joining) => {
                self.oracle.repeated(p, g, id, attempt, false);
                if self.processes[p].intake.join(&joining, attempt).is_err() {
                    self.oracle
                        .fail("C14", || format!("{attempt} could not join"));
                }
                false
            }
        }
    }

    /// A repeat hears what became of the first.
    pub(super) fn joined_answer(&mut self, attempt: Attempt, answer: &Result<Outcome, Error>) {
        self.oracle.joined_answer(attempt, answer);
    }

    /// An error, or silence: who brings ids simply repeats.
    pub(super) fn publisher_hears_error(&mut self, attempt: Attempt) {
        let life = &self.oracle.lives[attempt as usize];
        let i = life.publisher;
        if self.publishers[i].brings && life.repeats < 3 && !life.refused && life.joined.is_none() {
            let after = self.rng.u64(5_000..3_000_000);
            self.post(after, Ev::Repeat(i, attempt));
        }
    }
}
