//! The embedded broker on a disk: each publish is answered once it is synced.
//! Beside it a bare file that does nothing but write and sync, and, where there
//! is a RabbitMQ, its quorum queue, which syncs too.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;

use super::{
    Plan,
    baseline::file::BareFile,
    latency::Tally,
    leftovers::Leftovers,
    load::{Load, Shape},
    machine,
    payload::Bodies,
    readers::{self, Readers},
    report::Report,
    run::{Group, Row, Run},
    through_hub::{self, How},
};
use crate::{broker::QueueType, cli::Failure};

pub(super) async fn measure(plan: &Plan) -> Result<Report, Failure> {
    let shape = &plan.shape;
    let bodies = Bodies::new(shape.size, shape.consumers > 0)?;
    let name = format!("messaging-hub-bench-{}", plan.suffix);
    let folder = plan.leftovers.folder(plan.options.data.as_deref(), &name)?;
    let lone = Shape {
        producers: 1,
        window: 1,
        ..shape.clone()
    };
    let hub = |name, shape: &Shape| Journaled {
        name,
        shape: shape.clone(),
        bodies: bodies.clone(),
        parent: folder.clone(),
        leftovers: plan.leftovers.clone(),
        next: 0,
    };
    let file = |name, shape: &Shape| {
        let path = folder.join(format!("bare-{}", shape.window));
        Ok::<_, Failure>(Bare {
            name,
            shape: shape.clone(),
            bodies: bodies.clone(),
            file: Some(BareFile::create(&path)?),
        })
    };
    plan.progress.say("writing the bare files");
    let mut first: Group = vec![
        Box::new(hub("hub, windows", shape)),
        Box::new(file("bare file, a window a sync", shape)?),
    ];
    quorum(plan, &mut first).await?;
    let second: Group = vec![
        Box::new(hub("hub, a lone publisher", &lone)),
        Box::new(file("bare file, a record a sync", &lone)?),
    ];
    let mut report = plan.measure(vec![first, second]).await?;
    let mut config = through_hub::config(&[(QUEUE, QueueType::Classic)], &[]);
    config.data_dir = Some(folder.clone());
    report.weakened(&config);
    report.set("data", folder.display().to_string());
    if let Some(kind) = machine::file_system(&folder) {
        if machine::is_in_memory(&kind) {
            report.note("the folder is in memory, where a sync costs nothing and keeps nothing; give one on a disk with --data");
        }
        report.set("file_system", kind);
    }
    Ok(report)
}

/// Adds the row of RabbitMQ, where there is one.
#[cfg(feature = "rabbitmq")]
async fn quorum(plan: &Plan, group: &mut Group) -> Result<(), Failure> {
    use super::{baseline::amqp::Amqp, rabbitmq::RawPublish, rabbitmq::Side};
    let Some(url) = plan.options.rabbitmq() else {
        return Ok(());
    };
    let amqp = Arc::new(Amqp::connect(&url).await?);
    let queue = format!("tasks.bench.quorum.{}", plan.suffix);
    plan.leftovers.queue(&url, &queue);
    amqp.declare(&queue, QueueType::Quorum).await?;
    group.push(Box::new(RawPublish(Side {
        amqp,
        queue,
        kind: QueueType::Quorum,
        shape: plan.shape.clone(),
        bodies: Bodies::new(plan.shape.size, false)?,
    })));
    Ok(())
}

#[cfg(not(feature = "rabbitmq"))]
#[allow(clippy::unused_async, reason = "as with the client")]
async fn quorum(plan: &Plan, _: &mut Group) -> Result<(), Failure> {
    match plan.options.rabbitmq() {
        Some(_) => Err(super::not_built("rabbitmq")),
        None => Ok(()),
    }
}

/// The hub with a folder of its own for each run.
struct Journaled {
    name: &'static str,
    shape: Shape,
    bodies: Bodies,
    parent: PathBuf,
    leftovers: Leftovers,
    next: u32,
}

#[async_trait]
impl Row for Journaled {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn durability(&self) -> &'static str {
        "fsync"
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        self.next += 1;
        let name = format!("hub-{}-{}", self.shape.window, self.next);
        let folder = self.leftovers.folder(Some(&self.parent), &name)?;
        let mut config = through_hub::config(&[(QUEUE, QueueType::Classic)], &[]);
        config.data_dir = Some(folder.clone());
        let system = through_hub::start(config).await?;
        let hub = system.hub();
        let tally = Arc::new(Tally::new());
        let (consumers, prefetch) = (self.shape.consumers, self.shape.prefetch);
        let readers = Readers::of_queue(&hub, QUEUE, consumers, prefetch, &tally).await?;
        let mut loads = Load::split(&self.shape, time, &self.bodies);
        if consumers == 0 {
            // A queue that nobody reads has a bound, where a run ends early.
            for load in &mut loads {
                load.most = MOST_KEPT / load.producers as u64;
            }
        }
        let started = loads.first().map_or_else(Instant::now, |l| l.started);
        let published = through_hub::publish(&hub, QUEUE, loads, How::Window).await?;
        if consumers > 0 {
            // Counted, but not timed: what is measured is the answer.
            readers::arrived(&tally, &published, 1, started).await?;
        }
        readers.stop().await;
        system.close().await;
        let gone = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder)).await;
        // What is still there is taken away at the end, with a word if it cannot.
        drop(gone);
        Ok(published.into_run(started))
    }
}

/// The bare file.
struct Bare {
    name: &'static str,
    shape: Shape,
    bodies: Bodies,
    /// Lent to the thread that writes, for as long as a run lasts.
    file: Option<BareFile>,
}

#[async_trait]
impl Row for Bare {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn durability(&self) -> &'static str {
        "fsync"
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let lost = || Failure::new("the bare file's thread ended early");
        let mut file = self.file.take().ok_or_else(lost)?;
        // One file has one writer, which takes all producers' messages.
        let all = self.shape.producers as u64;
        let mut loads = Load::split(&self.shape, time, &self.bodies);
        let mut load = loads.pop().ok_or_else(lost)?;
        (load.producer, load.producers) = (0, 1);
        load.window *= self.shape.producers;
        load.rate = load.rate.map(|rate| rate * all);
        let started = load.started;
        let writing = tokio::task::spawn_blocking(move || {
            let done = file.append(&load);
            (file, done)
        });
        let (file, done) = writing.await.map_err(|_| lost())?;
        self.file = Some(file);
        Ok(done?.into_run(started))
    }
}

const QUEUE: &str = "tasks.bench";
/// Messages of one run, a tenth below what a queue of the embedded broker holds.
const MOST_KEPT: u64 = 900_000;
