//! The task that owns a lane: the thin shell round [`Machine`]. It moves
//! events in and actions out and decides nothing.
//!
//! It never waits for one thing only. Writing to the adapter goes through an
//! outbox that is passed on when the adapter has room, so a broker that stands
//! still cannot keep the hedge from being noticed.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{broadcast, futures::Notified, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    alarm::Alarm,
    ask::{self, ASKS_BOUND, Ask},
    keeper::{Done, Keeper, Loaded, Progress},
    machine::{Action, Intake, Local, Machine, Now, Settings},
};
use crate::{
    broker::{
        Confirmation, Delivery, Fate, Lane, LaneOptions, MessageBroker, Outcome, Receipt, Received,
        Settlement, Submission, Verdict,
    },
    error::{Error, ErrorCode, Result},
    hub::{
        accepted::Seen,
        controls::Rules,
        dead::DeadLetters,
        handover::hand_over,
        health::Health,
        lock,
        metrics::Meter,
        pending,
        spool::{LaneLeft, Seq, codec::LaneName, store::SpoolStore},
        state::{LaneState, RouteState, StateChange},
    },
    message::{
        Message, MessageId, Timestamp,
        wire::{Failure, Marks},
    },
    metrics::MetricsRecorder,
    topic::{Pattern, Topic},
};

/// A message on its way to a lane.
pub(crate) type Item = Intake<Waiter>;

/// Who waits for a publish.
pub(crate) struct Waiter {
    pub(crate) id: MessageId,
    pub(crate) since: Instant,
    pub(crate) answer: oneshot::Sender<Result<Receipt>>,
    /// Set for an id that the caller brought: repeats wait for it too.
    pub(crate) seen: Option<Seen>,
}

impl Waiter {
    /// From here on, or no longer, a lane may send it.
    pub(crate) fn hand_over(&mut self, handed_over: bool) {
        if let Some(seen) = &mut self.seen {
            seen.hand_over(handed_over);
        }
    }
}

/// A reader of spooled messages.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Unique in the hub.
    pub(crate) id: u64,
    /// Of which topics.
    pub(crate) pattern: Pattern,
    /// Where it gets them.
    pub(crate) deliveries: mpsc::Sender<Vec<Delivery>>,
    /// Which group it reads for: spooled events. None: spooled tasks, or it reads
    /// along.
    pub(crate) group: Option<Arc<str>>,
    /// Deliveries in hand at most, of a lane, or for a group of all lanes; 0:
    /// reads along without any.
    pub(crate) limit: usize,
    /// What a group's reader has in hand, of all lanes.
    pub(crate) in_hand: AtomicUsize,
}

impl Reader {
    /// Takes up all the room that is left, and says how much that is.
    fn reserve(&self) -> usize {
        self.limit
            .saturating_sub(self.in_hand.swap(self.limit, Relaxed))
    }

    fn give_back(&self, room: usize) {
        self.in_hand.fetch_sub(room, Relaxed);
    }
}

/// All readers of a hub; lanes watch the list and pick those of their topic.
pub(crate) type Readers = Arc<Vec<Arc<Reader>>>;

/// Everything a lane's task needs.
pub(crate) struct Parts {
    pub(crate) route: String,
    pub(crate) topic: Topic,
    pub(crate) lane: u32,
    pub(crate) broker: Arc<dyn MessageBroker>,
    pub(crate) options: LaneOptions,
    pub(crate) settings: Settings,
    /// Make the topic when it is missing.
    pub(crate) ensure: Option<crate::broker::Source>,
    /// The broker's breaker; the embedded broker has none.
    pub(crate) health: Option<Arc<Health>>,
    /// Where the spool is kept; none: in memory.
    pub(crate) store: Option<Arc<dyn SpoolStore>>,
    /// What an earlier process left in it.
    pub(crate) restored: Option<LaneLeft>,
    /// The lane's name in the store.
    pub(crate) name: LaneName,
    /// None without a fallback; then nothing is ever spooled.
    pub(crate) dead: Option<DeadLetters>,
    pub(crate) changes: broadcast::Sender<StateChange>,
    pub(crate) recorder: Arc<MetricsRecorder>,
    pub(crate) fallback_usages: Arc<AtomicU64>,
    pub(crate) readers: watch::Receiver<Readers>,
    /// What operators want.
    pub(crate) controls: watch::Receiver<Arc<Rules>>,
    pub(crate) closing: CancellationToken,
    /// Nobody waits for the spool to be moved any longer.
    pub(crate) abandoned: CancellationToken,
}

/// The hub's end of a lane's task.
pub(crate) struct LaneHandle {
    pub(crate) intake: mpsc::Sender<Item>,
    /// Whether its spool outlives the process.
    pub(crate) durable: bool,
    pub(crate) status: Arc<Status>,
    pub(crate) join: Mutex<Option<JoinHandle<()>>>,
    /// For operators.
    pub(crate) asks: mpsc::Sender<Ask>,
    pub(crate) name: LaneName,
    pub(crate) route: String,
    /// How fast it drains, from look to look.
    pub(crate) meter: Mutex<Meter>,
}

/// What a lane shows, without asking its task.
#[derive(Debug, Default)]
pub(crate) struct Status {
    state: AtomicU8,
    pub(crate) messages: AtomicU64,
    pub(crate) in_doubt: AtomicU64,
    /// Those that are in memory only, although there is a disk.
    pub(crate) unkept: AtomicU64,
    pub(crate) bytes: AtomicU64,
    /// Milliseconds since the epoch; 0: nothing is spooled.
    pub(crate) oldest: AtomicU64,
    pub(crate) drained: AtomicU64,
    pub(crate) ready: AtomicU64,
    pub(crate) in_flight: AtomicU64,
    pub(crate) leased: AtomicU64,
    pub(crate) resting: AtomicU64,
    /// An operator paused the drain.
    pub(crate) paused: AtomicBool,
    /// An operator lets nothing be written to the primary.
    pub(crate) forced: AtomicBool,
    /// Messages drained a second at most; 0: no limit.
    pub(crate) limit: AtomicU32,
    /// Why the state last changed, if it ever did.
    why: Mutex<Option<&'static str>>,
}

impl Status {
    pub(crate) fn state(&self) -> LaneState {
        match self.state.load(Relaxed) {
            0 => LaneState::Primary,
            1 => LaneState::Draining,
            2 => LaneState::Suspect,
            _ => LaneState::Degraded,
        }
    }

    /// Why the state last changed, if it ever did.
    pub(crate) fn why(&self) -> Option<&'static str> {
        *lock(&self.why)
    }

    /// How long ago the oldest message was spooled, in milliseconds.
    pub(crate) fn oldest_age_ms(&self, now: Timestamp) -> u64 {
        let oldest = i64::try_from(self.oldest.load(Relaxed)).unwrap_or(0);
        if oldest == 0 {
            return 0;
        }
        let age = now.since(Timestamp::from_millis(oldest));
        u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
    }

    /// Adds this lane to its route. `drain.remaining` carries the count of
    /// drained messages until the rate is worked out from it.
    pub(crate) fn add_to(&self, route: &mut RouteState, now: Timestamp) {
        route.state = route.state.max(self.state());
        route.spool.messages += self.messages.load(Relaxed);
        route.spool.in_doubt += self.in_doubt.load(Relaxed);
        route.spool.bytes += self.bytes.load(Relaxed);
        route.spool.oldest_age_ms = route.spool.oldest_age_ms.max(self.oldest_age_ms(now));
        route.paused |= self.paused.load(Relaxed);
        route.drain.remaining += self.drained.load(Relaxed);
    }

    fn show(&self, machine: &Machine<Waiter>) {
        let state = match machine.state() {
            LaneState::Primary => 0,
            LaneState::Draining => 1,
            LaneState::Suspect => 2,
            LaneState::Degraded => 3,
        };
        self.state.store(state, Relaxed);
        let spool = machine.spool();
        self.messages.store(spool.len() as u64, Relaxed);
        self.in_doubt.store(spool.in_doubt() as u64, Relaxed);
        self.bytes.store(spool.bytes() as u64, Relaxed);
        let oldest = spool.oldest().map_or(0, |t| t.as_millis().max(1));
        self.oldest.store(oldest.unsigned_abs(), Relaxed);
        self.drained.store(machine.drained(), Relaxed);
        self.ready.store(spool.ready() as u64, Relaxed);
        self.in_flight.store(spool.in_flight() as u64, Relaxed);
        self.leased.store(spool.leased() as u64, Relaxed);
        self.resting.store(spool.resting() as u64, Relaxed);
        self.paused.store(machine.is_paused(), Relaxed);
        self.forced.store(machine.is_forced(), Relaxed);
        self.limit.store(machine.limit(), Relaxed);
    }
}

/// Items that wait in front of a lane's task.
pub(crate) const INTAKE_BOUND: usize = 1024;

/// Items that the machine holds back before the task stops reading more.
const WAITING_BOUND: usize = 1024;

/// Events taken up in one turn, so that none starves the others.
const TURN: usize = 256;

/// Pause before a disk that could not be read is asked again.
const LOAD_PAUSE: Duration = Duration::from_secs(1);

/// Pause before a lane that could not be opened is tried again.
const REOPEN_PAUSE: Duration = Duration::from_millis(100);

/// How long a reader whose channel was full, perhaps with other lanes' messages,
/// is left before it is looked at again.
const READER_PAUSE: Duration = Duration::from_millis(20);

/// Starts a lane's task.
pub(crate) fn spawn(mut parts: Parts) -> LaneHandle {
    let (intake, items) = mpsc::channel(INTAKE_BOUND);
    let status = Arc::new(Status::default());
    let (settlements, verdicts) = mpsc::unbounded_channel();
    let durable = parts.settings.durable;
    let mut machine = Machine::new(parts.settings.clone());
    let mut keeper = Keeper::new(
        parts.name.clone(),
        parts.store.take(),
        parts.settings.spool_wait,
    );
    if let Some(left) = parts.restored.take() {
        machine.restore(left.spool);
        keeper.restored(left.ids);
        *lock(&status.why) = Some("an earlier process left messages in the spool");
    }
    let wanted = parts.controls.borrow_and_update().of(&parts.topic);
    machine.control(now(), wanted);
    // Seen by whoever asks before the task's first turn.
    status.show(&machine);
    let (asks, asked) = mpsc::channel(ASKS_BOUND);
    let name = parts.name.clone();
    let route = parts.route.clone();
    let task = Task {
        machine,
        keeper,
        parts,
        submissions: None,
        confirmations: None,
        outbox: Vec::new(),
        opening: None,
        loading: None,
        load_pause: Duration::ZERO,
        readers: Vec::new(),
        leases: HashMap::new(),
        copying: HashMap::new(),
        kept: Vec::new(),
        settlements,
        status: status.clone(),
    };
    let join = tokio::spawn(task.run(items, verdicts, asked));
    LaneHandle {
        intake,
        durable,
        status,
        join: Mutex::new(Some(join)),
        asks,
        name,
        route,
        meter: Mutex::default(),
    }
}

struct Task {
    parts: Parts,
    machine: Machine<Waiter>,
    keeper: Keeper<Waiter>,
    /// The two ends of the open lane.
    submissions: Option<mpsc::Sender<Vec<Submission>>>,
    confirmations: Option<mpsc::Receiver<Confirmation>>,
    /// Written by the machine, not passed to the adapter yet.
    outbox: Vec<Submission>,
    opening: Option<BoxFuture<'static, Result<Lane>>>,
    /// Spooled messages on their way back from the disk.
    loading: Option<BoxFuture<'static, Result<Loaded>>>,
    load_pause: Duration,
    /// Readers of this topic, and how many leases each holds.
    readers: Vec<(Arc<Reader>, usize)>,
    /// Which reader holds which lease.
    leases: HashMap<Seq, u64>,
    /// Leases that wait for a copy in the dead letters, with who waits for it.
    copying: HashMap<Seq, Option<Done>>,
    /// Handlers who wait until the disk has it that their group is done, or that
    /// their task rests.
    kept: Vec<Done>,
    settlements: mpsc::UnboundedSender<Settlement>,
    status: Arc<Status>,
}

impl Task {
    async fn run(
        mut self,
        mut items: mpsc::Receiver<Item>,
        mut verdicts: mpsc::UnboundedReceiver<Settlement>,
        mut asked: mpsc::Receiver<Ask>,
    ) {
        let mut connection = self.parts.broker.connection();
        let mut confirmations: Vec<Confirmation> = Vec::with_capacity(TURN);
        let mut batch: Vec<Item> = Vec::with_capacity(TURN);
        let mut settled: Vec<Settlement> = Vec::with_capacity(TURN);
        let mut closing = false;
        let mut abandoned = false;
        let mut open_intake = true;
        let mut reopen: Option<Instant> = None;
        let mut registry = self.parts.readers.clone();
        let mut controls = self.parts.controls.clone();
        self.pick_readers(&registry.borrow_and_update().clone());
        if !connection.borrow_and_update().connected {
            self.machine.broker_away(now());
        } else {
            self.machine.broker_back(now());
        }
        let budget = self.parts.settings.budget.clone();
        let mut alarm = Alarm::new();
        loop {
            self.act();
            // Listening begins before the last look, or room that comes free in
            // between would be rung for to nobody.
            let mut freed = std::pin::pin!(None);
            if self.machine.waiting() > 0 {
                freed.set(Some(budget.freed.notified()));
                if let Some(freed) = freed.as_mut().as_pin_mut() {
                    freed.enable();
                }
                self.machine.tick(now());
                self.act();
            }
            let starved = self.feed_readers();
            self.act();
            self.status.show(&self.machine);
            if !open_intake && self.may_end(closing, abandoned) {
                break;
            }
            let look_again = starved.then(|| now().at + READER_PAUSE);
            let deadlines = [
                self.machine.next_deadline(now()),
                self.keeper.next_deadline(),
                reopen,
                look_again,
            ];
            let deadline = deadlines.into_iter().flatten().min();
            let wants_intake = open_intake && self.machine.waiting() < WAITING_BOUND;
            let health = self.parts.health.clone();
            tokio::select! {
                biased;
                n = receive(&mut self.confirmations, &mut confirmations) => {
                    let now = now();
                    if n == 0 {
                        self.submissions = None;
                        self.confirmations = None;
                        self.unsend_outbox(now);
                        self.machine.ended(now, "the connection was lost");
                    } else {
                        self.parts.recorder.publish_confirmations.add(n as u64);
                        self.machine.confirmed(now, confirmations.drain(..));
                    }
                }
                n = verdicts.recv_many(&mut settled, TURN) => {
                    debug_assert!(n > 0, "the task holds a sender itself");
                    for s in settled.drain(..) {
                        self.settle(s);
                    }
                    self.tell_handlers();
                }
                Some(ask) = asked.recv() => {
                    // Whoever asks has said before what is wanted.
                    self.obey(&mut controls);
                    self.reply(ask);
                }
                Ok(()) = controls.changed() => self.obey(&mut controls),
                () = self.keeper.progress() => {
                    let progress = self.keeper.synced();
                    self.tell(now().at, progress);
                }
                loaded = pending(&mut self.loading) => {
                    self.loading = None;
                    self.take_up(loaded);
                }
                taken = hand_over(&self.submissions, &mut self.outbox),
                    if !self.outbox.is_empty() && self.submissions.is_some() =>
                {
                    if !taken {
                        // The lane ends; its last confirmations say what became
                        // of what was written, and this never was.
                        self.submissions = None;
                        self.unsend_outbox(now());
                    }
                }
                result = pending(&mut self.opening) => {
                    self.opening = None;
                    match result {
                        Ok(lane) => {
                            self.submissions = Some(lane.submissions);
                            self.confirmations = Some(lane.confirmations);
                            reopen = None;
                            self.machine.opened(now());
                        }
                        Err(error) => {
                            tracing::debug!(topic = %self.parts.topic, %error, "no lane could be opened");
                            self.machine.open_failed(now(), &error);
                            if !error.is_refusal() {
                                reopen = Some(Instant::now() + REOPEN_PAUSE);
                            }
                        }
                    }
                }
                changed = connection.changed() => {
                    let connected = changed.is_ok() && connection.borrow_and_update().connected;
                    if connected {
                        reopen = None;
                        self.machine.broker_back(now());
                    } else {
                        self.machine.broker_away(now());
                    }
                    if changed.is_err() {
                        // The broker object is gone for good; without this the
                        // branch would be ready for ever.
                        self.machine.open_failed(now(), &gone());
                        if self.confirmations.is_none() && self.opening.is_none() {
                            self.act();
                            break;
                        }
                    }
                }
                Ok(()) = registry.changed() => {
                    let list = registry.borrow_and_update().clone();
                    self.pick_readers(&list);
                }
                // Before intake: a publisher that never pauses must not keep a
                // lane from asking for its broker again, or from giving up on it.
                () = half_opened(&health), if reopen.is_some() => {
                    reopen = None;
                    if connection.borrow().connected {
                        self.machine.broker_back(now());
                    }
                }
                () = wait_for(freed.as_mut().as_pin_mut()), if freed.is_some() => {
                    self.machine.tick(now());
                }
                () = alarm.until(deadline) => {
                    let now = now();
                    if reopen.is_some_and(|at| at <= now.at) {
                        reopen = None;
                        if connection.borrow().connected {
                            self.machine.broker_back(now);
                        }
                    }
                    for (waiter, outcome) in self.keeper.give_up(now.at) {
                        self.answer(now.at, waiter, Ok(outcome));
                    }
                    self.machine.tick(now);
                }
                n = items.recv_many(&mut batch, TURN), if wants_intake => {
                    if n == 0 {
                        open_intake = false;
                    } else {
                        self.machine.publish(now(), batch.drain(..));
                    }
                }
                () = self.parts.closing.cancelled(), if !closing => {
                    closing = true;
                    self.machine.close(now());
                    // Nothing new from here on; what is in the channel is served.
                    items.close();
                }
                () = self.parts.abandoned.cancelled(), if !abandoned => abandoned = true,
            }
        }
        self.status.show(&self.machine);
    }

    fn pick_readers(&mut self, list: &Readers) {
        let held: HashMap<u64, usize> = self.readers.iter().map(|(r, h)| (r.id, *h)).collect();
        self.readers = list
            .iter()
            .filter(|r| r.pattern.matches(&self.parts.topic))
            .map(|r| (r.clone(), held.get(&r.id).copied().unwrap_or(0)))
            .collect();
        let readers = &self.readers;
        self.machine.keep_groups(|group| {
            let mut groups = readers.iter().filter_map(|(r, _)| r.group.as_deref());
            groups.any(|g| g == group)
        });
    }

    /// Does what operators want by now.
    fn obey(&mut self, controls: &mut watch::Receiver<Arc<Rules>>) {
        let wanted = controls.borrow_and_update().of(&self.parts.topic);
        self.machine.control(now(), wanted);
    }

    fn reply(&mut self, ask: Ask) {
        match ask {
            Ask::Obeyed(answer) => {
                self.act();
                self.status.show(&self.machine);
                // Whoever no longer waits need not know.
                let _ = answer.send(());
            }
            Ask::Page(wanted, answer) => {
                let _ = answer.send(ask::page(&self.machine, &self.keeper, wanted));
            }
        }
    }

    /// Carries out what the machine decided.
    fn act(&mut self) {
        loop {
            let actions = self.machine.take_actions();
            let at = now().at;
            if actions.is_empty() {
                self.write_on();
                let progress = self.keeper.flush(at);
                self.tell(at, progress);
                let unkept = self.keeper.unkept(self.machine.spool().len());
                self.machine.note_unkept(unkept);
                self.status.unkept.store(unkept as u64, Relaxed);
                return;
            }
            for action in actions {
                match action {
                    Action::Write(batch) => {
                        if self.outbox.is_empty() {
                            self.outbox = batch;
                        } else {
                            self.outbox.extend(batch);
                        }
                    }
                    Action::Answer(waiter, outcome) => self.answer(at, waiter, outcome),
                    Action::Open => self.open(),
                    Action::EndGeneration => {
                        self.submissions = None;
                        self.confirmations = None;
                        self.outbox.clear();
                    }
                    Action::DeadLetter {
                        seq,
                        message,
                        failure,
                        marks,
                    } => {
                        self.parts.recorder.messages_dead_lettered.inc();
                        // What was noted of it is written first, or there
                        // would be nothing that is kept until it is buried.
                        let progress = self.keeper.flush(at);
                        self.tell(at, progress);
                        let release = self.keeper.give_away(seq);
                        self.forget(at, seq);
                        if let Some(dead) = &self.parts.dead {
                            let message = counted(message, &failure);
                            let marks = marks.of_letter(failure);
                            dead.bury(&self.parts.topic, message, marks, release);
                        }
                    }
                    Action::CopyToDead {
                        tag,
                        message,
                        failure,
                        marks,
                    } => match &self.parts.dead {
                        Some(dead) => {
                            let message = counted(message, &failure);
                            let (marks, back) = (marks.of_letter(failure), &self.settlements);
                            dead.copy(&self.parts.topic, message, marks, back, tag);
                        }
                        // Without a fallback there is no spool either.
                        None => drop(self.settlements.send(Settlement {
                            tag,
                            verdict: Verdict::Requeue,
                            done: None,
                        })),
                    },
                    Action::Store { seq, entry, waiter } => {
                        self.parts.fallback_usages.fetch_add(1, Relaxed);
                        if let Some((waiter, outcome)) = self.keeper.store(seq, &entry, waiter) {
                            self.answer(at, waiter, Ok(outcome));
                        }
                        self.read_along(seq);
                    }
                    Action::Rewrite(seq) => {
                        if let Some(entry) = self.machine.spool().get(seq) {
                            self.keeper.rewrite(seq, entry);
                        }
                    }
                    Action::Remove(seq) => self.forget(at, seq),
                    Action::Load(seqs) => self.load(seqs),
                    Action::Changed { from, to, why } => self.announce(from, to, why),
                }
            }
        }
    }

    /// Passes the outbox on if the adapter has room at once, which saves a turn
    /// for each batch. What it does not take waits for room in the loop.
    fn write_on(&mut self) {
        if !self.outbox.is_empty()
            && let Some(submissions) = &self.submissions
            && let Ok(permit) = submissions.try_reserve()
        {
            permit.send(std::mem::take(&mut self.outbox));
        }
    }

    fn forget(&mut self, at: Instant, seq: Seq) {
        if let Some((waiter, outcome)) = self.keeper.remove(seq) {
            self.answer(at, waiter, Ok(outcome));
        }
    }

    fn tell(&mut self, at: Instant, progress: Progress<Waiter>) {
        for (waiter, outcome) in progress.answers {
            self.answer(at, waiter, Ok(outcome));
        }
        for seq in progress.kept {
            self.machine.kept(seq);
        }
    }

    fn load(&mut self, seqs: Vec<Seq>) {
        let Some(loader) = self.keeper.loader(seqs) else {
            return;
        };
        let pause = std::mem::take(&mut self.load_pause);
        let dead = self.parts.dead.clone();
        self.loading = Some(Box::pin(async move {
            tokio::time::sleep(pause).await;
            if let Some(dead) = dead {
                dead.room().await;
            }
            tokio::task::spawn_blocking(move || loader.load())
                .await
                .unwrap_or_else(|e| {
                    Err(
                        Error::new(ErrorCode::UnknownError, "reading the spool panicked")
                            .caused_by(e),
                    )
                })
        }));
    }

    fn take_up(&mut self, loaded: Result<Loaded>) {
        match loaded {
            Ok(loaded) => {
                for (seq, error) in loaded.unreadable {
                    tracing::error!(topic = %self.parts.topic, seq, %error,
                        "a spooled message cannot be read back");
                    self.machine.unreadable(seq);
                }
                self.machine.loaded(now(), loaded.entries);
            }
            Err(error) => {
                tracing::error!(topic = %self.parts.topic, %error,
                    "the spool cannot be read; trying again");
                self.load_pause = LOAD_PAUSE;
                self.machine.loaded(now(), Vec::new());
            }
        }
    }

    fn open(&mut self) {
        let broker = self.parts.broker.clone();
        let topic = self.parts.topic.clone();
        let options = self.parts.options.clone();
        let ensure = self.parts.ensure.clone();
        let lane = self.parts.lane;
        let health = self.parts.health.clone();
        self.opening = Some(Box::pin(async move {
            if let Some(health) = &health {
                health.check()?;
            }
            let limit = options.open_timeout;
            let opened = tokio::time::timeout(limit, async {
                if let Some(source) = ensure {
                    broker.ensure(&source).await?;
                }
                broker.open_lane(&topic, lane, &options).await
            })
            .await
            .unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorCode::ConnectionTimeout,
                    "the broker opened no publishing channel in time",
                ))
            });
            // A failure here may be this topic's alone; only the prober, which
            // asks the broker as a whole, counts failures.
            if let Some(health) = &health
                && opened.is_ok()
            {
                health.succeeded();
            }
            opened
        }));
    }

    fn answer(&self, now: Instant, waiter: Waiter, outcome: Result<Outcome>) {
        let recorder = &self.parts.recorder;
        match &outcome {
            Ok(_) => recorder.publish_successes.inc(),
            Err(error) => {
                recorder.publish_failures.inc();
                recorder.publish_errors.inc();
                if error.code() == ErrorCode::PublishTimeout || error.code() == ErrorCode::Timeout {
                    recorder.publish_timeouts.inc();
                }
            }
        }
        recorder
            .publish_latency
            .record(now.saturating_duration_since(waiter.since));
        let Waiter {
            id, answer, seen, ..
        } = waiter;
        let result = match outcome {
            Ok(outcome) => Ok(Receipt { id, outcome }),
            Err(error) => Err(error.with_id(id.as_str())),
        };
        if let Some(seen) = seen {
            seen.settle(&result);
        }
        // Whoever dropped the future abandoned the answer, not the message.
        let _ = answer.send(result);
    }

    /// What the adapter never took is certainly not sent.
    fn unsend_outbox(&mut self, now: Now) {
        let unsent = std::mem::take(&mut self.outbox).into_iter();
        self.machine.confirmed(
            now,
            unsent.map(|submission| Confirmation {
                token: submission.token,
                fate: Fate::Unsent(gone()),
            }),
        );
    }

    fn announce(&self, from: LaneState, to: LaneState, why: &'static str) {
        let change = StateChange {
            route: self.parts.route.clone(),
            topic: self.parts.topic.to_string(),
            lane: self.parts.lane,
            from,
            to,
            at: Timestamp::now(),
            reason: why.to_owned(),
        };
        *lock(&self.status.why) = Some(why);
        if to == LaneState::Primary || from == LaneState::Primary {
            tracing::warn!(route = %change.route, topic = %change.topic, lane = change.lane,
                from = from.as_str(), to = to.as_str(), reason = why,
                spooled = self.machine.spool().len(), "a lane changed its state");
        } else {
            tracing::info!(route = %change.route, topic = %change.topic, lane = change.lane,
                from = from.as_str(), to = to.as_str(), reason = why,
                spooled = self.machine.spool().len(), "a lane changed its state");
        }
        // Nobody listening is fine.
        let _ = self.parts.changes.send(change);
    }

    /// Hands spooled messages to local readers that have room. True when one
    /// could not be looked after because its channel was full.
    fn feed_readers(&mut self) -> bool {
        if self.readers.is_empty() {
            return false;
        }
        let mut starved = false;
        let now = now();
        let events = self.parts.settings.local == Local::Groups;
        if events && !self.machine.hands_out_events() {
            return false;
        }
        for (reader, held) in &mut self.readers {
            if reader.limit == 0 || reader.group.is_some() != events {
                continue;
            }
            let mut batch = Vec::new();
            let Ok(permit) = reader.deliveries.try_reserve() else {
                starved = !reader.deliveries.is_closed() && self.machine.spool().ready() > 0;
                continue;
            };
            if let Some(group) = &reader.group {
                let room = reader.reserve();
                let taken = self.machine.take_for(now, group, room);
                reader.give_back(room - taken.len());
                // Another lane may have what this reader has room for.
                starved |= room == 0;
                *held += taken.len();
                for (tag, entry) in taken {
                    self.leases.insert(tag, reader.id);
                    let received = received(&self.parts, &entry.message, entry.marks);
                    batch.push(Delivery::new(received, self.settlements.clone(), tag));
                }
                if !batch.is_empty() {
                    permit.send(batch);
                }
                continue;
            }
            while *held < reader.limit {
                let Some((seq, entry)) = self.machine.lease(now) else {
                    break;
                };
                *held += 1;
                self.leases.insert(seq, reader.id);
                batch.push(Delivery::new(
                    received(&self.parts, &entry.message, entry.marks),
                    self.settlements.clone(),
                    seq,
                ));
            }
            if !batch.is_empty() {
                permit.send(batch);
            }
        }
        starved
    }

    /// Live readers without a group see a spooled message at once; a slow one
    /// gets it when it is drained.
    fn read_along(&mut self, seq: Seq) {
        if self.readers.iter().all(|(r, _)| r.limit != 0) {
            return;
        }
        let Some(entry) = self.machine.spool().get(seq).cloned() else {
            return;
        };
        for (reader, _) in &self.readers {
            if reader.limit == 0 {
                let delivery =
                    Delivery::unsettled(received(&self.parts, &entry.message, entry.marks.clone()));
                let _ = reader.deliveries.try_send(vec![delivery]);
            }
        }
    }

    fn settle(&mut self, settlement: Settlement) {
        if self.parts.settings.local == Local::Groups {
            self.settle_event(settlement);
            return;
        }
        self.end_lease(settlement.tag);
        let acked = matches!(settlement.verdict, Verdict::Ack);
        let rests = matches!(settlement.verdict, Verdict::Retry { .. });
        let known = self
            .machine
            .settle(now(), settlement.tag, settlement.verdict);
        if known && acked {
            self.parts.recorder.messages_acked.inc();
        }
        let Some(done) = settlement.done else {
            return;
        };
        if known && rests {
            // Who was told that it rests may count on its time: a kill before the
            // disk had it would hand it out again at once, as not yet tried.
            self.kept.push(done);
        } else {
            let _ = done.send(if known { Ok(()) } else { Err(not_held()) });
        }
    }

    /// As [`Task::settle`], where a group decided about an event.
    fn settle_event(&mut self, settlement: Settlement) {
        let Settlement { tag, verdict, done } = settlement;
        let copied = self.copying.remove(&tag);
        let copies = matches!(verdict, Verdict::DeadLetter { .. });
        let acked = matches!(verdict, Verdict::Ack);
        let known = self.machine.settle(now(), tag, verdict);
        if copies && known {
            // The lease goes on until there is a copy.
            self.copying.insert(tag, done);
            return;
        }
        self.end_lease(tag);
        if acked && known && copied.is_none() {
            self.parts.recorder.messages_acked.inc();
        }
        let failed = copied.is_some() && !acked;
        let Some(done) = copied.unwrap_or(done) else {
            return;
        };
        if acked && known {
            self.kept.push(done);
        } else {
            let _ = done.send(if failed {
                Err(Error::new(
                    ErrorCode::DeadLetterFailed,
                    "the hub's dead letters could not take a copy; the event is handed out again",
                ))
            } else if known {
                Ok(())
            } else {
                Err(not_held())
            });
        }
    }

    /// Handlers hear of what was noted about a message once that is as safe as the
    /// message itself: a group's ack, a task's rest.
    fn tell_handlers(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        self.act();
        for done in std::mem::take(&mut self.kept) {
            self.keeper.tell_handler(now().at, done);
        }
    }

    /// Takes a lease off its reader's account.
    fn end_lease(&mut self, tag: Seq) {
        if let Some(id) = self.leases.remove(&tag)
            && let Some((reader, held)) = self.readers.iter_mut().find(|(r, _)| r.id == id)
        {
            *held = held.saturating_sub(1);
            if reader.group.is_some() {
                reader.give_back(1);
            }
        }
    }

    /// Ends when nothing more will happen by itself: no outcome is due and no
    /// drain goes on. A lane whose broker was replaced goes on until its spool is
    /// empty; only a hub that closes leaves one behind.
    fn may_end(&self, closing: bool, abandoned: bool) -> bool {
        self.machine.is_quiet()
            && self.keeper.is_quiet()
            && self.leases.is_empty()
            && !self.machine.is_draining()
            && (abandoned || !self.machine.awaits_broker())
            && (closing || self.machine.spool().is_empty())
    }
}

fn received(parts: &Parts, message: &Arc<Message>, marks: Marks) -> Received {
    let mut shown = (**message).clone();
    // An id that the hub made is as good as a brought one from here on: the copy
    // that may be at the primary comes back under it, and must be recognised.
    if let Ok(id) = MessageId::new(shown.id.as_str()) {
        shown.id = id;
    }
    shown.topic = Some(parts.topic.to_string());
    Received {
        topic: parts.topic.clone(),
        message: Arc::new(shown),
        marks: Arc::new(marks),
        via: crate::broker::BrokerType::InMemory,
    }
}

fn now() -> Now {
    Now {
        at: tokio::time::Instant::now().into_std(),
        wall: Timestamp::now(),
    }
}

fn not_held() -> Error {
    Error::new(
        ErrorCode::AckFailed,
        "the spool no longer holds this delivery",
    )
}

fn gone() -> Error {
    Error::new(ErrorCode::ConnectionClosed, "the lane has ended")
}

async fn receive(
    lane: &mut Option<mpsc::Receiver<Confirmation>>,
    into: &mut Vec<Confirmation>,
) -> usize {
    match lane {
        Some(lane) => lane.recv_many(into, TURN).await,
        None => std::future::pending().await,
    }
}

async fn half_opened(health: &Option<Arc<Health>>) {
    match health {
        Some(health) => health.changed.notified().await,
        None => std::future::pending().await,
    }
}

async fn wait_for(room: Option<Pin<&mut Notified<'_>>>) {
    match room {
        Some(room) => room.await,
        None => std::future::pending().await,
    }
}

/// A letter with the retries that its reader made.
fn counted(mut message: Arc<Message>, failure: &Failure) -> Arc<Message> {
    if failure.retries > message.retry_count {
        failure.count_on(Arc::make_mut(&mut message));
    }
    message
}
