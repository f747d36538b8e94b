//! `bench SCENARIO`: the hub measured side by side, in one process and in turn,
//! with the bare clients, files and channels that it stands on.
//!
//! ```text
//!   options -> Plan -> scenario: groups of rows -> run (pairs, in turn) -> stats -> report
//!                                  |       `-- benches/baseline: without the hub
//!                                  `-- through_hub
//! ```
//!
//! It says ratios, with how sure they are, rather than records: what else the
//! machine does falls on both sides. It needs no hub that runs, uses queues and
//! topics of its own, and takes them away at the end, however it ends.

#[path = "../../../benches/baseline/mod.rs"]
pub(super) mod baseline;
mod embedded;
#[cfg(feature = "rabbitmq")]
mod failover;
mod http;
#[cfg(feature = "journal")]
mod journal;
#[cfg(feature = "kafka")]
mod kafka;
pub(super) mod latency;
mod leftovers;
pub(super) mod load;
mod machine;
mod options;
pub(super) mod pace;
pub(super) mod payload;
mod progress;
pub(super) mod published;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;
mod readers;
mod report;
mod request;
pub(super) mod run;
mod running;
mod scenario;
mod shell;
mod stats;
mod through_hub;

use std::process::ExitCode;

use leftovers::Leftovers;
use load::Shape;
use progress::Progress;
use report::Report;
use run::Group;
use scenario::Scenario;

pub(super) use options::Bench;

use super::{Failure, Target, say, signals::Signals};

/// What a scenario works with.
struct Plan {
    options: Bench,
    shape: Shape,
    /// A running hub to measure, where one was named.
    running: Option<Target>,
    leftovers: Leftovers,
    progress: Progress,
    /// Part of every name that this bench makes, and of no other's.
    suffix: String,
}

impl Bench {
    /// Runs the scenario. `url_given`: the hub's address was written on the
    /// command line.
    pub(super) async fn run(self, target: &Target, url_given: bool) -> Result<ExitCode, Failure> {
        self.check(url_given)?;
        let plan = Plan {
            shape: self.shape()?,
            options: self,
            running: url_given.then(|| target.clone()),
            leftovers: Leftovers::default(),
            progress: Progress::new(target.json),
            suffix: uuid::Uuid::now_v7().simple().to_string(),
        };
        let mut signals = Signals::new()?;
        let outcome = tokio::select! {
            outcome = plan.measured() => outcome,
            () = signals.next() => Err(Failure::new("interrupted")),
        };
        plan.progress.done();
        let left = tokio::select! {
            left = plan.leftovers.remove() => left,
            () = signals.next() => vec!["interrupted again".to_owned()],
        };
        for what in left {
            eprintln!("not taken away: {what}");
        }
        let report = outcome?;
        if target.json {
            say(report.json().to_string())?;
        } else {
            say(report.table().trim_end())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Plan {
    async fn measured(&self) -> Result<Report, Failure> {
        match self.options.scenario {
            #[cfg(feature = "rabbitmq")]
            Scenario::Rabbitmq => rabbitmq::measure(self).await,
            #[cfg(feature = "rabbitmq")]
            Scenario::Failover => failover::measure(self).await,
            #[cfg(not(feature = "rabbitmq"))]
            Scenario::Rabbitmq | Scenario::Failover => Err(not_built("rabbitmq")),
            #[cfg(feature = "kafka")]
            Scenario::Kafka => kafka::measure(self).await,
            #[cfg(not(feature = "kafka"))]
            Scenario::Kafka => Err(not_built("kafka")),
            Scenario::Embedded => embedded::measure(self).await,
            #[cfg(feature = "journal")]
            Scenario::Journal => journal::measure(self).await,
            #[cfg(not(feature = "journal"))]
            Scenario::Journal => Err(not_built("journal")),
            Scenario::Http => http::measure(self).await,
        }
    }

    /// Runs groups of rows, and reports on them.
    async fn measure(&self, groups: Vec<Group>) -> Result<Report, Failure> {
        let shape = &self.shape;
        let runs = run::measure(groups, shape.pairs, shape.time, &self.progress).await?;
        Ok(Report::of_runs(self.options.scenario.name(), shape, runs))
    }
}

#[cfg(not(all(feature = "rabbitmq", feature = "kafka", feature = "journal")))]
fn not_built(feature: &str) -> Failure {
    Failure::new(format!(
        "this program was built without the feature `{feature}`, which the scenario is about; build it with --features {feature}"
    ))
}
