//! Topics that should exist: making what is missing, naming what differs.
//! Nothing that exists is ever changed.

use super::admin::{Admin, wanted_settings};
use crate::{
    broker::{BrokerType, TopicOptions},
    error::Result,
    topic::Topic,
    topology::{Drift, Topology, TopologyReport},
};

/// Looks at every wanted topic; with `apply` what is missing is made.
pub(super) async fn look(
    admin: &Admin,
    topology: &Topology,
    apply: bool,
) -> Result<TopologyReport> {
    let mut report = TopologyReport::default();
    for (name, options) in wanted(topology) {
        let object = format!("topic {name}");
        let topic = Topic::new(&name)?;
        match admin.shape(&topic).await? {
            None if apply => match admin.create(&topic, &options).await {
                Ok(_) => report.created.push(object),
                Err(error) => {
                    report.not_checked.push(format!("{object}: {error}"));
                    report.missing.push(object);
                }
            },
            None => report.missing.push(object),
            Some(shape) => {
                let settings = match admin.settings(&topic).await {
                    Ok(settings) => settings,
                    Err(error) => {
                        // Describing needs a permission that publishing does
                        // not; the topic itself is there.
                        report.not_checked.push(format!("{object}: {error}"));
                        continue;
                    }
                };
                let drift = differences(&object, &options, shape, &settings);
                if drift.is_empty() {
                    report.ok.push(object);
                } else {
                    report.drift.extend(drift);
                }
            }
        }
    }
    Ok(report)
}

/// Every topic that should exist, the dead letters' included.
pub(super) fn wanted(topology: &Topology) -> Vec<(String, TopicOptions)> {
    let mut wanted: Vec<_> = topology
        .topics
        .iter()
        .map(|t| (t.name.clone(), t.options.clone()))
        .collect();
    let dead_letters = topology.dead_letter_topic();
    if !wanted.is_empty() && !wanted.iter().any(|(name, _)| name == dead_letters) {
        wanted.push((dead_letters.to_owned(), TopicOptions::default()));
    }
    wanted
}

fn differences(
    object: &str,
    options: &TopicOptions,
    (partitions, copies): (i32, i32),
    settings: &super::admin::Settings,
) -> Vec<Drift> {
    let mut drift = Vec::new();
    let mut compare = |argument: &str, expected: String, actual: String| {
        if expected != actual {
            drift.push(Drift {
                broker: BrokerType::Kafka,
                object: object.to_owned(),
                argument: argument.to_owned(),
                expected,
                actual,
            });
        }
    };
    compare(
        "partitions",
        options.partitions.to_string(),
        partitions.to_string(),
    );
    compare(
        "replication",
        options.replication.to_string(),
        copies.to_string(),
    );
    for (name, expected) in wanted_settings(options) {
        let actual = settings.get(&name).cloned().unwrap_or_default();
        if !same(&expected, &actual) {
            compare(&name, expected, actual);
        }
    }
    drift
}

/// Whether two settings mean the same.
pub(super) fn same(a: &str, b: &str) -> bool {
    sorted(a) == sorted(b)
}

/// Lists such as `compact,delete` mean the same in any order.
fn sorted(list: &str) -> Vec<&str> {
    let mut parts: Vec<_> = list.split(',').map(str::trim).collect();
    parts.sort_unstable();
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::TopicSpec;

    #[test]
    fn the_dead_letters_topic_is_wanted_with_any_other() {
        assert!(wanted(&Topology::default()).is_empty());
        let topology = Topology {
            topics: vec![TopicSpec {
                name: "a".into(),
                options: TopicOptions::default(),
            }],
            ..Topology::default()
        };
        let names: Vec<_> = wanted(&topology).into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, ["a", "helixagent.dlq.events"]);
    }

    #[test]
    fn drift_names_what_differs() {
        let options = TopicOptions {
            cleanup_policy: "compact,delete".into(),
            ..TopicOptions::default()
        };
        let mut settings = wanted_settings(&options);
        settings.insert("cleanup.policy".into(), "delete,compact".into());
        assert!(differences("topic a", &options, (3, 1), &settings).is_empty());
        settings.insert("retention.ms".into(), "5".into());
        let drift = differences("topic a", &options, (2, 1), &settings);
        let names: Vec<_> = drift.iter().map(|d| d.argument.as_str()).collect();
        assert_eq!(names, ["partitions", "retention.ms"]);
    }
}
