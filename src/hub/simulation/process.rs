//! A simulated hub process: the real machines, keepers, windows, budget and
//! breakers, with the shell's rules stepped round them: what a lane's task does
//! with each action, when it asks for a lane again, when it looks at the clock.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{
    consumer::{Held, Source},
    disk::Disk,
    oracle::{Attempt, Seen},
    world::{Ev, World},
};
use crate::{
    broker::{BrokerType, Outcome, Settlement, Submission, Verdict},
    config::WindowSettings,
    error::{Error, ErrorCode},
    hub::{
        breaker::Breaker,
        group::Group,
        intake::{IntakeWindow, Ticket},
        lane::{
            keeper::{Keeper, Loader, Progress, Release},
            machine::{Action, Local, Machine, Now, Settings},
        },
        spool::{
            Budget, LaneLeft, Seq,
            codec::{self, LaneName},
            store::SpoolStore,
        },
        state::LaneState,
    },
    message::Message,
};

/// Lanes of a process: the queue's, and one for each partition of the stream.
pub(super) const LANES: usize = 3;

/// One hub process, alive or dead, with its disk.
pub(super) struct Process {
    pub(super) up: bool,
    /// Counts its lives.
    pub(super) incarnation: u32,
    pub(super) lanes: Vec<LaneSim>,
    pub(super) budget: Arc<Budget>,
    pub(super) disk: Arc<Disk>,
    pub(super) intake: IntakeWindow<Outcome, Attempt>,
    pub(super) tickets: HashMap<Attempt, Ticket>,
    /// One for the queue's subscription, one for the stream's.
    pub(super) groups: [Group; 2],
    pub(super) settlements: mpsc::UnboundedSender<Settlement>,
    pub(super) verdicts: mpsc::UnboundedReceiver<Settlement>,
    pub(super) held: HashMap<u64, Held>,
    pub(super) sources: HashMap<u64, Source>,
    pub(super) breakers: [Breaker; 2],
    pub(super) connected: [bool; 2],
    /// Disk faults.
    pub(super) slow: u32,
    pub(super) fail_syncs: bool,
    pub(super) sync_epoch: u32,
    /// Room that something else took.
    pub(super) hogged: usize,
    /// When there was no room last.
    pub(super) full_last: u64,
    /// So many actions until it dies, and whether by a power cut.
    pub(super) dies_in: Option<(u32, bool)>,
}

/// One lane, as its task keeps it.
pub(super) struct LaneSim {
    pub(super) machine: Machine<Attempt>,
    pub(super) keeper: Keeper<Attempt>,
    pub(super) outbox: Vec<Submission>,
    pub(super) handing_over: bool,
    pub(super) conn: Option<usize>,
    pub(super) opening: Option<(u64, u64)>,
    pub(super) reopen: Option<u64>,
    pub(super) tick_at: Option<u64>,
    /// Turns at one moment: a lane that never rests is broken.
    turns: (u64, u32),
    /// When publishes had to wait for room in the window last.
    pub(super) in_the_way: u64,
    /// By when it must have written what it holds.
    pub(super) must_write_by: Option<u64>,
    /// Which attempt has which number.
    pub(super) attempts: HashMap<Seq, Attempt>,
    /// Spooled messages in local handlers' hands.
    pub(super) leases: usize,
    /// Spooled messages on their way back from the disk.
    pub(super) loading: Option<Loader>,
}

/// The payload of an attempt is its number.
pub(super) fn attempt_of(message: &Message) -> Attempt {
    message
        .payload
        .as_ref()
        .try_into()
        .map_or(0, u32::from_le_bytes)
}

pub(super) fn lane_name(l: usize) -> LaneName {
    LaneName {
        topic: crate::topic::Topic::new(if l == 0 { "queue" } else { "stream" }).unwrap(),
        lane: u32::try_from(l.saturating_sub(1)).unwrap_or(0),
        mandatory: true,
        compression: None,
        address: None,
    }
}

/// The name of the group at the stream.
pub(super) const GROUP: &str = "g";

fn group(name: Option<&str>) -> Group {
    Group::new(
        name.map(str::to_owned),
        &WindowSettings {
            age: Duration::from_secs(24 * 3600),
            ids: 100_000,
        },
    )
}

impl Process {
    pub(super) fn new(world: &super::world::Plan) -> Self {
        let (settlements, verdicts) = mpsc::unbounded_channel();
        Self {
            up: false,
            incarnation: 0,
            lanes: Vec::new(),
            budget: Arc::new(Budget::new(world.room, usize::MAX / 2)),
            disk: Disk::new(),
            intake: IntakeWindow::new(100_000, Duration::from_secs(24 * 3600)),
            tickets: HashMap::new(),
            groups: [group(None), group(Some(GROUP))],
            settlements,
            verdicts,
            held: HashMap::new(),
            sources: HashMap::new(),
            breakers: [breaker(), breaker()],
            connected: [false; 2],
            slow: 0,
            fail_syncs: false,
            sync_epoch: 0,
            hogged: 0,
            full_last: 0,
            dies_in: None,
        }
    }
}

fn breaker() -> Breaker {
    Breaker::new(3, Duration::from_secs(30))
}

/// Pause before a lane that could not be opened is tried again.
const REOPEN_PAUSE: u64 = 100_000;

/// How long an opened lane may take to be ready.
const OPEN_TIMEOUT: u64 = 10_000_000;

/// The longest that a sync takes on a slow disk.
pub(super) const SLOW_SYNC: u64 = 800_000;

impl World {
    // ----- life and death -----

    /// A process starts: it reads its disk before anything else.
    pub(super) fn start(&mut self, p: usize) {
        let plan = self.plan.clone();
        let process = &mut self.processes[p];
        let fresh = Process::new(&plan);
        process.up = true;
        process.incarnation += 1;
        process.budget = fresh.budget;
        process.intake = fresh.intake;
        process.tickets.clear();
        process.groups = fresh.groups;
        process.settlements = fresh.settlements;
        process.verdicts = fresh.verdicts;
        process.held.clear();
        process.sources.clear();
        process.breakers = fresh.breakers;
        process.connected = [false; 2];
        process.fail_syncs = false;
        process.hogged = 0;
        process.dies_in = None;
        process.full_last = self.now;
        process.lanes.clear();
        for l in 0..LANES {
            let topic = if l == 0 { "queue" } else { "stream" };
            let settings = Settings {
                via: if l == 0 {
                    BrokerType::RabbitMq
                } else {
                    BrokerType::Kafka
                },
                topic: topic.into(),
                window: plan.window,
                hedge: (Duration::from_millis(100), Duration::from_secs(1)),
                suspect_timeout: Duration::from_secs(10),
                spool: true,
                budget: process.budget.clone(),
                spool_wait: Duration::from_secs(5),
                durable: true,
                local: match l {
                    0 if plan.local => Local::Consumers,
                    1.. if plan.groups => Local::Groups,
                    _ => Local::Nobody,
                },
                overload_pause: Duration::from_millis(50),
                head: plan.head,
            };
            let store: Arc<dyn SpoolStore> = process.disk.clone();
            process.lanes.push(LaneSim {
                machine: Machine::new(settings),
                keeper: Keeper::new(lane_name(l), Some(store), Duration::from_secs(5)),
                outbox: Vec::new(),
                handing_over: false,
                conn: None,
                opening: None,
                reopen: None,
                tick_at: None,
                turns: (0, 0),
                in_the_way: 0,
                must_write_by: None,
                attempts: HashMap::new(),
                leases: 0,
                loading: None,
            });
        }
        let kept = process.disk.reopen();
        let mut found: Vec<_> = Vec::with_capacity(kept.len());
        for (id, body) in kept {
            match codec::decode(&body) {
                Ok(kept) => found.push((id, kept)),
                Err(error) => self
                    .oracle
                    .fail("C2", || format!("a whole record is unreadable: {error}")),
            }
        }
        found.sort_by_key(|(_, kept)| (kept.lane.topic.clone(), kept.lane.lane, kept.seq));
        let mut restored = Vec::new();
        let mut left: [LaneLeft; LANES] = Default::default();
        for (id, kept) in found {
            let l = if kept.lane.topic.as_str() == "queue" {
                0
            } else {
                1 + kept.lane.lane as usize
            };
            let attempt = attempt_of(&kept.entry.message);
            restored.push(attempt);
            self.oracle.hold(attempt);
            let size = kept.entry.message.size();
            left[l].ids.insert(kept.seq, id);
            left[l].spool.restore(kept.seq, &kept.entry.order, size);
            self.processes[p].lanes[l]
                .attempts
                .insert(kept.seq, attempt);
        }
        for (lane, left) in self.processes[p].lanes.iter_mut().zip(left) {
            lane.machine.restore(left.spool);
            lane.keeper.restored(left.ids);
        }
        self.trace(|| format!("process {p} starts with {restored:?}"));
        for l in 0..LANES {
            self.with_machine(p, l, |machine, now| machine.broker_away(now));
        }
        let incarnation = self.processes[p].incarnation;
        for b in 0..2 {
            let after = self.rng.u64(1_000..100_000);
            self.post(after, Ev::Connect(p, incarnation, b));
            self.post(1_000_000, Ev::Probe(p, incarnation, b));
        }
    }

    /// It dies after some more actions, or soon.
    pub(super) fn kill_soon(&mut self, p: usize, power_cut: bool) {
        if !self.processes[p].up {
            return;
        }
        if self.rng.bool() {
            let actions = self.rng.u32(0..40);
            self.processes[p].dies_in = Some((actions, power_cut));
            let incarnation = self.processes[p].incarnation;
            self.post(500_000, Ev::Die(p, incarnation, power_cut));
        } else {
            self.die(p, power_cut);
        }
    }

    pub(super) fn die(&mut self, p: usize, power_cut: bool) {
        let process = &mut self.processes[p];
        if !process.up {
            return;
        }
        process.up = false;
        process.dies_in = None;
        process.incarnation += 1;
        process.sync_epoch += 1;
        process.lanes.clear();
        process.held.clear();
        process.sources.clear();
        let torn = process.disk.die(power_cut, &mut self.rng);
        self.trace(|| format!("process {p} dies (power cut: {power_cut}, torn: {torn})"));
        let silent: Vec<Attempt> = self
            .oracle
            .lives
            .iter()
            .enumerate()
            .filter(|(_, life)| life.process == p && !life.bereaved && life.answer.is_none())
            .filter_map(|(attempt, _)| Attempt::try_from(attempt).ok())
            .collect();
        self.oracle.died(p);
        for attempt in silent {
            self.publisher_hears_error(attempt);
        }
        for c in 0..self.conns.len() {
            if self.conns[c].open && self.conns[c].process == p {
                self.abandon_conn(c);
            }
        }
        self.consumers_lose_process(p);
        let after = self.rng.u64(10_000..2_000_000);
        self.post(after, Ev::Start(p));
    }

    // ----- connections -----

    pub(super) fn connect(&mut self, p: usize, b: usize) {
        let incarnation = self.processes[p].incarnation;
        if !self.brokers[b].answers() {
            let again = self.rng.u64(50_000..250_000);
            self.post(again, Ev::Connect(p, incarnation, b));
            return;
        }
        if std::mem::replace(&mut self.processes[p].connected[b], true) {
            return;
        }
        self.probed_well(p, b);
        for l in lanes_of(b) {
            if self.processes[p].incarnation != incarnation {
                return;
            }
            self.processes[p].lanes[l].reopen = None;
            self.with_machine(p, l, |machine, now| machine.broker_back(now));
        }
        self.kick_consumers();
    }

    /// The connection of one process is cut.
    pub(super) fn cut(&mut self, p: usize, b: usize) {
        if self.processes[p].up && self.processes[p].connected[b] {
            self.consumers_lose_link(p, b);
            self.lose_link(p, b);
        }
    }

    pub(super) fn lose_link(&mut self, p: usize, b: usize) {
        if !self.processes[p].up || !std::mem::replace(&mut self.processes[p].connected[b], false) {
            return;
        }
        let incarnation = self.processes[p].incarnation;
        let away_first = self.rng.u32(..4) == 0;
        for l in lanes_of(b) {
            if self.processes[p].incarnation != incarnation {
                return;
            }
            if away_first {
                self.with_machine(p, l, |machine, now| machine.broker_away(now));
            }
            if self.processes[p].incarnation != incarnation {
                return;
            }
            if let Some(c) = self.processes[p].lanes[l].conn {
                self.end_conn(c, false);
            }
            if self.processes[p].incarnation != incarnation {
                return;
            }
            self.with_machine(p, l, |machine, now| machine.broker_away(now));
        }
        let again = self.rng.u64(50_000..250_000);
        self.post(again, Ev::Connect(p, incarnation, b));
    }

    pub(super) fn probe(&mut self, p: usize, b: usize) {
        let incarnation = self.processes[p].incarnation;
        let well = self.brokers[b].answers() && self.processes[p].connected[b];
        if well {
            self.probed_well(p, b);
            self.half_opened(p, b);
        } else {
            let at = self.at().at;
            self.processes[p].breakers[b].failed(at);
        }
        if self.processes[p].incarnation == incarnation {
            self.post(
                if well { 5_000_000 } else { 1_000_000 },
                Ev::Probe(p, incarnation, b),
            );
        }
    }

    pub(super) fn probed_well(&mut self, p: usize, b: usize) {
        self.processes[p].breakers[b].probed_well();
    }

    pub(super) fn half_opened(&mut self, p: usize, b: usize) {
        let incarnation = self.processes[p].incarnation;
        for l in lanes_of(b) {
            if self.processes[p].incarnation == incarnation
                && self.processes[p].lanes[l].reopen.is_some()
            {
                self.reopen(p, l);
            }
        }
    }

    pub(super) fn reopen(&mut self, p: usize, l: usize) {
        let b = usize::from(l > 0);
        self.processes[p].lanes[l].reopen = None;
        if self.processes[p].connected[b] {
            self.with_machine(p, l, |machine, now| machine.broker_back(now));
        }
    }

    /// The adapter answers that a lane is open, or is not.
    pub(super) fn opened(&mut self, p: usize, l: usize, token: u64) {
        let b = usize::from(l > 0);
        let Some((current, since)) = self.processes[p].lanes[l].opening else {
            return;
        };
        if current != token {
            return;
        }
        let at = self.at().at;
        let result = if !self.processes[p].breakers[b].allows(at) {
            Err(Error::new(
                ErrorCode::BrokerUnavailable,
                "the breaker is open",
            ))
        } else if !self.processes[p].connected[b] {
            Err(Error::new(ErrorCode::ConnectionFailed, "not connected"))
        } else if !self.brokers[b].answers() {
            if self.now < since + OPEN_TIMEOUT {
                let incarnation = self.processes[p].incarnation;
                self.post(50_000, Ev::Opened(p, incarnation, l, token));
                return;
            }
            Err(Error::new(
                ErrorCode::ConnectionTimeout,
                "no channel in time",
            ))
        } else if self.brokers[b].refuses_lanes > 0 {
            self.brokers[b].refused_last = self.now;
            Err(Error::rejected(ErrorCode::QueueNotFound, "no such queue"))
        } else {
            Ok(())
        };
        self.processes[p].lanes[l].opening = None;
        match result {
            Ok(()) => {
                self.processes[p].breakers[b].succeeded();
                let incarnation = self.processes[p].incarnation;
                let c = self.conns.len();
                self.trace(|| format!("process {p} lane {l}: generation {c} opens"));
                self.conns.push(super::broker::Conn::new(p, incarnation, l));
                let lane = &mut self.processes[p].lanes[l];
                lane.conn = Some(c);
                lane.reopen = None;
                self.with_machine(p, l, |machine, now| machine.opened(now));
            }
            Err(error) => {
                if !error.is_refusal() {
                    self.order += 1;
                    let (token, incarnation) = (self.order, self.processes[p].incarnation);
                    self.processes[p].lanes[l].reopen = Some(token);
                    self.post(REOPEN_PAUSE, Ev::Reopen(p, incarnation, l, token));
                } else {
                    for attempt in self.held_in(p, l) {
                        self.oracle.life(attempt).refused = true;
                    }
                }
                self.with_machine(p, l, |machine, now| machine.open_failed(now, &error));
            }
        }
    }

    /// What a refused lane's spool holds, for the record.
    fn held_in(&self, p: usize, l: usize) -> Vec<Attempt> {
        self.oracle
            .lives
            .iter()
            .enumerate()
            .filter(|(_, life)| life.process == p && life.lane == l && life.held)
            .filter_map(|(attempt, _)| Attempt::try_from(attempt).ok())
            .collect()
    }

    // ----- stepping a machine -----

    pub(super) fn with_machine<R>(
        &mut self,
        p: usize,
        l: usize,
        step: impl FnOnce(&mut Machine<Attempt>, Now) -> R,
    ) -> Option<R> {
        let now = self.at();
        let lane = self.processes[p].lanes.get_mut(l)?;
        let result = step(&mut lane.machine, now);
        self.act(p, l);
        Some(result)
    }

    /// Carries out what a machine decided, as its task does.
    pub(super) fn act(&mut self, p: usize, l: usize) {
        let incarnation = self.processes[p].incarnation;
        loop {
            let Some(lane) = self.processes[p].lanes.get_mut(l) else {
                return;
            };
            let mut actions = lane.machine.take_actions();
            if actions.is_empty() {
                // Handing out may bury what expired.
                self.feed_local(p, l);
                if self.processes[p].incarnation != incarnation {
                    return;
                }
                actions = self.processes[p].lanes[l].machine.take_actions();
                if actions.is_empty() {
                    let at = self.at().at;
                    let progress = self.processes[p].lanes[l].keeper.flush(at);
                    self.pass_on(p, l, progress);
                    break;
                }
            }
            for action in actions {
                if let Some((left, power_cut)) = &mut self.processes[p].dies_in {
                    if *left == 0 {
                        let power_cut = *power_cut;
                        self.die(p, power_cut);
                        return;
                    }
                    *left -= 1;
                }
                self.carry_out(p, l, action);
                if self.processes[p].incarnation != incarnation || self.oracle.violation.is_some() {
                    return;
                }
            }
        }
        self.rest(p, l);
    }

    fn carry_out(&mut self, p: usize, l: usize, action: Action<Attempt>) {
        self.note_room(p);
        match action {
            Action::Write(batch) => self.write(p, l, batch),
            Action::Answer(attempt, answer) => self.answer(p, attempt, answer),
            Action::Open => {
                self.order += 1;
                let token = self.order;
                let incarnation = self.processes[p].incarnation;
                self.processes[p].lanes[l].opening = Some((token, self.now));
                let after = self.rng.u64(500..15_000);
                self.post(after, Ev::Opened(p, incarnation, l, token));
            }
            Action::EndGeneration => {
                let lane = &mut self.processes[p].lanes[l];
                lane.outbox.clear();
                if let Some(c) = lane.conn.take() {
                    self.trace(|| format!("process {p} lane {l}: gives generation {c} up"));
                    self.abandon_conn(c);
                }
            }
            Action::Store { seq, entry, waiter } => {
                let now = self.now;
                self.trace(|| format!("process {p} lane {l}: spools {waiter} as {seq}"));
                if self.oracle.life(waiter).filed.is_some() {
                    self.oracle
                        .fail("C1", || format!("{waiter} was spooled twice"));
                }
                self.take_room(p, waiter, true);
                self.oracle.life(waiter).filed = Some(now);
                self.processes[p].lanes[l].attempts.insert(seq, waiter);
                let answer = self.processes[p].lanes[l].keeper.store(seq, &entry, waiter);
                if let Some((waiter, outcome)) = answer {
                    self.answer(p, waiter, Ok(outcome));
                }
            }
            Action::Rewrite(seq) => {
                let lane = &mut self.processes[p].lanes[l];
                if let Some(entry) = lane.machine.spool().get(seq) {
                    lane.keeper.rewrite(seq, entry);
                }
            }
            Action::Remove(seq) => {
                self.trace(|| format!("process {p} lane {l}: lets go of {seq}"));
                self.forget(p, l, seq);
                if let Some(attempt) = self.processes[p].lanes[l].attempts.remove(&seq) {
                    self.oracle.let_go(attempt);
                }
            }
            Action::Load(seqs) => {
                let lane = &mut self.processes[p].lanes[l];
                lane.loading = lane.keeper.loader(seqs);
                let incarnation = self.processes[p].incarnation;
                let after = self.rng.u64(100..5_000);
                self.post(after, Ev::Loaded(p, incarnation, l));
            }
            Action::DeadLetter {
                seq,
                message,
                failure,
                ..
            } => {
                let attempt = attempt_of(&message);
                self.trace(|| {
                    format!("process {p} lane {l}: buries {attempt}: {}", failure.reason)
                });
                let wall = self.at().wall;
                let life = self.oracle.life(attempt);
                let right = match failure.reason.as_str() {
                    "expired" => message.is_expired(wall),
                    "refused" => life.refused,
                    _ => true,
                };
                life.buried = true;
                if !right {
                    self.oracle.fail("C9", || {
                        format!("{attempt} was buried for no reason: {}", failure.reason)
                    });
                }
                self.oracle.let_go(attempt);
                let release = self.processes[p].lanes[l].keeper.give_away(seq);
                self.forget(p, l, seq);
                let incarnation = self.processes[p].incarnation;
                let after = self.rng.u64(100..300_000);
                self.letters.insert((p, incarnation, attempt), release);
                self.post(after, Ev::Bury(p, incarnation, attempt));
            }
            Action::CopyToDead { tag, message, .. } => {
                self.trace(|| format!("process {p} lane {l}: copies {}", attempt_of(&message)));
                let now = self.at();
                let lane = &mut self.processes[p].lanes[l];
                lane.machine.settle(now, tag, Verdict::Ack);
            }
            Action::Changed { from, to, why } => {
                self.trace(|| {
                    format!(
                        "process {p} lane {l}: {} -> {}: {why}",
                        from.as_str(),
                        to.as_str()
                    )
                });
                self.lane_changed(p, l, to);
            }
        }
        // What the spool let go of gives its room back.
        self.note_room(p);
    }

    /// The dead letter is safe; the spool may let go.
    pub(super) fn bury(&mut self, p: usize, attempt: Attempt) {
        let incarnation = self.processes[p].incarnation;
        let Some(release) = self.letters.remove(&(p, incarnation, attempt)) else {
            return;
        };
        if self.processes[p].disk.bury(attempt) {
            let _ = release.map(Release::done);
        } else {
            // With a broken disk it is in memory only, as the spool's copy is
            // from now on: kept there until the process ends.
            self.letters_in_memory.insert((p, incarnation, attempt));
        }
        self.sync_if_due(p);
    }

    fn write(&mut self, p: usize, l: usize, batch: Vec<Submission>) {
        let incarnation = self.processes[p].incarnation;
        let state = self.processes[p].lanes[l].machine.state();
        let Some(c) = self.processes[p].lanes[l].conn else {
            self.oracle.fail("C3", || {
                format!("process {p} lane {l} writes without an open lane")
            });
            return;
        };
        if !matches!(state, LaneState::Primary | LaneState::Draining) {
            self.oracle.fail("C3", || {
                format!("process {p} lane {l} writes while {}", state.as_str())
            });
        }
        if self.conns[c].broken {
            self.oracle.fail("C4", || {
                format!("process {p} lane {l} writes on a generation that is ending")
            });
        }
        for submission in &batch {
            let attempt = attempt_of(&submission.message);
            let marked = submission.marks.possible_duplicate;
            self.trace(|| {
                format!(
                    "process {p} lane {l}: writes {attempt} (token {}, marked: {marked})",
                    submission.token
                )
            });
            if self.oracle.life(attempt).filed.is_none() {
                self.take_room(p, attempt, false);
            }
            self.oracle
                .writes(self.now, attempt, c, incarnation, marked);
            let settled = submission.marks.settled.iter().any(|g| g == GROUP);
            self.oracle.notes(attempt, incarnation, settled);
            if self.conns[c]
                .untold
                .insert(submission.token, attempt)
                .is_some()
            {
                self.oracle.fail("C1", || {
                    format!("token {} is in flight twice", submission.token)
                });
            }
        }
        if self.conns[c].untold.len() > self.plan.window {
            self.oracle.fail("C8", || {
                format!("process {p} lane {l} has more in flight than its window")
            });
        }
        if let Some(by) = self.processes[p].lanes[l].must_write_by.take()
            && self.now > by
        {
            let late = self.now - by;
            self.oracle.fail("C4", || {
                format!("process {p} lane {l} drained {late} us too late")
            });
        }
        self.processes[p].lanes[l].outbox.extend(batch);
    }

    fn take_room(&mut self, p: usize, attempt: Attempt, spooled: bool) {
        if self.oracle.life(attempt).held {
            return;
        }
        let room = self.plan.room;
        let taken = self.oracle.held[p] + self.processes[p].hogged;
        let most = if spooled { room - room / 10 } else { room };
        if taken >= most {
            self.oracle.fail("C8", || {
                format!("process {p} took {attempt} with {taken} of {room} taken")
            });
        }
        self.oracle.hold(attempt);
    }

    pub(super) fn note_room(&mut self, p: usize) {
        if self.is_full(p) {
            self.processes[p].full_last = self.now;
        }
    }

    /// Whether the spool has no room for one more.
    fn is_full(&self, p: usize) -> bool {
        let taken = self.oracle.held[p] + self.processes[p].hogged;
        taken >= self.plan.room - self.plan.room / 10
    }

    /// After its actions a lane sees to what is due, and sleeps.
    fn rest(&mut self, p: usize, l: usize) {
        if self.processes[p].lanes.get(l).is_none() {
            return;
        }
        self.sync_if_due(p);
        let now = self.at();
        let incarnation = self.processes[p].incarnation;
        let Some(lane) = self.processes[p].lanes.get_mut(l) else {
            return;
        };
        let in_flight = lane.conn.map_or(0, |c| self.conns[c].untold.len());
        if lane.machine.waiting() > 0 && in_flight >= self.plan.window.div_ceil(4) {
            lane.in_the_way = self.now;
        }
        let deadline = [lane.machine.next_deadline(now), lane.keeper.next_deadline()];
        let deadline = deadline.into_iter().flatten().min().map(|at| {
            u64::try_from(at.saturating_duration_since(self.base).as_micros()).unwrap_or(u64::MAX)
        });
        let hand_over = !lane.outbox.is_empty() && lane.conn.is_some() && !lane.handing_over;
        if hand_over {
            lane.handing_over = true;
        }
        if deadline != lane.tick_at {
            lane.tick_at = deadline;
            if let Some(at) = deadline {
                if at <= self.now {
                    if lane.turns.0 == self.now {
                        lane.turns.1 += 1;
                    } else {
                        lane.turns = (self.now, 0);
                    }
                    if lane.turns.1 > 100 {
                        self.oracle
                            .fail("C4", || format!("process {p} lane {l} never rests"));
                    }
                }
                let after = at.saturating_sub(self.now);
                self.post(after, Ev::Tick(p, incarnation, l, at));
            }
        }
        if hand_over {
            let after = self.rng.u64(20..400);
            self.post(after, Ev::Handover(p, incarnation, l));
        }
    }

    pub(super) fn tick(&mut self, p: usize, l: usize, at: u64) {
        let lane = &mut self.processes[p].lanes[l];
        if lane.tick_at != Some(at) {
            return;
        }
        lane.tick_at = None;
        let now = self.at();
        for (attempt, outcome) in self.processes[p].lanes[l].keeper.give_up(now.at) {
            self.answer(p, attempt, Ok(outcome));
        }
        self.with_machine(p, l, |machine, now| machine.tick(now));
    }

    /// Somebody gave room back: lanes where publishers wait look again.
    pub(super) fn look_for_room(&mut self, p: usize) {
        for l in 0..LANES {
            if self.processes[p]
                .lanes
                .get(l)
                .is_some_and(|x| x.machine.waiting() > 0)
            {
                self.with_machine(p, l, |machine, now| machine.tick(now));
            }
        }
    }

    // ----- the disk -----

    fn forget(&mut self, p: usize, l: usize, seq: Seq) {
        if let Some((attempt, outcome)) = self.processes[p].lanes[l].keeper.remove(seq) {
            self.answer(p, attempt, Ok(outcome));
        }
    }

    fn pass_on(&mut self, p: usize, l: usize, progress: Progress<Attempt>) {
        for (attempt, outcome) in progress.answers {
            self.answer(p, attempt, Ok(outcome));
        }
        for seq in progress.kept {
            self.processes[p].lanes[l].machine.kept(seq);
        }
    }

    /// Spooled messages are back from the disk.
    pub(super) fn loaded(&mut self, p: usize, l: usize) {
        let Some(loader) = self.processes[p].lanes[l].loading.take() else {
            return;
        };
        let loaded = loader.load().unwrap_or_default();
        self.trace(|| format!("process {p} lane {l}: reads {} back", loaded.entries.len()));
        for (seq, error) in &loaded.unreadable {
            self.oracle.fail("C2", || {
                format!("process {p} lane {l}: {seq} is unreadable: {error}")
            });
        }
        self.with_machine(p, l, |machine, now| machine.loaded(now, loaded.entries));
    }

    fn sync_if_due(&mut self, p: usize) {
        if !self.processes[p].up || !self.processes[p].disk.begin_sync() {
            return;
        }
        let after = if self.processes[p].slow > 0 {
            self.rng.u64(1_000..SLOW_SYNC)
        } else {
            self.rng.u64(200..4_000)
        };
        let epoch = self.processes[p].sync_epoch;
        self.post(after, Ev::Synced(p, epoch));
    }

    pub(super) fn synced(&mut self, p: usize) {
        let well = !std::mem::take(&mut self.processes[p].fail_syncs);
        self.trace(|| format!("process {p} has synced its disk (well: {well})"));
        self.processes[p].disk.end_sync(well);
        let incarnation = self.processes[p].incarnation;
        for l in 0..LANES {
            let progress = self.processes[p].lanes[l].keeper.synced();
            self.pass_on(p, l, progress);
            if self.processes[p].incarnation != incarnation {
                return;
            }
        }
        self.sync_if_due(p);
    }

    // ----- answers -----

    pub(super) fn answer(&mut self, p: usize, attempt: Attempt, answer: Result<Outcome, Error>) {
        self.trace(|| match &answer {
            Ok(outcome) => format!("process {p} answers {attempt}: {outcome:?}"),
            Err(error) => format!("process {p} answers {attempt}: {error}"),
        });
        self.judge(p, attempt, &answer);
        let ticket = self.processes[p].tickets.remove(&attempt);
        if let Some(ticket) = ticket {
            let wall = self.at().wall;
            let outcome = answer.as_ref().ok().cloned();
            for joined in self.processes[p].intake.finish(wall, ticket, outcome) {
                self.joined_answer(joined, &answer);
            }
        }
        if answer.is_err() {
            self.publisher_hears_error(attempt);
        }
    }

    fn judge(&mut self, p: usize, attempt: Attempt, answer: &Result<Outcome, Error>) {
        let life = &self.oracle.lives[attempt as usize];
        let b = usize::from(life.lane > 0);
        let process = &self.processes[p];
        let published = life.published;
        let wants_disk = matches!(answer, Ok(Outcome::Spooled { durable: true }));
        let seen = Seen {
            answer,
            on_medium: wants_disk && process.disk.is_on_medium(attempt),
            disk_broken: process.disk.is_broken(),
            lane_refused: self.brokers[b].refuses_lanes > 0
                || self.brokers[b].refused_last >= published,
            was_full: process.full_last >= published || self.is_full(p),
            was_in_the_way: process
                .lanes
                .get(life.lane)
                .is_none_or(|x| x.in_the_way >= published),
            sync_bound: 2 * SLOW_SYNC,
        };
        self.oracle.answered(self.now, attempt, &seen);
    }

    /// A refusal is the publisher's, or goes to the dead letters; it moves no lane.
    pub(super) fn check_refusal(
        &mut self,
        p: usize,
        l: usize,
        before: LaneState,
        attempt: Attempt,
    ) {
        let Some(lane) = self.processes[p].lanes.get(l) else {
            return;
        };
        let after = lane.machine.state();
        if before == LaneState::Primary && after != LaneState::Primary {
            self.oracle.fail("C9", || {
                format!(
                    "the refusal of {attempt} moved its lane to {}",
                    after.as_str()
                )
            });
        }
        let life = &self.oracle.lives[attempt as usize];
        let told = matches!(&life.answer, Some(Err(e)) if e.is_refusal());
        if !told && !life.buried {
            self.oracle.fail("C9", || {
                format!("{attempt} was refused, and neither answered nor buried")
            });
        }
    }
}

/// The lanes that lead to a broker.
pub(super) fn lanes_of(b: usize) -> std::ops::Range<usize> {
    if b == 0 { 0..1 } else { 1..LANES }
}
