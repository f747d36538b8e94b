//! Readers through the hub: work queues by leases, streams as Server-Sent
//! Events with the client's own commits. Both come back after whatever breaks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use crate::book::{Arrival, Book, Reader, hash};
use crate::cell::Mode;

/// One reader through the hub.
pub struct Through {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    mode: Mode,
}

impl Through {
    pub fn start(book: &Arc<Book>, url: &str, life: Arc<AtomicU32>, mode: Mode) -> Self {
        let shared = Arc::new(Shared {
            book: book.clone(),
            url: url.to_owned(),
            life,
            empty: AtomicU64::new(0),
        });
        let (stop, stopped) = watch::channel(false);
        let tasks = Mutex::new(begin(&shared, &stopped, mode));
        Self {
            shared,
            stop,
            tasks,
            mode,
        }
    }

    /// How often nothing came.
    pub fn empty(&self) -> u64 {
        self.shared.empty.load(Ordering::Relaxed)
    }

    /// Ends it in the middle of whatever it does; its connections break.
    pub async fn kill(&self) {
        for task in self.tasks.lock().await.iter() {
            task.abort();
        }
    }

    /// Lets it finish what it has in hand.
    pub async fn end(&self) {
        self.stop.send_replace(true);
        for task in self.tasks.lock().await.drain(..) {
            let _aborted = task.await;
        }
        self.stop.send_replace(false);
    }

    pub async fn start_again(&self) {
        *self.tasks.lock().await = begin(&self.shared, &self.stop.subscribe(), self.mode);
    }
}

impl Drop for Through {
    fn drop(&mut self) {
        for task in self.tasks.get_mut() {
            task.abort();
        }
    }
}

struct Shared {
    book: Arc<Book>,
    url: String,
    life: Arc<AtomicU32>,
    /// Lease requests that brought nothing, for whoever waits for the end.
    empty: AtomicU64,
}

/// Leases are taken by some workers at once, but under `local` by one, so that
/// the order in which the spool hands out can be seen; a stream is read by one.
fn begin(shared: &Arc<Shared>, stopped: &watch::Receiver<bool>, mode: Mode) -> Vec<JoinHandle<()>> {
    let workers = if mode == Mode::Hold { WORKERS } else { 1 };
    let events = mode == Mode::Events;
    (0..workers)
        .map(|_| tokio::spawn(work(shared.clone(), stopped.clone(), events)))
        .collect()
}

async fn work(shared: Arc<Shared>, stopped: watch::Receiver<bool>, events: bool) {
    let client = reqwest::Client::builder()
        .pool_max_idle_per_host(1)
        .build()
        .unwrap();
    while !*stopped.borrow() {
        let went_on = if events {
            shared.stream(&client, stopped.clone()).await
        } else {
            shared.lease(&client).await
        };
        if went_on.is_none() {
            tokio::time::sleep(RETRY).await;
        }
    }
}

impl Shared {
    /// Leases some, notes them, acks them. None: something failed.
    async fn lease(&self, client: &reqwest::Client) -> Option<()> {
        let life = self.life.load(Ordering::SeqCst);
        let ask = json!({"max": LEASE_OF, "wait_ms": 300, "lease_ms": LEASE.as_millis() as u64});
        let path = format!("/v1/queues/{}/lease", self.book.topic);
        let (status, answer) = self.post(client, &path, &ask).await?;
        if status != 200 {
            return None;
        }
        let deliveries = answer["deliveries"].as_array()?;
        if deliveries.is_empty() {
            self.empty.fetch_add(1, Ordering::Relaxed);
            return Some(());
        }
        let mut places = Vec::new();
        let mut tokens = Vec::new();
        for delivery in deliveries {
            places.push(self.note(&delivery["message"], life));
            tokens.push(delivery["token"].as_str().expect("a token").to_owned());
        }
        let (status, answer) = self
            .post(client, "/v1/deliveries/ack", &json!({"tokens": tokens}))
            .await?;
        let failed = answer["detail"].as_str().unwrap_or_default();
        let acked = places.into_iter().zip(&tokens);
        let acked =
            acked.filter(|(_, token)| status == 204 || status == 410 && !failed.contains(*token));
        self.book
            .settled(Reader::Through, acked.map(|(place, _)| place));
        Some(())
    }

    /// Reads a stream and commits what it has noted. None: it broke.
    async fn stream(
        &self,
        client: &reqwest::Client,
        mut stopped: watch::Receiver<bool>,
    ) -> Option<()> {
        let life = self.life.load(Ordering::SeqCst);
        let query = [
            ("pattern", self.book.topic.as_str()),
            ("group", "through"),
            ("ack", "cursor"),
        ];
        let request = client
            .get(format!("{}/v1/stream", self.url))
            .query(&query)
            .send();
        let response = tokio::time::timeout(OPEN, request).await.ok()?.ok()?;
        if response.status() != 200 {
            return None;
        }
        let mut pieces = response.bytes_stream();
        let mut text = String::new();
        let mut waiting: VecDeque<(String, usize)> = VecDeque::new();
        let mut committing = futures_util::future::pending().boxed();
        let mut busy = false;
        loop {
            if !busy && let Some((cursor, _)) = waiting.back() {
                let places: Vec<usize> = waiting.iter().map(|(_, place)| *place).collect();
                let ask = json!({"group": "through", "cursor": cursor});
                waiting.clear();
                busy = true;
                committing = async move {
                    let done = self.post(client, "/v1/stream/commit", &ask).await;
                    (done.is_some_and(|(status, _)| status == 204), places)
                }
                .boxed();
            }
            tokio::select! {
                (done, places) = &mut committing => {
                    busy = false;
                    committing = futures_util::future::pending().boxed();
                    if !done {
                        // Begin again at what is committed.
                        return None;
                    }
                    self.book.settled(Reader::Through, places);
                }
                piece = pieces.next() => {
                    let piece = piece?.ok()?;
                    text.push_str(std::str::from_utf8(&piece).ok()?);
                    while let Some((event, rest)) = text.split_once("\n\n") {
                        let field = |name: &str| event.lines().find_map(|l| l.strip_prefix(name));
                        if let Some((id, data)) = field("id: ").zip(field("data: ")) {
                            let message: Value = serde_json::from_str(data).expect("JSON");
                            waiting.push_back((id.to_owned(), self.note(&message, life)));
                        }
                        text = rest.to_owned();
                    }
                }
                // A reader that hears not even a comment tries another connection.
                () = tokio::time::sleep(SILENCE) => return None,
                _ = stopped.wait_for(|stop| *stop), if !busy && waiting.is_empty() => return Some(()),
            }
        }
    }

    fn note(&self, message: &Value, life: u32) -> usize {
        let text = |name: &str| message[name].as_str().map(str::to_owned);
        let payload = BASE64_STANDARD
            .decode(message["payload"].as_str().unwrap_or_default())
            .expect("base64");
        self.book.arrives(
            Reader::Through,
            Arrival {
                id: text("id").expect("an id"),
                key: text("key"),
                payload_hash: hash(&payload),
                marked: message["redelivered"] == json!(true),
                again: false,
                settled: false,
                life,
            },
        )
    }

    async fn post(
        &self,
        client: &reqwest::Client,
        path: &str,
        body: &Value,
    ) -> Option<(u16, Value)> {
        let request = client
            .post(format!("{}{path}", self.url))
            .timeout(OPEN)
            .body(body.to_string())
            .send();
        let response = request.await.ok()?;
        let status = response.status().as_u16();
        let text = response.text().await.ok()?;
        Some((status, serde_json::from_str(&text).unwrap_or_default()))
    }
}

const WORKERS: u64 = 3;
/// Deliveries of one lease at most.
const LEASE_OF: u64 = 300;
/// What may be unsettled at once.
pub const LEASED: u64 = WORKERS * LEASE_OF;
/// A reader that died gives its leases back after this.
const LEASE: Duration = Duration::from_secs(8);
const OPEN: Duration = Duration::from_secs(6);
/// Longer than the hub's comments are apart.
const SILENCE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(50);
