//! The simulated brokers: one like a queue (ready messages, consumers with a
//! prefetch, redelivery), one like a log (two partitions, a group with offsets).
//! Both take what is written on a generation's pipe, keep it, and confirm it
//! once it would survive a crash.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::{
    oracle::{Attempt, Wrote},
    world::{Ev, World},
};
use crate::{
    broker::{Confirmation, Fate, Submission},
    error::{Error, ErrorCode},
    message::Message,
};

/// One broker.
#[derive(Default)]
pub(super) struct Broker {
    pub(super) up: bool,
    /// Faults that last, each counted, since they overlap.
    pub(super) stalls: u32,
    pub(super) overloads: u32,
    pub(super) refuses_lanes: u32,
    /// When it refused lanes last.
    pub(super) refused_last: u64,
    /// So many confirms will be lost, or come late.
    pub(super) lose: u32,
    pub(super) delay: u32,
    pub(super) refuse_drained: u32,
    /// Counts crashes.
    pub(super) epoch: u32,
}

/// A copy in a broker's log.
pub(super) struct Stored {
    pub(super) attempt: Attempt,
    pub(super) marked: bool,
    message: Arc<Message>,
    conn: usize,
    token: u64,
}

/// A queue's or a partition's log: what is kept whatever happens, and what a
/// crash may lose.
#[derive(Default)]
pub(super) struct Log {
    pub(super) kept: Vec<(Attempt, bool)>,
    pub(super) messages: Vec<Arc<Message>>,
    pub(super) fresh: VecDeque<Stored>,
}

/// One generation of a lane.
pub(super) struct Conn {
    pub(super) process: usize,
    pub(super) incarnation: u32,
    pub(super) lane: usize,
    /// The hub still listens.
    pub(super) open: bool,
    /// It takes nothing any more.
    ending: bool,
    /// The hub was told so.
    pub(super) broken: bool,
    pub(super) pipe: VecDeque<(Submission, bool)>,
    /// Written, and the hub not told what became of it.
    pub(super) untold: BTreeMap<u64, Attempt>,
    /// Answers, in the order of writing, where the client waits for earlier ones.
    order: VecDeque<u64>,
    early: BTreeMap<u64, Fate>,
    serving: bool,
}

impl Conn {
    pub(super) fn new(process: usize, incarnation: u32, lane: usize) -> Self {
        Self {
            process,
            incarnation,
            lane,
            open: true,
            ending: false,
            broken: false,
            pipe: VecDeque::new(),
            untold: BTreeMap::new(),
            order: VecDeque::new(),
            early: BTreeMap::new(),
            serving: false,
        }
    }
}

impl Broker {
    pub(super) fn answers(&self) -> bool {
        self.up && self.stalls == 0
    }
}

pub(super) fn lost() -> Error {
    Error::unknown(ErrorCode::ConnectionClosed, "lost")
}

impl World {
    /// The adapter takes over what a lane wrote.
    pub(super) fn handover(&mut self, p: usize, l: usize) {
        let lane = &mut self.processes[p].lanes[l];
        lane.handing_over = false;
        let Some(c) = lane.conn else {
            return;
        };
        let b = usize::from(l > 0);
        // A client of a broker that stands still takes only so much.
        if !self.brokers[b].answers() && self.conns[c].pipe.len() >= self.plan.window / 2 {
            return;
        }
        if self.conns[c].ending {
            let incarnation = self.conns[c].incarnation;
            for submission in std::mem::take(&mut lane.outbox) {
                self.tell(c, submission.token, Fate::Unsent(lost()));
                if self.processes[p].incarnation != incarnation {
                    return;
                }
            }
            return;
        }
        let conn = &mut self.conns[c];
        for submission in lane.outbox.drain(..) {
            let attempt = super::process::attempt_of(&submission.message);
            let drained = self.oracle.lives[attempt as usize].filed.is_some();
            conn.order.push_back(submission.token);
            conn.pipe.push_back((submission, drained));
        }
        self.serve_soon(c);
    }

    pub(super) fn serve_soon(&mut self, c: usize) {
        let conn = &mut self.conns[c];
        if !conn.serving && !conn.pipe.is_empty() {
            conn.serving = true;
            let after = self.rng.u64(50..1_500);
            self.post(after, Ev::Serve(c));
        }
    }

    /// The broker reads from a pipe.
    pub(super) fn serve(&mut self, c: usize) {
        self.conns[c].serving = false;
        let l = self.conns[c].lane;
        let b = usize::from(l > 0);
        if !self.brokers[b].answers() {
            return;
        }
        let n = self.rng.usize(1..=self.conns[c].pipe.len().max(1));
        for _ in 0..n {
            let Some((submission, drained)) = self.conns[c].pipe.pop_front() else {
                break;
            };
            let attempt = super::process::attempt_of(&submission.message);
            let token = submission.token;
            let broker = &mut self.brokers[b];
            let life = self.oracle.life(attempt);
            if life.poison || (drained && broker.refuse_drained > 0) {
                broker.refuse_drained -= u32::from(!life.poison);
                life.refused = true;
                let error = Error::rejected(ErrorCode::PublishRejected, "unroutable");
                self.send_answer(c, token, Fate::Refused(error), 0);
            } else if broker.overloads > 0 && self.rng.u32(..8) != 0 {
                life.turned_away = true;
                let error = Error::new(ErrorCode::PublishFailed, "full");
                self.send_answer(c, token, Fate::Overloaded(error), 0);
            } else {
                self.trace(|| format!("broker {b} takes {attempt} on generation {c}"));
                self.logs[l].fresh.push_back(Stored {
                    attempt,
                    marked: submission.marks.possible_duplicate,
                    message: with_settled(submission.message, &submission.marks.settled),
                    conn: c,
                    token,
                });
            }
        }
        let epoch = self.brokers[b].epoch;
        let after = self.rng.u64(100..2_500);
        self.post(after, Ev::Durable(l, epoch));
        self.serve_soon(c);
    }

    /// What a log holds is safe now, and confirmed.
    pub(super) fn make_durable(&mut self, l: usize) {
        let b = usize::from(l > 0);
        if !self.brokers[b].answers() {
            return;
        }
        while let Some(stored) = self.logs[l].fresh.pop_front() {
            let (c, token, attempt) = (stored.conn, stored.token, stored.attempt);
            self.keep(l, stored);
            let broker = &mut self.brokers[b];
            if broker.lose > 0 {
                broker.lose -= 1;
                self.trace(|| format!("the confirm of {attempt} is lost"));
                continue;
            }
            let mut late = 0;
            if broker.delay > 0 {
                broker.delay -= 1;
                late = self.rng.u64(100_000..15_000_000);
            }
            self.send_answer(c, token, Fate::Confirmed(None), late);
        }
    }

    fn keep(&mut self, l: usize, stored: Stored) {
        self.oracle.stored(stored.attempt, stored.marked);
        self.logs[l].kept.push((stored.attempt, stored.marked));
        if l == 0 {
            self.queue.arrives(stored.attempt, stored.message);
        } else {
            self.logs[l].messages.push(stored.message);
        }
        self.kick_consumers();
    }

    fn send_answer(&mut self, c: usize, token: u64, fate: Fate, late: u64) {
        let after = self.rng.u64(100..3_000) + late;
        self.post(after, Ev::Answer(c, token, fate));
    }

    /// An answer reaches the client.
    pub(super) fn answer_arrives(&mut self, c: usize, token: u64, fate: Fate) {
        let conn = &mut self.conns[c];
        if !conn.open || conn.ending {
            return;
        }
        // A client of the log answers in order; one of the queue by the seed.
        let in_order = conn.lane > 0 || self.plan.in_order;
        if !in_order {
            self.tell(c, token, fate);
            return;
        }
        conn.early.insert(token, fate);
        while let Some(front) = self.conns[c].order.front().copied() {
            let Some(fate) = self.conns[c].early.remove(&front) else {
                return;
            };
            self.conns[c].order.pop_front();
            self.tell(c, front, fate);
            if !self.conns[c].open {
                return;
            }
        }
    }

    /// The hub is told what became of a submission.
    pub(super) fn tell(&mut self, c: usize, token: u64, fate: Fate) {
        let conn = &mut self.conns[c];
        let Some(attempt) = conn.untold.remove(&token) else {
            return;
        };
        let (p, l) = (conn.process, conn.lane);
        conn.broken |= matches!(fate, Fate::Unknown(_) | Fate::Unsent(_));
        self.trace(|| format!("process {p} lane {l}: {attempt} {}", name(&fate)));
        let life = self.oracle.life(attempt);
        if life.wrote == Wrote::Open(c) {
            life.wrote = match &fate {
                Fate::Confirmed(_) => Wrote::Confirmed,
                Fate::Refused(_) => Wrote::Refused,
                Fate::Overloaded(_) | Fate::Unsent(_) => Wrote::NotStored,
                Fate::Unknown(_) => Wrote::Unknown,
            };
        }
        let before = self.processes[p].lanes[l].machine.state();
        let refused = matches!(fate, Fate::Refused(_));
        self.with_machine(p, l, |machine, now| {
            machine.confirmed(now, [Confirmation { token, fate }])
        });
        if refused && self.processes[p].up {
            self.check_refusal(p, l, before, attempt);
        }
    }

    /// The broker dies, and every connection to it.
    pub(super) fn crash_broker(&mut self, b: usize, losing: bool) {
        self.brokers[b].up = false;
        self.brokers[b].epoch += 1;
        for l in if b == 0 { 0..1 } else { 1..3 } {
            let fresh = std::mem::take(&mut self.logs[l].fresh);
            let keep = if losing {
                self.rng.usize(..=fresh.len())
            } else {
                fresh.len()
            };
            for stored in fresh.into_iter().take(keep) {
                self.keep(l, stored);
            }
        }
        self.consumers_lose_broker(b);
        for p in 0..self.processes.len() {
            self.lose_link(p, b);
        }
        // What it had not read dies with its connections.
        for conn in &mut self.conns {
            if usize::from(conn.lane > 0) == b && !conn.open {
                conn.pipe.clear();
            }
        }
    }

    /// A generation ends under its hub: each submission is answered, and then,
    /// at once or much later, the lane is closed.
    pub(super) fn end_conn(&mut self, c: usize, slow: bool) {
        if !self.conns[c].open {
            return;
        }
        if self.conns[c].ending {
            if !slow {
                self.close_conn(c);
            }
            return;
        }
        self.conns[c].ending = true;
        // Of what the broker has not read, the client may not have written some.
        let unsent = self.rng.usize(..=self.conns[c].pipe.len());
        let keep = self.conns[c].pipe.len() - unsent;
        let unsent = self.conns[c].pipe.split_off(keep);
        let unsent: std::collections::BTreeSet<u64> = unsent.iter().map(|(s, _)| s.token).collect();
        // What is still in the outbox was never the client's.
        let (p, l) = (self.conns[c].process, self.conns[c].lane);
        let outbox: std::collections::BTreeSet<u64> = self.processes[p].lanes[l]
            .outbox
            .iter()
            .map(|s| s.token)
            .collect();
        let tokens: Vec<u64> = self.conns[c].untold.keys().copied().collect();
        let incarnation = self.conns[c].incarnation;
        for token in tokens {
            if outbox.contains(&token) {
                continue;
            }
            let fate = if unsent.contains(&token) {
                Fate::Unsent(lost())
            } else {
                Fate::Unknown(lost())
            };
            self.tell(c, token, fate);
            if self.processes[p].incarnation != incarnation || !self.conns[c].open {
                return;
            }
        }
        if slow {
            let after = self.rng.u64(1_000..15_000_000);
            self.post(after, Ev::Close(c));
        } else {
            self.close_conn(c);
        }
    }

    /// The lane's confirmations are closed.
    pub(super) fn close_conn(&mut self, c: usize) {
        if !self.conns[c].open {
            return;
        }
        let (p, l) = (self.conns[c].process, self.conns[c].lane);
        let incarnation = self.conns[c].incarnation;
        self.trace(|| format!("process {p} lane {l}: generation {c} is closed"));
        self.processes[p].lanes[l].conn = None;
        // What the adapter never took was certainly not sent.
        for submission in std::mem::take(&mut self.processes[p].lanes[l].outbox) {
            self.tell(c, submission.token, Fate::Unsent(lost()));
            if self.processes[p].incarnation != incarnation {
                return;
            }
        }
        self.abandon_conn(c);
        self.with_machine(p, l, |machine, now| machine.ended(now, "lost"));
    }

    /// The hub listens no longer. Some of what is in the pipe still arrives.
    pub(super) fn abandon_conn(&mut self, c: usize) {
        let conn = &mut self.conns[c];
        conn.open = false;
        for attempt in std::mem::take(&mut conn.untold).into_values() {
            let life = self.oracle.life(attempt);
            if life.wrote == Wrote::Open(c) {
                life.wrote = Wrote::Unknown;
            }
        }
        let keep = self.rng.usize(..=conn.pipe.len());
        conn.pipe.truncate(keep);
        if !conn.pipe.is_empty() && !conn.serving {
            conn.serving = true;
            let after = self.rng.u64(50..2_000_000);
            self.post(after, Ev::Serve(c));
        }
    }
}

fn name(fate: &Fate) -> &'static str {
    match fate {
        Fate::Confirmed(_) => "confirmed",
        Fate::Refused(_) => "refused",
        Fate::Overloaded(_) => "turned away",
        Fate::Unknown(_) => "unknown",
        Fate::Unsent(_) => "unsent",
    }
}

/// The header under which the simulated brokers carry the groups' marks.
pub(super) const SETTLED: &str = "settled";

fn with_settled(message: Arc<Message>, groups: &[String]) -> Arc<Message> {
    if groups.is_empty() {
        return message;
    }
    let mut noted = Message::clone(&message);
    noted.headers.insert(SETTLED.to_owned(), groups.join(","));
    Arc::new(noted)
}
