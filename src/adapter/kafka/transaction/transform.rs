//! The thread of a transform: reads what is committed, has it handled, and writes
//! what comes of it in one transaction with the positions of its group. Whatever goes
//! wrong with a transaction, it goes back to the committed positions.
//!
//! ```text
//!   read --> held --> handle (tasks) --> begin, write, offsets, commit --> read
//!     ^-------------- rewind to what is committed <--' not committed, or unknown
//! ```
//!
//! While handlers run long it goes on polling, so that a rebalance waits for nobody.
//! Between a transaction's begin and its end it never polls: what is written then
//! belongs to partitions that are ours, or the broker turns the positions down.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, KafkaResult},
};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;

use super::{
    handle::{Rules, bury, handle},
    held::{Handled, Item, Part},
    member::{Context, Member},
    session::{Session, Work},
};
use crate::{
    adapter::kafka::{
        broker::Backend,
        consumer::{self, Plan, TopicPartition, bare_list, list_of},
        error::{failed, invalid},
        record,
    },
    broker::{
        BrokerType, Outgoing, Received, Source, SubscribeOptions, Transformer,
        consumer::{ConsumerState, report_active},
    },
    error::{Error, ErrorCode, Result},
    topic::{Pattern, Topic},
};

/// The thread's own.
pub(super) struct Transform {
    backend: Arc<Backend>,
    session: Session,
    client: BaseConsumer<Context>,
    /// What it was made of, and its successor is.
    settings: ClientConfig,
    member: Arc<Member>,
    rules: Arc<Rules>,
    runtime: Handle,
    pattern: Pattern,
    /// Messages that are read ahead of their transaction at most.
    window: usize,
    stopping: CancellationToken,
    report: watch::Sender<ConsumerState>,
    /// Partitions from which nothing is fetched now.
    paused: BTreeSet<TopicPartition>,
    topics: record::Topics,
    /// Messages that are still handled one by one, to find out which of them makes
    /// something that the broker refuses.
    careful: usize,
    /// Transactions since the last that was committed.
    failed: u32,
}

impl Transform {
    /// Makes its clients; nothing is read before it runs.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for what cannot be honoured.
    pub(super) fn new(
        backend: &Arc<Backend>,
        (source, options, id): (&Source, &SubscribeOptions, &str),
        session: Session,
        transformer: Arc<dyn Transformer>,
        runtime: Handle,
        (stopping, report): (CancellationToken, watch::Sender<ConsumerState>),
    ) -> Result<Self> {
        let plan = Plan::new(backend, source, options)?;
        if options.group_id.is_none() || !plan.member {
            return Err(invalid(
                "a transform needs a group, and reads all partitions of its topics: set group_id, and leave stream.partition out",
            ));
        }
        if options.auto_ack {
            return Err(invalid(
                "auto_ack: the position of a transform is committed with what it writes; leave it out",
            ));
        }
        // An id of the configuration serves every consumer of the process; the
        // transactional id is this one's alone.
        let instance = options.group_instance_id.clone().or_else(|| {
            let configured = backend.config.group_instance_id.as_ref()?;
            Some(format!("{configured}-{id}"))
        });
        let mut settings = plan.settings(backend, options, instance.as_deref())?;
        settings
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed");
        let link = Arc::clone(&backend.link);
        let member = Arc::new(Member::new(link, plan.reset, options.session_timeout));
        let client = BaseConsumer::from_config_and_context(&settings, Context(Arc::clone(&member)))
            .map_err(|e| failed(ErrorCode::InvalidConfig, "the consumer's settings", e))?;
        let dead_letters = Topic::new(backend.topology.dead_letter_topic())?;
        let recorder = Arc::clone(&backend.recorder);
        let rules = Rules::new(
            options,
            transformer,
            recorder,
            dead_letters,
            Arc::clone(&backend.topology),
            stopping.clone(),
        );
        Ok(Self {
            backend: Arc::clone(backend),
            session,
            client,
            settings,
            member,
            rules: Arc::new(rules),
            runtime,
            pattern: source.pattern().clone(),
            window: plan.window,
            stopping,
            report,
            paused: BTreeSet::new(),
            topics: record::Topics::default(),
            careful: 0,
            failed: 0,
        })
    }

    /// Runs until it is stopped, `all` are, or it failed for good, and says so.
    pub(super) fn run(mut self, all: &CancellationToken) {
        let end = match self.work(all) {
            Ok(()) => ConsumerState::Stopped,
            Err(why) => {
                tracing::error!(target: "messaging_hub::kafka", pattern = %self.pattern, why, "a transform failed for good");
                ConsumerState::Failed(why.into())
            }
        };
        self.stopping.cancel();
        let report = self.report.clone();
        // Leaves the group: the last thing that may take long.
        drop(self);
        report.send_replace(end);
    }

    fn work(&mut self, all: &CancellationToken) -> Result<(), String> {
        // Before the group is joined: what an earlier process of the id left open is
        // ended by this, and its positions are known then.
        self.prepare(all)?;
        self.client
            .subscribe(&[&consumer::subscribed(&self.pattern)])
            .map_err(|e| format!("subscribing: {e}"))?;
        while !self.is_over(all) {
            self.tell();
            self.read()?;
            let careful = self.careful > 0;
            let parts = self.member.held().batch(Instant::now(), careful);
            if parts.is_empty() {
                continue;
            }
            self.careful = self.careful.saturating_sub(1);
            let one = if careful { single(&parts) } else { None };
            match self.handle(parts, all)? {
                Some(handled) => self.commit(handled, one, all)?,
                None => self.rewind(all)?,
            }
        }
        Ok(())
    }

    fn prepare(&mut self, all: &CancellationToken) -> Result<(), String> {
        while !self.is_over(all) {
            let Err(error) = self.session.prepare(Instant::now() + PREPARE) else {
                return Ok(());
            };
            self.check(&error)?;
            tracing::debug!(target: "messaging_hub::kafka", %error, "a transform waits for its transactional id");
            self.pause(PAUSE);
        }
        Ok(())
    }

    /// Takes in what is there, waiting for the first message only.
    fn read(&mut self) -> Result<(), String> {
        let resting = self.member.held().resting().cloned().collect();
        self.pause_only(resting);
        let mut wait = SLICE;
        while self.member.held().waiting() < self.window {
            if !self.poll(wait)? {
                break;
            }
            wait = Duration::ZERO;
        }
        Ok(())
    }

    /// Takes in one message. False: there is none.
    fn poll(&mut self, wait: Duration) -> Result<bool, String> {
        match self.client.poll(wait) {
            None => Ok(false),
            Some(Err(error)) if self.member.is_forgotten(&error) => {
                self.join_anew(&error)?;
                Ok(false)
            }
            Some(Err(error)) => {
                tracing::debug!(target: "messaging_hub::kafka", %error, "consuming");
                match consumer::fatal(&error, self.member.reset) {
                    Some(why) => Err(why),
                    None => Ok(false),
                }
            }
            Some(Ok(message)) => {
                if let Some((topic, message, marks)) = record::decode(&message, &mut self.topics) {
                    let partition = message.partition.unwrap_or_default();
                    let place = (topic.shared(), partition);
                    let item = Item {
                        offset: message.offset.unwrap_or_default(),
                        received: Received {
                            topic,
                            message: Arc::new(message),
                            marks: Arc::new(marks),
                            via: BrokerType::Kafka,
                        },
                        verdict: None,
                    };
                    self.member.held().take_in(&place, item);
                }
                Ok(true)
            }
        }
    }

    /// Joins the group again. What is held is read again, by whoever is given it.
    fn join_anew(&mut self, error: &KafkaError) -> Result<(), String> {
        let context = Context(Arc::clone(&self.member));
        let client = consumer::join_anew(&self.settings, &self.pattern, context, error)?;
        drop(std::mem::replace(&mut self.client, client));
        self.member.leave();
        self.paused.clear();
        // Where another has this member's id after all, one process gets the
        // transactional id too, and not each one of the two.
        self.session.renew();
        Ok(())
    }

    /// Has a batch handled. None: nobody waits for it any longer, or a task of it
    /// panicked.
    fn handle(
        &mut self,
        parts: Vec<Part>,
        all: &CancellationToken,
    ) -> Result<Option<Vec<Handled>>, String> {
        let began = Instant::now();
        let mut running = self.runtime.spawn(handle(parts, Arc::clone(&self.rules)));
        loop {
            let done = self
                .runtime
                .block_on(async { tokio::time::timeout(SLICE, &mut running).await });
            if let Ok(joined) = done {
                return Ok(joined.ok());
            }
            // Passes a close of the broker on to the handlers.
            let _ = self.is_over(all);
            if self.session.is_abandoned() {
                running.abort();
                let _ = self.runtime.block_on(running);
                return Ok(None);
            }
            if began.elapsed() >= PAUSE_AFTER {
                // Nothing is fetched any more, so this serves rebalances only.
                let places = self.member.held().places();
                self.pause_only(places.into_iter().map(|(place, _)| place).collect());
                if let Err(why) = self.poll(Duration::ZERO) {
                    running.abort();
                    let _ = self.runtime.block_on(running);
                    return Err(why);
                }
            }
        }
    }

    fn commit(
        &mut self,
        handled: Vec<Handled>,
        one: Option<Item>,
        all: &CancellationToken,
    ) -> Result<(), String> {
        let mut current = Vec::with_capacity(handled.len());
        {
            let (mut held, now) = (self.member.held(), Instant::now());
            for mut part in handled {
                // A rebalance took it: its next owner reads it again.
                if held.settle(&mut part, now) {
                    current.push(part);
                }
            }
        }
        let offsets: Vec<(TopicPartition, i64)> = current
            .iter()
            .filter_map(|h| Some((h.place.clone(), h.next?)))
            .collect();
        let done: u64 = current.iter().map(|h| h.done).sum();
        let letters: u64 = current.iter().map(|h| h.letters).sum();
        let batch: Vec<Outgoing> = current.into_iter().flat_map(|h| h.outputs).collect();
        if offsets.is_empty() {
            return Ok(());
        }
        // What is buried with it, once it is committed.
        let outcome = match self.transact(&batch, &offsets) {
            Ok(()) => Ok(letters),
            Err(error) if self.is_of_a_message(&error) => match one {
                // Alone in its transaction: what is refused comes of this message.
                Some(item) => {
                    let letter = bury(&item, &error, &self.rules);
                    if letter.is_none() {
                        tracing::warn!(target: "messaging_hub::kafka", pattern = %self.pattern,
                            id = %item.received.message.id, %error,
                            "what a dead letter was made into is refused; it stays where it is");
                    }
                    let buried = self.transact(letter.as_slice(), &offsets);
                    if buried.as_ref().is_err_and(Error::is_refusal)
                        && let Some((place, _)) = offsets.first()
                    {
                        // Kept rather than lost. The others go on meanwhile.
                        let until = Instant::now() + UNBURIED;
                        self.member.held().rest(place, until);
                    }
                    // In place of whatever came of the message.
                    buried.map(|()| u64::from(letter.is_some()))
                }
                None => {
                    self.careful = self.window;
                    Err(error)
                }
            },
            Err(error) => Err(error),
        };
        let error = match outcome {
            Ok(letters) => {
                let mut held = self.member.held();
                for (place, next) in &offsets {
                    held.committed(place, *next);
                }
                drop(held);
                self.failed = 0;
                let recorder = &self.backend.recorder;
                recorder.messages_acked.add(done);
                recorder.messages_dead_lettered.add(letters);
                return Ok(());
            }
            Err(error) => error,
        };
        self.check(&error)?;
        tracing::warn!(target: "messaging_hub::kafka", pattern = %self.pattern, %error,
            "a transaction of a transform was not committed; it goes back to the last that was");
        // Each time all its handlers run again: not as fast as they can.
        let doubled = PAUSE.saturating_mul(1 << self.failed.min(6));
        self.failed = self.failed.saturating_add(1);
        self.pause(doubled.min(LONGEST_PAUSE));
        self.rewind(all)
    }

    fn transact(&mut self, batch: &[Outgoing], offsets: &[(TopicPartition, i64)]) -> Result<()> {
        let letters = &self.rules.dead_letters;
        if batch.iter().any(|o| o.topic == *letters) {
            self.runtime.block_on(self.backend.dead_letters())?;
        }
        let client = &self.client;
        // Asked when it is needed: a rebalance gives it another generation.
        let ask = || Some((list_of(offsets), client.group_metadata()?));
        let work = Work {
            batch,
            compression: None,
            offsets: Some(&ask),
            deadline: Instant::now() + self.backend.config.transaction_timeout,
        };
        // Nobody waits for an early answer: it goes on until it knows.
        self.session.write(&work, &mut |_| {}).map(drop)
    }

    /// Goes back to the committed positions, which tell also what became of a commit
    /// whose outcome nobody heard.
    fn rewind(&mut self, all: &CancellationToken) -> Result<(), String> {
        // Ends what may be open, so that the positions are settled.
        self.prepare(all)?;
        while !self.is_over(all) {
            self.member.held().rewind();
            match self.seek_back() {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::debug!(target: "messaging_hub::kafka", %error, "the committed positions are not known yet");
                }
            }
            self.pause(PAUSE);
            self.poll(Duration::ZERO)?;
        }
        Ok(())
    }

    fn seek_back(&self) -> KafkaResult<()> {
        let places = self.member.held().places();
        let names: Vec<_> = places.iter().map(|(place, _)| place.clone()).collect();
        if names.is_empty() {
            return Ok(());
        }
        let (mut known, _) = consumer::committed(&self.client, &names)?;
        for (place, first) in places {
            // A group without a position stands where it began.
            if let Some(first) = first
                && !known.iter().any(|(k, _)| *k == place)
            {
                known.push((place, first));
            }
        }
        if known.is_empty() {
            return Ok(());
        }
        let moved = self.client.seek_partitions(list_of(&known), SEEK)?;
        moved.elements().iter().try_for_each(|e| e.error())
    }

    /// Whether an error is a refusal of what a message has become.
    fn is_of_a_message(&self, error: &Error) -> bool {
        // What this hub may not do is no message's fault, also while the brokers turn
        // everybody away.
        error.is_refusal()
            && error.code() != ErrorCode::AuthenticationFailed
            && self.check(error).is_ok()
    }

    /// Whether an error ends the transform.
    fn check(&self, error: &Error) -> Result<(), String> {
        // While the brokers turn everybody away it waits for them, as all consumers do.
        let denied =
            error.code() == ErrorCode::AuthenticationFailed && self.session.reachable().is_ok();
        let ends =
            self.session.ended().is_some() || denied || error.code() == ErrorCode::InvalidConfig;
        if ends { Err(error.to_string()) } else { Ok(()) }
    }

    fn is_over(&self, all: &CancellationToken) -> bool {
        if all.is_cancelled() {
            self.stopping.cancel();
        }
        self.stopping.is_cancelled()
    }

    fn tell(&self) {
        let active = self.member.has_joined() && self.backend.link.is_up();
        report_active(&self.report, active);
    }

    /// Fetches from all partitions but these.
    fn pause_only(&mut self, wanted: BTreeSet<TopicPartition>) {
        let list = |places: Vec<&TopicPartition>| {
            bare_list(&places.into_iter().cloned().collect::<Vec<_>>())
        };
        // One that is not ours any more cannot be resumed, and need not be.
        let resume: Vec<_> = self.paused.difference(&wanted).collect();
        if !resume.is_empty() {
            let _ = self.client.resume(&list(resume));
        }
        let pause: Vec<_> = wanted.difference(&self.paused).collect();
        if !pause.is_empty() {
            let _ = self.client.pause(&list(pause));
        }
        self.paused = wanted;
    }

    /// Rests on this thread, until it is stopped.
    fn pause(&self, long: Duration) {
        let stopped = self.stopping.cancelled();
        let _ = self
            .runtime
            .block_on(async { tokio::time::timeout(long, stopped).await });
    }
}

/// The only message of a batch.
fn single(parts: &[Part]) -> Option<Item> {
    match parts {
        [part] if part.items.len() == 1 => part.items.front().cloned(),
        _ => None,
    }
}

/// What a transform's thread is called.
pub(super) const NAME: &str = "kafka-transform";

/// How long a poll waits for the first message; ends are seen then.
const SLICE: Duration = Duration::from_millis(100);

/// How long one try to get the transactional id may take.
const PREPARE: Duration = Duration::from_secs(1);

/// Between two tries of something that failed.
const PAUSE: Duration = Duration::from_millis(200);

/// After many transactions that were not committed.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How long a partition rests of which a message can be neither written nor buried.
const UNBURIED: Duration = Duration::from_secs(10);

/// Handlers that take this long have their partitions paused and rebalances served.
const PAUSE_AFTER: Duration = Duration::from_secs(1);

/// How long a seek may take.
const SEEK: Duration = Duration::from_secs(5);
