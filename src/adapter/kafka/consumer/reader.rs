//! The polling thread: the only owner of a consumer's client. It polls, keeps
//! to the window of unfinished messages, pauses partitions when the reader is
//! slow for long (leaving the group would be worse), stores offsets, and leaves
//! in good order.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    consumer::{CommitMode, Consumer as _},
    error::{KafkaError, KafkaResult},
    message::Message as _,
    types::RDKafkaErrorCode as Code,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    core::{Client, Command, Context, Core, bare_list, list_of},
    ends::Ends,
    fence::join_anew,
    position,
    state::Settle,
    tracker::TopicPartition,
};
use crate::{
    adapter::kafka::{
        error::{precise, raw_code},
        record,
    },
    broker::{
        BrokerType, OffsetReset, Received, SeekTo, StartFrom,
        consumer::{ConsumerState, report_active},
    },
    error::ErrorCode,
    topic::Pattern,
};

/// The polling thread's own.
pub(super) struct Reader {
    pub(super) core: Arc<Core>,
    pub(super) client: Client,
    /// What it was made of, and its successor is.
    pub(super) settings: ClientConfig,
    pub(super) pattern: Pattern,
    pub(super) start: StartFrom,
    pub(super) only: Option<i32>,
    /// Unfinished messages at most.
    pub(super) window: usize,
    pub(super) refresh: Duration,
    pub(super) stopping: CancellationToken,
    pub(super) report: watch::Sender<ConsumerState>,
    pub(super) assigned: HashSet<TopicPartition>,
    pub(super) topics: record::Topics,
    /// How far it reads.
    pub(super) ends: Ends,
    /// Since when the cluster says that it has no such topic; only a reader with an
    /// end minds, another waits for the topic to come.
    pub(super) missing_since: Option<Instant>,
    /// When the topics are looked at again.
    pub(super) next_look: Instant,
}

/// Orders are taken for as long as this is there, also on a thread that panics.
struct Orders(Arc<Core>);

impl Drop for Orders {
    fn drop(&mut self) {
        self.0.refuse_orders();
    }
}

impl Reader {
    /// Runs until stopped or failed, and reports how it ended.
    pub(super) fn run(mut self) {
        let orders = Orders(Arc::clone(&self.core));
        let end = match self.read() {
            Ok(()) => ConsumerState::Stopped,
            Err(why) => {
                tracing::error!(target: "messaging_hub::kafka", pattern = %self.pattern, why, "the consumer failed for good");
                ConsumerState::Failed(why.into())
            }
        };
        // A failure stops the other half too, which closes the reader's channel.
        self.stopping.cancel();
        self.drain();
        self.leave();
        let report = self.report.clone();
        // Leaves the group: the last thing that may take long.
        drop(self);
        // Who ordered meanwhile finds the group without this member.
        drop(orders);
        report.send_replace(end);
    }

    fn read(&mut self) -> Result<(), String> {
        let mut full_since: Option<Instant> = None;
        while !self.stopping.is_cancelled() {
            self.obey();
            self.store();
            if !self.core.member && Instant::now() >= self.next_look {
                self.next_look = Instant::now() + self.look();
                if self
                    .missing_since
                    .is_some_and(|since| since.elapsed() >= BELIEVED)
                {
                    return Err(DELETED.to_owned());
                }
            }
            self.tell();
            if self.ends.is_over() {
                if self.core.state().unfinished() == 0 {
                    return Ok(());
                }
                // The rest is handed over first: stopping would drop it.
                self.core.wait(SLICE, |s| s.unfinished() == 0 || s.stopping);
                continue;
            }
            let window = self.window;
            if self.core.state().unfinished() >= window {
                let since = *full_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= PAUSE_AFTER {
                    self.pause();
                    // Nothing is fetched any more, so this serves rebalances
                    // and heartbeats only.
                    self.poll(Duration::ZERO, 1)?;
                }
                self.core
                    .wait(SLICE, |s| s.unfinished() < window || s.stopping);
                continue;
            }
            full_since = None;
            self.resume();
            let room = window.saturating_sub(self.core.state().unfinished());
            self.poll(SLICE, room.min(BATCH))?;
        }
        Ok(())
    }

    /// Takes in what is there, waiting for the first message only.
    fn poll(&mut self, wait: Duration, most: usize) -> Result<(), String> {
        let mut taken = 0;
        let mut timeout = wait;
        while taken < most {
            match self.client.poll(timeout) {
                None => break,
                Some(Err(KafkaError::PartitionEOF(partition))) => self.ends.reach(partition),
                Some(Err(error)) if self.core.fence.is_forgotten(&error, &self.core.link) => {
                    self.join_anew(&error)?;
                    break;
                }
                Some(Err(error)) => {
                    if let Some(why) = fatal(&error, self.core.reset) {
                        return Err(why);
                    }
                    let meaning = raw_code(&error).and_then(precise);
                    if self.ends.is_bounded() && meaning == Some(ErrorCode::TopicNotFound) {
                        // A cluster that starts may say so of a topic that it has;
                        // the look asks for long enough.
                        self.next_look = self.next_look.min(Instant::now() + LOOK_AGAIN);
                    }
                    tracing::debug!(target: "messaging_hub::kafka", %error, "consuming");
                    break;
                }
                Some(Ok(message)) => {
                    taken += 1;
                    if !self.ends.admits(message.partition(), message.offset()) {
                        continue;
                    }
                    if let Some((topic, message, marks)) =
                        record::decode(&message, &mut self.topics)
                    {
                        let place = (topic.shared(), message.partition.unwrap_or_default());
                        let offset = message.offset.unwrap_or_default();
                        let received = Received {
                            topic,
                            message: Arc::new(message),
                            marks: Arc::new(marks),
                            via: BrokerType::Kafka,
                        };
                        let settle = self.core.settle;
                        self.core.state().take_in(received, place, offset, settle);
                    }
                }
            }
            timeout = Duration::ZERO;
        }
        if taken > 0 {
            self.core.ready.notify_one();
        }
        self.let_go();
        Ok(())
    }

    /// Joins the group again. What was handed out and is not settled comes again.
    fn join_anew(&mut self, error: &KafkaError) -> Result<(), String> {
        let context = Context(Arc::clone(&self.core));
        let client = join_anew(&self.settings, &self.pattern, context, error)?;
        // Its end takes what it had away.
        drop(std::mem::replace(&mut self.client, client));
        let mut state = self.core.state();
        for place in state.tracker.partitions() {
            state.revoke(&place);
        }
        self.core.joined.store(false, Ordering::Release);
        Ok(())
    }

    /// Fetches no more of partitions that were read to their ends.
    fn let_go(&mut self) {
        let (reached, topic) = (self.ends.take_reached(), self.pattern.literal());
        let Some(topic) = topic.filter(|_| !reached.is_empty()) else {
            return;
        };
        let names = reached.into_iter().map(|p| (topic.as_str().into(), p));
        let names: Vec<TopicPartition> = names.collect();
        if let Err(error) = self.client.incremental_unassign(&bare_list(&names)) {
            // They are read on, and what comes of them is dropped.
            tracing::debug!(target: "messaging_hub::kafka", %error, "letting go of partitions");
        }
    }

    /// Reports whether the broker has the subscription.
    fn tell(&self) {
        let active = self.core.joined.load(Ordering::Acquire) && self.core.link.is_up();
        report_active(&self.report, active);
    }

    /// Stores what was done since; the client commits it in the background.
    fn store(&self) {
        let dirty = self.core.state().take_dirty();
        if !dirty.is_empty()
            && let Err(error) = self.client.store_offsets(&list_of(&dirty))
        {
            // A partition that was revoked just now: its offset was committed
            // by the callback.
            tracing::debug!(target: "messaging_hub::kafka", %error, "storing offsets");
        }
    }

    /// Assigns partitions that are new, at their positions. Returns when to
    /// look again.
    fn look(&mut self) -> Duration {
        match self.assign_new() {
            Ok(()) => {
                self.core.joined.store(true, Ordering::Release);
                // Asked again soon: the client library itself says late or never
                // that a topic is gone, and then nothing comes of it any more.
                match self.missing_since {
                    Some(_) => BELIEVED,
                    None => self.refresh,
                }
            }
            Err(error) => {
                tracing::debug!(target: "messaging_hub::kafka", %error, "positions not known yet");
                // Nobody says any more that it is missing.
                self.missing_since = None;
                LOOK_AGAIN
            }
        }
    }

    fn assign_new(&mut self) -> KafkaResult<()> {
        let literal = self.pattern.literal();
        let metadata = self
            .client
            .fetch_metadata(literal.as_ref().map(|t| t.as_str()), METADATA)?;
        let unknown = metadata.topics().iter().any(|t| match t.error() {
            Some(e) => Code::from(e) == Code::UnknownTopicOrPartition,
            // Deleted and made again with fewer: nothing more is said of the others.
            None => {
                let there: Vec<i32> = t.partitions().iter().map(|p| p.id()).collect();
                self.ends.misses(&there)
            }
        });
        self.missing_since = (unknown && self.ends.is_bounded())
            .then(|| self.missing_since.unwrap_or_else(Instant::now));
        let new: Vec<TopicPartition> = metadata
            .topics()
            .iter()
            .filter(|t| t.error().is_none() && is_ours(t.name()) && self.pattern.matches(t.name()))
            .flat_map(|t| t.partitions().iter().map(|p| (t.name().into(), p.id())))
            .filter(|tp| self.only.is_none_or(|only| only == tp.1) && self.ends.wants(tp.1))
            .filter(|tp| !self.assigned.contains(tp))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        // What appears after the start is new as a whole, unless it was named.
        let later = self.core.joined.load(Ordering::Acquire) && !self.ends.is_bounded();
        let mut positions = if later {
            position::resolve(&self.client, &new, SeekTo::Beginning)?
        } else {
            self.first_positions(&new)?
        };
        positions.retain(|(tp, offset)| self.ends.begin(tp.1, *offset));
        self.core
            .state()
            .assign(positions.iter().map(|(tp, _)| tp.clone()));
        if !positions.is_empty() {
            self.client.incremental_assign(&list_of(&positions))?;
        }
        if self.core.paused.load(Ordering::Acquire) {
            let _ = self.client.pause(&bare_list(&new));
        }
        self.assigned.extend(new);
        Ok(())
    }

    fn first_positions(&self, new: &[TopicPartition]) -> KafkaResult<Vec<(TopicPartition, i64)>> {
        if self.core.settle != Settle::Never {
            // One partition of a group's: committed, else where the reset says.
            let (mut known, unknown) = position::committed(&self.client, new)?;
            let to = match self.core.reset {
                OffsetReset::Latest => SeekTo::End,
                OffsetReset::Earliest | OffsetReset::None => SeekTo::Beginning,
            };
            known.extend(position::resolve(&self.client, &unknown, to)?);
            return Ok(known);
        }
        match &self.start {
            StartFrom::Latest => position::resolve(&self.client, new, SeekTo::End),
            StartFrom::Earliest => position::resolve(&self.client, new, SeekTo::Beginning),
            StartFrom::Time(at) => position::resolve(&self.client, new, SeekTo::Time(*at)),
            StartFrom::Offsets(offsets) => {
                let (mut given, mut others) = (Vec::new(), Vec::new());
                for tp in new {
                    match offsets.get(&(tp.0.to_string(), tp.1)) {
                        Some(offset) => given.push((tp.clone(), *offset)),
                        None => others.push(tp.clone()),
                    }
                }
                given.extend(position::resolve(&self.client, &others, SeekTo::End)?);
                Ok(given)
            }
        }
    }

    /// Carries out orders from elsewhere.
    fn obey(&self) {
        for (command, answer) in self.core.take_orders() {
            let (offsets, seek) = match command {
                Command::Seek(offsets) => (offsets, true),
                Command::Commit(offsets) => (offsets, false),
            };
            let ours: Vec<_> = {
                let state = self.core.state();
                offsets
                    .into_iter()
                    .filter(|(tp, _)| state.tracker.owns(tp))
                    .collect()
            };
            let result = self.move_to(&ours, seek);
            let names = ours.into_iter().map(|(tp, _)| tp).collect();
            // Whoever ordered has gone; the order is carried out all the same.
            let _ = answer.send(result.map(|()| names));
        }
    }

    fn move_to(&self, offsets: &[(TopicPartition, i64)], seek: bool) -> KafkaResult<()> {
        if offsets.is_empty() {
            return Ok(());
        }
        let list = list_of(offsets);
        if seek {
            let partitions = offsets.iter().map(|(tp, _)| tp.clone());
            // A new generation: what is out belongs to the old position.
            self.core.state().assign(partitions);
            let moved = self.client.seek_partitions(list_of(offsets), SEEK)?;
            for element in moved.elements() {
                element.error()?;
            }
            // Else the background commit would bring the old offset back.
            self.client.store_offsets(&list)?;
        }
        self.client.commit(&list, CommitMode::Sync)
    }

    fn pause(&self) {
        if !self.core.paused.swap(true, Ordering::AcqRel) {
            tracing::debug!(target: "messaging_hub::kafka", pattern = %self.pattern, "the reader is slow: paused");
            let _ = self
                .client
                .pause(&bare_list(&self.core.state().tracker.partitions()));
        }
    }

    fn resume(&self) {
        if self.core.paused.swap(false, Ordering::AcqRel) {
            let _ = self
                .client
                .resume(&bare_list(&self.core.state().tracker.partitions()));
        }
    }

    /// Waits until everything handed out is settled; keeps the membership
    /// meanwhile, so that what is settled can be committed.
    fn drain(&mut self) {
        self.core.state().stop();
        self.core.ready.notify_one();
        self.pause();
        while self.core.state().handed_out() > 0 && !self.core.abort.load(Ordering::Acquire) {
            self.obey();
            self.store();
            // The stop has cleared what was taken in, and takes in no more.
            let _ = self.poll(Duration::ZERO, 1);
            self.core.state().stop();
            self.core.wait(SLICE, |s| s.handed_out() == 0);
        }
    }

    fn leave(&self) {
        self.store();
        if !self.core.member && self.core.settle != Settle::Never && self.core.link.is_up() {
            // Nobody revokes what was assigned by hand.
            let done = self.core.state().tracker.watermarks();
            if !done.is_empty()
                && let Err(error) = self.client.commit(&list_of(&done), CommitMode::Sync)
            {
                tracing::warn!(target: "messaging_hub::kafka", %error, "the last offsets were not committed; those messages come again");
            }
        }
    }
}

/// Why a consumer that got this error gets nothing more, if that is so.
pub(in crate::adapter::kafka) fn fatal(error: &KafkaError, reset: OffsetReset) -> Option<String> {
    match (error, raw_code(error)) {
        (KafkaError::MessageConsumptionFatal(_), _) => Some(format!(
            "the client failed for good: {error}; with static membership, another consumer has the same group_instance_id"
        )),
        (_, Some(Code::TopicAuthorizationFailed | Code::GroupAuthorizationFailed)) => {
            Some(format!("not permitted to read: {error}"))
        }
        (_, Some(Code::AutoOffsetReset | Code::NoOffset)) if reset == OffsetReset::None => {
            Some("the group has no committed position and offset_reset is none".to_owned())
        }
        _ => None,
    }
}

/// Whether a topic is not one of Kafka's own.
pub(super) fn is_ours(name: &str) -> bool {
    !name.starts_with("__")
}

/// What ends a reader that was to read to an end.
const DELETED: &str = "the topic was deleted before it was read to its end";

/// How long the cluster must say that a topic is not there before that is
/// believed: one that starts may know less than it has.
const BELIEVED: Duration = Duration::from_secs(2);

/// How long a poll waits for the first message; orders and stops are seen then.
const SLICE: Duration = Duration::from_millis(100);

/// Messages taken in before the others are looked after.
const BATCH: usize = 256;

/// A reader that is slow for this long has its partitions paused. Pausing
/// throws away what was fetched ahead, so it is not done for every full moment.
const PAUSE_AFTER: Duration = Duration::from_secs(1);

/// How long one look at the topics may take.
const METADATA: Duration = Duration::from_secs(2);

/// When positions could not be found out.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How long a seek may take.
const SEEK: Duration = Duration::from_secs(5);
