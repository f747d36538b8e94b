//! Publishers over HTTP: NDJSON, own ids, one request for as long as it lives.
//! What got no answer is repeated under its id (C14), as a client would.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::StreamExt;
use messaging_hub::conformance::ledger::Outcome;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;

use crate::book::{Book, key, payload};

/// Some publishers with one throttle.
pub struct Load {
    /// Messages that all publishers together may have begun.
    allowed: Arc<watch::Sender<u64>>,
    rate: Arc<AtomicU32>,
    progress: Arc<Progress>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    pacer: JoinHandle<()>,
}

/// How much a load may have under way.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Lines of a publisher without an answer.
    pub window: usize,
    /// Messages that may be due and not written.
    pub debt: u64,
}

impl Shape {
    /// Enough to keep the hub busy, little enough that waiting behind one's own
    /// lines is no matter of seconds.
    pub const CELL: Self = Self {
        window: 150,
        debt: 100,
    };
}

#[derive(Default)]
struct Progress {
    begun: AtomicU64,
    answered: AtomicU64,
}

impl Load {
    /// `url` is the hub's, through the clients' proxy.
    pub fn start(book: &Arc<Book>, url: &str, shape: Shape) -> Self {
        let allowed = Arc::new(watch::Sender::new(0));
        let rate = Arc::new(AtomicU32::new(0));
        let progress = Arc::new(Progress::default());
        let (stop, stopped) = watch::channel(false);
        let tasks = (0..PUBLISHERS)
            .map(|index| {
                let publisher = Publisher {
                    index,
                    book: book.clone(),
                    url: format!("{url}/v1/topics/{}/messages", book.topic),
                    allowed: allowed.subscribe(),
                    progress: progress.clone(),
                    window: shape.window,
                    next: 0,
                    again: VecDeque::new(),
                };
                tokio::spawn(publisher.run(stopped.clone()))
            })
            .collect();
        let pacer = tokio::spawn(pace(
            allowed.clone(),
            rate.clone(),
            progress.clone(),
            shape.debt,
        ));
        Self {
            allowed,
            rate,
            progress,
            stop,
            tasks,
            pacer,
        }
    }

    /// Messages a second from now on, all publishers together.
    pub fn set_rate(&self, rate: u32) {
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// So many more, as fast as they go.
    pub fn allow(&self, more: u64) {
        self.allowed.send_modify(|allowed| *allowed += more);
    }

    /// Messages that were answered in the end.
    pub fn answered(&self) -> u64 {
        self.progress.answered.load(Ordering::Relaxed)
    }

    /// Whether everything that was allowed is answered.
    pub fn is_done(&self) -> bool {
        self.answered() == *self.allowed.borrow()
    }

    /// Call it when everything is answered.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        for task in self.tasks.drain(..) {
            task.await.expect("a publisher does not panic");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.pacer.abort();
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Never owes more than a little: where the hub is slower than the rate, the
/// publishers are as fast as it answers.
async fn pace(
    allowed: Arc<watch::Sender<u64>>,
    rate: Arc<AtomicU32>,
    progress: Arc<Progress>,
    debt: u64,
) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut owed = 0.0;
    loop {
        ticks.tick().await;
        owed += f64::from(rate.load(Ordering::Relaxed)) * TICK.as_secs_f64();
        if owed >= 1.0 {
            let most = progress.begun.load(Ordering::Relaxed) + debt;
            allowed.send_if_modified(|allowed| {
                let room = most.saturating_sub(*allowed);
                *allowed += room.min(owed as u64);
                true
            });
            owed = owed.fract();
        }
    }
}

struct Publisher {
    index: usize,
    book: Arc<Book>,
    url: String,
    allowed: watch::Receiver<u64>,
    progress: Arc<Progress>,
    window: usize,
    next: u64,
    /// Numbers, and how often they were sent, of what must be repeated.
    again: VecDeque<(u64, u32)>,
}

/// Written and not answered, by place in the book.
type Open = VecDeque<usize>;

impl Publisher {
    async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                biased;
                _ = stopped.wait_for(|stop| *stop) => return,
                () = self.connection() => {}
            }
            // The hub is away, or its link: a client tries again soon.
            tokio::time::sleep(RECONNECT).await;
        }
    }

    /// One request, until it breaks. Leaves in `again` what it owes.
    async fn connection(&mut self) {
        // A request without a message would only time out.
        if self.again.is_empty() && !self.until_allowed().await {
            return;
        }
        let (lines, body) = mpsc::channel::<Result<Bytes, io::Error>>(1);
        let client = reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .build()
            .expect("a client");
        let request = client
            .post(&self.url)
            .header("content-type", "application/x-ndjson")
            .header("hub-publisher", format!("publisher-{}", self.index))
            .body(reqwest::Body::wrap_stream(ReceiverStream::new(body)))
            .send();
        let mut open = Open::new();
        // The head of the answer comes when the hub has seen ours.
        let response = match tokio::time::timeout(ANSWER, request).await {
            Ok(Ok(response)) if response.status().is_success() => response,
            _ => return,
        };
        let mut pieces = response.bytes_stream();
        let mut text = Vec::new();
        let mut heard = Instant::now();
        loop {
            let room = open.len() < self.window;
            tokio::select! {
                piece = pieces.next() => {
                    let Some(Ok(piece)) = piece else { break };
                    heard = Instant::now();
                    text.extend_from_slice(&piece);
                    if !self.take_answers(heard, &mut text, &mut open) {
                        break;
                    }
                }
                permit = lines.reserve(), if room && !self.again.is_empty() => {
                    let Ok(permit) = permit else { break };
                    permit.send(Ok(self.write_again(&mut open)));
                }
                begin = self.may_begin(), if room && self.again.is_empty() => {
                    if !begin { break }
                    if open.is_empty() { heard = Instant::now(); }
                    let mut text = self.write_new(&mut open);
                    // What else is due goes with it.
                    for _ in 1..BATCH {
                        if open.len() >= self.window || !self.takes_one() { break }
                        text.extend(self.write_new(&mut open));
                    }
                    if lines.send(Ok(text.into())).await.is_err() { break }
                }
                () = tokio::time::sleep_until(heard + ANSWER), if !open.is_empty() => break,
            }
        }
        // In the order in which they were written, before anything new.
        for place in open.into_iter().rev() {
            let attempt = self.book.attempt(place);
            self.again.push_front((attempt.n, attempt.again + 1));
        }
    }

    async fn until_allowed(&self) -> bool {
        let begun = &self.progress.begun;
        let mut allowed = self.allowed.clone();
        allowed
            .wait_for(|allowed| *allowed > begun.load(Ordering::Relaxed))
            .await
            .is_ok()
    }

    /// Takes one of what all may begin; cancel safe, as it takes at its end.
    async fn may_begin(&self) -> bool {
        loop {
            if !self.until_allowed().await {
                return false;
            }
            if self.takes_one() {
                return true;
            }
        }
    }

    fn takes_one(&self) -> bool {
        let allowed = *self.allowed.borrow();
        let one_more = |begun: u64| (begun < allowed).then_some(begun + 1);
        let begun = &self.progress.begun;
        begun
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .is_ok()
    }

    fn write_new(&mut self, open: &mut Open) -> Vec<u8> {
        let n = self.next;
        self.next += 1;
        open.push_back(self.book.writes(self.index, n, 0));
        self.line(n)
    }

    fn write_again(&mut self, open: &mut Open) -> Bytes {
        let mut lines = Vec::new();
        while open.len() < self.window
            && lines.len() < BATCH
            && let Some((n, again)) = self.again.pop_front()
        {
            open.push_back(self.book.writes(self.index, n, again));
            lines.extend_from_slice(&self.line(n));
        }
        lines.into()
    }

    fn line(&self, n: u64) -> Vec<u8> {
        let envelope = Envelope {
            id: self.book.id(self.index, n),
            kind: "fault",
            key: key(self.index, n),
            payload: BASE64_STANDARD.encode(payload(self.index, n)),
            headers: Headers { n: n.to_string() },
        };
        let mut line = serde_json::to_vec(&envelope).expect("it is JSON");
        line.push(b'\n');
        line
    }

    /// False when the hub takes nothing more on this connection. What came in one
    /// piece came at one time: reading it here is no wait at the hub.
    fn take_answers(&mut self, came: Instant, text: &mut Vec<u8>, open: &mut Open) -> bool {
        let Some(end) = text.iter().rposition(|b| *b == b'\n') else {
            return true;
        };
        let whole: Vec<u8> = text.drain(..=end).collect();
        for line in whole.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let answer: Told = serde_json::from_slice(line).expect("a line of JSON");
            let error = answer.error.unwrap_or_default();
            if error["detail"]
                .as_str()
                .is_some_and(|d| d.contains("shutting down"))
            {
                return false;
            }
            let place = open.pop_front().expect("an answer for a line");
            let (outcome, problem) = match answer.outcome {
                Some("delivered") => (Outcome::Delivered, None),
                Some("spooled") => {
                    let weak = (!answer.durable).then(|| "not durable".to_owned());
                    (Outcome::Spooled, weak)
                }
                _ => {
                    let outcome = match error["assume"].as_str() {
                        Some("not_sent") => Outcome::NotSent,
                        Some("rejected") => Outcome::Rejected,
                        _ => Outcome::Unknown,
                    };
                    (outcome, Some(error.to_string()))
                }
            };
            self.book.answered(place, came.into_std(), outcome, problem);
            self.progress.answered.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}

/// A line. Plain data, written and read as such: what this costs is taken from the
/// hub, which runs on the same cores.
#[derive(Serialize)]
struct Envelope {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    key: String,
    payload: String,
    headers: Headers,
}

#[derive(Serialize)]
struct Headers {
    n: String,
}

/// What the hub says of a line.
#[derive(Deserialize)]
struct Told<'a> {
    outcome: Option<&'a str>,
    #[serde(default)]
    durable: bool,
    error: Option<Value>,
}

const PUBLISHERS: usize = 3;
const TICK: Duration = Duration::from_millis(5);
const RECONNECT: Duration = Duration::from_millis(50);
/// Without any answer for this long a client gives a connection up.
const ANSWER: Duration = Duration::from_secs(5);
/// Lines that go out at a time.
const BATCH: usize = 100;
