//! RabbitMQ: confirmed publishing, and from publish to handled and acked,
//! through the hub and by bare lapin, on the same queues with the same bytes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::task::JoinSet;

use super::{
    Plan,
    baseline::amqp::Amqp,
    latency::Tally,
    load::{Load, Shape},
    payload::Bodies,
    readers::{self, Readers},
    report::Report,
    run::{Group, Row, Run},
    scenario::QueueKind,
    through_hub::{self, How},
};
use crate::{
    adapter::rabbitmq::RabbitMqConfig, broker::QueueType, cli::Failure, config::MessagingConfig,
    hub::MessagingHub, secret::Secret,
};

pub(super) async fn measure(plan: &Plan) -> Result<Report, Failure> {
    let url = plan.options.rabbitmq().ok_or_else(no_broker)?;
    let end_to_end = plan.shape.consumers > 0;
    let publishing = Bodies::new(plan.shape.size, false)?;
    let timed = end_to_end.then(|| Bodies::new(plan.shape.size, true));
    let timed = timed.transpose()?;
    let amqp = Arc::new(Amqp::connect(&url).await?);
    let mut queues = Vec::new();
    for kind in plan.options.queues(QueueKind::Both).types() {
        let queue = format!("tasks.bench.{}.{}", word(*kind), plan.suffix);
        plan.leftovers.queue(&url, &queue);
        amqp.declare(&queue, *kind).await?;
        queues.push((queue, *kind));
    }
    let named: Vec<_> = queues.iter().map(|(q, k)| (q.as_str(), *k)).collect();
    let config = config(&url, &named, &plan.shape);
    let system = through_hub::start(config.clone()).await?;
    let side = |queue: &(String, QueueType), bodies: &Bodies| Side {
        amqp: amqp.clone(),
        queue: queue.0.clone(),
        kind: queue.1,
        shape: plan.shape.clone(),
        bodies: bodies.clone(),
    };
    let mut groups: Vec<Group> = Vec::new();
    for queue in &queues {
        groups.push(vec![
            Box::new(HubPublish(side(queue, &publishing), system.hub())),
            Box::new(RawPublish(side(queue, &publishing))),
        ]);
    }
    for (queue, bodies) in queues.iter().zip(std::iter::repeat(&timed)) {
        if let Some(bodies) = bodies {
            groups.push(vec![
                Box::new(HubEndToEnd(side(queue, bodies), system.hub())),
                Box::new(RawEndToEnd(side(queue, bodies))),
            ]);
        }
    }
    let mut report = plan.measure(groups).await?;
    report.servers(&system.hub().state().brokers);
    report.weakened(&config);
    if end_to_end {
        report.set("multi_ack_every", plan.shape.ack_every);
    }
    system.close().await;
    Ok(report)
}

/// What to do without a broker.
pub(super) fn no_broker() -> Failure {
    Failure::usage(
        "no RabbitMQ is named: give one with --rabbitmq amqp://user:password@host:port or RABBITMQ_URL; `scripts/brokers start rabbitmq-4 DIR` starts one",
    )
}

/// A hub over RabbitMQ with these queues, whose lanes take all producers' windows.
pub(super) fn config(url: &str, queues: &[(&str, QueueType)], shape: &Shape) -> MessagingConfig {
    MessagingConfig {
        rabbitmq: Some(RabbitMqConfig {
            url: Some(Secret::new(url)),
            window: shape.window.saturating_mul(shape.producers),
            ..RabbitMqConfig::default()
        }),
        ..through_hub::config(queues, &[])
    }
}

pub(super) fn word(kind: QueueType) -> &'static str {
    match kind {
        QueueType::Classic => "classic",
        QueueType::Quorum => "quorum",
    }
}

/// What a confirm means.
pub(super) fn durability(kind: QueueType) -> &'static str {
    match kind {
        QueueType::Classic => "page cache",
        QueueType::Quorum => "fsync",
    }
}

/// What both sides work with.
pub(super) struct Side {
    pub(super) amqp: Arc<Amqp>,
    pub(super) queue: String,
    pub(super) kind: QueueType,
    pub(super) shape: Shape,
    pub(super) bodies: Bodies,
}

impl Side {
    /// The loads of a run over an empty queue, and when it began.
    async fn begin(&self, time: Duration) -> Result<(Vec<Load>, Instant), Failure> {
        self.amqp.purge(&self.queue).await?;
        Ok(self.loads(time))
    }

    fn loads(&self, time: Duration) -> (Vec<Load>, Instant) {
        let loads = Load::split(&self.shape, time, &self.bodies);
        let started = loads.first().map_or_else(Instant::now, |l| l.started);
        (loads, started)
    }

    async fn publish(&self, loads: Vec<Load>) -> Result<super::published::Published, Failure> {
        let mut producers = JoinSet::new();
        for load in loads {
            let (amqp, queue) = (self.amqp.clone(), self.queue.clone());
            producers.spawn(async move { amqp.publish(&queue, &load).await });
        }
        through_hub::gather(producers).await
    }

    fn name(&self, what: &str, who: &str) -> String {
        format!("{what} {}, {who}", word(self.kind))
    }
}

struct HubPublish(Side, MessagingHub);

#[async_trait]
impl Row for HubPublish {
    fn name(&self) -> String {
        self.0.name("publish", "hub")
    }

    fn durability(&self) -> &'static str {
        durability(self.0.kind)
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let (loads, started) = self.0.begin(time).await?;
        let done = through_hub::publish(&self.1, &self.0.queue, loads, How::Window).await?;
        through_hub::drained(&self.1).await?;
        Ok(done.into_run(started))
    }
}

/// Confirmed publishing by lapin alone.
pub(super) struct RawPublish(pub(super) Side);

#[async_trait]
impl Row for RawPublish {
    fn name(&self) -> String {
        self.0.name("publish", "lapin")
    }

    fn durability(&self) -> &'static str {
        durability(self.0.kind)
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let (loads, started) = self.0.begin(time).await?;
        Ok(self.0.publish(loads).await?.into_run(started))
    }
}

struct HubEndToEnd(Side, MessagingHub);

#[async_trait]
impl Row for HubEndToEnd {
    fn name(&self) -> String {
        self.0.name("end to end", "hub")
    }

    fn durability(&self) -> &'static str {
        durability(self.0.kind)
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let Self(side, hub) = self;
        side.amqp.purge(&side.queue).await?;
        let tally = Arc::new(Tally::new());
        let (consumers, prefetch) = (side.shape.consumers, side.shape.prefetch);
        let readers = Readers::of_queue(hub, &side.queue, consumers, prefetch, &tally).await?;
        let (loads, started) = side.loads(time);
        let published = through_hub::publish(hub, &side.queue, loads, How::Window).await?;
        let run = readers::arrived(&tally, &published, 1, started).await?;
        readers.stop().await;
        Ok(run)
    }
}

struct RawEndToEnd(Side);

#[async_trait]
impl Row for RawEndToEnd {
    fn name(&self) -> String {
        self.0.name("end to end", "lapin")
    }

    fn durability(&self) -> &'static str {
        durability(self.0.kind)
    }

    async fn run(&mut self, time: Duration) -> Result<Run, Failure> {
        let Self(side) = self;
        side.amqp.purge(&side.queue).await?;
        let tally = Arc::new(Tally::new());
        let (prefetch, ack_every) = (side.shape.prefetch, side.shape.ack_every);
        let mut consumers = Vec::new();
        for _ in 0..side.shape.consumers {
            let consumer = side
                .amqp
                .consume(&side.queue, prefetch, ack_every, tally.clone());
            consumers.push(consumer.await?);
        }
        let (loads, started) = side.loads(time);
        let published = side.publish(loads).await?;
        let run = readers::arrived(&tally, &published, 1, started).await?;
        for consumer in consumers {
            consumer.stop().await?;
        }
        Ok(run)
    }
}
