//! What operators do with the spool: look at it, export it, pause, resume and
//! limit its drain, and degrade lanes by force. It moves and changes no message.

use std::{
    collections::VecDeque,
    fmt,
    str::FromStr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::{
    MessagingHub,
    controls::{Hold, Rules},
    lane::{
        ask::{Ask, MAX_PAGE, Page, PageWanted},
        task::LaneHandle,
    },
    lock,
    spool::{Entry, Seq, Status, codec::LaneName},
    state::LaneState,
};
use crate::{
    broker::Compression,
    error::{Error, ErrorCode, Result},
    message::{Message, Timestamp, wire::Marks},
    topic::Pattern,
};

/// Which lanes are meant. Without anything: all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpoolFilter {
    /// Lanes of the route with this pattern, as `/v1/state` names it.
    pub route: Option<String>,
    /// Lanes of topics that this pattern covers; an alias is a topic's name, too.
    pub topic: Option<Pattern>,
}

/// The spools of all lanes that were asked for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SpoolList {
    /// The fullest first, then by topic and lane.
    pub lanes: Vec<LaneSpool>,
    /// All lanes that were asked for, those over the limit included.
    pub total: SpoolTotal,
}

/// Sums over lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpoolTotal {
    /// Lanes.
    pub lanes: u64,
    /// Messages, those in doubt too.
    pub messages: u64,
    /// Those whose fate at the primary is not known.
    pub in_doubt: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What one lane holds, and how its drain does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LaneSpool {
    /// The route's pattern.
    pub route: String,
    /// The topic.
    pub topic: String,
    /// Which lane of the topic (Kafka: the partition).
    pub lane: u32,
    /// How the lane publishes, where that is not as usual.
    #[serde(flatten)]
    pub way: LaneWay,
    /// Where it stands.
    pub state: LaneState,
    /// Why its state last changed, if it ever did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'static str>,
    /// Messages, those in doubt too.
    pub messages: u64,
    /// Those whose fate at the primary is not known.
    pub in_doubt: u64,
    /// Those that may be drained or handed out.
    pub ready: u64,
    /// Those being drained: written, not confirmed.
    pub in_flight: u64,
    /// Those in a local handler's hands.
    pub leased: u64,
    /// Those that rest until they are tried again.
    pub resting: u64,
    /// Bytes.
    pub bytes: u64,
    /// Age of the oldest.
    pub oldest_age_ms: u64,
    /// Whether they survive the hub's death.
    pub durable: bool,
    /// Whether an operator paused the drain.
    pub paused: bool,
    /// Whether an operator lets nothing be written to the primary.
    pub forced: bool,
    /// How fast it drains.
    pub drain: LaneDrain,
}

/// How a lane publishes. One topic has a lane for each way that is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LaneWay {
    /// Messages that nobody would get are refused.
    #[serde(skip_serializing_if = "is_false")]
    pub mandatory: bool,
    /// Another compression than the configured one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Another exchange and routing key than the topic's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<(String, String)>,
}

/// How fast a lane drains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LaneDrain {
    /// Messages drained a second, lately.
    pub rate: f64,
    /// Messages drained a second at most; 0: no limit.
    pub limit: u32,
}

/// A message in the spool.
#[derive(Clone, Debug)]
pub struct SpooledMessage {
    /// The topic.
    pub topic: String,
    /// Which lane of the topic.
    pub lane: u32,
    /// Its place in the lane's publish order.
    pub seq: u64,
    /// What was published.
    pub message: Arc<Message>,
    /// Where it stands.
    pub status: SpooledStatus,
    /// What it takes of the spool's room, in bytes.
    pub size: u64,
    /// When it was published.
    pub since: Timestamp,
    /// When it is tried again, if it rests.
    pub due: Option<Timestamp>,
    /// What the hub has noted on it.
    pub marks: Marks,
}

/// Where a spooled message stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SpooledStatus {
    /// Written to the primary; its fate is not known.
    InDoubt,
    /// May be drained or handed out.
    Ready,
    /// Being drained: written, not confirmed.
    InFlight,
    /// In a local handler's hands.
    Leased,
    /// Failed, and rests until it is tried again.
    Resting,
}

/// Some spooled messages, by topic and lane, in publish order.
#[derive(Clone, Debug)]
pub struct SpoolPage {
    /// The messages.
    pub messages: Vec<SpooledMessage>,
    /// Where the next page begins; none at the end.
    pub next: Option<SpoolCursor>,
}

/// A place in the spool. Its text form is opaque.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpoolCursor {
    #[serde(rename = "l")]
    lane: LaneName,
    #[serde(rename = "s")]
    from: Seq,
}

/// What an operator's word reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reached {
    /// Lanes for which it is in force.
    pub lanes: u64,
    /// Lanes that had not taken it up after [`MessagingHub::OBEY_TIMEOUT`];
    /// they will.
    pub pending: u64,
}

/// Reads a whole spool, page by page. Messages that are drained meanwhile may
/// be missing, messages published to a lane after its turn came are left out;
/// nothing comes twice.
#[derive(Debug)]
pub struct SpoolExport(Walk);

impl MessagingHub {
    /// How long a lane may take to do what an operator wants before it is
    /// reported as pending.
    pub const OBEY_TIMEOUT: Duration = Duration::from_secs(5);

    /// Messages of one page of the spool at most.
    pub const MAX_SPOOL_PAGE: usize = MAX_PAGE;

    /// What every lane holds; at most `limit` lanes, the fullest first.
    #[must_use]
    pub fn spool(&self, filter: &SpoolFilter, limit: usize) -> SpoolList {
        let now = Timestamp::now();
        let mut total = SpoolTotal::default();
        let mut lanes: Vec<LaneSpool> = self
            .lanes_of(filter)
            .iter()
            .map(|handle| {
                let lane = show(handle, now);
                total.lanes += 1;
                total.messages += lane.messages;
                total.in_doubt += lane.in_doubt;
                total.bytes += lane.bytes;
                lane
            })
            .collect();
        // Stable: those that hold as much stay by topic and lane.
        lanes.sort_by_key(|lane| std::cmp::Reverse(lane.messages));
        lanes.truncate(limit);
        SpoolList { lanes, total }
    }

    /// A page of spooled messages, of at most `limit` (and at most
    /// [`MessagingHub::MAX_SPOOL_PAGE`]), from the beginning or from a cursor
    /// on. They stay in the spool.
    ///
    /// # Errors
    /// `OPERATION_CANCELED` when a lane ended meanwhile.
    ///
    /// # Cancel safety
    /// Only the answer is lost.
    pub async fn spooled(
        &self,
        filter: &SpoolFilter,
        from: Option<&SpoolCursor>,
        limit: usize,
    ) -> Result<SpoolPage> {
        let mut walk = self.walk(filter, from);
        let mut messages = Vec::new();
        let mut bytes = 0;
        let limit = limit.min(MAX_PAGE);
        while messages.len() < limit && bytes < WALK_BYTES {
            let Some(page) = walk.next(limit - messages.len()).await? else {
                break;
            };
            bytes += page.iter().map(|m| m.size).sum::<u64>();
            messages.extend(page);
        }
        Ok(SpoolPage {
            next: walk.cursor(),
            messages,
        })
    }

    /// Reads all spooled messages, a page at a time.
    #[must_use]
    pub fn export_spool(&self, filter: &SpoolFilter) -> SpoolExport {
        SpoolExport(self.walk(filter, None))
    }

    /// Stops the drain of all lanes whose topics the pattern covers, those of
    /// the future included, until [`MessagingHub::resume_drain`]. Publishing
    /// goes on: messages whose keys the spool holds go behind it, others to the
    /// primary. With `degrade` nothing is written to the primary any more, and
    /// everything goes to the spool; what is in flight ends as its confirms come.
    ///
    /// Paused spools do not hold up a shutdown. What of them is in memory is
    /// lost with the process, and reported.
    ///
    /// # Errors
    /// `INVALID_CONFIG` where nothing could be spooled (`degrade` without a
    /// fallback), or when over a thousand patterns were spoken of.
    ///
    /// # Cancel safety
    /// Once polled it holds, whether or not it is waited for.
    pub async fn pause_drain(&self, pattern: &Pattern, degrade: bool) -> Result<Reached> {
        let pattern = self.meant(pattern);
        if degrade && !lock(&self.0.routes).all().iter().any(|r| r.spool) {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                "no lane can be degraded: there is no spool that could hold its messages; use a fallback, and a broker besides it",
            ));
        }
        let hold = if degrade {
            Hold::Everything
        } else {
            Hold::Drain
        };
        self.say(|rules| rules.hold(&pattern, hold))?;
        tracing::warn!(%pattern, degrade, "an operator paused the drain");
        Ok(self.obeyed(pattern).await)
    }

    /// Lets all lanes whose topics the pattern covers drain, and write, again.
    /// `rate` limits how many messages each of them drains a second, from now
    /// on; `Some(0)` lifts the limit, `None` leaves it.
    ///
    /// # Errors
    /// `INVALID_CONFIG` when over a thousand patterns were spoken of.
    ///
    /// # Cancel safety
    /// As [`MessagingHub::pause_drain`].
    pub async fn resume_drain(&self, pattern: &Pattern, rate: Option<u32>) -> Result<Reached> {
        let pattern = self.meant(pattern);
        self.say(|rules| {
            if let Some(rate) = rate {
                rules.limit(&pattern, rate)?;
            }
            rules.hold(&pattern, Hold::Nothing)
        })?;
        tracing::warn!(%pattern, rate, "an operator resumed the drain");
        Ok(self.obeyed(pattern).await)
    }

    /// Changes what operators want, whole or not at all.
    fn say(&self, change: impl FnOnce(&mut Rules) -> Result<()>) -> Result<()> {
        let mut result = Ok(());
        self.0.controls.send_if_modified(|rules| {
            let mut next = (**rules).clone();
            result = change(&mut next);
            if result.is_ok() {
                *rules = Arc::new(next);
            }
            result.is_ok()
        });
        result
    }

    /// Waits until the lanes that exist have taken up what was said.
    async fn obeyed(&self, pattern: Pattern) -> Reached {
        let filter = SpoolFilter {
            topic: Some(pattern),
            route: None,
        };
        let asks: Vec<_> = self
            .lanes_of(&filter)
            .iter()
            .map(|handle| handle.asks.clone())
            .collect();
        let answers = asks.into_iter().map(|asks| async move {
            let (answer, obeyed) = oneshot::channel();
            // A lane that has ended needs no control.
            if asks.send(Ask::Obeyed(answer)).await.is_err() {
                return None;
            }
            obeyed.await.ok().map(|()| true)
        });
        let answers =
            answers.map(|answer| async { tokio::time::timeout(Self::OBEY_TIMEOUT, answer).await });
        let mut reached = Reached::default();
        for answer in join_all(answers).await {
            match answer {
                Ok(Some(_)) => reached.lanes += 1,
                Ok(None) => {}
                Err(_) => reached.pending += 1,
            }
        }
        reached
    }

    /// An alias stands for its topic.
    fn meant(&self, pattern: &Pattern) -> Pattern {
        Pattern::new(self.0.topology.canonical(pattern.as_str()))
            .unwrap_or_else(|_| pattern.clone())
    }

    /// By topic and lane.
    fn lanes_of(&self, filter: &SpoolFilter) -> Vec<Arc<LaneHandle>> {
        let topic = filter.topic.as_ref().map(|p| self.meant(p));
        let mut lanes: Vec<Arc<LaneHandle>> = lock(&self.0.lanes)
            .iter()
            .filter(|(key, _)| topic.as_ref().is_none_or(|p| p.matches(&key.topic)))
            .filter(|(_, handle)| filter.route.as_ref().is_none_or(|r| *r == handle.route))
            .map(|(_, handle)| handle.clone())
            .collect();
        lanes.sort_by_cached_key(|handle| place(&handle.name));
        lanes
    }

    fn walk(&self, filter: &SpoolFilter, from: Option<&SpoolCursor>) -> Walk {
        let mut lanes: VecDeque<_> = self
            .lanes_of(filter)
            .iter()
            .map(|handle| (handle.name.clone(), handle.asks.clone()))
            .collect();
        let mut seq = 0;
        if let Some(from) = from {
            let begin = place(&from.lane);
            lanes.retain(|(name, _)| place(name) >= begin);
            if lanes.front().is_some_and(|(name, _)| *name == from.lane) {
                seq = from.from;
            }
        }
        Walk {
            lanes,
            from: seq,
            until: None,
        }
    }
}

impl SpoolExport {
    /// The next messages, in publish order of their lane; none at the end.
    ///
    /// # Errors
    /// `OPERATION_CANCELED` when a lane ended meanwhile: what was read so far is
    /// not everything.
    ///
    /// # Cancel safety
    /// Nothing is skipped.
    pub async fn next(&mut self) -> Result<Option<Vec<SpooledMessage>>> {
        self.0.next(EXPORT_PAGE).await
    }
}

/// A way through the spools of lanes.
struct Walk {
    lanes: VecDeque<(LaneName, mpsc::Sender<Ask>)>,
    /// Where the first lane's next page begins.
    from: Seq,
    /// Where the first lane's last page ends.
    until: Option<Seq>,
}

impl Walk {
    /// The next messages, all of one lane.
    async fn next(&mut self, limit: usize) -> Result<Option<Vec<SpooledMessage>>> {
        while let Some((name, asks)) = self.lanes.front() {
            let wanted = PageWanted {
                from: self.from,
                until: self.until,
                limit,
            };
            let page = ask(name, asks, wanted).await?;
            let messages: Vec<_> = page
                .entries
                .into_iter()
                .map(|(seq, entry, status)| spooled(name, seq, entry, status))
                .collect();
            match page.next {
                Some(next) => {
                    self.from = next;
                    self.until = Some(self.until.unwrap_or(page.end));
                }
                None => {
                    self.lanes.pop_front();
                    (self.from, self.until) = (0, None);
                }
            }
            if !messages.is_empty() {
                return Ok(Some(messages));
            }
        }
        Ok(None)
    }

    fn cursor(&self) -> Option<SpoolCursor> {
        self.lanes.front().map(|(name, _)| SpoolCursor {
            lane: name.clone(),
            from: self.from,
        })
    }
}

impl fmt::Debug for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk")
            .field("lanes", &self.lanes.len())
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for SpoolCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names and numbers always have a JSON form.
        let json = serde_json::to_vec(self).unwrap_or_default();
        f.write_str(&BASE64_URL_SAFE_NO_PAD.encode(json))
    }
}

impl FromStr for SpoolCursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let read = || {
            let json = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
            serde_json::from_slice(&json).ok()
        };
        read().ok_or_else(|| {
            Error::rejected(
                ErrorCode::InvalidConfig,
                format!("{text:?} is not a cursor of the spool; begin without one"),
            )
        })
    }
}

async fn ask(name: &LaneName, asks: &mpsc::Sender<Ask>, wanted: PageWanted) -> Result<Page> {
    let ended = || {
        Error::new(
            ErrorCode::OperationCanceled,
            "a lane ended while its spool was read; ask again",
        )
        .on(name.topic.as_str())
    };
    let (answer, page) = oneshot::channel();
    asks.send(Ask::Page(wanted, answer))
        .await
        .map_err(|_| ended())?;
    let page = page.await.map_err(|_| ended())?;
    if page.is_whole() {
        return Ok(page);
    }
    tokio::task::spawn_blocking(move || page.read())
        .await
        .map_err(|e| {
            Error::new(ErrorCode::UnknownError, "reading the spool panicked").caused_by(e)
        })?
}

fn spooled(name: &LaneName, seq: Seq, entry: Entry, status: Status) -> SpooledMessage {
    SpooledMessage {
        topic: name.topic.to_string(),
        lane: name.lane,
        seq,
        status: match status {
            Status::InDoubt => SpooledStatus::InDoubt,
            Status::InFlight => SpooledStatus::InFlight,
            Status::Leased => SpooledStatus::Leased,
            Status::Ready if entry.due.is_some() => SpooledStatus::Resting,
            Status::Ready => SpooledStatus::Ready,
        },
        size: entry.size as u64,
        since: entry.since,
        due: entry.due,
        marks: entry.marks,
        message: entry.message,
    }
}

fn show(handle: &LaneHandle, now: Timestamp) -> LaneSpool {
    let status = &handle.status;
    let name = &handle.name;
    LaneSpool {
        route: handle.route.clone(),
        topic: name.topic.to_string(),
        lane: name.lane,
        way: LaneWay {
            mandatory: name.mandatory,
            compression: name.compression,
            address: name.address.clone(),
        },
        state: status.state(),
        why: status.why(),
        messages: status.messages.load(Relaxed),
        in_doubt: status.in_doubt.load(Relaxed),
        ready: status.ready.load(Relaxed),
        in_flight: status.in_flight.load(Relaxed),
        leased: status.leased.load(Relaxed),
        resting: status.resting.load(Relaxed),
        bytes: status.bytes.load(Relaxed),
        oldest_age_ms: status.oldest_age_ms(now),
        durable: handle.durable,
        paused: status.paused.load(Relaxed),
        forced: status.forced.load(Relaxed),
        drain: LaneDrain {
            rate: lock(&handle.meter).look(status.drained.load(Relaxed)),
            limit: status.limit.load(Relaxed),
        },
    }
}

/// What lanes are ordered by: topic, number, and the rest of the name.
fn place(name: &LaneName) -> (String, u32, String) {
    let rest = serde_json::to_string(name).unwrap_or_default();
    (name.topic.to_string(), name.lane, rest)
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands over references"
)]
fn is_false(b: &bool) -> bool {
    !b
}

/// Messages of an export that are in hand at once; by bytes a page has a bound
/// of its own.
const EXPORT_PAGE: usize = 256;

/// Bytes after which a listing's page is full.
const WALK_BYTES: u64 = 4 * 1024 * 1024;
