//! The simulated world: virtual time, both clocks, everything that will happen,
//! drawn from one seed.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::{
    broker::{Broker, Conn, Log},
    consumer::{Partition, Queue},
    faults::Fault,
    oracle::{Attempt, Oracle, Violation},
    process::{LANES, Process},
    publisher::Publisher,
    table::Table,
};
use crate::{
    broker::Fate,
    hub::{
        lane::{keeper::Release, machine::Now},
        state::LaneState,
    },
    message::Timestamp,
    topic::Topic,
};

/// What a seed decides at the start.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) window: usize,
    /// Room of each process's spool, in messages.
    pub(super) room: usize,
    /// Local handlers take spooled tasks during an outage.
    pub(super) local: bool,
    /// Local groups get spooled events during an outage.
    pub(super) groups: bool,
    /// Spooled messages that stay in memory.
    pub(super) head: usize,
    /// The queue's client answers in order.
    pub(super) in_order: bool,
    pub(super) messages: u32,
    pub(super) faults: u32,
}

/// Something that will happen. Those with two numbers in front concern one life
/// of a process, and are forgotten with it.
pub(super) enum Ev {
    Publish(usize),
    Repeat(usize, Attempt),
    Handover(usize, u32, usize),
    Serve(usize),
    Durable(usize, u32),
    Answer(usize, u64, Fate),
    Close(usize),
    Opened(usize, u32, usize, u64),
    Reopen(usize, u32, usize, u64),
    Tick(usize, u32, usize, u64),
    Connect(usize, u32, usize),
    Probe(usize, u32, usize),
    Synced(usize, u32),
    Loaded(usize, u32, usize),
    Bury(usize, u32, Attempt),
    Start(usize),
    Die(usize, u32, bool),
    Deliver(usize),
    ForeignAck(u32, u64),
    Handled(usize, u32, u64),
    Strike(Fault, usize, usize),
    BrokerUp(usize),
    StallOver(usize),
    OverloadOver(usize),
    RefusalOver(usize),
    DiskFast(usize),
    Room(usize, u32, usize),
    Heal,
    Look,
}

struct Timed {
    at: u64,
    order: u64,
    what: Ev,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Everything.
pub(super) struct World {
    pub(super) rng: fastrand::Rng,
    /// Microseconds since the start.
    pub(super) now: u64,
    pub(super) base: Instant,
    /// How far the wall clock is off, in milliseconds.
    pub(super) wall: i64,
    /// The furthest that it ever was.
    pub(super) wall_most: i64,
    queue_of_events: BinaryHeap<Reverse<Timed>>,
    pub(super) order: u64,
    pub(super) plan: Plan,
    pub(super) brokers: [Broker; 2],
    pub(super) logs: [Log; LANES],
    pub(super) queue: Queue,
    pub(super) partitions: [Partition; 2],
    pub(super) conns: Vec<Conn>,
    pub(super) processes: Vec<Process>,
    pub(super) publishers: Vec<Publisher>,
    pub(super) topics: [Topic; 2],
    pub(super) next_tag: u64,
    pub(super) letters: HashMap<(usize, u32, Attempt), Option<Release>>,
    pub(super) letters_in_memory: BTreeSet<(usize, u32, Attempt)>,
    /// Faults that wait for a lane to come into a state.
    armed: Vec<(LaneState, Fault)>,
    /// Faults that struck.
    pub(super) struck: usize,
    pub(super) healed: bool,
    healed_at: u64,
    done: bool,
    pub(super) oracle: Oracle,
    pub(super) table: Table,
    lines: Option<VecDeque<String>>,
    all_lines: bool,
    events: u64,
}

/// What a run came to.
pub(super) struct Report {
    pub(super) violation: Option<Violation>,
    pub(super) table: Table,
    pub(super) messages: usize,
    pub(super) faults: usize,
    pub(super) lines: VecDeque<String>,
}

/// Where the wall clock begins.
const EPOCH: i64 = 1_700_000_000_000;

/// When everything heals at the latest.
const END: u64 = 60_000_000;

/// How long the rest may take after that.
const PATIENCE: u64 = 120_000_000;

/// Events of a run at most; more means that something goes round in circles.
const MOST_EVENTS: u64 = 2_000_000;

/// Last events that are kept for a failing seed.
const LAST: usize = 120;

impl World {
    /// A world of this seed. `trace`: 0 nothing, 1 the last events, 2 all.
    pub(super) fn new(seed: u64, trace: u8) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let plan = Plan {
            window: rng.usize(4..=24),
            room: if rng.u32(..4) == 0 {
                rng.usize(20..80)
            } else {
                2_000
            },
            local: rng.u32(..3) == 0,
            // Not drawn, so that the other seeds stay what they were.
            groups: seed % 7 == 6,
            head: if rng.bool() { rng.usize(2..12) } else { 10_000 },
            in_order: rng.bool(),
            messages: rng.u32(200..=260),
            faults: rng.u32(4..=10),
        };
        let up = || Broker {
            up: true,
            ..Broker::default()
        };
        let mut world = Self {
            now: 0,
            base: Instant::now(),
            wall: EPOCH,
            wall_most: EPOCH,
            queue_of_events: BinaryHeap::new(),
            order: 0,
            brokers: [up(), up()],
            logs: Default::default(),
            queue: Queue::default(),
            partitions: Default::default(),
            conns: Vec::new(),
            processes: (0..2).map(|_| Process::new(&plan)).collect(),
            publishers: Vec::new(),
            topics: [Topic::new("queue").unwrap(), Topic::new("stream").unwrap()],
            next_tag: 0,
            letters: HashMap::new(),
            letters_in_memory: BTreeSet::new(),
            armed: Vec::new(),
            struck: 0,
            healed: false,
            healed_at: 0,
            done: false,
            oracle: Oracle::default(),
            table: Table::default(),
            lines: (trace > 0).then(VecDeque::new),
            all_lines: trace > 1,
            events: 0,
            rng,
            plan,
        };
        world.trace(|| format!("seed {seed}"));
        world.draw();
        world
    }

    fn draw(&mut self) {
        for p in 0..2 {
            self.start(p);
        }
        self.make_publishers();
        for _ in 0..self.plan.faults {
            let fault = Fault::ALL[self.rng.usize(..Fault::ALL.len())];
            match self.rng.u32(..5) {
                0 => self.armed.push((LaneState::Suspect, fault)),
                1 => self.armed.push((LaneState::Draining, fault)),
                2 => self.armed.push((LaneState::Degraded, fault)),
                _ => {
                    let (p, l) = (self.rng.usize(..2), self.rng.usize(..LANES));
                    let at = self.rng.u64(100_000..25_000_000);
                    self.post(at, Ev::Strike(fault, p, l));
                }
            }
        }
        // Something has to move the lanes for those that wait.
        for _ in 0..3 {
            let mover = [
                Fault::CrashKeeping,
                Fault::CrashLosing,
                Fault::Stall,
                Fault::Cut,
                Fault::Overload,
            ];
            let fault = mover[self.rng.usize(..mover.len())];
            let (p, l) = (self.rng.usize(..2), self.rng.usize(..LANES));
            let at = self.rng.u64(100_000..20_000_000);
            self.post(at, Ev::Strike(fault, p, l));
        }
        self.post(1_000_000, Ev::Look);
        self.post(END, Ev::Heal);
    }

    /// Runs to the end.
    pub(super) fn run(mut self) -> Report {
        while !self.done && self.oracle.violation.is_none() {
            let Some(Reverse(next)) = self.queue_of_events.pop() else {
                break;
            };
            self.now = self.now.max(next.at);
            self.events += 1;
            if self.events > MOST_EVENTS {
                self.oracle
                    .fail("C4", || "it goes round in circles".to_owned());
            }
            let before = [0, 1].map(|p: usize| self.processes[p].budget.taken().0);
            let lives = [0, 1].map(|p: usize| self.processes[p].incarnation);
            self.happen(next.what);
            for p in 0..2 {
                if self.processes[p].incarnation == lives[p]
                    && self.processes[p].budget.taken().0 < before[p]
                {
                    self.look_for_room(p);
                }
            }
        }
        if self.oracle.violation.is_none() {
            self.check_end();
        }
        Report {
            violation: self.oracle.violation,
            table: self.table,
            messages: self.oracle.lives.len(),
            faults: self.struck,
            lines: self.lines.unwrap_or_default(),
        }
    }

    fn check_end(&mut self) {
        let mut letters: BTreeSet<Attempt> = BTreeSet::new();
        for (p, process) in self.processes.iter().enumerate() {
            letters.extend(process.disk.letters());
            let live = self.letters_in_memory.iter();
            letters.extend(
                live.filter(|(q, i, _)| *q == p && *i == process.incarnation)
                    .map(|(_, _, a)| *a),
            );
            if process.budget.taken() != (0, 0) {
                self.oracle.fail("C8", || {
                    format!("process {p} still holds room: {:?}", process.budget.taken())
                });
            }
        }
        let logs: Vec<Vec<(Attempt, bool)>> = self.logs.iter().map(|l| l.kept.clone()).collect();
        self.oracle.check(&logs, &letters);
    }

    // ----- time -----

    pub(super) fn post(&mut self, after: u64, what: Ev) {
        self.order += 1;
        self.queue_of_events.push(Reverse(Timed {
            at: self.now + after,
            order: self.order,
            what,
        }));
    }

    /// Both clocks.
    pub(super) fn at(&self) -> Now {
        let ms = i64::try_from(self.now / 1_000).unwrap_or(0);
        Now {
            at: self.base + Duration::from_micros(self.now),
            wall: Timestamp::from_millis(self.wall + ms),
        }
    }

    pub(super) fn trace(&mut self, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            if !self.all_lines && lines.len() >= LAST {
                lines.pop_front();
            }
            let line = format!("{:>12.6} {}", self.now as f64 / 1e6, line());
            lines.push_back(line);
        }
    }

    // ----- what happens -----

    fn lives(&self, p: usize, incarnation: u32) -> bool {
        self.processes[p].up && self.processes[p].incarnation == incarnation
    }

    fn happen(&mut self, what: Ev) {
        match what {
            Ev::Publish(i) => self.publish_burst(i),
            Ev::Repeat(i, attempt) => {
                let id = self.oracle.lives[attempt as usize].id.clone();
                self.repeat(i, &id, attempt);
            }
            Ev::Handover(p, i, l) if self.lives(p, i) => self.handover(p, l),
            Ev::Serve(c) => self.serve(c),
            Ev::Durable(l, epoch) if self.brokers[usize::from(l > 0)].epoch == epoch => {
                self.make_durable(l)
            }
            Ev::Answer(c, token, fate) => self.answer_arrives(c, token, fate),
            Ev::Close(c) => self.close_conn(c),
            Ev::Opened(p, i, l, token) if self.lives(p, i) => self.opened(p, l, token),
            Ev::Reopen(p, i, l, token)
                if self.lives(p, i) && self.processes[p].lanes[l].reopen == Some(token) =>
            {
                self.reopen(p, l);
            }
            Ev::Tick(p, i, l, at) if self.lives(p, i) => self.tick(p, l, at),
            Ev::Loaded(p, i, l) if self.lives(p, i) => self.loaded(p, l),
            Ev::Connect(p, i, b) if self.lives(p, i) => self.connect(p, b),
            Ev::Probe(p, i, b) if self.lives(p, i) => self.probe(p, b),
            Ev::Synced(p, epoch) if self.processes[p].sync_epoch == epoch => self.synced(p),
            Ev::Bury(p, i, attempt) if self.lives(p, i) => self.bury(p, attempt),
            Ev::Start(p) if !self.processes[p].up => self.start(p),
            Ev::Die(p, i, power_cut) if self.lives(p, i) && !self.healed => self.die(p, power_cut),
            Ev::Deliver(r) => self.deliver(r),
            Ev::ForeignAck(epoch, tag) => self.foreign_ack(epoch, tag),
            Ev::Handled(p, i, tag) if self.lives(p, i) => self.handled(p, tag),
            Ev::Strike(fault, p, l) if !self.healed => self.strike(fault, p, l),
            Ev::BrokerUp(b) => {
                self.brokers[b].up = true;
                self.kick(b);
            }
            Ev::StallOver(b) => {
                self.brokers[b].stalls = self.brokers[b].stalls.saturating_sub(1);
                self.kick(b);
            }
            Ev::OverloadOver(b) => {
                self.brokers[b].overloads = self.brokers[b].overloads.saturating_sub(1)
            }
            Ev::RefusalOver(b) => {
                self.brokers[b].refuses_lanes = self.brokers[b].refuses_lanes.saturating_sub(1);
                self.brokers[b].refused_last = self.now;
            }
            Ev::DiskFast(p) => self.processes[p].slow = self.processes[p].slow.saturating_sub(1),
            Ev::Room(p, i, n) if self.lives(p, i) => self.give_room(p, n),
            Ev::Heal => self.heal(),
            Ev::Look => self.look(),
            _ => {}
        }
    }

    /// A broker answers again: what waited for it goes on.
    fn kick(&mut self, b: usize) {
        if !self.brokers[b].answers() {
            return;
        }
        self.trace(|| format!("broker {b} answers"));
        for c in 0..self.conns.len() {
            if usize::from(self.conns[c].lane > 0) == b {
                self.serve_soon(c);
                let conn = &self.conns[c];
                if conn.open {
                    let (p, i, l) = (conn.process, conn.incarnation, conn.lane);
                    self.post(100, Ev::Handover(p, i, l));
                }
            }
        }
        let epoch = self.brokers[b].epoch;
        for l in super::process::lanes_of(b) {
            let after = self.rng.u64(100..2_000);
            self.post(after, Ev::Durable(l, epoch));
        }
        for p in 0..2 {
            if self.processes[p].up && self.processes[p].connected[b] {
                self.probed_well(p, b);
                self.half_opened(p, b);
            }
        }
        self.kick_consumers();
    }

    fn give_room(&mut self, p: usize, n: usize) {
        let process = &mut self.processes[p];
        if n > 0 {
            process.full_last = self.now;
        }
        let n = n.min(process.hogged);
        process.hogged -= n;
        process.budget.give_back(n, 0);
        self.look_for_room(p);
    }

    /// A lane came into a state: what waited for that strikes.
    pub(super) fn lane_changed(&mut self, p: usize, l: usize, to: LaneState) {
        if let Some(i) = self.armed.iter().position(|(state, _)| *state == to) {
            let (_, fault) = self.armed.swap_remove(i);
            let after = match to {
                LaneState::Draining => self.rng.u64(..4_000),
                _ => self.rng.u64(..60_000),
            };
            self.post(after, Ev::Strike(fault, p, l));
        }
    }

    /// All faults end; nobody publishes any more.
    fn heal(&mut self) {
        if self.healed {
            return;
        }
        self.trace(|| "everything heals".to_owned());
        self.healed = true;
        self.healed_at = self.now;
        self.armed.clear();
        // A retry keeps its absolute due time, so the clock has to come back.
        self.wall = self.wall_most;
        for b in 0..2 {
            let (epoch, refused_last) = (self.brokers[b].epoch, self.brokers[b].refused_last);
            let refused = self.brokers[b].refuses_lanes > 0;
            self.brokers[b] = Broker {
                up: true,
                epoch,
                refused_last: if refused { self.now } else { refused_last },
                ..Broker::default()
            };
        }
        for p in 0..2 {
            self.processes[p].slow = 0;
            self.processes[p].fail_syncs = false;
            self.processes[p].dies_in = None;
            let (local, groups) = (self.plan.local, self.plan.groups);
            for (l, lane) in self.processes[p].lanes.iter_mut().enumerate() {
                if lane.machine.state() == LaneState::Degraded
                    && lane.machine.spool().ready() > 0
                    && !(local && l == 0)
                    && !(groups && l > 0)
                {
                    lane.must_write_by = Some(self.now + 1_000_000);
                }
            }
            let hogged = self.processes[p].hogged;
            self.give_room(p, hogged);
        }
        for b in 0..2 {
            self.kick(b);
        }
        self.post(100_000, Ev::Look);
    }

    /// Looks whether there is anything left to wait for.
    fn look(&mut self) {
        if !self.healed {
            let published = self.publishers.iter().all(|p| p.left == 0);
            if published && self.now > 30_000_000 {
                self.heal();
            } else {
                self.post(1_000_000, Ev::Look);
            }
            return;
        }
        self.commit_all();
        match self.unrest() {
            None => {
                self.trace(|| "quiet".to_owned());
                self.done = true;
            }
            Some(why) if self.now > self.healed_at + PATIENCE => {
                self.oracle
                    .fail("C4", || format!("never quiet again: {why}"));
            }
            Some(_) => self.post(250_000, Ev::Look),
        }
    }

    fn unrest(&self) -> Option<String> {
        for (p, process) in self.processes.iter().enumerate() {
            if !process.up {
                return Some(format!("process {p} is not up"));
            }
            for (l, lane) in process.lanes.iter().enumerate() {
                let machine = &lane.machine;
                let busy = machine.state() != LaneState::Primary
                    || !machine.is_quiet()
                    || !machine.spool().is_empty()
                    || !lane.keeper.is_quiet()
                    || !lane.outbox.is_empty();
                if busy {
                    return Some(format!(
                        "process {p} lane {l} is {}, waiting {}, spool {} (in doubt {}, leased {}, resting {})",
                        machine.state().as_str(),
                        machine.waiting(),
                        machine.spool().len(),
                        machine.spool().in_doubt(),
                        machine.spool().leased(),
                        machine.spool().resting(),
                    ));
                }
            }
            if !process.held.is_empty() {
                return Some(format!("process {p} still handles {}", process.held.len()));
            }
        }
        let live = |(p, i, _): &&(usize, u32, Attempt)| self.processes[*p].incarnation == *i;
        if self.letters.keys().filter(live).count() > 0 {
            return Some("letters are not buried".to_owned());
        }
        let unacked: usize = self.queue.consumers.iter().map(|c| c.unacked.len()).sum();
        if !self.queue.ready.is_empty() || unacked > 0 {
            return Some(format!(
                "the queue holds {} ready, {unacked} unacked",
                self.queue.ready.len()
            ));
        }
        for (j, part) in self.partitions.iter().enumerate() {
            if part.committed < self.logs[1 + j].messages.len() {
                return Some(format!("partition {j} is read up to {}", part.committed));
            }
        }
        let fresh: usize = self.logs.iter().map(|l| l.fresh.len()).sum();
        let piped: usize = self.conns.iter().map(|c| c.pipe.len()).sum();
        (fresh + piped > 0).then(|| format!("{fresh} not durable, {piped} in pipes"))
    }
}
