//! What a replay reads: for each topic, partitions with a first offset and an end.
//! Fixed before anything is read, so that what is published meanwhile, by others
//! or by the replay itself, is not read.

use std::{collections::BTreeMap, sync::Arc};

use super::request::Wanted;
use crate::{
    broker::{BrokerType, EventStreamBroker, MessageBroker, SeekTo},
    error::{Error, ErrorCode, Result},
    topic::Topic,
};

/// A topic to be read, and where it is.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) broker: Arc<dyn MessageBroker>,
    pub(crate) topic: Topic,
}

/// A topic's stretch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) topic: Topic,
    /// First offset, and the first that is not read. None is empty.
    pub(super) partitions: BTreeMap<i32, (i64, i64)>,
    /// Messages of the time range, by offsets.
    pub(super) expected: u64,
}

impl Stretch {
    /// From what brokers say. `behind` is the first offset of `to_time`; messages
    /// of the range may lie behind it all the same, because what waits in a spool
    /// is written later than it was made. So reading goes on to the end.
    pub(super) fn new(
        topic: Topic,
        first: &BTreeMap<i32, i64>,
        behind: &BTreeMap<i32, i64>,
        end: &BTreeMap<i32, i64>,
    ) -> Self {
        let mut partitions = BTreeMap::new();
        let mut expected = 0;
        for (partition, end) in end {
            let Some(first) = first.get(partition).filter(|f| *f < end) else {
                continue;
            };
            let behind = behind.get(partition).unwrap_or(end).clamp(first, end);
            expected += behind.abs_diff(*first);
            partitions.insert(*partition, (*first, *end));
        }
        Self {
            topic,
            partitions,
            expected,
        }
    }

    /// Offsets to pass.
    pub(super) fn offsets(&self) -> u64 {
        let spans = self.partitions.values();
        spans.map(|(first, end)| end.abs_diff(*first)).sum()
    }
}

/// Asks the brokers what there is. Topics that a pattern found and that are gone
/// by now are left out.
///
/// # Errors
/// The first that a broker gives.
pub(super) async fn stretches(wanted: &Wanted, sources: &[Source]) -> Result<Vec<Stretch>> {
    let mut stretches = Vec::with_capacity(sources.len());
    for source in sources {
        match stretch(wanted, source).await {
            Ok(stretch) => stretches.push(stretch),
            Err(e) if e.code() == ErrorCode::TopicNotFound && wanted.topics.literal().is_none() => {
            }
            Err(e) => return Err(e.on(source.topic.as_str())),
        }
    }
    Ok(stretches)
}

async fn stretch(wanted: &Wanted, source: &Source) -> Result<Stretch> {
    let broker = streams(source)?;
    let topic = &source.topic;
    // The end first: whatever the others find is before it, or is not read.
    let end = broker.locate(topic, SeekTo::End).await?;
    let first = match wanted.from {
        Some(at) => broker.locate(topic, SeekTo::Time(at)).await?,
        None => broker.locate(topic, SeekTo::Beginning).await?,
    };
    let behind = match wanted.to {
        Some(at) => broker.locate(topic, SeekTo::Time(at)).await?,
        None => end.clone(),
    };
    Ok(Stretch::new(topic.clone(), &first, &behind, &end))
}

/// The streams of a source's broker.
///
/// # Errors
/// `INVALID_CONFIG` where it keeps none.
pub(super) fn streams(source: &Source) -> Result<&dyn EventStreamBroker> {
    source
        .broker
        .event_stream()
        .ok_or_else(|| no_log(source.broker.broker_type(), &source.topic))
}

fn no_log(broker: BrokerType, topic: &Topic) -> Error {
    Error::rejected(
        ErrorCode::InvalidConfig,
        format!("{broker} keeps no log of {topic}; only streams of Kafka or of the embedded broker can be replayed"),
    )
    .at(broker)
    .on(topic.as_str())
}

/// Topics of one replay at most; each is asked for its offsets before it starts.
pub(crate) const MAX_TOPICS: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(list: &[(i32, i64)]) -> BTreeMap<i32, i64> {
        list.iter().copied().collect()
    }

    #[test]
    fn a_stretch_leaves_out_what_has_nothing_and_counts_the_rest() {
        let stretch = Stretch::new(
            Topic::new("t").unwrap(),
            &offsets(&[(0, 10), (1, 5), (2, 0)]),
            &offsets(&[(0, 15), (1, 5), (2, 900)]),
            &offsets(&[(0, 20), (1, 5), (2, 7), (3, 9)]),
        );
        assert_eq!(
            stretch.partitions,
            [(0, (10, 20)), (2, (0, 7))].into_iter().collect()
        );
        assert_eq!((stretch.expected, stretch.offsets()), (5 + 7, 10 + 7));
    }
}
