//! Failover: a steady load through the hub while RabbitMQ is killed and started
//! again, or while the link to it is cut. What arrived is counted by a bare
//! client afterwards; a message that is missing fails the run.
//!
//! ```text
//!   load --> hub --(proxy)--> RabbitMQ <-- bare client: probes, and counts at the end
//!             `-- spool, watched
//! ```

mod fault;
mod proxy;
mod svg;
mod timeline;
mod watch;

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use self::{
    fault::Fault,
    timeline::{Moments, Sample},
    watch::SpoolSeen,
};
use super::{
    Plan,
    baseline::amqp::Amqp,
    load::{Load, Shape},
    machine,
    payload::Bodies,
    published::Answered,
    rabbitmq,
    report::{Report, RowReport},
    scenario::QueueKind,
    stats,
    through_hub::{self, How},
};
use crate::{MessagingSystem, broker::QueueType, cli::Failure, hub::MessagingHub};

pub(super) async fn measure(plan: &Plan) -> Result<Report, Failure> {
    let url = plan.options.rabbitmq().ok_or_else(rabbitmq::no_broker)?;
    let (fault, through) = Fault::new(plan, &url).await?;
    let kinds = plan.options.queues(QueueKind::Quorum).types();
    let kind = kinds.first().copied().unwrap_or(QueueType::Quorum);
    let queue = format!("tasks.bench.failover.{}", plan.suffix);
    let probes = format!("tasks.bench.probe.{}", plan.suffix);
    let amqp = Amqp::connect(&url).await?;
    for name in [&queue, &probes] {
        plan.leftovers.queue(&url, name);
        amqp.declare(name, kind).await?;
    }
    let mut config = rabbitmq::config(&through, &[(&queue, kind)], &plan.shape);
    let mut folder = None;
    if cfg!(feature = "journal") {
        let name = format!("messaging-hub-bench-{}", plan.suffix);
        let made = plan.leftovers.folder(plan.options.data.as_deref(), &name)?;
        config.data_dir = Some(made.clone());
        folder = Some(made);
    }
    let system = through_hub::start(config.clone()).await?;
    warm_up(plan, &system, &queue).await?;
    amqp.purge(&queue).await?;
    drop(amqp);
    let run = Outage {
        plan,
        fault: &fault,
        hub: system.hub(),
        queue: &queue,
        // The way that the hub goes: a link that is cut is cut for both.
        probe: (&through, &probes),
    };
    let (moments, samples, spool) = run.through().await?;
    let servers = system.hub().state().brokers;
    let left = system.close().await;
    plan.progress.say("counting what arrived");
    let numbers = Amqp::connect(&url).await?.empty(&queue, IDLE).await?;
    let distinct: HashSet<u64> = numbers.iter().copied().collect();
    let lost = samples.len().saturating_sub(distinct.len());
    if lost > 0 {
        return Err(Failure::new(format!(
            "{lost} of {} accepted messages were lost ({} were left in the hub's journal)",
            samples.len(),
            left.left_in_journal
        )));
    }
    let durable = match folder.as_deref().and_then(machine::file_system) {
        Some(system) if !machine::is_in_memory(&system) => "fsync",
        _ => "none",
    };
    let rows = rows(&moments, &samples, kind, durable, fault.name());
    let mut report = Report::new(plan.options.scenario.name(), &plan.shape, vec![rows]);
    report.servers(&servers);
    report.weakened(&config);
    report.set("fault", fault.name());
    report.set("queue_type", rabbitmq::word(kind));
    report.set("data", folder.map(|f| f.display().to_string()));
    report.set("published", samples.len());
    report.set("arrived", numbers.len());
    report.set("lost", lost);
    report.set("duplicates", numbers.len() - distinct.len());
    tell(&mut report, &moments, &samples, &spool);
    if let Some(path) = &plan.options.svg {
        let title = format!(
            "RabbitMQ away ({}), {} messages a second of {} bytes",
            fault.name(),
            plan.shape.rate.unwrap_or_default() * plan.shape.producers as u64,
            plan.shape.size
        );
        let picture = svg::draw(&title, &timeline::buckets(&samples, moments.end), &moments);
        std::fs::write(path, picture)
            .map_err(|e| Failure::new(format!("{} cannot be written: {e}", path.display())))?;
        report.set("svg", path.display().to_string());
    }
    Ok(report)
}

/// Connections and lanes stand before the load begins.
async fn warm_up(plan: &Plan, system: &MessagingSystem, queue: &str) -> Result<(), Failure> {
    plan.progress.say("warming up");
    let bodies = Bodies::new(plan.shape.size, true)?;
    let loads = Load::split(&plan.shape, WARM_UP, &bodies);
    through_hub::publish(&system.hub(), queue, loads, How::Window).await?;
    through_hub::drained(&system.hub()).await
}

/// One outage under load.
struct Outage<'a> {
    plan: &'a Plan,
    fault: &'a Fault,
    hub: MessagingHub,
    queue: &'a str,
    /// Where the bare client tries, and with which queue.
    probe: (&'a str, &'a str),
}

impl Outage<'_> {
    /// Before, outage and after take a quarter of the time each at least; the
    /// drain takes what it takes.
    async fn through(&self) -> Result<(Moments, Vec<Sample>, SpoolSeen), Failure> {
        let plan = self.plan;
        let quarter = plan.shape.time / 4;
        let bodies = Bodies::new(plan.shape.size, true)?;
        let stop = CancellationToken::new();
        let shape = Shape {
            time: plan.shape.time + watch::PATIENCE * 2,
            ..plan.shape.clone()
        };
        let mut loads = Load::split(&shape, shape.time, &bodies);
        for load in &mut loads {
            load.stop = stop.clone();
            load.traced = true;
        }
        let started = loads.first().map_or_else(Instant::now, |l| l.started);
        let publishing = through_hub::publish(&self.hub, self.queue, loads, How::Window);
        let outage = async {
            // Whatever ends it, the load ends too.
            let _stop = stop.clone().drop_guard();
            plan.progress.say("before");
            tokio::time::sleep(quarter).await;
            plan.progress.say("outage");
            let struck = Instant::now();
            self.fault.strike(plan).await?;
            tokio::time::sleep_until((struck + quarter).into()).await;
            let mended = Instant::now();
            let watching = watch::spool(self.hub.clone());
            let (given_back, probed) = tokio::join!(
                self.fault.mend(plan),
                watch::probe(self.probe.0, self.probe.1)
            );
            given_back?;
            let probed = probed?;
            plan.progress.say("drain");
            let spool = tokio::time::timeout(watch::PATIENCE, watching).await;
            let spool = spool.ok().and_then(Result::ok).ok_or_else(|| {
                Failure::new("the spool was not drained in time; the load may be above what the broker takes, use a lower -r")
            })?;
            plan.progress.say("after");
            tokio::time::sleep(quarter).await;
            Ok::<_, Failure>((struck, mended, probed, spool))
        };
        let (published, outage) = tokio::join!(publishing, outage);
        let (struck, mended, probed, spool) = outage?;
        let since = |at: Instant| at.saturating_duration_since(started);
        let published = published?.into_trace();
        let samples: Vec<Sample> = published.iter().map(|a| sample(a, started)).collect();
        let seen = |at: Option<Instant>| at.map_or(since(probed), since);
        let moments = Moments {
            struck: since(struck),
            mended: since(mended),
            probed: since(probed),
            draining: seen(spool.draining),
            drained_first: seen(spool.first),
            empty: seen(spool.empty),
            end: samples.iter().map(|s| s.due).max().unwrap_or_default(),
        };
        Ok((moments, samples, spool))
    }
}

fn sample(answered: &Answered, started: Instant) -> Sample {
    Sample {
        due: answered.due.saturating_duration_since(started),
        latency: answered.at.saturating_duration_since(answered.due),
        spooled: answered.spooled,
    }
}

/// A row for each phase; the first is what the others are measured by.
fn rows(
    moments: &Moments,
    samples: &[Sample],
    kind: QueueType,
    spool: &str,
    fault: &str,
) -> Vec<RowReport> {
    let broker = rabbitmq::durability(kind);
    let mut before = None;
    let phases = moments.phases().into_iter().zip([
        ("before".to_owned(), broker),
        (format!("outage ({fault})"), spool),
        ("drain".to_owned(), spool),
        ("after".to_owned(), broker),
    ]);
    phases
        .map(|(phase, (name, durability))| {
            let seen = timeline::seen(samples, phase);
            let first = *before.get_or_insert(seen.rate.median);
            RowReport {
                name,
                durability: durability.to_owned(),
                rate: seen.rate,
                latencies: seen.latencies,
                ratio: stats::ratio(&[first], &[seen.rate.median]),
                cpu_per_message: None,
                spooled: seen.spooled,
            }
        })
        .collect()
}

/// What the run came to beside its rows.
#[allow(clippy::cast_precision_loss, reason = "counts are below 2^52")]
fn tell(report: &mut Report, moments: &Moments, samples: &[Sample], spool: &SpoolSeen) {
    let drain = moments.phases()[2];
    let drained = timeline::drained(samples, drain, spool.held);
    let ms = |d: Duration| (d.as_secs_f64() * 10_000.0).round() / 10.0;
    report.set(
        "outage_ms",
        ms(moments.probed.saturating_sub(moments.struck)),
    );
    report.set("recovery_ms", ms(moments.recovery()));
    report.set("drain_ms", ms(drain.length()));
    report.set("drained", drained);
    let rate = drained as f64 / drain.length().as_secs_f64().max(0.001);
    report.set("drain_rate", rate.round());
    report.set("spool_most", spool.most);
    report.note("recovery counts from the bare client's first confirm to the first spooled message's; drained/s counts what left the spool, the rates of the rows are answers to publishers");
}

const WARM_UP: Duration = Duration::from_secs(1);
/// How long a queue brings nothing until it counts as empty.
const IDLE: Duration = Duration::from_secs(3);
