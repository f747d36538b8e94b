//! The command's flags, with the meanings of RabbitMQ's `PerfTest`, checked
//! against the scenario: a flag is honoured or refused, never ignored.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use super::{
    load::Shape,
    scenario::{QueueKind, Scenario},
};
use crate::cli::Failure;

/// Measure the hub side by side with the bare clients and disks that it stands on.
#[derive(Debug, Args)]
pub(in crate::cli) struct Bench {
    /// What to measure.
    #[arg(value_enum)]
    pub(super) scenario: Scenario,
    /// Producers. Default 1; http: connections, by default 64 for single
    /// messages and 2 for NDJSON.
    #[arg(short = 'x', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    producers: Option<u16>,
    /// Consumers; 0: publish only. Default 1, journal 0.
    #[arg(short = 'y', long, value_name = "N")]
    consumers: Option<u16>,
    /// Unconfirmed messages of each producer at most. Default 1000, kafka 10000.
    #[arg(short = 'c', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    confirm: Option<u32>,
    /// Prefetch: unsettled messages of each consumer at most. Default 1000.
    #[arg(short = 'q', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    qos: Option<u16>,
    /// Messages that a bare RabbitMQ consumer acks together. Default half of -q,
    /// at most 100, as the hub's consumer does.
    #[arg(short = 'A', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    multi_ack_every: Option<u16>,
    /// Bytes of a payload. Default 128.
    #[arg(short = 's', long, value_name = "BYTES")]
    size: Option<u32>,
    /// Messages a second of each producer; latency counts from when a message
    /// was due. Default: as fast as it goes, failover 5000.
    #[arg(short = 'r', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    rate: Option<u64>,
    /// Seconds of one run. Default 2; failover: of the whole run, default 24.
    #[arg(short = 'z', long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    time: Option<u64>,
    /// Runs of each row, in turn. Default 6: fewer leave a ratio less than 95 %
    /// sure.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pairs: Option<u16>,
    /// Kind of RabbitMQ queue. Default both; failover quorum.
    #[arg(long, value_enum, value_name = "KIND")]
    queue_type: Option<QueueKind>,
    /// RabbitMQ, as amqp://user:password@host:port/vhost. Default: `RABBITMQ_URL`.
    #[arg(long, value_name = "URL")]
    rabbitmq: Option<String>,
    /// Kafka, as host:port, several separated by commas. Default: `KAFKA_BROKERS`.
    #[arg(long, value_name = "ADDRS")]
    kafka: Option<String>,
    /// Where the journal's files go, for as long as it runs. Default: where
    /// temporary files go.
    #[arg(long, value_name = "DIR")]
    pub(super) data: Option<PathBuf>,
    /// failover: the command that starts the killed RabbitMQ again. Without it
    /// the link is cut instead.
    #[arg(long, value_name = "CMD")]
    pub(super) broker_start: Option<String>,
    /// failover: the command that kills RabbitMQ (kill -9).
    #[arg(long, value_name = "CMD", conflicts_with = "broker_pid")]
    pub(super) broker_kill: Option<String>,
    /// failover: the process of RabbitMQ, which is killed with kill -9.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(2..))]
    pub(super) broker_pid: Option<u32>,
    /// failover: draw throughput and latency over time into this file.
    #[arg(long, value_name = "FILE")]
    pub(super) svg: Option<PathBuf>,
}

impl Bench {
    /// Refuses what the scenario cannot honour.
    ///
    /// # Errors
    /// Which flag, why, and what to do.
    pub(super) fn check(&self, url_given: bool) -> Result<(), Failure> {
        use Scenario::{Embedded, Failover, Http, Journal, Kafka, Rabbitmq};
        let flags: [(&str, bool, &[Scenario], &str); 14] = [
            (
                "-y",
                self.consumers.is_some(),
                &[Rabbitmq, Kafka, Embedded, Journal, Http],
                "what arrived is counted by a bare client afterwards",
            ),
            (
                "-c",
                self.confirm.is_some(),
                &[Rabbitmq, Kafka, Embedded, Journal, Failover],
                "each connection has one request under way; use -x for more of them",
            ),
            (
                "-q",
                self.qos.is_some(),
                &[Rabbitmq, Kafka, Embedded, Journal, Http],
                "nobody consumes while it runs",
            ),
            (
                "-A",
                self.multi_ack_every.is_some(),
                &[Rabbitmq],
                "only a bare RabbitMQ consumer acks many messages at once by its own choice",
            ),
            (
                "--pairs",
                self.pairs.is_some(),
                &[Rabbitmq, Kafka, Embedded, Journal, Http],
                "it is one run; start it again for another",
            ),
            (
                "--queue-type",
                self.queue_type.is_some(),
                &[Rabbitmq, Failover],
                "it is about RabbitMQ's queues",
            ),
            (
                "--rabbitmq",
                self.rabbitmq.is_some(),
                &[Rabbitmq, Journal, Failover],
                "RabbitMQ takes no part in it",
            ),
            (
                "--kafka",
                self.kafka.is_some(),
                &[Kafka],
                "Kafka takes no part in it",
            ),
            (
                "--data",
                self.data.is_some(),
                &[Journal, Failover],
                "nothing of it is kept on a disk",
            ),
            (
                "--broker-start",
                self.broker_start.is_some(),
                &[Failover],
                "no broker is killed",
            ),
            (
                "--broker-kill",
                self.broker_kill.is_some(),
                &[Failover],
                "no broker is killed",
            ),
            (
                "--broker-pid",
                self.broker_pid.is_some(),
                &[Failover],
                "no broker is killed",
            ),
            (
                "--svg",
                self.svg.is_some(),
                &[Failover],
                "nothing of it changes over time",
            ),
            ("--url", url_given, &[Http], "it starts a hub of its own"),
        ];
        for (flag, given, scenarios, why) in flags {
            if given && !scenarios.contains(&self.scenario) {
                return Err(Failure::usage(format!(
                    "{flag} does not apply to bench {}: {why}; leave it out",
                    self.scenario.name()
                )));
            }
        }
        if self.scenario == Failover {
            let kills = self.broker_kill.is_some() || self.broker_pid.is_some();
            if kills != self.broker_start.is_some() {
                return Err(Failure::usage(
                    "a broker that is killed must be started again: give --broker-start and one of --broker-kill and --broker-pid, or none of them to cut the link",
                ));
            }
            if self.time.is_some_and(|z| z < LEAST_FAILOVER) {
                return Err(Failure::usage(format!(
                    "-z of failover is the whole run, of which a quarter is the outage; use {LEAST_FAILOVER} or more"
                )));
            }
            if self.queue_type == Some(QueueKind::Both) {
                return Err(Failure::usage(
                    "failover has one queue; use --queue-type quorum or classic",
                ));
            }
        }
        if matches!(self.scenario, Embedded | Http) && !url_given && self.consumers == Some(0) {
            return Err(Failure::usage(format!(
                "-y 0 does not apply to bench {}: every message is counted at a consumer, and without one its queue would fill the memory; use -y 1 or more",
                self.scenario.name()
            )));
        }
        if url_given && (self.consumers.is_some() || self.qos.is_some()) {
            return Err(Failure::usage(
                "-y and -q do not apply to a running hub (--url): what was published is leased back at the end; leave them out",
            ));
        }
        Ok(())
    }

    /// The flags and defaults as the scenario's runs take them.
    ///
    /// # Errors
    /// Flags that do not fit together.
    pub(super) fn shape(&self) -> Result<Shape, Failure> {
        let kafka = self.scenario == Scenario::Kafka;
        let failover = self.scenario == Scenario::Failover;
        let consumers = match self.scenario {
            Scenario::Journal | Scenario::Failover => 0,
            _ => 1,
        };
        let window = if kafka { 10_000 } else { 1000 };
        let prefetch = self.qos.unwrap_or(1000);
        let ack_every = self.multi_ack_every.unwrap_or((prefetch / 2).clamp(1, 100));
        if ack_every > prefetch {
            return Err(Failure::usage(format!(
                "-A {ack_every} is above -q {prefetch}: the consumer would wait for more messages than it may hold; raise -q or lower -A"
            )));
        }
        let size = self.size.unwrap_or(128) as usize;
        if size > MOST_BYTES {
            return Err(Failure::usage(format!(
                "-s {size} is above the largest message that the hub takes; use {MOST_BYTES} or less"
            )));
        }
        let time = self.time.unwrap_or(if failover { 24 } else { 2 });
        Ok(Shape {
            producers: usize::from(self.producers.unwrap_or(1)),
            consumers: usize::from(self.consumers.unwrap_or(consumers)),
            window: self.confirm.unwrap_or(window) as usize,
            prefetch,
            ack_every: u64::from(ack_every),
            size,
            rate: self.rate.or(failover.then_some(5000)),
            time: Duration::from_secs(time),
            pairs: usize::from(self.pairs.unwrap_or(6)),
        })
    }

    /// Connections, where they were asked for.
    pub(super) fn connections(&self) -> Option<usize> {
        self.producers.map(usize::from)
    }

    /// Which queues to measure, unless `otherwise` is the default.
    pub(super) fn queues(&self, otherwise: QueueKind) -> QueueKind {
        self.queue_type.unwrap_or(otherwise)
    }

    /// Where RabbitMQ is, if somebody said so.
    pub(super) fn rabbitmq(&self) -> Option<String> {
        given(self.rabbitmq.as_ref(), "RABBITMQ_URL")
    }

    /// Where Kafka is, if somebody said so.
    pub(super) fn kafka(&self) -> Option<String> {
        given(self.kafka.as_ref(), "KAFKA_BROKERS")
    }
}

fn given(flag: Option<&String>, variable: &str) -> Option<String> {
    let found = flag.cloned().or_else(|| std::env::var(variable).ok());
    found.filter(|text| !text.trim().is_empty())
}

/// Four quarters, of which an outage takes one.
const LEAST_FAILOVER: u64 = 8;
/// What a hub takes by default, without the room that headers need.
const MOST_BYTES: usize = 8 * 1024 * 1024;
