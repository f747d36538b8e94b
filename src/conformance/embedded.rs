//! The embedded broker as a backend of the suite; also the example for authors
//! of further factories.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;

use super::{Capabilities, Capability, Factory, Kind, Target};
use crate::{
    adapter::embedded::{EmbeddedBroker, EmbeddedConfig},
    broker::{MessageBroker, Source},
    error::Result,
    topic::Pattern,
    topology::{QueueSpec, TopicSpec, Topology},
};

/// The embedded broker in memory, or on its journal. A client is the broker
/// itself; what was in memory a closed one has lost, so nothing that outlives a
/// client is declared there.
#[derive(Debug, Default)]
pub struct EmbeddedFactory {
    current: Mutex<Option<Arc<EmbeddedBroker>>>,
    #[cfg(feature = "journal")]
    journal: Option<Folder>,
}

/// A folder, with one for each check in it: else each check that closes its
/// client would bring back what all before it have left.
#[cfg(feature = "journal")]
#[derive(Debug)]
struct Folder {
    dir: std::path::PathBuf,
    check: std::sync::atomic::AtomicU32,
}

impl EmbeddedFactory {
    /// In memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The name of the backend on its journal.
    #[cfg(feature = "journal")]
    pub const ON_DISK: &str = "embedded journal";

    /// On a journal in a folder.
    #[cfg(feature = "journal")]
    pub fn on_disk(dir: impl Into<std::path::PathBuf>) -> Self {
        Self {
            current: Mutex::default(),
            journal: Some(Folder {
                dir: dir.into(),
                check: std::sync::atomic::AtomicU32::new(0),
            }),
        }
    }

    /// The broker, a new one where the last was closed.
    #[must_use]
    pub fn broker(&self) -> Arc<EmbeddedBroker> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // One that is about to connect has no reason not to be connected.
        if let Some(broker) = &*current
            && (broker.is_connected() || broker.connection().borrow().reason.is_none())
        {
            return broker.clone();
        }
        #[cfg(feature = "journal")]
        let broker = match &self.journal {
            Some(Folder { dir, check }) => {
                let check = check.load(std::sync::atomic::Ordering::Relaxed);
                on_disk(&dir.join(check.to_string()))
            }
            None => EmbeddedBroker::new(config(), Arc::new(topology())),
        };
        #[cfg(not(feature = "journal"))]
        let broker = EmbeddedBroker::new(config(), Arc::new(topology()));
        *current = Some(broker.clone());
        broker
    }
}

#[async_trait]
impl Factory for EmbeddedFactory {
    fn name(&self) -> String {
        #[cfg(feature = "journal")]
        if self.journal.is_some() {
            return Self::ON_DISK.to_owned();
        }
        "embedded memory".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        use Capability as C;
        let all = [
            C::Queues,
            C::Streams,
            C::Priority,
            C::Ttl,
            C::Delay,
            C::DeadLetters,
            C::Retry,
            C::Offsets,
            C::Seek,
            C::Groups,
            C::GrouplessReaders,
            C::HistoryReplay,
            C::RedeliveredInQueues,
            C::RedeliveredInStreams,
            C::UnroutableRefused,
            C::PerKeyOrder,
            C::OrderedSingleConsumer,
            C::QueueStats,
            C::Dequeue,
            C::Purge,
            C::QueueTtl,
            C::DeclareConflict,
            C::HandlerOptions,
            C::Unconfirmed,
            C::TopicMetadata,
            C::BoundedPrefetch,
        ];
        #[cfg(feature = "journal")]
        if self.journal.is_some() {
            return all.into_iter().chain([C::OutlivesClient]).collect();
        }
        Capabilities::from(all)
    }

    fn one_client(&self) -> bool {
        true
    }

    #[cfg(feature = "journal")]
    fn begin(&self) {
        if let Some(folder) = &self.journal {
            folder
                .check
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    async fn connect(&self) -> Result<Arc<dyn Target>> {
        let broker = self.broker();
        broker.connect().await?;
        let broker: Arc<dyn MessageBroker> = broker;
        Ok(Arc::new(broker))
    }

    fn retry_delay(&self, _kind: Kind) -> Duration {
        RETRY_DELAY
    }

    fn dead_letters(&self, kind: Kind) -> Option<Source> {
        let topology = Topology::default();
        let name = match kind {
            Kind::Queue => topology.dead_letter_queue(),
            Kind::Stream => topology.dead_letter_topic(),
        };
        Some(kind.source_of(Pattern::new(name).ok()?))
    }
}

/// The broker on a journal in a folder, not connected.
#[cfg(feature = "journal")]
pub(super) fn on_disk(dir: &std::path::Path) -> Arc<EmbeddedBroker> {
    let config = EmbeddedConfig {
        journal: Some(crate::adapter::embedded::JournalConfig {
            segment_bytes: SEGMENT_BYTES,
            ..crate::adapter::embedded::JournalConfig::at(dir)
        }),
        ..config()
    };
    EmbeddedBroker::new(config, Arc::new(topology()))
}

fn config() -> EmbeddedConfig {
    EmbeddedConfig {
        // A name that nobody declared must be refused.
        auto_declare: false,
        ..EmbeddedConfig::default()
    }
}

/// The places for dead letters.
#[must_use]
pub fn topology() -> Topology {
    let names = Topology::default();
    Topology {
        queues: vec![QueueSpec {
            name: names.dead_letter_queue().to_owned(),
            options: crate::broker::QueueOptions::default(),
            bindings: Vec::new(),
            aliases: Vec::new(),
        }],
        topics: vec![TopicSpec {
            name: names.dead_letter_topic().to_owned(),
            options: crate::broker::TopicOptions::default(),
        }],
        ..Topology::default()
    }
}

const RETRY_DELAY: Duration = Duration::from_millis(50);

/// Small, so that segments come and go under the checks.
#[cfg(feature = "journal")]
const SEGMENT_BYTES: u64 = 1024 * 1024;
