//! Where a stream without a group begins, made exact: the offset of every
//! partition that exists now. A cursor that named only the partitions which
//! had brought a message would lose what reached the others meanwhile.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::{StreamExt, stream};

use super::{
    App,
    cursor::{Cursor, Positions},
};
use crate::{
    broker::{BrokerType, StartFrom, options::Filter},
    topic::Pattern,
};

/// Which end of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Oldest,
    Newest,
}

/// The chosen end of every partition of the topics of `pattern` that can be
/// asked for now; topics that cannot be found are left out.
pub(super) async fn of(app: &App, pattern: &Pattern, end: End) -> Positions {
    let mut out = Positions::new();
    let topics = topics(app, pattern).await;
    // Several at once: a cluster that does not answer is not waited for by each.
    let asked = topics
        .into_iter()
        .map(|topic| async move { (app.hub().topic_metadata(&topic).await, topic) });
    let mut asked = stream::iter(asked).buffer_unordered(ASKED);
    while let Some((found, topic)) = asked.next().await {
        match found {
            Ok(found) => out.extend(found.partitions.iter().map(|p| {
                let at = match end {
                    End::Oldest => p.low_watermark,
                    End::Newest => p.high_watermark,
                };
                ((topic.clone(), p.id), at)
            })),
            Err(e) => tracing::debug!(%topic, error = %e, "the ends of a topic are not known"),
        }
    }
    out
}

/// How to begin where `cursor` stands. Partitions that it does not name came
/// after it and begin at their oldest message; where the stream began by a
/// time, what is older than that is filtered out.
pub(super) async fn resume(
    app: &App,
    pattern: &Pattern,
    cursor: &Cursor,
) -> (StartFrom, Option<Filter>) {
    let mut start = of(app, pattern, End::Oldest).await;
    start.extend(cursor.positions.clone());
    let filter = cursor.since.map(|since| {
        let named = Arc::new(cursor.positions.clone());
        Filter::new(move |received| {
            let partition = received.partition.unwrap_or_default();
            named.contains_key(&(received.topic.to_string(), partition))
                || received.message.timestamp >= since
        })
    });
    (StartFrom::Offsets(start), filter)
}

/// The streams of `pattern` that exist now; those of the topology while their
/// broker cannot be asked.
async fn topics(app: &App, pattern: &Pattern) -> Vec<String> {
    if let Some(topic) = pattern.literal() {
        return vec![topic.to_string()];
    }
    let all: Vec<String> = match app.hub().list_topics().await {
        Ok(found) => found.iter().map(ToString::to_string).collect(),
        Err(e) => {
            tracing::debug!(error = %e, "the streams that exist are not known");
            let known = app.topology().topics.iter();
            known.map(|t| t.name.clone()).collect()
        }
    };
    all.into_iter()
        .filter(|name| pattern.matches(name))
        .collect()
}

/// The primary broker of each topic: offsets mean something only there. What
/// the spool hands out meanwhile does not move a cursor.
#[derive(Debug)]
pub(super) struct Primaries {
    routes: Vec<(Pattern, BrokerType)>,
    known: BTreeMap<String, Option<BrokerType>>,
}

impl Primaries {
    pub(super) fn new(app: &App) -> Self {
        let routes = app
            .hub()
            .state()
            .routes
            .iter()
            .filter_map(|r| Some((Pattern::new(&r.pattern).ok()?, r.primary)))
            .collect();
        Self {
            routes,
            known: BTreeMap::new(),
        }
    }

    /// Whether `via` is the primary of `topic`.
    pub(super) fn is(&mut self, topic: &str, via: BrokerType) -> bool {
        let primary = match self.known.get(topic) {
            Some(known) => *known,
            None => {
                let found = self
                    .routes
                    .iter()
                    .find(|(pattern, _)| pattern.matches(topic))
                    .map(|(_, primary)| *primary);
                if self.known.len() < MAX_KNOWN {
                    self.known.insert(topic.to_owned(), found);
                }
                found
            }
        };
        primary.is_none_or(|p| p == via)
    }
}

/// Topics that are asked for at a time.
const ASKED: usize = 16;

/// Topics whose primary is remembered.
const MAX_KNOWN: usize = 10_000;
