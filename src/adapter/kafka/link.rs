//! Whether the brokers answer: one state that the probe, the producers and the
//! consumers report to, from any thread. It decides nothing about messages.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use rdkafka::{
    ClientContext, client::OAuthToken, config::RDKafkaLogLevel, error::KafkaError,
    types::RDKafkaErrorCode as Code,
};
use tokio::sync::watch;

use super::error::raw_code;
use crate::{broker::ConnectionState, metrics::MetricsRecorder};

/// The state of the connection, and who is told.
#[derive(Debug)]
pub(super) struct Link {
    state: watch::Sender<ConnectionState>,
    recorder: Arc<MetricsRecorder>,
    /// Since when the brokers answer, while they do.
    up_since: Mutex<Option<Instant>>,
    /// Somebody saw trouble: the probe looks at once.
    doubt: AtomicBool,
    /// The last single error, which is more precise than "all are down".
    last: Mutex<Option<String>>,
    /// The probe has been through the topology once, so that others may say
    /// that the brokers answer again.
    prepared: AtomicBool,
}

impl Link {
    pub(super) fn new(recorder: Arc<MetricsRecorder>) -> Self {
        Self {
            state: watch::channel(ConnectionState::default()).0,
            recorder,
            up_since: Mutex::default(),
            doubt: AtomicBool::new(false),
            last: Mutex::default(),
            prepared: AtomicBool::new(false),
        }
    }

    pub(super) fn watch(&self) -> watch::Receiver<ConnectionState> {
        self.state.subscribe()
    }

    pub(super) fn is_up(&self) -> bool {
        self.state.borrow().connected
    }

    /// The brokers answer and everything is prepared.
    pub(super) fn up(&self) {
        self.prepared.store(true, Ordering::Release);
        let changed = self.state.send_if_modified(|s| {
            let change = !s.connected;
            if change {
                s.generation += 1;
                s.connected = true;
                *self.lock_since() = Some(Instant::now());
                *self.lock_last() = None;
                s.reason = None;
                s.refused = false;
            }
            change
        });
        if changed {
            self.recorder.connection_successes.add(1);
            self.recorder.current_connections.add(1);
            tracing::info!(target: "messaging_hub::kafka", "Kafka is reachable");
        }
    }

    /// The brokers do not answer.
    pub(super) fn down(&self, reason: &str, refused: bool) {
        self.doubt.store(true, Ordering::Release);
        let mut lost = false;
        self.state.send_if_modified(|s| {
            lost = s.connected;
            let change = s.connected || s.refused != refused || s.reason.as_deref() != Some(reason);
            if change {
                s.connected = false;
                *self.lock_since() = None;
                s.refused = refused;
                s.reason = Some(reason.into());
            }
            change
        });
        if lost {
            self.recorder.connection_errors.add(1);
            self.recorder.current_connections.dec();
            tracing::warn!(target: "messaging_hub::kafka", reason, "Kafka is not reachable");
        }
    }

    /// A record was stored, so the brokers answer, whatever the last probe said.
    pub(super) fn delivered(&self) {
        if !self.is_up() && self.prepared.load(Ordering::Acquire) {
            self.up();
        }
    }

    /// A probe was not answered. What is known already is more precise than
    /// `reason`, so it stays.
    pub(super) fn silent(&self, reason: &str) {
        let last = self.lock_last().clone();
        let state = self.state.borrow().clone();
        if !state.connected && state.reason.is_some() {
            return;
        }
        match last {
            Some(last) => self.down(&last, state.refused),
            // Nothing went wrong that anybody knows of; a first connection may
            // just take its time.
            None if state.generation == 0 => {}
            None => self.down(reason, state.refused),
        }
    }

    /// What a client's error callback says. It comes twice for each error, so
    /// nothing is counted here.
    pub(super) fn report(&self, error: &KafkaError, reason: &str) {
        match raw_code(error) {
            Some(Code::AllBrokersDown) => {
                let refused = self.state.borrow().refused;
                // "1/1 brokers are down" says less than the last single error.
                let last = self.lock_last().clone();
                self.down(last.as_deref().unwrap_or(reason), refused);
            }
            Some(Code::Authentication | Code::SaslAuthenticationFailed) => {
                *self.lock_last() = Some(reason.to_owned());
                self.down(reason, true);
            }
            _ => {
                *self.lock_last() = Some(reason.to_owned());
                self.doubt.store(true, Ordering::Release);
            }
        }
        tracing::debug!(target: "messaging_hub::kafka", %error, reason, "client error");
    }

    /// Since when the brokers answer; none while they do not.
    pub(super) fn up_since(&self) -> Option<Instant> {
        *self.lock_since()
    }

    fn lock_since(&self) -> MutexGuard<'_, Option<Instant>> {
        // A time is whole whenever the lock is free.
        self.up_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody saw trouble.
    pub(super) fn has_doubt(&self) -> bool {
        self.doubt.load(Ordering::Acquire)
    }

    fn lock_last(&self) -> MutexGuard<'_, Option<String>> {
        // A text is whole whenever the lock is free.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody saw trouble since this was asked last.
    pub(super) fn take_doubt(&self) -> bool {
        self.doubt.swap(false, Ordering::AcqRel)
    }
}

/// The context of clients that only report to the link.
#[derive(Clone, Debug)]
pub(super) struct LinkContext(pub(super) Arc<Link>);

impl ClientContext for LinkContext {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.report(&error, reason);
    }

    fn generate_oauth_token(
        &self,
        _: Option<&str>,
    ) -> Result<OAuthToken, Box<dyn std::error::Error>> {
        Err("OAUTHBEARER is not supported; use PLAIN or SCRAM".into())
    }
}

impl rdkafka::consumer::ConsumerContext for LinkContext {}

/// librdkafka's log in ours. Its warnings are mostly about connections, which
/// the link reports once and in our words, so they are debug lines here.
pub(super) fn log(level: RDKafkaLogLevel, fac: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::error!(target: "librdkafka", fac, "{message}");
        }
        _ => tracing::debug!(target: "librdkafka", fac, "{message}"),
    }
}
