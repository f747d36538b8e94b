//! The embedded broker in memory: what the hub costs when nothing is below it.
//! Every message is counted where it is handled; one that is missing fails the
//! run.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use async_trait::async_trait;

use super::{
    Plan,
    baseline::channel,
    latency::Tally,
    load::{Load, Shape},
    pace::Backlog,
    payload::Bodies,
    readers::{self, Readers},
    report::Report,
    run::{Group, Row, Run},
    through_hub::{self, How},
};
use crate::{
    broker::{QueueType, TopicOptions},
    cli::Failure,
};

pub(super) async fn measure(plan: &Plan) -> Result<Report, Failure> {
    let bodies = Bodies::new(plan.shape.size, true)?;
    let hub = |name, way| {
        Box::new(Embedded {
            name,
            way,
            shape: plan.shape.clone(),
            bodies: bodies.clone(),
        }) as Box<dyn Row>
    };
    let group: Group = vec![
        hub("hub, windows", Way::Queue(How::Window)),
        hub("hub, batches of 100", Way::Queue(How::Batches(BATCH))),
        hub("hub, each awaited", Way::Awaited),
        hub("hub, events to 10 subscribers", Way::FanOut),
        Box::new(Channel {
            shape: plan.shape.clone(),
            bodies: bodies.clone(),
        }),
    ];
    let mut report = plan.measure(vec![group]).await?;
    report.weakened(&through_hub::config(&[], &[]));
    report.note("rates are of handled messages: of the events, each counts ten times");
    report.set("fan_out", SUBSCRIBERS);
    report.set("batch", BATCH);
    Ok(report)
}

/// A row of the hub's.
struct Embedded {
    name: &'static str,
    way: Way,
    shape: Shape,
    bodies: Bodies,
}

#[derive(Clone, Copy)]
enum Way {
    /// A work queue.
    Queue(How),
    /// A work queue, each publish awaited.
    Awaited,
    /// A stream that ten groups read.
    FanOut,
}

#[async_trait]
impl Row for Embedded {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn durability(&self) -> &'static str {
        "none"
    }

    /// A hub of its own for each run, so that no run begins with what another
    /// left in memory.
    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let retention = [("retention.bytes".to_owned(), RETENTION.to_owned())];
        let topic = TopicOptions {
            settings: retention.into(),
            ..TopicOptions::default()
        };
        let config = through_hub::config(&[(QUEUE, QueueType::Classic)], &[(TOPIC, topic)]);
        let system = through_hub::start(config).await?;
        let hub = system.hub();
        let tally = Arc::new(Tally::new());
        let (prefetch, consumers) = (self.shape.prefetch, self.shape.consumers);
        let how = match self.way {
            Way::Queue(how) => how,
            Way::Awaited | Way::FanOut => How::Window,
        };
        let (topic, copies, readers) = match self.way {
            Way::Queue(_) | Way::Awaited => {
                let readers = Readers::of_queue(&hub, QUEUE, consumers, prefetch, &tally);
                (QUEUE, 1, readers.await?)
            }
            Way::FanOut => {
                // As many members in each group as there are consumers.
                let groups = (0..SUBSCRIBERS * consumers).map(|n| format!("g{}", n % SUBSCRIBERS));
                let readers = Readers::of_stream(&hub, TOPIC, groups, prefetch, true, &tally);
                (TOPIC, SUBSCRIBERS as u64, readers.await?)
            }
        };
        let backlog = Backlog {
            sent: Arc::new(AtomicU64::new(0)),
            arrived: tally.clone(),
            copies,
        };
        let mut loads = Load::split(&self.shape, time, &self.bodies);
        for load in &mut loads {
            load.backlog = Some(backlog.clone());
            match self.way {
                Way::Awaited => load.window = 1,
                Way::FanOut => load.keys = KEYS,
                Way::Queue(_) => {}
            }
        }
        let started = loads
            .first()
            .map_or_else(std::time::Instant::now, |l| l.started);
        let published = through_hub::publish(&hub, topic, loads, how).await?;
        let run = readers::arrived(&tally, &published, copies, started).await?;
        readers.stop().await;
        system.close().await;
        Ok(run)
    }
}

/// The bare channel.
struct Channel {
    shape: Shape,
    bodies: Bodies,
}

#[async_trait]
impl Row for Channel {
    fn name(&self) -> String {
        "tokio mpsc, one consumer, no acks".to_owned()
    }

    fn durability(&self) -> &'static str {
        "none"
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let loads = Load::split(&self.shape, time, &self.bodies);
        let started = loads
            .first()
            .map_or_else(std::time::Instant::now, |l| l.started);
        let tally = channel::run(loads, self.shape.window).await?;
        Ok(Run::new(
            tally.count(),
            tally.until_last(started),
            tally.latencies(),
        ))
    }
}

const QUEUE: &str = "tasks.bench";
const TOPIC: &str = "events.bench";
const SUBSCRIBERS: usize = 10;
const BATCH: usize = 100;
/// Keys of events, so that every partition is used.
pub(super) const KEYS: u64 = 60;
/// Bytes that a partition keeps: more than producers may be ahead.
const RETENTION: &str = "83886080";
