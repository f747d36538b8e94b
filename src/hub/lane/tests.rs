//! The lane's machine against a simulated broker, driven by seeds: virtual
//! time, crashes, stalls, lost and late confirms, overload, failed opens. After
//! each run the contract is checked; a failing seed is printed and reproduces
//! its run exactly.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::machine::{Action, Intake, Local, Machine, Now, Settings};
use crate::hub::controls::{Controls, Hold};
use crate::{
    broker::{BrokerType, Confirmation, Fate, OrderKey, Outcome, Submission, Verdict},
    error::{Error, ErrorCode},
    hub::{
        spool::{Budget, Entry},
        state::LaneState,
    },
    message::{Message, MessageId, Timestamp, wire::Marks},
};

mod bounds;
mod handlers;
mod states;

fn answer(token: u64, fate: Fate) -> Confirmation {
    Confirmation { token, fate }
}

const WINDOW: usize = 16;
const KEYS: u64 = 5;

/// What a simulated broker does with a lane.
struct Broker {
    up: bool,
    stalled: bool,
    overloaded: bool,
    /// Written on the open lane, not taken up yet.
    written: VecDeque<Submission>,
    /// Stored, confirm on its way.
    confirming: VecDeque<u64>,
    /// Everything that was ever stored, in order.
    stored: Vec<(String, OrderKey, bool)>,
}

struct Sim {
    rng: fastrand::Rng,
    now: Instant,
    wall: i64,
    machine: Machine<u64>,
    broker: Broker,
    lane_open: bool,
    open_wanted: bool,
    budget: Arc<Budget>,
    next: u64,
    /// Outcome of each publish, by number.
    answers: HashMap<u64, Result<Outcome, Error>>,
    dead: BTreeSet<String>,
    leased: BTreeMap<u64, String>,
    handled: Vec<String>,
    /// Turned away by an overloaded broker: what was pipelined behind them on
    /// the same channel may be stored first (C5 leaves that out).
    turned_away: HashSet<String>,
    /// What is kept of the spool, and who of it is not on the disk yet.
    disk: BTreeMap<u64, Entry>,
    unsynced: VecDeque<u64>,
    to_load: Option<Vec<u64>>,
    states: BTreeSet<(LaneState, &'static str)>,
    changes: Vec<(LaneState, LaneState)>,
}

pub(super) fn settings(budget: &Arc<Budget>, local: bool) -> Settings {
    Settings {
        via: BrokerType::RabbitMq,
        topic: "t".into(),
        window: WINDOW,
        hedge: (Duration::from_millis(100), Duration::from_secs(1)),
        suspect_timeout: Duration::from_secs(10),
        spool: true,
        budget: budget.clone(),
        spool_wait: Duration::from_secs(5),
        durable: true,
        head: 4,
        local: if local {
            Local::Consumers
        } else {
            Local::Nobody
        },
        overload_pause: Duration::from_millis(50),
    }
}

fn lost() -> Error {
    Error::unknown(ErrorCode::ConnectionClosed, "lost")
}

impl Sim {
    fn new(seed: u64, local: bool) -> Self {
        let budget = Arc::new(Budget::new(100_000, usize::MAX / 2));
        Self {
            rng: fastrand::Rng::with_seed(seed),
            now: Instant::now(),
            wall: 1_000_000,
            machine: Machine::new(settings(&budget, local)),
            broker: Broker {
                up: true,
                stalled: false,
                overloaded: false,
                written: VecDeque::new(),
                confirming: VecDeque::new(),
                stored: Vec::new(),
            },
            lane_open: false,
            open_wanted: false,
            budget,
            next: 0,
            answers: HashMap::new(),
            dead: BTreeSet::new(),
            leased: BTreeMap::new(),
            handled: Vec::new(),
            turned_away: HashSet::new(),
            disk: BTreeMap::new(),
            unsynced: VecDeque::new(),
            to_load: None,
            states: BTreeSet::new(),
            changes: Vec::new(),
        }
    }

    fn now(&self) -> Now {
        Now {
            at: self.now,
            wall: Timestamp::from_millis(self.wall),
        }
    }

    fn act(&mut self) {
        loop {
            let actions = self.machine.take_actions();
            if actions.is_empty() {
                return;
            }
            for action in actions {
                match action {
                    Action::Write(batch) => {
                        assert!(self.lane_open, "written without an open lane");
                        assert!(
                            matches!(
                                self.machine.state(),
                                LaneState::Primary | LaneState::Draining
                            ),
                            "written while {:?}",
                            self.machine.state()
                        );
                        assert!(!self.machine.is_forced(), "written while degraded by force");
                        if self.machine.is_paused() {
                            for s in &batch {
                                assert_eq!(
                                    self.machine.spool().status(s.token),
                                    None,
                                    "drained while paused"
                                );
                            }
                        }
                        self.broker.written.extend(batch);
                    }
                    Action::Answer(n, outcome) => {
                        let before = self.answers.insert(n, outcome);
                        assert!(before.is_none(), "publish {n} was answered twice");
                    }
                    Action::Open => self.open_wanted = true,
                    Action::EndGeneration => {
                        self.lane_open = false;
                        // The broker may still take what was written.
                        let n = self.rng.usize(..=self.broker.written.len());
                        self.store(n);
                        self.broker.written.clear();
                        self.broker.confirming.clear();
                    }
                    Action::DeadLetter { seq, message, .. } => {
                        assert!(self.disk.remove(&seq).is_some(), "{seq} was not kept");
                        self.dead.insert(message.id.to_string());
                    }
                    Action::Store { seq, entry, waiter } => {
                        let spooled = Ok(Outcome::Spooled { durable: false });
                        self.answers.insert(waiter, spooled);
                        self.disk.insert(seq, entry);
                        self.unsynced.push_back(seq);
                    }
                    Action::Rewrite(seq) => {
                        if let Some(entry) = self.machine.spool().get(seq) {
                            self.disk.insert(seq, entry.clone());
                            self.unsynced.push_back(seq);
                        }
                    }
                    Action::Load(seqs) => {
                        assert!(!seqs.is_empty(), "nothing to load");
                        let before = self.to_load.replace(seqs);
                        assert!(before.is_none(), "two loads at a time");
                    }
                    Action::Remove(seq) => {
                        assert!(self.disk.remove(&seq).is_some(), "{seq} was not kept");
                    }
                    Action::CopyToDead { .. } => panic!("tasks are moved, not copied"),
                    Action::Changed { from, to, .. } => self.changes.push((from, to)),
                }
            }
        }
    }

    fn store(&mut self, n: usize) {
        for submission in self.broker.written.drain(..n) {
            self.broker.stored.push((
                submission.message.id.to_string(),
                submission.order.clone(),
                submission.marks.possible_duplicate,
            ));
            self.broker.confirming.push_back(submission.token);
        }
    }

    fn publish(&mut self) {
        let n = self.next;
        self.next += 1;
        self.publish_numbered(n, n % KEYS);
    }

    fn publish_numbered(&mut self, n: u64, key: u64) {
        let mut message = Message::new("t", "x");
        message.id = MessageId::new(format!("m{n}")).unwrap();
        let intake = Intake {
            message: Arc::new(message),
            order: OrderKey::Publisher(key),
            confirm: true,
            deadline: self.now + Duration::from_secs(30),
            marks: Marks::default(),
            waiter: n,
        };
        self.machine.publish(self.now(), [intake]);
    }

    /// The connection dies: some of what was written was stored, and of that
    /// some confirms had come.
    fn crash(&mut self) {
        self.broker.up = false;
        if !self.lane_open {
            self.machine.broker_away(self.now());
            return;
        }
        let n = self.rng.usize(..=self.broker.written.len());
        self.store(n);
        let unsent: Vec<u64> = self.broker.written.drain(..).map(|s| s.token).collect();
        let unknown: Vec<u64> = self.broker.confirming.drain(..).collect();
        self.lane_open = false;
        for token in unknown {
            self.machine
                .confirmed(self.now(), [answer(token, Fate::Unknown(lost()))]);
            self.act();
        }
        for token in unsent {
            // An adapter may not know whether it was written.
            let fate = if self.rng.bool() {
                Fate::Unsent(lost())
            } else {
                Fate::Unknown(lost())
            };
            self.machine.confirmed(self.now(), [answer(token, fate)]);
            self.act();
        }
        self.machine.ended(self.now(), "crash");
        self.machine.broker_away(self.now());
    }

    fn step(&mut self, faults: bool) {
        match self.rng.u32(..106) {
            100..=103 => {
                let n = self.rng.usize(..8);
                self.sync(n);
            }
            104..=105 => {
                let n = self.rng.usize(..4);
                self.load(n);
            }
            0..=29 => self.publish(),
            30..=54 if self.broker.up && !self.broker.stalled && self.lane_open => {
                if self.broker.overloaded {
                    if let Some(s) = self.broker.written.pop_front() {
                        self.turned_away.insert(s.message.id.to_string());
                        self.machine.confirmed(
                            self.now(),
                            [answer(
                                s.token,
                                Fate::Overloaded(Error::new(ErrorCode::PublishFailed, "full")),
                            )],
                        );
                    }
                } else {
                    let n = self.rng.usize(..=self.broker.written.len());
                    self.store(n);
                }
            }
            55..=79 if self.broker.up && !self.broker.stalled => {
                let n = self.rng.usize(..=self.broker.confirming.len());
                let answers: Vec<_> = self.broker.confirming.drain(..n).collect();
                let answers = answers.into_iter();
                let answers = answers.map(|token| answer(token, Fate::Confirmed(None)));
                self.machine.confirmed(self.now(), answers);
                self.act();
            }
            80..=84 if self.open_wanted && self.broker.up => {
                self.open_wanted = false;
                if faults && self.rng.u32(..4) == 0 {
                    self.machine
                        .open_failed(self.now(), &Error::new(ErrorCode::ConnectionFailed, "no"));
                    self.act();
                    self.machine.broker_back(self.now());
                } else {
                    self.lane_open = true;
                    self.machine.opened(self.now());
                }
            }
            85..=94 => {
                let ms = self.rng.u64(1..200);
                self.now += Duration::from_millis(ms);
                self.wall += i64::try_from(ms).unwrap();
                self.machine.tick(self.now());
            }
            95 => {
                if let Some((seq, entry)) = self.machine.lease(self.now()) {
                    self.leased.insert(seq, entry.message.id.to_string());
                }
            }
            96 => {
                if let Some((seq, id)) = self.leased.pop_first() {
                    let verdict = if self.rng.bool() {
                        self.handled.push(id);
                        Verdict::Ack
                    } else {
                        Verdict::Requeue
                    };
                    assert!(self.machine.settle(self.now(), seq, verdict));
                }
            }
            97 if faults => {
                let before = self.machine.state();
                match self.rng.u32(..6) {
                    0 | 1 if self.broker.up => {
                        self.states.insert((before, "crash"));
                        self.crash();
                    }
                    2 => {
                        self.states.insert((before, "stall"));
                        self.broker.stalled = !self.broker.stalled;
                    }
                    3 => {
                        self.states.insert((before, "overload"));
                        self.broker.overloaded = !self.broker.overloaded;
                    }
                    _ if !self.broker.up => {
                        self.states.insert((before, "return"));
                        self.broker.up = true;
                        self.broker.stalled = false;
                        self.machine.broker_back(self.now());
                    }
                    _ => {
                        self.states.insert((before, "clock jump"));
                        self.now += Duration::from_secs(11);
                        self.wall += 11_000;
                        self.machine.tick(self.now());
                    }
                }
            }
            98 if faults => {
                let before = self.machine.state();
                let hold = match self.rng.u32(..4) {
                    0 => Hold::Drain,
                    1 => Hold::Everything,
                    _ => Hold::Nothing,
                };
                let rate = if self.rng.bool() { 0 } else { 200 };
                self.states.insert((before, "operator"));
                self.machine.control(self.now(), Controls { hold, rate });
            }
            _ => {}
        }
        self.act();
    }

    /// The disk has synced some of what was written.
    fn sync(&mut self, count: usize) {
        for seq in self.unsynced.drain(..count.min(self.unsynced.len())) {
            self.machine.kept(seq);
        }
    }

    /// The disk has read some of what was asked for, at least one.
    fn load(&mut self, count: usize) {
        if let Some(seqs) = self.to_load.take() {
            let read = seqs.iter().take(count.max(1));
            let entries = read.map(|seq| (*seq, self.disk[seq].clone())).collect();
            self.machine.loaded(self.now(), entries);
        }
    }

    /// Time passes, and the lane is told when it is over.
    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.wall += i64::try_from(time.as_millis()).unwrap();
        self.machine.tick(self.now());
        self.act();
    }

    fn heal(&mut self) {
        self.broker.stalled = false;
        self.broker.overloaded = false;
        self.machine.control(self.now(), Controls::default());
        self.act();
        if !self.broker.up {
            self.broker.up = true;
            self.machine.broker_back(self.now());
            self.act();
        }
        for (seq, id) in std::mem::take(&mut self.leased) {
            self.handled.push(id);
            self.machine.settle(self.now(), seq, Verdict::Ack);
            self.act();
        }
        for _ in 0..10_000 {
            if self.machine.is_quiet() && self.machine.spool().is_empty() && !self.open_wanted {
                return;
            }
            if self.open_wanted {
                self.open_wanted = false;
                self.lane_open = true;
                self.machine.opened(self.now());
                self.act();
            }
            self.sync(usize::MAX);
            self.load(usize::MAX);
            self.act();
            let n = self.broker.written.len();
            self.store(n);
            while let Some(token) = self.broker.confirming.pop_front() {
                self.machine
                    .confirmed(self.now(), [answer(token, Fate::Confirmed(None))]);
                self.act();
            }
            self.now += Duration::from_millis(20);
            self.wall += 20;
            self.machine.tick(self.now());
            self.act();
        }
        panic!(
            "not healed: {:?}, spool {} ({} in doubt), waiting {}",
            self.machine.state(),
            self.machine.spool().len(),
            self.machine.spool().in_doubt(),
            self.machine.waiting(),
        );
    }

    fn check(&self, local: bool) {
        assert_eq!(self.answers.len() as u64, self.next, "unanswered publishes");
        assert_eq!(self.machine.state(), LaneState::Primary);
        assert_eq!(self.budget.taken(), (0, 0), "room was not given back");
        assert_eq!(self.machine.spool().bytes(), 0, "bytes were miscounted");
        assert!(self.disk.is_empty(), "the disk keeps what is done");
        let stored: HashSet<&str> = self
            .broker
            .stored
            .iter()
            .map(|(id, ..)| id.as_str())
            .collect();
        let handled: HashSet<&str> = self.handled.iter().map(String::as_str).collect();
        for (n, answer) in &self.answers {
            let id = format!("m{n}");
            if answer.is_ok() {
                assert!(
                    stored.contains(id.as_str())
                        || handled.contains(id.as_str())
                        || self.dead.contains(&id),
                    "C1, C2: {id} was accepted and is lost"
                );
            }
            if matches!(answer, Ok(Outcome::Delivered { .. })) {
                assert!(stored.contains(id.as_str()), "{id} was not delivered");
            }
        }
        // C6: a copy beyond the first is marked, unless it is the copy of a
        // message whose generation ended before its mark could travel: then the
        // later copy is the marked one.
        let mut seen: HashSet<&str> = HashSet::new();
        for (id, _, marked) in &self.broker.stored {
            assert!(
                seen.insert(id) || *marked,
                "C6: {id} came again without a mark"
            );
        }
        if !local {
            let mut last: HashMap<&OrderKey, u64> = HashMap::new();
            let mut seen: HashSet<&str> = HashSet::new();
            for (id, key, _) in &self.broker.stored {
                if !seen.insert(id) || self.turned_away.contains(id) {
                    continue;
                }
                let n: u64 = id.trim_start_matches('m').parse().unwrap();
                let before = last.insert(key, n);
                assert!(
                    before.is_none_or(|b| b < n),
                    "C5: m{n} came after m{} of its key",
                    before.unwrap_or_default()
                );
            }
        }
    }
}

fn run(seed: u64, local: bool) -> BTreeSet<(LaneState, &'static str)> {
    let mut sim = Sim::new(seed, local);
    sim.machine.broker_back(sim.now());
    sim.act();
    for _ in 0..1_500 {
        sim.step(true);
    }
    sim.heal();
    sim.check(local);
    sim.states
}

/// Runs seeds and says which one failed.
fn runs(seeds: std::ops::Range<u64>, local: bool) -> BTreeSet<(LaneState, &'static str)> {
    let mut states = BTreeSet::new();
    for seed in seeds {
        let result = std::panic::catch_unwind(|| run(seed, local));
        match result {
            Ok(seen) => states.extend(seen),
            Err(cause) => {
                eprintln!("seed {seed} (local: {local}) failed");
                std::panic::resume_unwind(cause);
            }
        }
    }
    states
}

#[test]
fn nothing_is_lost_reordered_or_silently_repeated_under_hold() {
    let states = runs(0..400, false);
    for state in [
        LaneState::Primary,
        LaneState::Suspect,
        LaneState::Degraded,
        LaneState::Draining,
    ] {
        assert!(
            states.iter().any(|(s, _)| *s == state),
            "no fault ever struck while {state:?}"
        );
    }
}

#[test]
fn nothing_is_lost_or_silently_repeated_under_local() {
    runs(0..200, true);
}

#[test]
fn a_confirm_that_is_late_spools_what_is_in_flight_and_answers_at_the_hedge() {
    let mut sim = Sim::new(1, false);
    sim.machine.broker_back(sim.now());
    sim.act();
    sim.lane_open = true;
    sim.machine.opened(sim.now());
    sim.publish();
    sim.act();
    assert!(sim.answers.is_empty());
    let deadline = sim.machine.next_deadline(sim.now()).unwrap();
    assert_eq!(
        deadline - sim.now,
        Duration::from_secs(1),
        "the first hedge"
    );
    sim.now = deadline;
    sim.machine.tick(sim.now());
    sim.act();
    assert_eq!(
        sim.answers[&0].as_ref().ok(),
        Some(&Outcome::Spooled { durable: false })
    );
    assert_eq!(sim.machine.state(), LaneState::Suspect);
    assert_eq!(sim.machine.spool().in_doubt(), 1);
    // What comes now goes behind it at once.
    sim.publish();
    sim.act();
    assert!(sim.answers[&1].is_ok());
    // The late confirm drops the copy, and the rest is drained.
    let token = sim.broker.written.pop_front().unwrap().token;
    sim.machine
        .confirmed(sim.now(), [answer(token, Fate::Confirmed(None))]);
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Draining);
    assert_eq!(sim.broker.written.len(), 1);
    sim.heal();
    assert_eq!(sim.machine.state(), LaneState::Primary);
    assert_eq!(
        sim.changes,
        [
            (LaneState::Primary, LaneState::Suspect),
            (LaneState::Suspect, LaneState::Draining),
            (LaneState::Draining, LaneState::Primary),
        ]
    );
}

#[test]
fn a_full_spool_makes_publishers_wait_and_then_says_so() {
    let budget = Arc::new(Budget::new(2, usize::MAX / 2));
    let mut sim = Sim::new(1, false);
    sim.machine = Machine::new(settings(&budget, false));
    sim.machine.broker_away(sim.now());
    for _ in 0..3 {
        sim.publish();
    }
    sim.act();
    assert_eq!(sim.answers.len(), 2);
    sim.now += Duration::from_secs(5);
    sim.machine.tick(sim.now());
    sim.act();
    let error = sim.answers[&2].as_ref().unwrap_err();
    assert_eq!(error.code(), ErrorCode::SpoolFull);
    assert_eq!(error.assume(), crate::error::Assume::NotSent);
}

#[test]
fn without_a_spool_an_outage_is_the_callers() {
    let budget = Arc::new(Budget::new(2, 1 << 20));
    let mut sim = Sim::new(1, false);
    sim.machine = Machine::new(Settings {
        spool: false,
        ..settings(&budget, false)
    });
    sim.lane_open = true;
    sim.machine.opened(sim.now());
    sim.publish();
    sim.act();
    sim.broker.written.clear();
    sim.machine.ended(sim.now(), "crash");
    sim.act();
    assert_eq!(
        sim.answers[&0].as_ref().unwrap_err().assume(),
        crate::error::Assume::Unknown
    );
    sim.publish();
    sim.act();
    assert_eq!(
        sim.answers[&1].as_ref().unwrap_err().code(),
        ErrorCode::BrokerUnavailable
    );
}

#[test]
fn a_refusal_never_fails_over() {
    let mut sim = Sim::new(1, false);
    sim.lane_open = true;
    sim.machine.opened(sim.now());
    sim.publish();
    sim.act();
    let token = sim.broker.written.pop_front().unwrap().token;
    let refusal = Error::rejected(ErrorCode::PublishRejected, "unroutable");
    sim.machine
        .confirmed(sim.now(), [answer(token, Fate::Refused(refusal))]);
    sim.act();
    assert!(sim.answers[&0].as_ref().unwrap_err().is_refusal());
    assert_eq!(sim.machine.state(), LaneState::Primary);
    assert!(sim.machine.spool().is_empty());
}

/// A lane that nothing was said to yet, with room for anything.
fn default_settings() -> Settings {
    settings(&Arc::new(Budget::new(100_000, usize::MAX / 2)), false)
}

fn with(settings: Settings) -> Sim {
    let mut sim = Sim::new(1, false);
    sim.budget = settings.budget.clone();
    sim.machine = Machine::new(settings);
    sim
}

/// A lane that spooled `n` messages of one key while its broker was away.
fn away_with(n: usize) -> Sim {
    let mut sim = Sim::new(1, false);
    spool_away(&mut sim, n);
    sim
}

fn spool_away(sim: &mut Sim, n: usize) {
    sim.machine.broker_away(sim.now());
    for number in 0..n as u64 {
        sim.publish_numbered(number, 0);
    }
    sim.act();
    assert_eq!(sim.machine.spool().len(), n);
}

/// The broker is back, and a lane to it is open.
fn back(sim: &mut Sim) {
    sim.machine.broker_back(sim.now());
    sim.act();
    sim.lane_open = true;
    sim.open_wanted = false;
    sim.machine.opened(sim.now());
    sim.act();
}

fn confirm_all(sim: &mut Sim) {
    let n = sim.broker.written.len();
    sim.store(n);
    while let Some(token) = sim.broker.confirming.pop_front() {
        sim.machine
            .confirmed(sim.now(), [answer(token, Fate::Confirmed(None))]);
        sim.act();
    }
}

fn stored(sim: &Sim) -> Vec<&str> {
    sim.broker
        .stored
        .iter()
        .map(|(id, ..)| id.as_str())
        .collect()
}

#[test]
fn a_paused_drain_keeps_the_order_of_keys_and_lets_other_keys_pass() {
    let mut sim = away_with(2);
    sim.machine.pause_drain(sim.now());
    back(&mut sim);
    assert_eq!(sim.machine.state(), LaneState::Draining);
    assert!(sim.broker.written.is_empty(), "it drained though paused");
    // The same key goes behind what is spooled, another one to the primary.
    sim.publish_numbered(2, 0);
    sim.publish_numbered(3, 1);
    sim.act();
    assert_eq!(
        sim.answers[&2].as_ref().ok(),
        Some(&Outcome::Spooled { durable: false })
    );
    confirm_all(&mut sim);
    assert_eq!(stored(&sim), ["m3"]);
    assert!(
        !sim.machine.is_draining(),
        "a pause must not hold a close up"
    );
    sim.machine.resume_drain(sim.now());
    sim.act();
    confirm_all(&mut sim);
    assert_eq!(stored(&sim), ["m3", "m0", "m1", "m2"]);
    assert_eq!(sim.machine.state(), LaneState::Primary);
    let same = (LaneState::Draining, LaneState::Draining);
    assert!(sim.changes.contains(&same), "the word was not announced");
}

#[test]
fn publishers_are_not_slowed_for_a_drain_that_an_operator_paused() {
    let mut sim = away_with(1);
    sim.machine.pause_drain(sim.now());
    back(&mut sim);
    // Far more than the intake that a drain begins with.
    for n in 1..7_000 {
        sim.publish_numbered(n, 0);
        sim.act();
        assert!(sim.answers[&n].is_ok(), "publish {n} was held back");
    }
    assert_eq!(sim.machine.spool().len(), 7_000);
}

#[test]
fn a_limit_spreads_the_drain_over_time() {
    let mut sim = away_with(50);
    sim.machine.limit_drain(sim.now(), 10);
    back(&mut sim);
    let begin = sim.now;
    confirm_all(&mut sim);
    assert_eq!(stored(&sim).len(), 1);
    while sim.machine.state() != LaneState::Primary {
        let deadline = sim.machine.next_deadline(sim.now()).unwrap();
        assert!(deadline > sim.now, "it would be asked for ever");
        sim.wall += i64::try_from((deadline - sim.now).as_millis()).unwrap();
        sim.now = deadline;
        sim.machine.tick(sim.now());
        sim.act();
        confirm_all(&mut sim);
    }
    let took = sim.now - begin;
    assert_eq!(took, Duration::from_millis(4_900));
    assert_eq!(stored(&sim).len(), 50);
}

#[test]
fn lifting_a_limit_lets_the_rest_go_at_once_and_closing_lifts_it() {
    for close in [false, true] {
        let mut sim = Sim::new(1, false);
        // A durable spool would be left to the next process.
        sim.machine = Machine::new(Settings {
            durable: false,
            ..settings(&sim.budget, false)
        });
        spool_away(&mut sim, 8);
        sim.machine.limit_drain(sim.now(), 1);
        back(&mut sim);
        confirm_all(&mut sim);
        assert_eq!(stored(&sim).len(), 1);
        if close {
            sim.machine.close(sim.now());
        } else {
            sim.machine.limit_drain(sim.now(), 0);
        }
        sim.act();
        confirm_all(&mut sim);
        assert_eq!(stored(&sim).len(), 8, "closing: {close}");
    }
}

#[test]
fn a_close_waits_for_a_broker_that_is_away_where_the_spool_would_be_lost() {
    for durable in [false, true] {
        let mut sim = Sim::new(1, false);
        sim.machine = Machine::new(Settings {
            durable,
            ..settings(&sim.budget, false)
        });
        spool_away(&mut sim, 3);
        assert!(!sim.machine.awaits_broker(), "it does not close yet");
        sim.machine.close(sim.now());
        sim.act();
        assert_eq!(sim.machine.awaits_broker(), !durable);
        if durable {
            continue;
        }
        back(&mut sim);
        assert!(sim.machine.is_draining());
        confirm_all(&mut sim);
        assert_eq!(stored(&sim).len(), 3);
        assert!(!sim.machine.awaits_broker() && !sim.machine.is_draining());
    }
}

#[test]
fn a_lane_degraded_by_force_spools_everything_until_it_is_released() {
    let mut sim = Sim::new(1, false);
    back(&mut sim);
    sim.publish_numbered(0, 0);
    sim.act();
    sim.machine.force_degraded(sim.now());
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Degraded);
    sim.publish_numbered(1, 0);
    sim.publish_numbered(2, 1);
    sim.act();
    assert_eq!(sim.broker.written.len(), 1, "only what was in flight");
    // What was in flight is delivered as its confirm comes.
    confirm_all(&mut sim);
    assert!(matches!(sim.answers[&0], Ok(Outcome::Delivered { .. })));
    // A broker that goes and comes meanwhile changes nothing.
    sim.machine.ended(sim.now(), "crash");
    sim.act();
    assert!(!sim.open_wanted, "no lane is opened that may not write");
    sim.lane_open = false;
    sim.machine.broker_back(sim.now());
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Degraded);
    sim.machine.release_lane(sim.now());
    sim.act();
    assert!(sim.open_wanted);
    back(&mut sim);
    confirm_all(&mut sim);
    assert_eq!(stored(&sim), ["m0", "m1", "m2"]);
    assert_eq!(sim.machine.state(), LaneState::Primary);
}

#[test]
fn what_is_in_flight_of_a_lane_degraded_by_force_is_answered_at_the_hedge() {
    let mut sim = Sim::new(1, false);
    back(&mut sim);
    sim.publish_numbered(0, 0);
    sim.act();
    sim.machine.force_degraded(sim.now());
    sim.act();
    let deadline = sim.machine.next_deadline(sim.now()).unwrap();
    assert_eq!(deadline - sim.now, Duration::from_secs(1));
    sim.now = deadline;
    sim.machine.tick(sim.now());
    sim.act();
    assert!(sim.answers[&0].is_ok());
    assert_eq!(sim.machine.state(), LaneState::Suspect);
    // The confirm drops the copy, and the lane is degraded as before.
    confirm_all(&mut sim);
    assert_eq!(sim.machine.state(), LaneState::Degraded);
    assert!(sim.machine.spool().is_empty());
    sim.machine.release_lane(sim.now());
    sim.act();
    assert_eq!(sim.machine.state(), LaneState::Primary);
}

#[test]
fn a_lane_made_under_a_word_obeys_it_from_the_beginning() {
    let mut sim = Sim::new(1, false);
    let wanted = Controls {
        hold: Hold::Everything,
        rate: 5,
    };
    sim.machine.control(sim.now(), wanted);
    sim.machine.broker_back(sim.now());
    sim.publish_numbered(0, 0);
    sim.act();
    assert!(!sim.open_wanted);
    assert!(sim.answers[&0].is_ok());
    assert_eq!(sim.machine.limit(), 5);
    assert!(sim.machine.is_paused() && sim.machine.is_forced());
}

#[test]
fn without_a_spool_nothing_is_degraded_by_force() {
    let budget = Arc::new(Budget::new(2, 1 << 20));
    let mut sim = Sim::new(1, false);
    sim.machine = Machine::new(Settings {
        spool: false,
        ..settings(&budget, false)
    });
    sim.lane_open = true;
    sim.machine.opened(sim.now());
    sim.machine.force_degraded(sim.now());
    sim.publish();
    sim.act();
    assert!(!sim.machine.is_forced());
    assert_eq!(sim.broker.written.len(), 1);
}
