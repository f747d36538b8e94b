//! The stream side of the broker's interface.

use std::collections::BTreeMap;

use async_trait::async_trait;

use super::EmbeddedBroker;
use crate::{
    broker::{EventStreamBroker, SeekTo, TopicMetadata, TopicOptions},
    error::{Error, ErrorCode, Result},
    topic::{Pattern, Topic},
};

#[async_trait]
impl EventStreamBroker for EmbeddedBroker {
    async fn create_topic(&self, topic: &Topic, options: &TopicOptions) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, _| state.create_stream(topic, options).map(drop))
            .await
    }

    async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, _| {
                let id = state.known_stream(topic)?;
                state.delete_stream(id);
                Ok(())
            })
            .await
    }

    async fn list_topics(&self) -> Result<Vec<Topic>> {
        self.shared.usable()?;
        Ok(self
            .shared
            .step(|state, _| state.stream_names.keys().cloned().collect()))
    }

    async fn topic_metadata(&self, topic: &Topic) -> Result<TopicMetadata> {
        self.shared.usable()?;
        self.shared.step(|state, now| {
            state.retain_streams(now);
            let id = state.known_stream(topic)?;
            state.stream_metadata(now, id).ok_or_else(|| {
                Error::new(ErrorCode::TopicNotFound, "the stream was deleted just now")
                    .on(topic.as_str())
            })
        })
    }

    async fn locate(&self, topic: &Topic, at: SeekTo) -> Result<BTreeMap<i32, i64>> {
        self.shared.usable()?;
        self.shared.step(|state, now| {
            state.retain_streams(now);
            let id = state.known_stream(topic)?;
            let count = state.streams.get(&id).map_or(0, |s| s.core.count());
            (0..count)
                .map(|p| Ok((p, state.locate(id, p, at)?)))
                .collect()
        })
    }

    async fn create_consumer_group(
        &self,
        group: &str,
        pattern: &Pattern,
        reset: SeekTo,
    ) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, _| state.create_group(group, pattern, reset))
            .await
    }

    async fn delete_consumer_group(&self, group: &str) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, _| state.delete_group(group))
            .await
    }

    async fn commit_offset(
        &self,
        group: &str,
        topic: &Topic,
        partition: i32,
        next: i64,
    ) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, _| {
                let id = state.known_stream(topic)?;
                state.commit(group, (id, partition), next)
            })
            .await
    }

    async fn offset(&self, group: &str, topic: &Topic, partition: i32) -> Result<Option<i64>> {
        self.shared.usable()?;
        self.shared.step(|state, _| {
            let id = state.known_stream(topic)?;
            Ok(state.committed(group, (id, partition)))
        })
    }

    async fn seek(
        &self,
        group: &str,
        topic: &Topic,
        partition: Option<i32>,
        to: SeekTo,
    ) -> Result<()> {
        self.shared.usable()?;
        self.shared
            .durably(|state, _| {
                let id = state.known_stream(topic)?;
                state.seek(group, id, partition, to)
            })
            .await
    }
}
