//! The life of a publishing lane, as a pure state machine: events and the time
//! go in, actions come out. It refuses to know clocks, channels and brokers, so
//! that whole outages are stepped in microseconds by tests.
//!
//! ```text
//!            hedge over / overloaded            nothing in doubt
//!  primary ------------------------> suspect ---------------------> draining
//!     ^  \                              | suspect_timeout,             |  |
//!     |   \ generation lost             v generation lost             |  |
//!     |    `-------------------------> degraded <---------------------'  |
//!     |                                   | lane opened                  |
//!     |                                   `----------> draining          |
//!     `------------------------------------------------------------------'
//!                              spool empty
//! ```
//!
//! Order (C5): every message gets its sequence number when it is admitted,
//! written or spooled. Copies taken late are filed under it, so a drain in
//! sequence order is a drain in publish order. A new message goes straight to
//! the primary only if the spool holds nothing of its order key that is not
//! already written on this same lane.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

mod events;
mod flights;
mod operate;

pub(crate) use self::events::Local;
use self::flights::{Flights, Fresh};
use super::{
    groups::{Groups, Tag},
    hedge::Hedge,
    limit::Limit,
};
use crate::{
    broker::{BrokerType, Confirmation, Fate, OrderKey, Outcome, Submission, Verdict},
    error::{Assume, Error, ErrorCode},
    hub::{
        spool::{Budget, ENTRY_OVERHEAD, Entry, Seq, Spool, Status},
        state::LaneState,
    },
    message::{
        Message, Timestamp,
        wire::{Failure, Marks},
    },
};

/// Both clocks: the steady one for time-outs, the wall for expirations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) at: Instant,
    pub(crate) wall: Timestamp,
}

/// Settings of a lane.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Whose lane it is.
    pub(crate) via: BrokerType,
    /// The topic, for errors.
    pub(crate) topic: Arc<str>,
    /// Messages in flight at most.
    pub(crate) window: usize,
    /// The hedge's bounds.
    pub(crate) hedge: (Duration, Duration),
    /// How long a lane may be suspect before its generation is ended.
    pub(crate) suspect_timeout: Duration,
    /// Whether there is a spool; without one errors reach the caller.
    pub(crate) spool: bool,
    /// The room that all lanes share.
    pub(crate) budget: Arc<Budget>,
    /// How long a publish waits for room in a full spool.
    pub(crate) spool_wait: Duration,
    /// Whether what is spooled outlives the process.
    pub(crate) durable: bool,
    /// Spooled messages that stay in memory although they are on the disk. With
    /// less than half of that many at hand, half of that many are read.
    pub(crate) head: usize,
    /// Which local handlers may take spooled messages during an outage.
    pub(crate) local: Local,
    /// How long an overloaded primary is left alone.
    pub(crate) overload_pause: Duration,
}

/// A message at the lane's door, with whoever waits for its outcome.
#[derive(Debug)]
pub(crate) struct Intake<W> {
    pub(crate) message: Arc<Message>,
    pub(crate) order: OrderKey,
    pub(crate) confirm: bool,
    /// When waiting is over.
    pub(crate) deadline: Instant,
    pub(crate) marks: Marks,
    pub(crate) waiter: W,
}

/// What the shell must do, in order.
#[derive(Debug)]
pub(crate) enum Action<W> {
    /// Write these on the open lane.
    Write(Vec<Submission>),
    /// Tell a publisher.
    Answer(W, Result<Outcome, Error>),
    /// Open a lane as soon as the broker is there.
    Open,
    /// Drop the open lane; its generation is over.
    EndGeneration,
    /// A message came into the spool: keep it where the spool is kept, then
    /// tell its publisher so. Live readers may want to read along.
    Store { seq: Seq, entry: Entry, waiter: W },
    /// A spooled message was changed in place; what is kept of it is outdated.
    Rewrite(Seq),
    /// The head of the spool runs short: read these back, from the first on, as
    /// many as fit into memory well.
    Load(Vec<Seq>),
    /// The spool let go of a message; nothing has to be kept of it.
    Remove(Seq),
    /// Move a message from the spool to the hub's dead letters. It is kept
    /// until they have it.
    DeadLetter {
        seq: Seq,
        message: Arc<Message>,
        failure: Failure,
        /// As it is marked.
        marks: Marks,
    },
    /// Keep a copy of a spooled event in the hub's dead letters, for the group
    /// that has it in hand; then that is to be settled, with an ack, or given
    /// back if no copy could be made.
    CopyToDead {
        tag: Tag,
        message: Arc<Message>,
        failure: Failure,
        /// As it is marked.
        marks: Marks,
    },
    /// The state changed.
    Changed {
        from: LaneState,
        to: LaneState,
        why: &'static str,
    },
}

/// A lane's state machine. `W` stands for whoever waits for an answer.
pub(crate) struct Machine<W> {
    settings: Settings,
    state: LaneState,
    /// A lane is open on the current generation.
    open: bool,
    /// An `Open` was emitted and not answered yet, since when.
    opening: Option<Instant>,
    /// The last open was refused; opened again only when something is published.
    refused: bool,
    /// Why; meaningful while `refused`.
    refusal: Option<Error>,
    waiting: VecDeque<(Intake<W>, Instant)>,
    /// The first deadline of those that wait, or one before it of somebody who waits
    /// no longer.
    earliest_deadline: Option<Instant>,
    in_flight: Flights<W>,
    spool: Spool,
    /// Which groups have which spooled events in hand.
    groups: Groups,
    next_seq: Seq,
    /// The last sequence number of an earlier process.
    restored: Seq,
    hedge: Hedge,
    suspect_since: Option<Instant>,
    /// The open lane answered that a message was not, or perhaps not, written:
    /// its generation is ending, and writing to it again would only bring the
    /// same answer until the end is seen.
    broken: bool,
    closing: bool,
    /// The primary said that it is overloaded: nothing is written before this.
    pause_until: Option<Instant>,
    /// Doubles with each overload in a row, reset by a confirm.
    pause: Duration,
    /// A `Load` was emitted and not answered yet.
    loading: bool,
    /// Spooled messages that a restart would not bring back.
    unkept: usize,
    /// How many messages intake may add to the spool while it drains; earned by
    /// drained messages, two for one, so that the spool shrinks under any load.
    credit: usize,
    half_credit: bool,
    drained: u64,
    /// An operator paused the drain.
    paused: bool,
    /// An operator lets nothing be written to the primary.
    forced: bool,
    /// How fast an operator, or the configuration, lets it drain.
    limit: Option<Limit>,
    actions: Vec<Action<W>>,
    /// Messages and bytes of the budget that nobody has to hold any more.
    freed: (usize, usize),
}

/// Intake that a drain begins with: a second of a busy publisher, so that an
/// ordinary drain slows nobody.
const FIRST_CREDIT: usize = 5_000;

/// How often the wall clock is looked at while something rests: it may be set,
/// which no timer on the steady clock notices.
const WALL_LOOK: Duration = Duration::from_secs(1);

/// What an overload pause grows to at most.
const MAX_OVERLOAD_PAUSE: Duration = Duration::from_secs(2);

impl<W> Machine<W> {
    pub(crate) fn new(settings: Settings) -> Self {
        let hedge = Hedge::new(settings.hedge.0, settings.hedge.1);
        let pause = settings.overload_pause;
        let spool = settings.local.prepare(Spool::new());
        Self {
            settings,
            state: LaneState::Primary,
            open: false,
            opening: None,
            refused: false,
            refusal: None,
            waiting: VecDeque::new(),
            earliest_deadline: None,
            in_flight: Flights::new(),
            spool,
            groups: Groups::default(),
            next_seq: 1,
            restored: 0,
            hedge,
            suspect_since: None,
            broken: false,
            closing: false,
            pause_until: None,
            pause,
            loading: false,
            unkept: 0,
            credit: FIRST_CREDIT,
            half_credit: false,
            drained: 0,
            paused: false,
            forced: false,
            limit: None,
            actions: Vec::new(),
            freed: (0, 0),
        }
    }

    // ----- what others may ask -----

    pub(crate) fn state(&self) -> LaneState {
        self.state
    }

    pub(crate) fn spool(&self) -> &Spool {
        &self.spool
    }

    pub(crate) fn drained(&self) -> u64 {
        self.drained
    }

    /// Messages that wait for room; the shell reads no more intake above a bound.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Nothing is in flight or waits for its outcome.
    pub(crate) fn is_quiet(&self) -> bool {
        self.waiting.is_empty() && self.in_flight.is_empty()
    }

    /// What to do, in order. Called after each event.
    pub(crate) fn take_actions(&mut self) -> Vec<Action<W>> {
        self.give_room_back();
        std::mem::take(&mut self.actions)
    }

    /// When `tick` is due, if at all.
    pub(crate) fn next_deadline(&self, now: Now) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let mut at_least = |t: Instant| next = Some(next.map_or(t, |n| n.min(t)));
        if self.state != LaneState::Suspect
            && self.settings.spool
            && let Some(written) = self.in_flight.oldest()
        {
            at_least(written + self.hedge.current());
        }
        if !self.settings.spool
            && let Some(deadline) = self.in_flight.first_deadline()
        {
            at_least(deadline);
        }
        if let Some(since) = self.suspect_since
            && (self.spool.in_doubt() > 0 || self.broken)
        {
            at_least(since + self.settings.suspect_timeout);
        }
        if let Some(until) = self.pause_until {
            at_least(until);
        }
        if let Some(since) = self.opening
            && self.state == LaneState::Primary
            && self.settings.spool
        {
            at_least(since + self.settings.hedge.1);
        }
        if let Some(deadline) = self.earliest_deadline {
            at_least(deadline);
        }
        if self.settings.spool
            && let Some((intake, since)) = self.waiting.front()
            && !self.has_room(&intake.message)
        {
            at_least(*since + self.settings.spool_wait);
        }
        let rested = self.hands_out_events().then(|| self.groups.next_due());
        if let Some(due) = self
            .spool
            .next_due()
            .into_iter()
            .chain(rested.flatten())
            .min()
        {
            at_least(
                now.at
                    + due
                        .since(now.wall)
                        .clamp(Duration::from_millis(1), WALL_LOOK),
            );
        }
        if let Some(limit) = &self.limit
            && self.may_drain()
            && self.spool.next_to_drain().is_some()
            && self.has_drain_window()
        {
            at_least(limit.next());
        }
        next
    }

    // ----- events -----

    /// Takes up what an earlier process left in the spool, before anything
    /// else happens. It has its room whether there is any or not: it was
    /// accepted.
    pub(crate) fn restore(&mut self, left: Spool) {
        let Some(last) = left.tail_end() else { return };
        if self.settings.spool {
            self.settings.budget.take_anyway(left.len(), left.bytes());
        }
        self.next_seq = last + 1;
        self.restored = last;
        self.spool = self.settings.local.prepare(left);
        // Nothing is written before the broker is asked for a lane.
        self.state = LaneState::Degraded;
    }

    /// A spooled message is on the disk; its body may go when there are many.
    pub(crate) fn kept(&mut self, seq: Seq) {
        // Groups read past each other: theirs stay, within the spool's bound.
        let pages = self.settings.local != Local::Groups;
        if pages && self.spool.head_len() > self.settings.head {
            self.spool.page_out(seq);
        }
    }

    /// Entries of the tail were read back, in publish order; none: they could
    /// not be read, and the shell asks again with the next event.
    pub(crate) fn loaded(&mut self, now: Now, entries: Vec<(Seq, Entry)>) {
        self.loading = false;
        for (seq, mut entry) in entries {
            entry.size = entry.message.size() + ENTRY_OVERHEAD;
            // What was written when the last process died cannot be told from
            // what was not, so all of it may be a duplicate.
            entry.marks.possible_duplicate |= seq <= self.restored;
            self.spool.page_in(seq, entry);
            self.groups.came(seq);
        }
        if let Some(error) = self.refusal.clone().filter(|_| self.refused) {
            while let Some(seq) = self.next_to_drain() {
                self.refuse_spooled(seq, &error);
            }
        }
        self.pump(now);
    }

    /// A kept message cannot be read back, and never will be.
    pub(crate) fn unreadable(&mut self, seq: Seq) {
        self.spool.drop_unreadable(seq);
        // How large it was went with it.
        self.release(0);
    }

    /// The broker is not there at all, as far as is known.
    pub(crate) fn broker_away(&mut self, now: Now) {
        if !self.open && self.state == LaneState::Primary {
            self.opening = None;
            self.go(LaneState::Degraded, "the broker is away");
        }
        self.pump(now);
    }

    /// The broker is there: a lane may be opened.
    pub(crate) fn broker_back(&mut self, now: Now) {
        self.refused = false;
        self.want_open(now);
        self.pump(now);
    }

    /// Somebody publishes, or several do.
    pub(crate) fn publish(&mut self, now: Now, intake: impl IntoIterator<Item = Intake<W>>) {
        // Degraded, the shell tries again by itself: what is spooled meanwhile
        // would ask at every message.
        let tries = self.settings.spool && self.state == LaneState::Degraded && !self.refused;
        if !self.open && !tries {
            self.refused = false;
            self.want_open(now);
        }
        for intake in intake {
            let deadline = intake.deadline;
            self.earliest_deadline =
                Some(self.earliest_deadline.map_or(deadline, |d| d.min(deadline)));
            self.waiting.push_back((intake, now.at));
        }
        self.pump(now);
        if self.waiting.is_empty() {
            self.earliest_deadline = None;
        }
    }

    /// A lane was opened.
    pub(crate) fn opened(&mut self, now: Now) {
        self.opening = None;
        self.open = true;
        self.broken = false;
        self.refused = false;
        self.pause_until = None;
        match self.state {
            LaneState::Degraded | LaneState::Suspect if !self.spool.is_empty() => {
                self.begin_drain("the broker is back");
            }
            LaneState::Degraded | LaneState::Suspect => {
                self.go(
                    LaneState::Primary,
                    "the broker is back, nothing was spooled",
                );
            }
            LaneState::Primary | LaneState::Draining => {}
        }
        self.pump(now);
    }

    /// No lane could be opened.
    pub(crate) fn open_failed(&mut self, now: Now, error: &Error) {
        self.opening = None;
        if error.is_refusal() {
            // Looked at and turned down: callers hear it, and what the spool
            // holds would be refused too, so it goes where it can be seen.
            self.refused = true;
            self.refusal = Some(error.clone());
            while let Some((intake, _)) = self.waiting.pop_front() {
                self.actions
                    .push(Action::Answer(intake.waiter, Err(error.clone())));
            }
            self.spool.wake(far_future());
            while let Some(seq) = self.next_to_drain() {
                self.refuse_spooled(seq, error);
            }
            // The broker answers, so this is not an outage: the next publish
            // asks again and hears the answer itself.
            self.go(LaneState::Primary, "the broker refuses the topic");
        } else if self.settings.spool {
            if self.state == LaneState::Primary {
                self.go(LaneState::Degraded, "no lane could be opened");
            }
        } else {
            while let Some((intake, _)) = self.waiting.pop_front() {
                self.actions
                    .push(Action::Answer(intake.waiter, Err(error.clone())));
            }
        }
        self.pump(now);
    }

    /// The broker answered submissions.
    pub(crate) fn confirmed(
        &mut self,
        now: Now,
        confirmations: impl IntoIterator<Item = Confirmation>,
    ) {
        for Confirmation { token, fate } in confirmations {
            self.answered(now, token, fate);
        }
        self.pump(now);
    }

    fn answered(&mut self, now: Now, seq: Seq, fate: Fate) {
        let Some(flight) = self.in_flight.land(seq) else {
            // Its generation was given up before; the copy was drained or will be.
            return;
        };
        match (fate, flight.fresh) {
            (Fate::Confirmed(position), Some(Fresh { entry, waiter, .. })) => {
                self.note_confirm(now, flight.written);
                self.release(entry.size);
                let via = self.settings.via;
                let outcome = if entry.confirm {
                    Outcome::Delivered { via, position }
                } else {
                    Outcome::Sent { via }
                };
                self.actions.push(Action::Answer(waiter, Ok(outcome)));
            }
            (Fate::Confirmed(_), None) => {
                self.note_confirm(now, flight.written);
                // An in-doubt copy that was not handed on, or a drained entry.
                if self.spool.status(seq) == Some(Status::InFlight) {
                    self.drained += 1;
                    self.earn_credit();
                }
                self.forget(seq);
            }
            (Fate::Refused(error), Some(Fresh { entry, waiter, .. })) => {
                self.release(entry.size);
                self.actions.push(Action::Answer(waiter, Err(error)));
            }
            (Fate::Refused(error), None) => self.refuse_spooled(seq, &error),
            (Fate::Overloaded(error), fresh) => {
                self.give_back(now, seq, fresh, false, &error);
                self.overloaded(now);
            }
            (Fate::Unknown(error), fresh) => {
                self.broken = true;
                self.give_back(now, seq, fresh, true, &error);
                self.become_suspect(now, "the outcome of a publish is unknown");
            }
            (Fate::Unsent(error), fresh) => {
                self.broken = true;
                self.give_back(now, seq, fresh, false, &error);
                self.become_suspect(now, "the lane stopped writing");
            }
        }
    }

    /// The open lane has ended, and with it its generation.
    pub(crate) fn ended(&mut self, now: Now, why: &'static str) {
        self.open = false;
        self.end_generation(now, why);
        self.pump(now);
    }

    /// The hub closes: nothing rests any longer, since what is not written now
    /// is lost with a memory spool. A durable one is left to the next process.
    pub(crate) fn close(&mut self, now: Now) {
        self.closing = true;
        self.pump(now);
    }

    /// Whether the spool can still be moved to the primary.
    pub(crate) fn is_draining(&self) -> bool {
        self.open && self.is_wanted_back()
    }

    /// Whether the hub, which closes, should wait for a broker that is away:
    /// what that does not take within the grace period is lost.
    pub(crate) fn awaits_broker(&self) -> bool {
        !self.open && self.closing && !self.refused && self.is_wanted_back()
    }

    fn is_wanted_back(&self) -> bool {
        !self.spool.is_empty() && !self.leaves_the_rest() && !self.paused && !self.forced
    }

    /// Closing, with a spool that the next process takes up.
    fn leaves_the_rest(&self) -> bool {
        self.closing && self.settings.durable && self.unkept == 0
    }

    /// How many spooled messages are in memory only, although others are kept:
    /// the disk was full, or broke. They would be lost with the process.
    pub(crate) fn note_unkept(&mut self, unkept: usize) {
        self.unkept = unkept;
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Now) {
        if self.state != LaneState::Suspect
            && self.settings.spool
            && self
                .in_flight
                .oldest()
                .is_some_and(|written| written + self.hedge.current() <= now.at)
        {
            self.become_suspect(now, "a confirm is late");
        }
        if let Some(since) = self.suspect_since
            && (self.spool.in_doubt() > 0 || self.broken)
            && since + self.settings.suspect_timeout <= now.at
        {
            self.actions.push(Action::EndGeneration);
            self.open = false;
            self.end_generation(now, "no confirm within suspect_timeout");
            self.want_open(now);
        }
        if self.pause_until.is_some_and(|until| until <= now.at) {
            self.pause_until = None;
        }
        if let Some(since) = self.opening
            && self.state == LaneState::Primary
            && self.settings.spool
            && since + self.settings.hedge.1 <= now.at
        {
            self.go(LaneState::Degraded, "no lane within the hedge");
        }
        if !self.settings.spool {
            self.time_out_in_flight(now);
        }
        self.pump(now);
        self.time_out_waiting(now);
    }

    // ----- local handlers -----

    /// Leases the next spooled message to a local handler, if it may.
    pub(crate) fn lease(&mut self, now: Now) -> Option<(Seq, Entry)> {
        if self.settings.local != Local::Consumers || !self.is_out() {
            return None;
        }
        self.want_load();
        loop {
            let seq = self.spool.next_to_lease()?;
            if self.bury_if_expired(now, seq) {
                continue;
            }
            self.spool.set(seq, Status::Leased);
            return self.spool.get(seq).cloned().map(|entry| (seq, entry));
        }
    }

    /// A local handler decided. False when it holds no such lease.
    pub(crate) fn settle(&mut self, now: Now, seq: Seq, verdict: Verdict) -> bool {
        if self.settings.local == Local::Groups {
            return self.settle_event(now, seq, verdict);
        }
        if self.spool.status(seq) != Some(Status::Leased) {
            return false;
        }
        match verdict {
            Verdict::Ack => {
                self.forget(seq);
            }
            Verdict::Requeue => {
                self.spool.edit(seq, |e| {
                    let mut message = (*e.message).clone();
                    message.redelivered = true;
                    e.message = Arc::new(message);
                });
                self.spool.set(seq, Status::Ready);
            }
            Verdict::Retry { delay, failure } => {
                self.spool.edit(seq, |e| {
                    let mut message = (*e.message).clone();
                    message.retry_count += 1;
                    message.error = Some(failure.details.clone());
                    e.message = Arc::new(message);
                    e.marks.failure = Some(Box::new(failure));
                    e.due = Some(now.wall + delay);
                });
                self.spool.set(seq, Status::Ready);
                self.actions.push(Action::Rewrite(seq));
            }
            Verdict::DeadLetter { failure } => self.bury(seq, failure),
        }
        self.pump(now);
        true
    }

    // ----- the inside -----

    fn go(&mut self, to: LaneState, why: &'static str) {
        // Whatever would let it write waits for the operator's word.
        let (to, why) = match to {
            LaneState::Primary | LaneState::Draining if self.forced => {
                (LaneState::Degraded, operate::HELD)
            }
            _ => (to, why),
        };
        if self.state != to {
            let from = std::mem::replace(&mut self.state, to);
            self.actions.push(Action::Changed { from, to, why });
        }
        if to != LaneState::Suspect {
            self.suspect_since = None;
        }
    }

    fn begin_drain(&mut self, why: &'static str) {
        if self.state != LaneState::Draining {
            self.credit = FIRST_CREDIT;
        }
        // What a group was to try again later it gets from the primary.
        self.groups.end_rests();
        self.go(LaneState::Draining, why);
    }

    fn want_open(&mut self, now: Now) {
        if !self.open && self.opening.is_none() && !self.refused && !self.forced {
            self.opening = Some(now.at);
            self.actions.push(Action::Open);
        }
    }

    fn note_confirm(&mut self, now: Now, written: Instant) {
        // What comes while suspect says how long the stall was, not how fast
        // the broker is; counted in, it would raise the hedge for the next one.
        if self.state != LaneState::Suspect {
            self.hedge.record(now.at.saturating_duration_since(written));
            self.pause = self.settings.overload_pause;
        }
    }

    fn earn_credit(&mut self) {
        if self.half_credit {
            self.credit = (self.credit + 1).min(FIRST_CREDIT);
        }
        self.half_credit = !self.half_credit;
    }

    /// The stall begins: first what is in flight is spooled, in publish order,
    /// in doubt; then everything that waits goes behind it (by `pump`).
    fn become_suspect(&mut self, now: Now, why: &'static str) {
        // A lane that an operator degraded may still have publishes in flight.
        let over = self.state == LaneState::Degraded && !self.forced;
        if self.state == LaneState::Suspect || over {
            return;
        }
        if !self.settings.spool {
            return;
        }
        for seq in self.in_flight.numbers() {
            match self.in_flight.take(seq) {
                Some(Fresh { entry, waiter, .. }) => {
                    self.file(seq, entry, waiter, Status::InDoubt);
                }
                None => {
                    self.spool.set(seq, Status::InDoubt);
                }
            }
        }
        self.suspect_since = Some(now.at);
        let from = self.state;
        self.state = LaneState::Suspect;
        self.actions.push(Action::Changed {
            from,
            to: LaneState::Suspect,
            why,
        });
    }

    fn overloaded(&mut self, now: Now) {
        self.pause_until = Some(now.at + self.pause);
        self.pause = (self.pause * 2).min(MAX_OVERLOAD_PAUSE);
        self.become_suspect(now, "the broker is overloaded");
    }

    /// Spools a message that a publisher waits for, and tells the publisher.
    fn file(&mut self, seq: Seq, entry: Entry, waiter: W, status: Status) {
        let mut kept = entry.clone();
        // What is read back by another process was in doubt when this one died.
        kept.marks.possible_duplicate |= status == Status::InDoubt;
        self.groups.came(seq);
        self.spool.insert(seq, entry, status);
        self.actions.push(Action::Store {
            seq,
            entry: kept,
            waiter,
        });
    }

    /// A submission came back unstored, or perhaps stored (`doubt`).
    fn give_back(
        &mut self,
        _now: Now,
        seq: Seq,
        fresh: Option<Fresh<W>>,
        doubt: bool,
        error: &Error,
    ) {
        match fresh {
            Some(Fresh {
                mut entry, waiter, ..
            }) => {
                if self.settings.spool {
                    entry.marks.possible_duplicate |= doubt;
                    self.file(seq, entry, waiter, Status::Ready);
                } else {
                    self.release(entry.size);
                    let assume = if doubt {
                        Assume::Unknown
                    } else {
                        Assume::NotSent
                    };
                    self.actions
                        .push(Action::Answer(waiter, Err(error.clone().assuming(assume))));
                }
            }
            None => {
                if doubt {
                    self.spool.edit(seq, |e| e.marks.possible_duplicate = true);
                }
                self.spool.set(seq, Status::Ready);
            }
        }
    }

    /// Takes an entry out of the spool and gives its room back.
    fn forget(&mut self, seq: Seq) {
        if let Some(entry) = self.spool.remove(seq) {
            self.release(entry.size);
            self.actions.push(Action::Remove(seq));
            self.groups.left(seq);
        }
    }

    /// Takes an entry out of the spool for the dead letters.
    fn bury(&mut self, seq: Seq, failure: Failure) {
        if let Some(entry) = self.spool.remove(seq) {
            self.release(entry.size);
            self.groups.left(seq);
            self.actions.push(Action::DeadLetter {
                seq,
                message: entry.message,
                failure,
                marks: entry.marks,
            });
        }
    }

    fn release(&mut self, size: usize) {
        if self.settings.spool {
            self.freed.0 += 1;
            self.freed.1 += size;
        }
    }

    /// Gives room back, of many messages at once: every lane's publishes touch
    /// these counters.
    fn give_room_back(&mut self) {
        let (messages, bytes) = std::mem::take(&mut self.freed);
        if messages > 0 {
            self.settings.budget.give_back(messages, bytes);
        }
    }

    /// Everything written and unanswered becomes ready, marked.
    fn end_generation(&mut self, now: Now, why: &'static str) {
        self.broken = false;
        let lost = Error::unknown(ErrorCode::ConnectionClosed, why)
            .at(self.settings.via)
            .on(&*self.settings.topic);
        for (seq, fresh) in self.in_flight.end() {
            self.give_back(now, seq, fresh, true, &lost);
        }
        self.opening = None;
        self.go(LaneState::Degraded, why);
        self.want_open(now);
    }

    fn refuse_spooled(&mut self, seq: Seq, error: &Error) {
        if let Some(entry) = self.spool.get(seq) {
            let failure = Failure::now(
                "refused",
                error.to_string(),
                &self.settings.topic,
                entry.marks.failure.as_deref(),
            );
            self.bury(seq, failure);
        }
    }

    fn bury_if_expired(&mut self, now: Now, seq: Seq) -> bool {
        let Some(entry) = self.spool.get(seq) else {
            return false;
        };
        if !entry.message.is_expired(now.wall) {
            return false;
        }
        let failure = Failure::now(
            "expired",
            "the message expired in the spool",
            &self.settings.topic,
            entry.marks.failure.as_deref(),
        );
        self.bury(seq, failure);
        true
    }

    /// Does whatever the state allows now: ends a suspicion, drains, admits.
    fn pump(&mut self, now: Now) {
        self.give_room_back();
        let hurry = self.hurries();
        self.spool.wake(if hurry { far_future() } else { now.wall });
        if self.state == LaneState::Suspect
            && self.spool.in_doubt() == 0
            && self.in_flight.is_empty()
            && self.pause_until.is_none()
            && self.open
            && !self.broken
        {
            if self.spool.is_empty() {
                self.go(LaneState::Primary, "every confirm came after all");
            } else {
                self.begin_drain("nothing is in doubt any more");
            }
        }
        if self.state == LaneState::Primary && !self.open && self.spool.ready_here() > 0 {
            // The topic was refused, and then a handler gave work back, or its
            // rest was over: nobody else may ever ask the broker again.
            self.refused = false;
            self.want_open(now);
        }
        if self.state == LaneState::Primary && self.open && self.spool.ready() > 0 {
            self.begin_drain("a local handler gave work back");
        }
        let mut batch = Vec::new();
        self.drain(now, &mut batch);
        // What it buried makes room for what waits.
        self.give_room_back();
        // After the drain: it may have buried all that was here, and with
        // nothing in flight nothing else would ever ask for the rest.
        self.want_load();
        self.admit(now, &mut batch);
        if !batch.is_empty() {
            self.actions.push(Action::Write(batch));
        }
        // What rests or is in a local handler's hands comes back by itself and
        // starts another drain. An event comes back for certain, and has its
        // place in the order of its key.
        let away = match self.settings.local {
            Local::Groups => self.spool.resting(),
            _ => self.spool.leased() + self.spool.resting(),
        };
        if self.state == LaneState::Draining && self.spool.len() == away {
            self.go(LaneState::Primary, "the spool is empty");
        }
    }

    /// Closing, with messages that nobody takes up later.
    fn hurries(&self) -> bool {
        self.closing && !self.leaves_the_rest()
    }

    fn want_load(&mut self) {
        // Ready entries that stand behind the tail are of no use before it.
        let half = self.settings.head.div_ceil(2);
        let short = self.spool.ready_here() < half || !self.spool.begins_here();
        if short {
            self.load();
        }
    }

    /// Reads the tail's first entries back, if there is a tail.
    fn load(&mut self) {
        let half = self.settings.head.div_ceil(2);
        if !self.loading && self.spool.tail_len() > 0 {
            self.loading = true;
            self.actions.push(Action::Load(self.spool.tail_start(half)));
        }
    }

    /// An outage, during which local handlers are served.
    fn is_out(&self) -> bool {
        matches!(self.state, LaneState::Suspect | LaneState::Degraded)
    }

    fn may_write(&self) -> bool {
        self.open
            && !self.broken
            && self.pause_until.is_none()
            && matches!(self.state, LaneState::Primary | LaneState::Draining)
    }

    fn may_drain(&self) -> bool {
        self.may_write()
            && self.state == LaneState::Draining
            && !self.paused
            && !self.leaves_the_rest()
    }

    /// Whether the drain's share of the window has room.
    fn has_drain_window(&self) -> bool {
        let share = (self.settings.window * 3 / 4).max(1);
        self.in_flight.len() - self.in_flight.waited() < share
            && self.in_flight.len() < self.settings.window
    }

    /// What is to be drained next; what waits for a group is set aside.
    fn next_to_drain(&mut self) -> Option<Seq> {
        self.spool.park_held();
        self.spool.next_to_drain()
    }

    /// The drain has three quarters of the window; the rest is for new
    /// publishes whose keys the spool does not hold.
    fn drain(&mut self, now: Now, batch: &mut Vec<Submission>) {
        if !self.may_drain() {
            return;
        }
        // What a memory spool still holds when the hub closes is lost: no limit
        // is worth that.
        let hurry = self.hurries();
        while self.has_drain_window() {
            let Some(seq) = self.next_to_drain() else {
                return;
            };
            if self.bury_if_expired(now, seq) {
                continue;
            }
            if let Some(limit) = &mut self.limit
                && !hurry
                && !limit.take(now.at)
            {
                return;
            }
            self.spool.set(seq, Status::InFlight);
            let Some(entry) = self.spool.get(seq) else {
                return;
            };
            batch.push(Submission {
                token: seq,
                message: entry.message.clone(),
                order: entry.order.clone(),
                marks: entry.marks.clone(),
                confirm: true,
            });
            self.in_flight.write_drained(seq, now.at);
        }
    }

    fn admit(&mut self, now: Now, batch: &mut Vec<Submission>) {
        while let Some((intake, _)) = self.waiting.front() {
            enum Way {
                Write,
                Spool,
                Wait,
            }
            // A lane writes only what the spool could take back.
            let size = intake.message.size() + ENTRY_OVERHEAD;
            let room = !self.settings.spool || self.settings.budget.has_room(size);
            let spool_room = self.settings.budget.has_spool_room(size);
            // While it drains, new publishes have a quarter of the window.
            let free = match self.state {
                LaneState::Draining => {
                    self.in_flight.waited() < self.settings.window.div_ceil(4)
                        && self.in_flight.len() < self.settings.window
                }
                _ => self.in_flight.len() < self.settings.window,
            };
            let way =
                match self.state {
                    LaneState::Primary if self.may_write() => {
                        if free && room {
                            Way::Write
                        } else {
                            Way::Wait
                        }
                    }
                    LaneState::Primary => Way::Wait,
                    LaneState::Suspect | LaneState::Degraded if self.settings.spool => {
                        if spool_room { Way::Spool } else { Way::Wait }
                    }
                    LaneState::Suspect | LaneState::Degraded => Way::Wait,
                    LaneState::Draining => {
                        if self.spool.fences(&intake.order) {
                            // Nothing is drained any more that could earn credit.
                            let free = self.is_slowed()
                                || self.leaves_the_rest()
                                || self.waits_for_groups();
                            if spool_room && (self.credit > 0 || free) {
                                Way::Spool
                            } else {
                                Way::Wait
                            }
                        } else if free && room && self.may_write() {
                            Way::Write
                        } else {
                            Way::Wait
                        }
                    }
                };
            if matches!(way, Way::Wait) {
                break;
            }
            if self.settings.spool && !self.settings.budget.take(size) {
                break;
            }
            let Some((intake, _)) = self.waiting.pop_front() else {
                break;
            };
            let seq = self.next_seq;
            self.next_seq += 1;
            let entry = Entry {
                message: intake.message,
                order: intake.order,
                marks: intake.marks,
                confirm: intake.confirm,
                since: now.wall,
                size,
                due: None,
            };
            if matches!(way, Way::Spool) {
                if self.state == LaneState::Draining {
                    self.credit = self.credit.saturating_sub(1);
                }
                self.file(seq, entry, intake.waiter, Status::Ready);
                continue;
            }
            batch.push(Submission {
                token: seq,
                message: entry.message.clone(),
                order: entry.order.clone(),
                marks: entry.marks.clone(),
                confirm: entry.confirm,
            });
            let fresh = Fresh {
                entry,
                waiter: intake.waiter,
                deadline: intake.deadline,
            };
            self.in_flight.write(seq, now.at, fresh);
        }
        if self.state == LaneState::Degraded && !self.settings.spool {
            self.refuse_waiting();
        }
    }

    /// Whether the front of the queue would find room where it would go now.
    fn has_room(&self, message: &Message) -> bool {
        let size = message.size() + ENTRY_OVERHEAD;
        match self.state {
            LaneState::Primary => self.settings.budget.has_room(size),
            _ => self.settings.budget.has_spool_room(size),
        }
    }

    /// Without a spool an outage is an error at once.
    fn refuse_waiting(&mut self) {
        while let Some((intake, _)) = self.waiting.pop_front() {
            let error = Error::new(
                ErrorCode::BrokerUnavailable,
                "the broker is away and the fallback is off",
            )
            .at(self.settings.via)
            .on(&*self.settings.topic);
            self.actions.push(Action::Answer(intake.waiter, Err(error)));
        }
    }

    fn time_out_waiting(&mut self, now: Now) {
        // The first has waited longest for room; without this a busy lane would
        // go through all that wait at each turn.
        let rested =
            |since: Instant| self.settings.spool && since + self.settings.spool_wait <= now.at;
        if self.earliest_deadline.is_some_and(|d| d > now.at)
            && !self
                .waiting
                .front()
                .is_some_and(|(_, since)| rested(*since))
        {
            return;
        }
        let mut kept = VecDeque::with_capacity(self.waiting.len());
        for (intake, since) in std::mem::take(&mut self.waiting) {
            let over = intake.deadline <= now.at;
            let spool_over = self.settings.spool && since + self.settings.spool_wait <= now.at;
            let full = self.settings.spool && !self.has_room(&intake.message);
            if over || (spool_over && full) {
                let error = if full {
                    Error::new(
                        ErrorCode::SpoolFull,
                        "the spool is full and the broker does not take messages; try again later",
                    )
                } else {
                    Error::new(ErrorCode::Timeout, "no room to publish within the timeout")
                };
                self.actions.push(Action::Answer(
                    intake.waiter,
                    Err(error.at(self.settings.via).on(&*self.settings.topic)),
                ));
            } else {
                kept.push_back((intake, since));
            }
        }
        self.waiting = kept;
        self.earliest_deadline = self.waiting.iter().map(|(i, _)| i.deadline).min();
    }

    fn time_out_in_flight(&mut self, now: Now) {
        for seq in self.in_flight.late(now.at) {
            // It stays in flight, unanswered for nobody, until the broker's word
            // or the end of its generation: it still takes its place in the
            // window, or a stalled broker would be sent ever more.
            if let Some(Fresh { entry, waiter, .. }) = self.in_flight.take(seq) {
                self.release(entry.size);
                let error = Error::unknown(
                    ErrorCode::PublishTimeout,
                    "the broker did not confirm within the timeout",
                )
                .at(self.settings.via)
                .on(&*self.settings.topic);
                self.actions.push(Action::Answer(waiter, Err(error)));
            }
        }
    }
}

fn far_future() -> Timestamp {
    Timestamp::from_millis(i64::MAX)
}
