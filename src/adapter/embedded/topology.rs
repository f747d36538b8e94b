//! The wanted topology against what exists.

use super::{arguments::differences, state::State};
use crate::{
    broker::{BrokerType, Source},
    error::Result,
    message::Timestamp,
    topology::{Drift, TopologyReport},
};

impl State {
    /// Compares what exists with the topology, and makes what is missing when
    /// `apply` says so. Nothing is redeclared.
    ///
    /// # Errors
    /// An object whose options are wrong.
    pub(super) fn check_topology(&mut self, now: Timestamp, apply: bool) -> Result<TopologyReport> {
        let topology = self.topology.clone();
        let mut report = TopologyReport::default();
        for exchange in &topology.exchanges {
            // Exchanges are the topology itself here: they route by it.
            report.ok.push(format!("exchange {}", exchange.name));
        }
        for spec in &topology.queues {
            let object = format!("queue {}", spec.name);
            match self
                .queue_id(&spec.name)
                .and_then(|id| self.queues.get(&id))
            {
                Some(queue) => {
                    let found = differences(queue.core.options(), &spec.options);
                    if found.is_empty() {
                        report.ok.push(object);
                    } else {
                        report
                            .drift
                            .extend(found.into_iter().map(|(argument, is, wanted)| Drift {
                                broker: BrokerType::InMemory,
                                object: object.clone(),
                                argument: argument.to_owned(),
                                expected: wanted,
                                actual: is,
                            }));
                    }
                }
                None if apply => {
                    self.declare_queue(now, &spec.name, &spec.options)?;
                    report.created.push(object);
                }
                None => report.missing.push(object),
            }
        }
        self.check_streams(apply, &mut report)?;
        Ok(report)
    }

    /// Makes a topic usable with safe settings.
    ///
    /// # Errors
    /// Why it could not be made.
    pub(super) fn ensure(&mut self, now: Timestamp, source: &Source) -> Result<()> {
        // A pattern names nothing that could be made.
        let Some(topic) = source.pattern().literal() else {
            return Ok(());
        };
        match source {
            Source::Queue(_) => {
                if self.queue_id(&topic).is_none() {
                    let options = self
                        .topology
                        .queue(&topic)
                        .map(|q| q.options.clone())
                        .unwrap_or_default();
                    self.declare_queue(now, &topic, &options)?;
                }
                Ok(())
            }
            Source::Stream(_) => self.ensure_stream(&topic).map(drop),
        }
    }
}
