//! What is known of the topics: how many partitions each has, and the largest
//! batch that it takes. Answers from memory; the probe and the look-ups fill it.

use std::{
    collections::HashMap,
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use rdkafka::{error::IsError, metadata::Metadata};

/// What is known of one topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TopicFacts {
    /// Partitions.
    pub(super) partitions: i32,
    /// `max.message.bytes`, once it was asked for.
    pub(super) max_bytes: Option<usize>,
}

/// The topics of the cluster as they were seen last.
#[derive(Debug, Default)]
pub(super) struct Topics(RwLock<HashMap<String, TopicFacts>>);

impl Topics {
    /// What is known of a topic.
    pub(super) fn get(&self, topic: &str) -> Option<TopicFacts> {
        self.read().get(topic).copied()
    }

    /// Takes over what a look at the cluster said. A look at everything also
    /// forgets what is gone.
    pub(super) fn learn(&self, metadata: &Metadata, everything: bool) {
        let mut known = self.write();
        let mut seen = HashMap::with_capacity(metadata.topics().len());
        for topic in metadata.topics() {
            let broken = topic.error().is_some_and(|e| e.is_error());
            let count = i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX);
            if broken || count == 0 {
                known.remove(topic.name());
                continue;
            }
            let max_bytes = known.get(topic.name()).and_then(|f| f.max_bytes);
            let facts = TopicFacts {
                partitions: count,
                max_bytes,
            };
            seen.insert(topic.name().to_owned(), facts);
        }
        if everything {
            *known = seen;
        } else {
            known.extend(seen);
        }
    }

    /// Notes the largest batch of a topic.
    pub(super) fn set_max_bytes(&self, topic: &str, bytes: usize) {
        if let Some(facts) = self.write().get_mut(topic) {
            facts.max_bytes = Some(bytes);
        }
    }

    /// Forgets a topic, so that it is looked up again.
    pub(super) fn forget(&self, topic: &str) {
        self.write().remove(topic);
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<String, TopicFacts>> {
        // Nothing under this lock can stop half-way, so a poisoned map is whole.
        self.0.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<String, TopicFacts>> {
        self.0.write().unwrap_or_else(|e| e.into_inner())
    }
}
