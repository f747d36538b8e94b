//! The acceptance run: a steady load over HTTP while the broker is killed three
//! times, once in the middle of a drain, and the hub once, with the broker away.
//! Beside the hub a bare client tries the same queue or topic all the time after
//! the last restart: the hub may be a second behind its first confirm.
//!
//! `ACCEPTANCE=rabbitmq,kafka` runs it, `ACCEPTANCE_RATES` (messages a second)
//! says how often and how fast; default 5000,20000. Build it with `--release`:
//! the claim is about time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use messaging_hub::conformance::ledger::{self, Outcome};
use rdkafka::producer::{
    BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer,
};
use rdkafka::{ClientConfig, ClientContext};
use tokio::task::JoinHandle;

use crate::book::{Attempt, Book, Reader};
use crate::foreign::Foreign;
use crate::hiccup::Hiccups;
use crate::hub::{Hub, Seen};
use crate::judge::{self, HEDGE, SLACK, in_doubt, permille};
use crate::publisher::{Load, Shape};
use crate::site::{self, Node};
use crate::support::{unique, wait};

/// What one run found wrong.
#[derive(Default)]
pub struct Report {
    pub failed: Vec<String>,
}

impl Report {
    fn must(&mut self, holds: bool, text: String) {
        println!("  {} {text}", if holds { "PASS" } else { "FAIL" });
        if !holds {
            self.failed.push(text);
        }
    }
}

/// One run on a running broker. What it did is judged from the book, the
/// foreign reader and the meters; nothing comes from the hub's counters.
pub async fn run(node: &mut Node, rate: u32, folder: &Path) -> Report {
    let mut report = Report::default();
    println!("{} at {rate} messages a second", node.version());
    let topic = unique("faults.acceptance");
    site::configure_plain(folder, &topic, node);
    let mut hub = Hub::start(folder).await;
    wait::until(LONG, "the hub is connected", async || {
        hub.seen().await.is_some_and(|seen| seen.connected)
    })
    .await;
    let book = Arc::new(Book::new(&topic));
    let shape = Shape {
        window: rate as usize / 4,
        debt: u64::from(rate) / 20,
    };
    let load = Load::start(&book, &hub.url(), shape);
    let hiccups = Hiccups::start(folder);
    let mut course = Course {
        outages: Vec::new(),
        hubs: Vec::new(),
    };
    let began = Instant::now();
    load.set_rate(rate);
    tokio::time::sleep(WARM_UP).await;
    well(&hub, "before the first fault").await;

    // The first: in the middle of the load.
    course.kill(node, AWAY).await;
    let draining = |s: &Seen| s.state == "draining" && s.messages > 0;
    hub.until(LONG, LOOK, "a drain", draining).await;
    // The second: in the middle of the drain.
    let left = hub.seen().await.map_or(0, |s| s.messages);
    course.kill(node, AWAY).await;
    println!("  the second kill struck a drain with {left} messages left");
    well(&hub, "after the second kill").await;
    tokio::time::sleep(WARM_UP).await;

    // The third, and the hub with what it had spooled.
    let struck = Instant::now();
    node.kill().await;
    tokio::time::sleep(AWAY).await;
    let hub_killed = Instant::now();
    hub.kill();
    hub.start_again().await;
    let hub_back = Instant::now();
    course.hubs.push((hub_killed, hub_back));
    // No new publish is needed: everything is answered, and then nobody publishes.
    tokio::time::sleep(AWAY).await;
    load.set_rate(0);
    wait::until(LONG, "everything is answered", async || load.is_done()).await;
    let spooled = hub.seen().await.expect("the hub answers").messages;
    let until = Instant::now();
    let probe = Probe::start(node, &topic);
    // Fewer than it was while nobody published: the first confirm of the drain.
    let drained = async {
        let fewer = |s: &Seen| s.messages < spooled;
        hub.until(LONG, LOOK, "a confirm of the drain", fewer).await;
        Instant::now()
    };
    let (drained, ()) = tokio::join!(drained, node.restart());
    let served = Instant::now();
    course.outages.push((struck, until));
    let confirmed = probe.end().await;
    report.must(
        drained <= confirmed + BEHIND,
        format!(
            "the first drained confirm came {} a bare client's first ({} the server said that it serves), with {spooled} spooled and nothing published",
            apart(drained, confirmed),
            apart(drained, served),
        ),
    );
    load.set_rate(rate);
    well(&hub, "after the last kill").await;
    tokio::time::sleep(AFTERWARDS).await;
    let seen = hub.seen().await.expect("the hub answers");
    report.must(
        seen.is_well(),
        format!(
            "10 s after the last recovery, under load: {}, {} spooled",
            seen.state, seen.messages
        ),
    );
    load.set_rate(0);
    wait::until(LONG, "everything is answered at the end", async || {
        load.is_done()
    })
    .await;
    well(&hub, "at the end").await;
    let lasted = began.elapsed();
    load.stop().await;
    let status = hub.stop().await;
    report.must(status.success(), format!("the hub ends with {status}"));
    println!(
        "  {} lines in {:.1} s, hub away {} ms",
        book.attempts().len(),
        lasted.as_secs_f64(),
        hub_back.duration_since(hub_killed).as_millis()
    );
    latencies(&mut report, &book, &course, &hiccups);
    hiccups.stop().await;
    let mut foreign = match node {
        Node::Rabbit(node) => Foreign::of_queue(&book, node.url().to_owned(), topic.clone()),
        Node::Kafka(node) => Foreign::of_topic(&book, node.bootstrap().to_owned()),
    };
    wait::until(READING, "the foreign reader is at the end", async || {
        foreign.ends() >= 2
    })
    .await;
    foreign.end().await;
    let window = match node {
        Node::Rabbit(_) => judge::RABBITMQ_WINDOW,
        Node::Kafka(_) => judge::KAFKA_WINDOW,
    };
    account(&mut report, &book, &course, window);
    report
}

struct Course {
    /// From each kill of the broker until the next thing was done for it.
    outages: Vec<(Instant, Instant)>,
    hubs: Vec<(Instant, Instant)>,
}

impl Course {
    async fn kill(&mut self, node: &mut Node, away: Duration) {
        let struck = Instant::now();
        node.kill().await;
        tokio::time::sleep_until((struck + away).into()).await;
        self.outages.push((struck, Instant::now()));
        node.restart().await;
    }
}

async fn well(hub: &Hub, when: &str) {
    hub.until(LONG, LOOK, when, Seen::is_well).await;
}

/// A bare client that publishes to the hub's queue or topic until one confirm
/// came.
struct Probe {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Option<Instant>>,
}

impl Probe {
    fn start(node: &Node, topic: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (over, topic) = (stop.clone(), topic.to_owned());
        let task = match node {
            Node::Rabbit(node) => {
                let url = node.url().to_owned();
                tokio::spawn(async move {
                    while !over.load(Ordering::Relaxed) {
                        let tried = tokio::time::timeout(TRY, confirm(&url, &topic)).await;
                        if let Ok(Ok(true)) = tried {
                            return Some(Instant::now());
                        }
                        tokio::time::sleep(AGAIN).await;
                    }
                    None
                })
            }
            Node::Kafka(node) => {
                let bootstrap = node.bootstrap().to_owned();
                tokio::task::spawn_blocking(move || deliver(&bootstrap, &topic, &over))
            }
        };
        Self { stop, task }
    }

    /// When its confirm came.
    async fn end(self) -> Instant {
        let Self { stop, task } = self;
        let ended = tokio::time::timeout(LONG, task).await;
        stop.store(true, Ordering::Relaxed);
        let confirmed = ended
            .expect("the bare client gets through")
            .expect("it does not panic");
        confirmed.expect("a confirm")
    }
}

async fn confirm(url: &str, queue: &str) -> Result<bool, lapin::Error> {
    let connection =
        lapin::Connection::connect(url, lapin::ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let properties = lapin::BasicProperties::default()
        .with_message_id(PROBE.into())
        .with_delivery_mode(2);
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            b"probe",
            properties,
        )
        .await?
        .await?;
    let _closed = connection.close(200, "done".into()).await;
    Ok(confirm.is_ack())
}

/// Notes when the first record was delivered.
struct First(std::sync::Mutex<Option<Instant>>);

impl ClientContext for First {}

impl ProducerContext for First {
    type DeliveryOpaque = ();
    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_ok() {
            self.0.lock().unwrap().get_or_insert_with(Instant::now);
        }
    }
}

fn deliver(bootstrap: &str, topic: &str, over: &AtomicBool) -> Option<Instant> {
    let producer: ThreadedProducer<First> = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "200")
        .set("linger.ms", "0")
        .create_with_context(First(std::sync::Mutex::new(None)))
        .unwrap();
    let record = BaseRecord::to(topic).key(PROBE).payload("probe");
    producer.send(record).map_err(|(e, _)| e).unwrap();
    while !over.load(Ordering::Relaxed) {
        if let Some(at) = *producer.context().0.lock().unwrap() {
            return Some(at);
        }
        std::thread::park_timeout(LOOK);
    }
    None
}

/// How long publishes waited from a second after a kill until the broker was
/// started again, and at worst from the kill on.
fn latencies(report: &mut Report, book: &Book, course: &Course, hiccups: &Hiccups) {
    let attempts = book.attempts();
    let refused = attempts
        .iter()
        .filter(|a| a.answered.is_some() && !a.outcome.is_accepted());
    report.must(
        refused.clone().next().is_none(),
        format!("{} publishes failed", refused.count()),
    );
    let weak = attempts
        .iter()
        .filter(|a| a.outcome == Outcome::Spooled && a.problem.is_some());
    report.must(
        weak.count() == 0,
        "what was spooled was on the disk".to_owned(),
    );
    for (number, (struck, until)) in course.outages.iter().enumerate() {
        // The hub's own absence is no wait that it could shorten.
        let met_no_hub = |a: &Attempt| {
            let mut hubs = course.hubs.iter();
            hubs.any(|(died, back)| {
                let near = *died - PATIENCE..=*back + SETTLED;
                near.contains(&a.written) && a.answered.is_none_or(|at| at >= *died)
            })
        };
        let of = |from: Instant| {
            let within = attempts
                .iter()
                .filter(|a| a.again == 0 && a.written >= from && a.written < *until)
                .filter(|a| !met_no_hub(a));
            let mut waits: Vec<Duration> = within.filter_map(Attempt::took).collect();
            waits.sort_unstable();
            waits
        };
        let (all, settled) = (of(*struck), of(*struck + SETTLED));
        let (late, sync) = hiccups.worst(*struck, *until);
        let worst = permille(&all, 1000);
        let limit = HEDGE + sync + late * 2 + SLACK;
        println!(
            "  outage {}: {:.1} s, {} publishes; from 1 s on p50 {:.1} p99 {:.1} p99.9 {:.1} ms; the worst of all {:.0} ms (limit {:.0}); the machine's worst hiccup {:.1} ms, sync {:.1} ms",
            number + 1,
            until.duration_since(*struck).as_secs_f64(),
            all.len(),
            millis(permille(&settled, 500)),
            millis(permille(&settled, 990)),
            millis(permille(&settled, 999)),
            millis(worst),
            millis(limit),
            millis(late),
            millis(sync),
        );
        // One stall or many small waits: when the slow ones were written.
        let slow: Vec<Duration> = attempts
            .iter()
            .filter(|a| a.again == 0 && a.written >= *struck + SETTLED && a.written < *until)
            .filter(|a| !met_no_hub(a) && a.took().is_some_and(|took| took >= P99))
            .map(|a| a.written.duration_since(*struck))
            .collect();
        if let (Some(first), Some(last)) = (slow.iter().min(), slow.iter().max()) {
            println!(
                "  outage {}: {} publishes took {} ms or more, written {:.2} to {:.2} s after the kill",
                number + 1,
                slow.len(),
                P99.as_millis(),
                first.as_secs_f64(),
                last.as_secs_f64(),
            );
        }
        report.must(
            worst <= limit,
            format!(
                "outage {}: no publish waits longer than the hedge and a sync",
                number + 1
            ),
        );
        report.must(
            !settled.is_empty() && permille(&settled, 990) < P99,
            format!("outage {}: p99 under {} ms", number + 1, P99.as_millis()),
        );
    }
}

/// What the foreign reader found, against the book.
fn account(report: &mut Report, book: &Book, course: &Course, window: u64) {
    let mut arrivals = book.arrivals(Reader::Foreign);
    arrivals.retain(|a| a.id != PROBE && !a.id.is_empty());
    let delivered = judge::deliveries(book, GROUP, arrivals.iter());
    let verdict = ledger::check(&ledger::History {
        published: book.published(),
        delivered,
        expected_groups: BTreeMap::from([(book.topic.clone(), [GROUP.to_owned()].into())]),
        ..ledger::History::default()
    });
    let duplicates: u64 = verdict.duplicated.iter().map(|d| d.extra).sum();
    let doubt = |at: Instant| in_doubt(book, at, window);
    let losses: u64 = course
        .outages
        .iter()
        .map(|(struck, _)| doubt(*struck + HEDGE))
        .sum();
    let hubs: u64 = course
        .hubs
        .iter()
        .map(|(died, _)| doubt(*died) + book.unanswered_by(*died))
        .sum();
    let (lost, reordered) = (verdict.lost.len(), verdict.reordered.len());
    let corrupted = verdict.corrupted.len() + verdict.ambiguous.len();
    let unexpected = verdict.unexpected.len();
    report.must(
        verdict.accepted >= 100_000,
        format!("{} messages were accepted", verdict.accepted),
    );
    report.must(
        lost + reordered + corrupted + unexpected == 0,
        format!("{} read: lost {lost}, reordered {reordered}, corrupted {corrupted}, unexpected {unexpected}", arrivals.len()),
    );
    report.must(
        duplicates <= losses + hubs,
        format!(
            "duplicated {duplicates}, at most {} were in doubt",
            losses + hubs
        ),
    );
}

fn apart(at: Instant, other: Instant) -> String {
    match at.checked_duration_since(other) {
        Some(later) => format!("{} ms after", later.as_millis()),
        None => format!("{} ms before", (other - at).as_millis()),
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

const PROBE: &str = "probe";
const GROUP: &str = "foreign";
const WARM_UP: Duration = Duration::from_secs(4);
const AWAY: Duration = Duration::from_secs(4);
const AFTERWARDS: Duration = Duration::from_secs(10);
const SETTLED: Duration = Duration::from_secs(1);
const BEHIND: Duration = Duration::from_secs(1);
const P99: Duration = Duration::from_millis(10);
/// Longer than a client waits for any answer before it connects again.
const PATIENCE: Duration = Duration::from_secs(6);
const LOOK: Duration = Duration::from_millis(5);
const TRY: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(120);
const READING: Duration = Duration::from_secs(400);
