//! `GET /v1/stream`: streams and live subscriptions as Server-Sent Events.
//!
//! ```text
//!   hub --deliveries--> pump --frames (bounded)--> body --> connection --> socket
//!                         ^------- what was flushed (see `flushed`) ---------'
//! ```
//!
//! With `ack=auto` a delivery is acked once its frame was written to the
//! socket; with `ack=cursor` once the client commits. What was neither when the
//! client goes is given back. Order is the consumer's.

use std::collections::VecDeque;

use axum::{
    Extension,
    body::Body,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, future::join_all};
use serde::Deserialize;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{
    App,
    cursor::Cursor,
    flushed::Flushed,
    limits,
    positions::{self, End, Primaries},
    problem::Problem,
    streams::{Commit, Entered},
};
use crate::{
    broker::{Consumer, Delivery, OffsetReset, StartFrom, SubscribeOptions},
    config::RouteKind,
    error::{Error, ErrorCode},
    hub::MessagingHub,
    message::{MessageId, Timestamp},
    topic::Pattern,
};

/// The query of a stream.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ask {
    pattern: String,
    group: Option<String>,
    from: Option<String>,
    #[serde(default)]
    ack: AckMode,
    last_event_id: Option<String>,
}

/// Who commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AckMode {
    /// What was written to the socket counts as handled.
    #[default]
    Auto,
    /// The client commits a cursor.
    Cursor,
}

/// Where a stream is asked to begin.
#[derive(Debug, PartialEq, Eq)]
enum From {
    Latest,
    Earliest,
    Time(Timestamp),
    Cursor(Cursor),
}

/// Opens a stream; it is live when the answer's headers arrive.
pub(super) async fn stream(
    State(app): State<App>,
    Extension(flushed): Extension<Flushed>,
    headers: HeaderMap,
    Query(ask): Query<Ask>,
) -> Result<Response, Problem> {
    if app.closing().is_cancelled() {
        return Err(Problem::shutting_down());
    }
    let pattern = Pattern::new(&ask.pattern).map_err(Problem::from)?;
    if app.hub().kind_of_pattern(&pattern) == RouteKind::Task {
        let queue = pattern.as_str();
        return Err(Problem::http(
            StatusCode::CONFLICT,
            "WORK_QUEUE",
            format!("{queue} is a work queue, and those are leased: POST /v1/queues/{queue}/lease"),
        )
        .on(queue));
    }
    if ask.ack == AckMode::Cursor && ask.group.is_none() {
        return Err(Problem::parameter(
            "ack=cursor needs a group; without one there is nothing to commit",
        ));
    }
    if let Some(group) = &ask.group {
        check_group(group)?;
    }
    let last = headers
        .get("last-event-id")
        .map(|v| v.to_str().unwrap_or("?"))
        .or(ask.last_event_id.as_deref())
        .filter(|id| !id.is_empty());
    let from = match last {
        Some(id) => Some(From::Cursor(Cursor::decode(id)?)),
        None => ask.from.as_deref().map(From::parse).transpose()?,
    };
    let mut cursor = Cursor {
        stream: MessageId::generate().as_str().to_owned(),
        ..Cursor::default()
    };
    let entered = match &ask.group {
        Some(group) => {
            let resumes = match &from {
                Some(From::Cursor(known)) => Some(known.stream.clone()),
                _ => None,
            };
            let commits = ask.ack == AckMode::Cursor;
            app.streams()
                .open(&cursor.stream, group, resumes, commits)?
        }
        // It holds nobody's place.
        None => Entered::default(),
    };
    let registered = Registered {
        app: app.clone(),
        id: cursor.stream.clone(),
    };
    gone(&entered.replaced, &pattern).await?;
    let options = begin(&app, &pattern, ask.group.as_deref(), from, &mut cursor).await?;
    let consumer = app
        .hub()
        .stream_events(&pattern.to_string(), options)
        .await
        .map_err(|e| Problem::from(e).on(pattern.as_str()))?;
    // From here on a client that hangs up leaves its place after its consumer has.
    let starting = Starting {
        parts: Some((consumer, registered)),
    };
    if !starting.live().await {
        let why = starting.failure();
        let why = why.map_or_else(
            || "the broker did not take the subscription in time; try again".to_owned(),
            |why| why.to_string(),
        );
        let error = Error::new(ErrorCode::SubscribeFailed, why).on(pattern.as_str());
        return Err(error.into());
    }
    let (frames, body) = mpsc::channel(limits::STREAM_BUFFER);
    let pump = Pump {
        primaries: Primaries::new(&app),
        base: flushed.given(),
        flushed: flushed.watch(),
        sent: 0,
        cursor,
        unacked: VecDeque::new(),
        held: 0,
        written: VecDeque::new(),
        unflushed: 0,
        moved: Instant::now(),
        waiting: VecDeque::new(),
        commits: entered.commits,
        ending: entered.ending,
        frames,
    };
    if let Some((consumer, registered)) = starting.into_parts() {
        let running = app.clone();
        app.spawn(async move {
            pump.run(consumer, &running).await;
            drop(registered);
        });
    }
    let body = ReceiverStream::new(body).map(move |frame: Bytes| {
        flushed.give();
        Ok::<_, std::convert::Infallible>(frame)
    });
    Ok((
        [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-store"),
        ],
        Body::from_stream(body),
    )
        .into_response())
}

/// Whether every broker takes the name.
pub(super) fn check_group(name: &str) -> Result<(), Problem> {
    match name.len() {
        0 => Err(Problem::parameter(
            "group is empty; leave it out, or name one",
        )),
        1..=MAX_GROUP => Ok(()),
        bytes => Err(Problem::parameter(format!(
            "the name of the group has {bytes} bytes, at most {MAX_GROUP} are taken"
        ))),
    }
}

/// Bytes of a group's name.
const MAX_GROUP: usize = 255;

/// A time. The plus of its offset comes as a blank where nobody escaped it.
fn time(text: &str) -> Result<Timestamp, crate::Error> {
    match text.rsplit_once(' ') {
        Some((left, offset)) if left.len() >= DATE_AND_TIME => format!("{left}+{offset}").parse(),
        _ => text.parse(),
    }
}

/// Characters of a date and a time without an offset, at least.
const DATE_AND_TIME: usize = "2026-01-01T00:00".len();

impl From {
    fn parse(text: &str) -> Result<Self, Problem> {
        match text {
            "latest" => Ok(Self::Latest),
            "earliest" => Ok(Self::Earliest),
            other => match time(other) {
                Ok(time) => Ok(Self::Time(time)),
                Err(_) => Cursor::decode(other).map(Self::Cursor).map_err(|_| {
                    Problem::parameter(format!(
                        "from is {other:?}; use latest, earliest, an RFC 3339 time or a cursor"
                    ))
                }),
            },
        }
    }
}

/// How the consumer begins; fills `cursor` with where that is.
async fn begin(
    app: &App,
    pattern: &Pattern,
    group: Option<&str>,
    from: Option<From>,
    cursor: &mut Cursor,
) -> Result<SubscribeOptions, Problem> {
    let mut options = SubscribeOptions {
        max_poll_records: limits::STREAM_MAX_UNCOMMITTED,
        prefetch: u16::try_from(limits::STREAM_MAX_UNCOMMITTED).unwrap_or(u16::MAX),
        ..SubscribeOptions::default()
    };
    let Some(group) = group else {
        options.start = match from.unwrap_or(From::Latest) {
            From::Earliest => {
                cursor.positions = positions::of(app, pattern, End::Oldest).await;
                StartFrom::Earliest
            }
            From::Latest => {
                cursor.positions = positions::of(app, pattern, End::Newest).await;
                if cursor.positions.is_empty() {
                    // Nothing is there yet, or nobody can say: the time stands
                    // in, or a resumed stream would not know where this began.
                    cursor.since = Some(Timestamp::now());
                    StartFrom::Latest
                } else {
                    StartFrom::Offsets(cursor.positions.clone())
                }
            }
            From::Time(time) => {
                cursor.since = Some(time);
                StartFrom::Time(time)
            }
            From::Cursor(known) => {
                let (start, filter) = positions::resume(app, pattern, &known).await;
                options.filter = filter;
                cursor.positions = known.positions;
                cursor.since = known.since;
                start
            }
        };
        return Ok(options);
    };
    options.group_id = Some(group.to_owned());
    match from {
        None => {}
        Some(From::Earliest) => options.offset_reset = Some(OffsetReset::Earliest),
        Some(From::Latest) => options.offset_reset = Some(OffsetReset::Latest),
        Some(From::Time(_)) => {
            return Err(Problem::parameter(
                "a group begins at its committed position; with a group, from takes latest, earliest (where nothing is committed) or a cursor",
            ));
        }
        Some(From::Cursor(known)) => {
            // The cursor wins over what was committed, and over what was handed
            // to the group and never reached its client.
            resume(app, group, &known).await?;
            cursor.positions = known.positions;
        }
    }
    Ok(options)
}

/// Waits until the streams that this one replaces have left their group. A client comes
/// back when it has lost its connection, which is often before the hub knows: until then
/// the old stream counts what it writes as handled, and keeps the group where it is.
async fn gone(replaced: &[CancellationToken], pattern: &Pattern) -> Result<(), Problem> {
    let all = join_all(replaced.iter().map(|over| over.cancelled()));
    match timeout(limits::STREAM_START_TIMEOUT, all).await {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(
            ErrorCode::SubscribeFailed,
            "the stream that is resumed did not end in time; try again",
        )
        .on(pattern.as_str())
        .into()),
    }
}

/// Sets the group where the cursor says. While its members change, and until a static
/// one is given up, a broker takes no such order.
async fn resume(app: &App, group: &str, known: &Cursor) -> Result<(), Problem> {
    let until = Instant::now() + limits::STREAM_RESUME_TIMEOUT;
    loop {
        match app.hub().resume_group(group, &known.positions).await {
            Ok(()) => return Ok(()),
            Err(e) if e.code() == ErrorCode::ConsumeFailed && Instant::now() < until => {
                tokio::time::sleep(limits::STREAM_RESUME_AGAIN).await;
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// A consumer that is to become live. Dropped, it is ended, and its place is given up
/// when it has left its group.
struct Starting {
    parts: Option<(Consumer, Registered)>,
}

impl Starting {
    async fn live(&self) -> bool {
        let Some((consumer, _)) = &self.parts else {
            return false;
        };
        timeout(limits::STREAM_START_TIMEOUT, consumer.control.active())
            .await
            .unwrap_or(false)
    }

    fn failure(&self) -> Option<std::sync::Arc<str>> {
        self.parts.as_ref()?.0.control.failure()
    }

    fn into_parts(mut self) -> Option<(Consumer, Registered)> {
        self.parts.take()
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some((consumer, registered)) = self.parts.take() {
            let app = registered.app.clone();
            app.spawn(async move {
                end(consumer).await;
                drop(registered);
            });
        }
    }
}

/// Stops a consumer and gives back what it still holds.
async fn end(consumer: Consumer) {
    let Consumer {
        mut deliveries,
        control,
        ..
    } = consumer;
    control.begin_stop();
    deliveries.close();
    // Dropped unsettled, hence given back.
    while deliveries.recv().await.is_some() {}
    control.stop().await;
}

/// Takes the stream off the list, however its task ends.
struct Registered {
    app: App,
    id: String,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.app.streams().close(&self.id);
    }
}

struct Pump {
    primaries: Primaries,
    /// Frames that the connection had been given before this stream.
    base: u64,
    flushed: watch::Receiver<u64>,
    /// Frames sent.
    sent: u64,
    cursor: Cursor,
    /// Given out and not settled, with their count.
    unacked: VecDeque<(u64, Delivery)>,
    /// Bytes of those.
    held: usize,
    /// Frames that are not known to be flushed, and the bytes of all of them.
    written: VecDeque<Written>,
    unflushed: usize,
    /// When something was flushed last, or nothing was left to be.
    moved: Instant,
    /// Received and not given out.
    waiting: VecDeque<Delivery>,
    commits: Option<mpsc::Receiver<Commit>>,
    /// Its client has come back elsewhere.
    ending: CancellationToken,
    frames: mpsc::Sender<Bytes>,
}

/// A frame with events.
struct Written {
    number: u64,
    /// The count of its last delivery.
    last: u64,
    bytes: usize,
}

impl Pump {
    async fn run(mut self, mut consumer: Consumer, app: &App) {
        self.send(Bytes::from(format!(
            "retry: {}\n: live\n\n",
            limits::STREAM_RETRY_MS
        )))
        .await;
        let mut heartbeat = interval_at(Instant::now() + limits::HEARTBEAT, limits::HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let room = self.waiting.is_empty()
                && self.unacked.len() < limits::STREAM_MAX_UNCOMMITTED
                && self.held < limits::STREAM_MAX_HELD;
            let writes = !self.waiting.is_empty() && self.unflushed < limits::STREAM_MAX_BYTES;
            tokio::select! {
                biased;
                () = app.closing().cancelled() => break,
                () = self.frames.closed() => break,
                () = self.ending.cancelled() => break,
                // The sender lives as long as the connection; gone means gone.
                changed = self.flushed.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    self.settle_flushed();
                }
                commit = next_commit(&mut self.commits) => self.hand_over(commit),
                permit = self.frames.clone().reserve_owned(), if writes => {
                    let Ok(permit) = permit else { break };
                    let frame = self.frame(app.hub());
                    permit.send(frame);
                }
                batch = consumer.deliveries.recv(), if room => match batch {
                    Some(batch) => self.waiting.extend(batch),
                    None => {
                        self.explain(&consumer).await;
                        break;
                    }
                },
                _ = heartbeat.tick() => {
                    if self.unflushed > 0 && self.moved.elapsed() >= limits::STREAM_STANDSTILL {
                        // Its partitions are of more use to another member.
                        tracing::warn!(stream = self.cursor.stream, "a stream was ended: its client reads nothing");
                        break;
                    }
                    // A full body has no need of a sign of life.
                    let alive = Bytes::from_static(b": alive\n\n");
                    if self.waiting.is_empty() && self.frames.try_send(alive).is_ok() {
                        self.sent += 1;
                    }
                }
            }
        }
        // What has reached the socket by now is handled; the rest is dropped
        // unsettled, which gives it back.
        self.settle_flushed();
        drop(self);
        end(consumer).await;
    }

    /// As many waiting deliveries as fit into one frame.
    fn frame(&mut self, hub: &MessagingHub) -> Bytes {
        let mut out = BytesMut::new();
        while out.len() < FRAME_BYTES
            && let Some(delivery) = self.waiting.pop_front()
        {
            self.cursor.given += 1;
            let received = delivery.received();
            hub.count_consumed(received);
            if let (Some(partition), Some(offset)) = (received.partition, received.offset)
                && self.primaries.is(&received.topic, received.via)
            {
                self.cursor.pass(&received.topic, partition, offset);
            }
            out.put_slice(b"id: ");
            out.put_slice(self.cursor.encode().as_bytes());
            out.put_slice(b"\ndata: ");
            // A message always has a JSON form, on one line.
            let _ = serde_json::to_writer((&mut out).writer(), received.message.as_ref());
            out.put_slice(b"\n\n");
            self.held += delivery.message.size();
            self.unacked.push_back((self.cursor.given, delivery));
        }
        self.sent += 1;
        if self.unflushed == 0 {
            self.moved = Instant::now();
        }
        self.unflushed += out.len();
        self.written.push_back(Written {
            number: self.sent,
            last: self.cursor.given,
            bytes: out.len(),
        });
        out.freeze()
    }

    async fn send(&mut self, frame: Bytes) {
        self.sent += 1;
        tokio::select! {
            // A closed body is noticed by the loop.
            _ = self.frames.send(frame) => {}
            // A full one may never be read.
            () = self.ending.cancelled() => {}
        }
    }

    /// Takes note of what was written to the socket, and acks it (`ack=auto`).
    fn settle_flushed(&mut self) {
        let flushed = self.flushed.borrow_and_update().saturating_sub(self.base);
        let mut upto = None;
        while let Some(frame) = self.written.front() {
            if frame.number > flushed {
                break;
            }
            upto = Some(frame.last);
            self.unflushed -= frame.bytes;
            self.moved = Instant::now();
            self.written.pop_front();
        }
        // Else its client commits.
        if let Some(upto) = upto.filter(|_| self.commits.is_none()) {
            for delivery in self.take(upto) {
                // A connection that is gone delivers it again.
                delivery.settle_now(crate::broker::Verdict::Ack);
            }
        }
    }

    fn hand_over(&mut self, commit: Commit) {
        let deliveries = self.take(commit.upto);
        // Nobody waiting means that the client hung up; it commits again.
        if let Err(unclaimed) = commit.deliveries.send(deliveries) {
            drop(unclaimed);
        }
    }

    fn take(&mut self, upto: u64) -> Vec<Delivery> {
        let count = self.unacked.partition_point(|(n, _)| *n <= upto);
        let taken: Vec<_> = self.unacked.drain(..count).map(|(_, d)| d).collect();
        self.held -= taken.iter().map(|d| d.message.size()).sum::<usize>();
        taken
    }

    /// Tells the client why the stream ends by itself.
    async fn explain(&mut self, consumer: &Consumer) {
        if let Some(why) = consumer.control.failure() {
            let problem = Problem::from(Error::new(ErrorCode::ConsumeFailed, why.to_string()));
            let json = serde_json::to_string(&problem).unwrap_or_default();
            self.send(Bytes::from(format!("event: problem\ndata: {json}\n\n")))
                .await;
        }
    }
}

async fn next_commit(commits: &mut Option<mpsc::Receiver<Commit>>) -> Commit {
    match commits {
        Some(commits) => match commits.recv().await {
            Some(commit) => commit,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// Events that leave together at most.
const FRAME_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_whose_plus_was_not_escaped_is_read() {
        for text in [
            "2026-11-28T21:00:00+00:00",
            "2026-11-28T21:00:00 00:00",
            "2026-11-28T22:00:00.000 01:00",
        ] {
            let read = time(text).unwrap();
            assert_eq!(read, "2026-11-28T21:00:00Z".parse().unwrap(), "{text}");
        }
        assert!(time("2026-11-28 x").is_err());
    }

    #[test]
    fn a_group_has_a_name_that_every_broker_takes() {
        assert!(check_group("billing").is_ok());
        assert!(check_group("").is_err());
        assert!(check_group(&"g".repeat(256)).is_err());
    }
}
