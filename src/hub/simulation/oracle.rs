//! What really happened, by the simulation's own record, and whether it is what
//! the contract promises. It never asks the hub's counters.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{
    broker::{OrderKey, Outcome},
    error::{Assume, Error, ErrorCode},
};

/// Number of an attempt to publish; also its place in the order of publishing,
/// and its payload.
pub(super) type Attempt = u32;

/// A clause that did not hold.
#[derive(Clone, Debug)]
pub(super) struct Violation {
    pub(super) clause: &'static str,
    pub(super) text: String,
}

/// What became of the last write of an attempt, as far as its hub was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrote {
    Never,
    /// Under way in this generation.
    Open(usize),
    Confirmed,
    /// Certainly not stored.
    NotStored,
    Refused,
    /// Nobody knows.
    Unknown,
}

/// One attempt's whole life.
pub(super) struct Life {
    pub(super) process: usize,
    pub(super) incarnation: u32,
    pub(super) lane: usize,
    pub(super) stream: (OrderKey, u8),
    pub(super) id: String,
    pub(super) publisher: usize,
    pub(super) repeats: u32,
    pub(super) persistent: bool,
    pub(super) confirm: bool,
    pub(super) poison: bool,
    pub(super) deadline: u64,
    pub(super) published: u64,
    pub(super) written: Option<u64>,
    pub(super) filed: Option<u64>,
    pub(super) answer: Option<Result<Outcome, Error>>,
    /// A repeat that joined another attempt.
    pub(super) joined: Option<Attempt>,
    pub(super) wrote: Wrote,
    /// In which life of its process it was written last.
    pub(super) wrote_in: u32,
    /// Copies that the broker keeps, whatever happens; and unmarked ones.
    pub(super) durable: u32,
    pub(super) unmarked: u32,
    pub(super) refused: bool,
    pub(super) turned_away: bool,
    pub(super) leased: bool,
    /// Handled by a local handler, in which life of the process.
    pub(super) handled: Option<u32>,
    /// Its process died after it had been answered.
    pub(super) bereaved: bool,
    pub(super) buried: bool,
    /// It takes room in its hub now.
    pub(super) held: bool,
}

/// The record of a run.
#[derive(Default)]
pub(super) struct Oracle {
    pub(super) lives: Vec<Life>,
    pub(super) violation: Option<Violation>,
    /// Which ids a process accepted: (process, lane's topic, id).
    accepted: HashMap<(usize, usize, String), Accepted>,
    /// Who handles, and who has handled, an id: (process, group, id, attempt).
    handling: BTreeMap<(usize, usize, String, u32), bool>,
    handled: BTreeSet<(usize, usize, String, u32)>,
    /// First leases in order: (process, incarnation, lane, stream) -> attempt.
    leased: HashMap<(usize, u32, usize, (OrderKey, u8)), Attempt>,
    /// Events that a group was given out of a spool, in which life of the process.
    given: BTreeSet<(Attempt, u32)>,
    /// Events that a group settled in a spool, in which life of the process last.
    settled: BTreeMap<Attempt, u32>,
    /// What takes room in each process.
    pub(super) held: [usize; 2],
}

struct Accepted {
    first: Attempt,
    answered: bool,
}

/// The hedge's upper bound, and how exact timers are.
const HEDGE: u64 = 1_000_000;
const SLACK: u64 = 2_000;

impl Oracle {
    pub(super) fn fail(&mut self, clause: &'static str, text: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation {
                clause,
                text: text(),
            });
        }
    }

    pub(super) fn life(&mut self, attempt: Attempt) -> &mut Life {
        &mut self.lives[attempt as usize]
    }

    // ----- publishing -----

    /// The intake window let an attempt through.
    pub(super) fn let_through(&mut self, process: usize, topic: usize, id: &str, attempt: Attempt) {
        let key = (process, topic, id.to_owned());
        if let Some(before) = self.accepted.get(&key) {
            let first = before.first;
            self.fail("C14", || {
                format!("{id} was let through as {attempt}, and before as {first}")
            });
        }
        self.accepted.insert(
            key,
            Accepted {
                first: attempt,
                answered: false,
            },
        );
    }

    /// The intake window answered a repeat, or lets it wait.
    pub(super) fn repeated(
        &mut self,
        process: usize,
        topic: usize,
        id: &str,
        attempt: Attempt,
        done: bool,
    ) {
        let known = self.accepted.get(&(process, topic, id.to_owned()));
        match known {
            Some(a) if a.answered == done => {
                let first = a.first;
                self.life(attempt).joined = Some(first);
            }
            _ => self.fail("C14", || {
                format!("{id} was called a repeat (done: {done}), and is none")
            }),
        }
    }

    /// A repeat was answered: exactly as the first.
    pub(super) fn joined_answer(&mut self, attempt: Attempt, answer: &Result<Outcome, Error>) {
        let same = |first: &Result<Outcome, Error>| match (first, answer) {
            (Ok(a), Ok(b)) => a == b,
            (Err(a), Err(b)) => a.code() == b.code(),
            _ => false,
        };
        let first = self.lives[attempt as usize].joined;
        let first = first.and_then(|f| self.lives[f as usize].answer.as_ref());
        if !first.is_some_and(same) {
            self.fail("C14", || {
                format!("{attempt} is a repeat and was answered otherwise: {answer:?}")
            });
        }
        let life = self.life(attempt);
        if life.answer.replace(answer.clone()).is_some() {
            self.fail("C1", || format!("{attempt} was answered twice"));
        }
    }

    /// An attempt entered a hub, to take room.
    pub(super) fn hold(&mut self, attempt: Attempt) {
        let life = self.life(attempt);
        if !std::mem::replace(&mut life.held, true) {
            let process = life.process;
            self.held[process] += 1;
        }
    }

    pub(super) fn let_go(&mut self, attempt: Attempt) {
        let life = self.life(attempt);
        if std::mem::replace(&mut life.held, false) {
            let process = life.process;
            self.held[process] -= 1;
        }
    }

    // ----- answers -----

    /// A publisher was answered.
    pub(super) fn answered(&mut self, now: u64, attempt: Attempt, seen: &Seen) {
        let life = &self.lives[attempt as usize];
        let answer = seen.answer;
        if life.answer.is_some() {
            self.fail("C1", || format!("{attempt} was answered twice"));
            return;
        }
        let mut wrong: Option<(&'static str, String)> = None;
        match answer {
            Ok(Outcome::Delivered { .. }) => {
                if life.durable == 0 {
                    wrong = Some(("C1", "delivered, but the broker has it not".to_owned()));
                }
            }
            Ok(Outcome::Spooled { durable: true }) => {
                if !seen.on_medium {
                    wrong = Some(("C2", "spooled for good, but not on the medium".to_owned()));
                }
            }
            Ok(Outcome::Spooled { durable: false }) => {
                let done_with = life.durable > 0 || life.buried || life.handled.is_some();
                if life.persistent && !seen.disk_broken && !done_with {
                    wrong = Some(("C1", "called volatile by a disk that works".to_owned()));
                }
            }
            Ok(Outcome::Sent { .. }) => {
                if life.confirm {
                    wrong = Some(("C1", "only sent, with a confirm asked for".to_owned()));
                }
            }
            Err(error) => {
                let in_time = now + SLACK < life.deadline;
                match error.assume() {
                    Assume::Unknown => {
                        wrong = Some(("C1", "unknown, with a spool that works".to_owned()));
                    }
                    Assume::Rejected if !life.refused && !seen.lane_refused => {
                        wrong = Some(("C9", format!("refused by nobody: {error}")));
                    }
                    Assume::NotSent if life.wrote != Wrote::Never => {
                        wrong = Some(("C1", format!("not sent, but written: {error}")));
                    }
                    _ if error.code() == ErrorCode::SpoolFull && !seen.was_full => {
                        wrong = Some(("C8", "refused for want of room that is there".to_owned()));
                    }
                    _ if error.code() == ErrorCode::Timeout && in_time => {
                        wrong = Some(("C1", "timed out before its deadline".to_owned()));
                    }
                    _ => {}
                }
                if life.filed.is_some() {
                    wrong = Some(("C9", "failed, though the spool had it".to_owned()));
                }
            }
        }
        // C3: from being written (or, while nothing is in the way, from being
        // published) to the answer or to the spool: the hedge; then the syncs.
        let from = life
            .written
            .or((!seen.was_in_the_way).then_some(life.published));
        if let Some(from) = from
            && life.joined.is_none()
            && !seen.was_full
        {
            let until = life.filed.unwrap_or(now);
            if until > from + HEDGE + SLACK {
                wrong = Some(("C3", format!("waited {} us for the broker", until - from)));
            }
        }
        if let Some(filed) = life.filed
            && now > filed + seen.sync_bound + SLACK
        {
            wrong = Some(("C3", format!("waited {} us for the disk", now - filed)));
        }
        if let Some((clause, text)) = wrong {
            self.fail(clause, || format!("{attempt}: {text}; {answer:?}"));
        }
        let life = self.life(attempt);
        life.answer = Some(answer.clone());
        if life.joined.is_none() {
            let key = (life.process, topic_of(life.lane), life.id.clone());
            if answer.is_ok() {
                if let Some(accepted) = self.accepted.get_mut(&key) {
                    accepted.answered = true;
                }
            } else {
                self.accepted.remove(&key);
            }
        }
        if !matches!(answer, Ok(Outcome::Spooled { .. }))
            && self.lives[attempt as usize].filed.is_none()
        {
            self.let_go(attempt);
        }
    }

    // ----- the wire -----

    /// A hub writes an attempt on a generation.
    pub(super) fn writes(
        &mut self,
        now: u64,
        attempt: Attempt,
        conn: usize,
        incarnation: u32,
        marked: bool,
    ) {
        let life = &self.lives[attempt as usize];
        let same_life = life.wrote_in == incarnation;
        let mut wrong: Option<(&'static str, String)> = None;
        match life.wrote {
            Wrote::Open(before) if same_life => {
                wrong = Some((
                    "C6",
                    format!("written again while {before} may still confirm it"),
                ));
            }
            Wrote::Confirmed if same_life => {
                wrong = Some(("C6", "written again after its confirm".to_owned()))
            }
            Wrote::Refused if same_life => {
                wrong = Some(("C9", "written again after it was refused".to_owned()))
            }
            Wrote::Unknown | Wrote::Open(_) | Wrote::Confirmed if !marked => {
                wrong = Some((
                    "C6",
                    "written again without the mark of a possible duplicate".to_owned(),
                ));
            }
            _ => {}
        }
        if life.handled == Some(incarnation) {
            wrong = Some(("C6", "drained after it was handled here".to_owned()));
        }
        if let Some((clause, text)) = wrong {
            self.fail(clause, || format!("{attempt}: {text}"));
        }
        let life = self.life(attempt);
        life.written.get_or_insert(now);
        life.wrote = Wrote::Open(conn);
        life.wrote_in = incarnation;
    }

    /// The broker keeps a copy from now on.
    pub(super) fn stored(&mut self, attempt: Attempt, marked: bool) {
        let life = self.life(attempt);
        life.durable += 1;
        life.unmarked += u32::from(!marked);
        if life.unmarked > 1 {
            self.fail("C6", || format!("{attempt} is stored twice without a mark"));
        }
    }

    /// A hub leases a spooled attempt to a handler of its own.
    pub(super) fn leases(&mut self, attempt: Attempt, incarnation: u32) {
        let life = &self.lives[attempt as usize];
        if matches!(life.wrote, Wrote::Open(_)) && life.wrote_in == incarnation {
            self.fail("C6", || format!("{attempt} was handed out while in doubt"));
            return;
        }
        if life.leased {
            return;
        }
        let key = (life.process, incarnation, life.lane, life.stream.clone());
        if let Some(before) = self.leased.insert(key, attempt)
            && before > attempt
        {
            self.fail("C5", || {
                format!("{attempt} was handed out after {before} of its key")
            });
        }
        self.life(attempt).leased = true;
    }

    /// A hub hands a spooled event to a group of its own.
    pub(super) fn gives(&mut self, attempt: Attempt, incarnation: u32) {
        let life = &self.lives[attempt as usize];
        if matches!(life.wrote, Wrote::Open(_)) && life.wrote_in == incarnation {
            self.fail("C6", || format!("{attempt} was handed out while in doubt"));
            return;
        }
        if self.settled.get(&attempt) == Some(&incarnation) {
            self.fail("C6", || {
                format!("{attempt} was handed out after its group had settled it")
            });
        }
        let life = &self.lives[attempt as usize];
        let key = (life.process, incarnation, life.lane, life.stream.clone());
        if self.given.insert((attempt, incarnation))
            && let Some(before) = self.leased.insert(key, attempt)
            && before > attempt
        {
            self.fail("C5", || {
                format!("{attempt} was handed out after {before} of its key")
            });
        }
    }

    /// A group settled a spooled event.
    pub(super) fn settles(&mut self, attempt: Attempt, incarnation: u32) {
        self.settled.insert(attempt, incarnation);
    }

    /// A hub writes an attempt with, or without, the group's mark.
    pub(super) fn notes(&mut self, attempt: Attempt, incarnation: u32, marked: bool) {
        let settled = self.settled.get(&attempt).copied();
        if marked && settled.is_none() {
            self.fail("C6", || {
                format!("{attempt} is marked, and no group has settled it")
            });
        }
        if !marked && settled == Some(incarnation) {
            self.fail("C6", || {
                format!("{attempt} lacks the mark of the group that settled it")
            });
        }
    }

    // ----- handling -----

    /// A handler of a group gets an attempt of an id.
    pub(super) fn handler_begins(&mut self, process: usize, group: usize, id: &str, retry: u32) {
        let key = (process, group, id.to_owned(), retry);
        if self.handled.contains(&key) {
            self.fail("C6", || {
                format!("{id} (retry {retry}) is handled again in group {group}")
            });
        }
        if self.handling.insert(key, true).is_some() {
            self.fail("C6", || {
                format!("{id} (retry {retry}) is handled twice at once in group {group}")
            });
        }
    }

    pub(super) fn handler_ends(
        &mut self,
        process: usize,
        group: usize,
        id: &str,
        retry: u32,
        done: bool,
    ) {
        let key = (process, group, id.to_owned(), retry);
        self.handling.remove(&key);
        if done {
            self.handled.insert(key);
        }
    }

    // ----- death -----

    /// A process died: what it had only in memory is gone, rightly.
    pub(super) fn died(&mut self, process: usize) {
        self.accepted.retain(|(p, ..), _| *p != process);
        self.handling.retain(|(p, ..), _| *p != process);
        self.handled.retain(|(p, ..)| *p != process);
        self.held[process] = 0;
        for life in &mut self.lives {
            if life.process == process {
                life.bereaved = true;
                life.held = false;
            }
        }
    }

    // ----- the end -----

    /// Everything has healed and is quiet: the whole contract.
    pub(super) fn check(&mut self, logs: &[Vec<(Attempt, bool)>], letters: &BTreeSet<u32>) {
        let mut failures: Vec<(&'static str, String)> = Vec::new();
        for (attempt, life) in self.lives.iter().enumerate() {
            let there =
                life.durable > 0 || life.handled.is_some() || letters.contains(&(attempt as u32));
            match &life.answer {
                None if !life.bereaved => {
                    failures.push(("C1", format!("{attempt} was never answered")))
                }
                Some(Ok(outcome)) if life.joined.is_none() => {
                    let may_be_lost = match outcome {
                        Outcome::Delivered { .. } | Outcome::Spooled { durable: true } => false,
                        Outcome::Spooled { durable: false } => life.bereaved,
                        Outcome::Sent { .. } => true,
                    };
                    if !there && !may_be_lost {
                        let clause = if life.buried || life.refused {
                            "C9"
                        } else {
                            "C2"
                        };
                        failures.push((
                            clause,
                            format!("{attempt} was accepted ({outcome:?}) and is lost"),
                        ));
                    }
                }
                Some(Err(error))
                    if life.joined.is_none() && (life.durable > 0 || life.handled.is_some()) =>
                {
                    failures.push((
                        "C1",
                        format!("{attempt} was called {:?} and is there", error.assume()),
                    ));
                }
                _ => {}
            }
        }
        for (lane, log) in logs.iter().enumerate() {
            if let Some(text) = self.disorder(log) {
                failures.push(("C5", format!("lane {lane}: {text}")));
            }
        }
        if let Some((clause, text)) = failures.into_iter().next() {
            self.fail(clause, || text);
        }
    }

    /// First copies must stand in publish order: of each life of a process all,
    /// across its lives those that were accepted. Those that the broker turned
    /// away once are outside, since what was pipelined behind them went ahead;
    /// so are those that were on their way to the dead letters when a process
    /// died, and those that a local handler had.
    fn disorder(&self, log: &[(Attempt, bool)]) -> Option<String> {
        let mut seen = BTreeSet::new();
        // Whose order: the process, its life where only that counts, key and priority.
        type Line<'a> = (usize, Option<u32>, &'a (OrderKey, u8));
        let mut last: HashMap<Line<'_>, Attempt> = HashMap::new();
        for (attempt, _) in log {
            let life = &self.lives[*attempt as usize];
            if !seen.insert(*attempt)
                || life.turned_away
                || life.refused
                || life.buried
                || life.leased
            {
                continue;
            }
            let mut in_order = |incarnation: Option<u32>| {
                let key = (life.process, incarnation, &life.stream);
                let before = last.insert(key, *attempt)?;
                (before > *attempt).then(|| format!("{attempt} came after {before} of its key"))
            };
            if let Some(text) = in_order(Some(life.incarnation)) {
                return Some(text);
            }
            // What dies with its process may still be on the way to the broker.
            let kept = matches!(
                life.answer,
                Some(Ok(
                    Outcome::Delivered { .. } | Outcome::Spooled { durable: true }
                ))
            );
            if kept && let Some(text) = in_order(None) {
                return Some(format!("{text}, across a restart"));
            }
        }
        None
    }
}

/// What surrounded an answer.
pub(super) struct Seen<'a> {
    pub(super) answer: &'a Result<Outcome, Error>,
    pub(super) on_medium: bool,
    pub(super) disk_broken: bool,
    /// The broker refuses the lane, or did while this waited.
    pub(super) lane_refused: bool,
    /// There was no room since it was published.
    pub(super) was_full: bool,
    /// The window was full since it was published.
    pub(super) was_in_the_way: bool,
    /// The longest that two syncs may take here.
    pub(super) sync_bound: u64,
}

/// Which topic a lane is of: the queue's, or the stream's.
pub(super) fn topic_of(lane: usize) -> usize {
    usize::from(lane > 0)
}
