//! The probe: one thread that asks the cluster for its metadata, quickly while
//! it is down and now and then while it is up, and looks at once when any
//! client reports trouble. Blocking calls of the client library stay on this
//! thread or on blocking threads; no runtime worker ever waits for them.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rdkafka::{
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, Consumer as _},
};
use tokio::sync::mpsc;

use super::{
    client,
    config::KafkaConfig,
    error::failed,
    link::{Link, LinkContext},
    topics::Topics,
};
use crate::{
    error::{ErrorCode, Result},
    metrics::MetricsRecorder,
};

/// A client that only asks. Shared by the probe and by look-ups.
pub(super) type Asker = BaseConsumer<LinkContext>;

/// The running probe.
#[derive(Debug)]
pub(super) struct Probe {
    stop: Arc<AtomicBool>,
    alive: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Probe {
    /// Starts the thread. `found` is told whenever the cluster answers while
    /// the link is down; whoever listens prepares and then says that it is up.
    ///
    /// # Errors
    /// `INVALID_CONFIG` when the system gives no thread.
    pub(super) fn start(
        asker: Arc<Asker>,
        link: Arc<Link>,
        topics: Arc<Topics>,
        recorder: Arc<MetricsRecorder>,
        found: mpsc::Sender<()>,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let alive = Arc::new(AtomicBool::new(false));
        let loop_ = Loop {
            asker,
            link,
            topics,
            recorder,
            found,
            stop: Arc::clone(&stop),
            alive: Arc::clone(&alive),
        };
        let thread = std::thread::Builder::new()
            .name("kafka-probe".to_owned())
            .spawn(move || loop_.run())
            .map_err(|e| {
                super::error::invalid("the system gives no thread for the probe").caused_by(e)
            })?;
        Ok(Self {
            stop,
            alive,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Whether the last probe was answered.
    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// Stops the thread and waits for it.
    pub(super) async fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // Joining blocks for as long as the probe's call may take.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Ends the thread, unobserved.
        self.stop.store(true, Ordering::Release);
    }
}

/// Makes the asking client.
///
/// # Errors
/// `INVALID_CONFIG` with what the client library says.
pub(super) fn asker(config: &KafkaConfig, link: &Arc<Link>) -> Result<Arc<Asker>> {
    let settings = client::asking(config)?;
    Asker::from_config_and_context(&settings, LinkContext(Arc::clone(link)))
        .map(Arc::new)
        .map_err(|e| failed(ErrorCode::InvalidConfig, "the client's settings", e))
}

struct Loop {
    asker: Arc<Asker>,
    link: Arc<Link>,
    topics: Arc<Topics>,
    recorder: Arc<MetricsRecorder>,
    found: mpsc::Sender<()>,
    stop: Arc<AtomicBool>,
    alive: Arc<AtomicBool>,
}

impl Loop {
    fn run(self) {
        let mut failures = 0u64;
        while !self.stop.load(Ordering::Acquire) {
            // Cleared before asking: trouble during the question counts.
            self.link.take_doubt();
            let up = self.link.is_up();
            if !up {
                self.recorder.connection_attempts.inc();
                if failures > 0 {
                    self.recorder.reconnection_attempts.inc();
                }
            }
            match self.asker.fetch_metadata(None, PROBE_TIMEOUT) {
                Ok(metadata) => {
                    failures = 0;
                    self.topics.learn(&metadata, true);
                    self.alive.store(true, Ordering::Release);
                    if !self.link.is_up() {
                        // Full means that the listener has yet to take up the
                        // last one, which serves as well.
                        let _ = self.found.try_send(());
                        self.rest(PREPARING);
                    } else {
                        self.rest(UP);
                    }
                }
                Err(error) => {
                    failures += 1;
                    if up && failures == 1 {
                        // One slow answer of a busy cluster is no outage; what
                        // is certain the clients have reported themselves.
                        self.serve(SLICE);
                        continue;
                    }
                    self.alive.store(false, Ordering::Release);
                    if !up {
                        self.recorder.connection_failures.inc();
                    }
                    self.link.silent(&error.to_string());
                    self.serve(DOWN);
                }
            }
        }
    }

    /// Waits for the next probe, or for trouble.
    fn rest(&self, long: Duration) {
        let until = Instant::now() + long;
        let least = Instant::now() + LEAST;
        while Instant::now() < until && !self.stop.load(Ordering::Acquire) {
            self.serve(SLICE);
            if Instant::now() >= least && (self.link.has_doubt() || !self.link.is_up()) {
                return;
            }
        }
    }

    /// Lets the client library call back, for this long.
    fn serve(&self, long: Duration) {
        let until = Instant::now() + long;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // Each event ends a poll early; what is left of the time is
            // waited out, so that a stream of errors cannot make a busy loop.
            let _ = self.asker.poll(left);
            if left.is_zero() {
                return;
            }
        }
    }
}

/// How long a probe may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Between probes while all is well.
const UP: Duration = Duration::from_secs(3);

/// Between probes while the topology is being prepared.
const PREPARING: Duration = Duration::from_millis(200);

/// Between probes while the brokers are away; the client library itself waits
/// for them inside the probe.
const DOWN: Duration = Duration::from_millis(50);

/// Two probes are at least this far apart, whatever trouble is reported.
const LEAST: Duration = Duration::from_millis(100);

/// How soon trouble is noticed between probes.
const SLICE: Duration = Duration::from_millis(50);
