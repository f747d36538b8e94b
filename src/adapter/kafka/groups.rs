//! Groups and their positions. Members in this process move at once; for
//! others the position is committed from outside, which Kafka takes only while
//! the group has no live members.

use std::{collections::BTreeMap, sync::Arc};

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    config::FromClientConfigAndContext,
    consumer::{CommitMode, Consumer as _},
    types::RDKafkaErrorCode as Code,
};

use super::{
    broker::Backend,
    client,
    connection::Asker,
    consumer::{Command, TopicPartition, resolve, steady},
    error::{failed, raw_code},
    link::LinkContext,
};
use crate::{
    broker::{BrokerType, SeekTo},
    error::{Error, ErrorCode, Result},
    topic::{Pattern, Topic},
};

type Offsets = Vec<(TopicPartition, i64)>;

/// Gives a group a position in every partition that a pattern covers now.
pub(super) async fn create(
    backend: &Arc<Backend>,
    group: &str,
    pattern: &Pattern,
    reset: SeekTo,
) -> Result<()> {
    let mut partitions = Vec::new();
    for topic in backend.admin.list().await? {
        if pattern.matches(&topic)
            && let Some(facts) = backend.admin.facts(&topic).await?
        {
            partitions.extend((0..facts.partitions).map(|p| (topic.as_str().into(), p)));
        }
    }
    if partitions.is_empty() {
        return Err(Error::new(
            ErrorCode::TopicNotFound,
            format!("no topic matches {pattern}, so the group would have no position"),
        )
        .at(BrokerType::Kafka));
    }
    let offsets = positions(backend, partitions, reset).await?;
    commit_outside(backend, group, offsets).await
}

/// Moves a group.
pub(super) async fn seek(
    backend: &Arc<Backend>,
    group: &str,
    topic: &Topic,
    partition: Option<i32>,
    to: SeekTo,
) -> Result<()> {
    let facts = backend.known(topic).await?;
    let range = match partition {
        Some(p) if (0..facts.partitions).contains(&p) => p..p + 1,
        Some(p) => {
            return Err(super::error::invalid(format!(
                "partition {p} does not exist, the topic has {}",
                facts.partitions
            ))
            .on(topic.as_str()));
        }
        None => 0..facts.partitions,
    };
    let partitions = range.map(|p| (topic.as_str().into(), p)).collect();
    let offsets = positions(backend, partitions, to).await?;
    inside_then_outside(backend, group, offsets, Command::Seek).await
}

/// Where a seek of every partition of a topic would go. Asked now, so that a
/// topic that is gone is not found.
pub(super) async fn locate(
    backend: &Arc<Backend>,
    topic: &Topic,
    at: SeekTo,
) -> Result<BTreeMap<i32, i64>> {
    let facts = backend.admin.look_up(topic).await?.ok_or_else(|| {
        Error::new(ErrorCode::TopicNotFound, "there is no such topic")
            .at(BrokerType::Kafka)
            .on(topic.as_str())
    })?;
    let partitions = (0..facts.partitions).map(|p| (topic.as_str().into(), p));
    let found = positions(backend, partitions.collect(), at).await?;
    Ok(found
        .into_iter()
        .map(|((_, p), offset)| (p, offset))
        .collect())
}

/// Commits a position.
pub(super) async fn commit(
    backend: &Arc<Backend>,
    group: &str,
    topic: &Topic,
    partition: i32,
    next: i64,
) -> Result<()> {
    if next < 0 {
        return Err(super::error::invalid("an offset must not be negative").on(topic.as_str()));
    }
    let offsets = vec![((topic.as_str().into(), partition), next)];
    inside_then_outside(backend, group, offsets, Command::Commit).await
}

/// A committed position.
pub(super) async fn committed(
    backend: &Arc<Backend>,
    group: &str,
    topic: &Topic,
    partition: i32,
) -> Result<Option<i64>> {
    let topic = topic.clone();
    with_group(backend, group, move |client| {
        let list = || {
            let mut list = TopicPartitionList::new();
            list.add_partition(&topic, partition);
            list
        };
        let fail = |e| {
            failed(ErrorCode::ConsumeFailed, "reading a committed offset", e).on(topic.as_str())
        };
        let found = steady(|| client.committed_offsets(list(), CALL)).map_err(fail)?;
        let element = found.find_partition(&topic, partition).map(|e| e.offset());
        Ok(match element {
            Some(Offset::Offset(offset)) => Some(offset),
            _ => None,
        })
    })
    .await
}

async fn positions(
    backend: &Arc<Backend>,
    partitions: Vec<TopicPartition>,
    to: SeekTo,
) -> Result<Offsets> {
    backend
        .admin
        .ask(move |asker| {
            resolve(asker, &partitions, to)
                .map_err(|e| failed(ErrorCode::ConsumeFailed, "looking up positions", e))
        })
        .await
}

async fn inside_then_outside(
    backend: &Arc<Backend>,
    group: &str,
    offsets: Offsets,
    command: fn(Offsets) -> Command,
) -> Result<()> {
    let carried_out = backend
        .consumers
        .command(group, || command(offsets.clone()))
        .await?;
    let rest: Offsets = offsets
        .into_iter()
        .filter(|(tp, _)| !carried_out.contains(tp))
        .collect();
    if rest.is_empty() {
        return Ok(());
    }
    commit_outside(backend, group, rest).await
}

async fn commit_outside(backend: &Arc<Backend>, group: &str, offsets: Offsets) -> Result<()> {
    let name = group.to_owned();
    with_group(backend, group, move |client| {
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for ((topic, partition), offset) in &offsets {
            list.add_partition_offset(topic, *partition, Offset::Offset(*offset))
                .map_err(|e| failed(ErrorCode::InvalidConfig, "an offset to commit", e).on(&**topic))?;
        }
        steady(|| client.commit(&list, CommitMode::Sync)).map_err(|e| match raw_code(&e) {
            Some(Code::UnknownMemberId | Code::IllegalGeneration | Code::RebalanceInProgress) => failed(
                ErrorCode::ConsumeFailed,
                &format!("group {name:?} has live members outside of this process; stop them, or move it there"),
                e,
            ),
            _ => failed(ErrorCode::ConsumeFailed, "committing offsets", e),
        })
    })
    .await
}

/// Runs a blocking call with a throw-away client of a group that joins nothing.
async fn with_group<T: Send + 'static>(
    backend: &Arc<Backend>,
    group: &str,
    call: impl FnOnce(&Asker) -> Result<T> + Send + 'static,
) -> Result<T> {
    let mut settings: ClientConfig = client::asking(&backend.config)?;
    settings
        .set("group.id", group)
        .set("enable.auto.commit", "false");
    let context = LinkContext(Arc::clone(&backend.link));
    tokio::task::spawn_blocking(move || {
        let client = Asker::from_config_and_context(&settings, context)
            .map_err(|e| failed(ErrorCode::InvalidConfig, "the client's settings", e))?;
        call(&client)
    })
    .await
    .map_err(|e| Error::new(ErrorCode::UnknownError, "a group call panicked").caused_by(e))?
}

/// How long one call may take.
const CALL: std::time::Duration = std::time::Duration::from_secs(5);
