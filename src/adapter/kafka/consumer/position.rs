//! Where reading begins: committed positions, times, ends of partitions. Every
//! function blocks, with a time-out, and belongs on a thread that may.

use std::time::{Duration, Instant};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext},
    error::{KafkaError, KafkaResult},
    types::RDKafkaErrorCode as Code,
};

use super::{
    core::{bare_list, list_of},
    tracker::TopicPartition,
};
use crate::{
    adapter::kafka::error::raw_code,
    broker::{OffsetReset, SeekTo},
};

/// Partitions with an offset each.
type Offsets = Vec<(TopicPartition, i64)>;

/// Calls again while the group's coordinator, or a partition's leader, is being
/// found or moves. Blocks.
#[allow(clippy::disallowed_methods, reason = "runs on a thread that may block")]
pub(in crate::adapter::kafka) fn steady<T>(call: impl Fn() -> KafkaResult<T>) -> KafkaResult<T> {
    let until = Instant::now() + LOOKUP;
    loop {
        match call() {
            Err(error) if is_passing(&error) && Instant::now() < until => {
                std::thread::sleep(AGAIN);
            }
            result => return result,
        }
    }
}

fn is_passing(error: &KafkaError) -> bool {
    matches!(
        raw_code(error),
        Some(
            Code::NotCoordinator
                | Code::CoordinatorNotAvailable
                | Code::CoordinatorLoadInProgress
                | Code::WaitingForCoordinator
                // Of a topic that was made just now.
                | Code::NotLeaderForPartition
                | Code::LeaderNotAvailable
        )
    )
}

/// Offsets for a wish, one for each partition. What no message fits is the end.
pub(in crate::adapter::kafka) fn resolve<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    partitions: &[TopicPartition],
    to: SeekTo,
) -> KafkaResult<Offsets> {
    let wish = match to {
        SeekTo::Offset(offset) => {
            return Ok(partitions.iter().map(|tp| (tp.clone(), offset)).collect());
        }
        SeekTo::Time(at) => Offset::Offset(at.as_millis().max(0)),
        // In the place of a time, Kafka reads these as the two ends.
        SeekTo::Beginning => Offset::Beginning,
        SeekTo::End => Offset::End,
    };
    if partitions.is_empty() {
        return Ok(Vec::new());
    }
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for (topic, partition) in partitions {
        list.add_partition_offset(topic, *partition, wish)?;
    }
    let found = steady(|| {
        let found = client.offsets_for_times(list.clone(), LOOKUP)?;
        found.elements().iter().try_for_each(|e| e.error())?;
        Ok(found)
    })?;
    let mut resolved = Vec::with_capacity(partitions.len());
    let mut newer = Vec::new();
    for element in found.elements() {
        let tp: TopicPartition = (element.topic().into(), element.partition());
        match element.offset() {
            Offset::Offset(offset) => resolved.push((tp, offset)),
            // Nothing is that new: behind the newest.
            _ => newer.push(tp),
        }
    }
    for (topic, partition) in newer {
        let (_, high) = steady(|| client.fetch_watermarks(&topic, partition, LOOKUP))?;
        resolved.push(((topic, partition), high));
    }
    Ok(resolved)
}

/// The committed positions of a group, and the partitions that have none.
pub(in crate::adapter::kafka) fn committed<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    partitions: &[TopicPartition],
) -> KafkaResult<(Offsets, Vec<TopicPartition>)> {
    let found = steady(|| client.committed_offsets(bare_list(partitions), LOOKUP))?;
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for element in found.elements() {
        let tp: TopicPartition = (element.topic().into(), element.partition());
        match element.offset() {
            Offset::Offset(offset) => known.push((tp, offset)),
            _ => unknown.push(tp),
        }
    }
    Ok((known, unknown))
}

/// Gives a group a position where it has none yet.
pub(in crate::adapter::kafka) fn commit_start<C: ConsumerContext>(
    client: &BaseConsumer<C>,
    partitions: &[TopicPartition],
    reset: OffsetReset,
) {
    let to = match reset {
        OffsetReset::Earliest => SeekTo::Beginning,
        OffsetReset::Latest => SeekTo::End,
        OffsetReset::None => return,
    };
    let made = committed(client, partitions).and_then(|(_, unknown)| {
        let start = resolve(client, &unknown, to)?;
        if start.is_empty() {
            return Ok(());
        }
        steady(|| client.commit(&list_of(&start), CommitMode::Sync))
    });
    if let Err(error) = made {
        // The client's own reset policy, which is the same, takes its place.
        tracing::warn!(target: "messaging_hub::kafka", %error, "the starting position of a new group was not committed");
    }
}

/// How long one look-up may take.
const LOOKUP: Duration = Duration::from_secs(5);

/// Between two calls to a coordinator that moves.
const AGAIN: Duration = Duration::from_millis(50);
