//! The course of one cell: set up, wait for the moment, strike, go on, mend,
//! wait until all is well, send the last ones, read to the end, judge.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use messaging_hub::conformance::ledger::Outcome;

use crate::book::{Book, Reader};
use crate::cell::{Cell, Fault, Mode, Moment, Target};
use crate::disk::SmallDisk;
use crate::foreign::Foreign;
use crate::hiccup::Hiccups;
use crate::hub::{Hub, Seen};
use crate::judge::{self, Facts, Row};
use crate::publisher::{Load, Shape};
use crate::site::{self, Node, Site};
use crate::support::{Direction, TcpProxy, unique, wait};
use crate::through::Through;

/// What a cell has while it runs.
struct Run<'a> {
    cell: Cell,
    site: &'a mut Site,
    hub: Hub,
    disk: Option<SmallDisk>,
    load: Load,
    foreign: Foreign,
    through: Through,
    book: Arc<Book>,
    began: Instant,
    random: fastrand::Rng,
    facts: Facts,
    /// How long a paused process is paused; else as long as it takes to see.
    paused_for: Option<Duration>,
}

/// Runs a cell. Err: why it cannot be run on this machine.
pub async fn cell(
    cell: Cell,
    site: &mut Site,
    seed: u64,
    folder: &Path,
    paused_for: Option<Duration>,
) -> Result<Row, String> {
    let began = Instant::now();
    site.mend().await;
    let topic = unique("faults.cell");
    site::configure(folder, &cell, &topic, site);
    let disk = match (cell.target, cell.fault) {
        (Target::Hub, Fault::FullDisk) => Some(SmallDisk::mount(&folder.join("data"))?),
        _ => None,
    };
    let book = Arc::new(Book::new(&topic));
    let hub = Hub::start(folder).await;
    wait::until(START, "the hub is connected", async || {
        hub.seen().await.is_some_and(|seen| seen.connected)
    })
    .await;
    let foreign = match &site.node {
        Node::Rabbit(node) => {
            let port = site.reader_link.as_ref().unwrap().port();
            Foreign::of_queue(
                &book,
                format!("{}?heartbeat=2", node.url_via(port)),
                site::audit(&topic),
            )
        }
        Node::Kafka(node) => Foreign::of_topic(&book, node.bootstrap().to_owned()),
    };
    let through = Through::start(&book, &hub.reader_url(), hub.life(), cell.mode);
    let load = Load::start(&book, &hub.url(), Shape::CELL);
    let hiccups = Hiccups::start(folder);
    let mut run = Run {
        cell,
        site: &mut *site,
        hub,
        disk,
        load,
        foreign,
        through,
        book,
        began,
        random: fastrand::Rng::with_seed(seed),
        facts: Facts::default(),
        paused_for,
    };
    run.course().await;
    let Run {
        mut hub,
        load,
        mut foreign,
        through,
        book,
        mut facts,
        ..
    } = run;
    load.stop().await;
    foreign.end().await;
    through.end().await;
    facts.repeatable = foreign.repeatable();
    let status = hub.stop().await;
    facts.stopped(status);
    let mut row = judge::judge(cell, seed, &book, &facts, &hiccups, began);
    hiccups.stop().await;
    if row.lost > 0
        && let Node::Rabbit(node) = &site.node
    {
        // Lost for good, or held back by the hub until it ended?
        let queues = node.ctl(&["list_queues", "name", "messages"]).await;
        let own = queues.lines().filter(|line| line.contains(&topic));
        row.why.push(format!(
            "in the queues after the hub's end: {}",
            own.collect::<Vec<_>>().join(", ")
        ));
    }
    Ok(row)
}

impl Run<'_> {
    /// So that a run that hangs says where.
    fn says(&self, stage: &str) {
        println!(
            "  {} {:.1} s: {stage}; {} answered",
            self.cell,
            self.began.elapsed().as_secs_f64(),
            self.load.answered()
        );
    }

    async fn course(&mut self) {
        self.says("set up");
        self.load.allow(WARM_UP);
        self.answered("the first messages are answered").await;
        self.well("before the fault").await;
        self.moment().await;
        self.says("strike");
        self.facts.struck = Some(Instant::now());
        self.facts.reconnects = self.site.link.counters().accepted;
        self.strike().await;
        self.facts.gone = Some(Instant::now());
        self.outage().await;
        self.says("mend");
        self.mend().await;
        self.says("mended");
        self.facts.reconnects = self.site.link.counters().accepted - self.facts.reconnects;
        self.facts.count_the_strike(self.cell);
        self.facts.mended = Some(Instant::now());
        self.load.set_rate(0);
        self.answered("everything is answered").await;
        self.says("answered");
        self.well("after the fault").await;
        self.says("well");
        self.load.allow(LAST);
        self.answered("the last messages are answered").await;
        self.well("at the end").await;
        self.facts.left = self.hub.seen().await.map_or(u64::MAX, |s| s.messages);
        self.says("read to the end");
        self.read_to_the_end().await;
        self.says("judge");
    }

    /// Until the moment at which the fault is to strike.
    async fn moment(&mut self) {
        match self.cell.moment {
            Moment::Idle => {}
            Moment::One => {
                let seen = self.hub.seen().await.expect("the hub answers");
                self.facts.at(&seen);
                // Not waited for: the fault meets it on its way.
                self.load.allow(1);
                return;
            }
            Moment::Saturated => self.saturate().await,
            Moment::Draining => {
                for attempt in 0.. {
                    self.saturate().await;
                    self.make_a_drain(attempt + 1).await;
                    if self.reach_the_drain().await {
                        return;
                    }
                    assert!(attempt < 5, "a drain was never seen in time");
                    self.well("after a drain that was over too soon").await;
                }
            }
        }
        if let Some(seen) = self.hub.seen().await {
            self.facts.at(&seen);
        }
    }

    async fn saturate(&mut self) {
        self.load.set_rate(RATE);
        let goal = self.load.answered() + self.random.u64(500..1_000);
        wait::until(LONG, "publishes before the fault", async || {
            self.load.answered() >= goal
        })
        .await;
    }

    /// An outage that fills the spool, and its end. A drain that was over too soon
    /// is made again from a fuller spool.
    async fn make_a_drain(&mut self, times: u64) {
        let wanted = self.random.u64(1_500..2_500) * times;
        if self.cell.mode == Mode::Local {
            // A local reader would empty the spool while it fills.
            self.through.end().await;
        }
        self.site.link.cut().await;
        self.facts.lost_a_connection(Instant::now());
        wait::until(LONG, "messages in the spool", async || {
            self.hub.seen().await.is_some_and(|s| s.messages >= wanted)
        })
        .await;
        // So that the drain can be seen: it lasts some seconds.
        let narrow = match self.cell.mode {
            // Written in compressed batches.
            Mode::Events => NARROW / 20,
            Mode::Hold | Mode::Local => NARROW,
        };
        self.site.link.set_rate(Some(narrow));
        self.site.link.heal().await;
    }

    /// True in the middle of a drain; false when it was too quick.
    async fn reach_the_drain(&mut self) -> bool {
        let deadline = Instant::now() + LONG;
        let into = Duration::from_millis(self.random.u64(10..600));
        let mut since = None;
        let found = loop {
            assert!(Instant::now() < deadline, "the spool never drained");
            let Some(seen) = self.hub.seen().await else {
                continue;
            };
            // The worst state of all lanes: with some of them always waiting for a
            // late confirm of what they drain, they are not seen as draining.
            match (seen.state.as_str(), since) {
                ("draining" | "suspect", None) => since = Some(Instant::now()),
                ("draining" | "suspect", Some(at))
                    if at.elapsed() >= into && seen.remaining > 0 =>
                {
                    self.facts.at(&seen);
                    break true;
                }
                ("primary", Some(_)) => break false,
                _ => {}
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        };
        self.site.link.set_rate(None);
        if self.cell.mode == Mode::Local {
            self.through.start_again().await;
        }
        found
    }

    async fn strike(&mut self) {
        match (self.cell.target, self.cell.fault) {
            (Target::RabbitMq | Target::Kafka, fault) => self.strike_broker(fault).await,
            (Target::Hub, fault) => self.strike_hub(fault).await,
            (Target::Consumer, fault) => self.strike_consumer(fault).await,
        }
    }

    async fn strike_broker(&mut self, fault: Fault) {
        let link = &self.site.link;
        match fault {
            Fault::Kill => self.site.node.kill().await,
            Fault::Stop => self.site.node.stop().await,
            Fault::Pause => self.site.node.pause().await,
            Fault::Cut => link.cut().await,
            Fault::HalfOpen => link.half_open(),
            Fault::Slow => {
                link.set_delay(DELAY);
                link.set_rate(Some(THREE_MBIT));
            }
            Fault::LostConfirm => link.drop_direction(Direction::ToClient),
            Fault::FullDisk => self.site.node.fill_disk().await,
        }
    }

    async fn strike_hub(&mut self, fault: Fault) {
        match fault {
            Fault::Kill => self.hub.kill(),
            Fault::Stop => {
                let status = self.hub.stop().await;
                self.facts.stopped(status);
            }
            Fault::Pause => self.hub.pause(),
            Fault::FullDisk => self.disk.as_ref().expect("a small disk").fill(),
            Fault::Cut | Fault::HalfOpen | Fault::Slow => strike_links(&self.links(), fault).await,
            // Its answers do not arrive.
            Fault::LostConfirm => {
                for link in self.links() {
                    link.drop_direction(Direction::ToClient);
                }
            }
        }
    }

    async fn strike_consumer(&mut self, fault: Fault) {
        match fault {
            Fault::Kill => {
                self.through.kill().await;
                self.foreign.kill().await;
            }
            Fault::Stop => {
                self.through.end().await;
                self.foreign.end().await;
            }
            Fault::Cut | Fault::HalfOpen | Fault::Slow => strike_links(&self.links(), fault).await,
            // What a reader sends that has no confirm: its acks.
            Fault::LostConfirm => {
                for link in self.links() {
                    link.drop_direction(Direction::ToServer);
                }
            }
            Fault::Pause | Fault::FullDisk => unreachable!("not applicable"),
        }
    }

    /// The links that a fault of the hub's clients, or of the readers, is on.
    fn links(&self) -> Vec<&TcpProxy> {
        let mut links = vec![&self.hub.reader_proxy];
        if self.cell.target == Target::Hub {
            links.push(&self.hub.proxy);
        } else {
            links.extend(&self.site.reader_link);
        }
        links
    }

    /// As long as the fault lasts.
    async fn outage(&mut self) {
        if matches!(self.cell.moment, Moment::Idle | Moment::One) {
            self.load.set_rate(GENTLE);
        }
        let struck = self.facts.struck.expect("struck");
        if let Some(lasting) = self.paused_for {
            tokio::time::sleep_until((struck + lasting).into()).await;
            return;
        }
        let wanted = self.random.usize(100..600);
        match (self.cell.target, self.cell.fault) {
            // It comes back at once; what it went through is over.
            (Target::Hub, Fault::Kill | Fault::Stop) => {}
            // Nothing passes: it lasts for a while.
            (Target::Hub, Fault::Pause | Fault::Cut | Fault::HalfOpen | Fault::LostConfirm)
            | (Target::Consumer, Fault::Cut | Fault::HalfOpen | Fault::LostConfirm) => {
                let lasting = Duration::from_millis(self.random.u64(500..2_500));
                tokio::time::sleep_until((struck + lasting).into()).await;
            }
            (Target::Hub, Fault::Slow | Fault::FullDisk)
            | (Target::Consumer, _)
            | (_, Fault::Slow) => {
                wait::until(LONG, "publishes during the fault", async || {
                    self.book.count_since(struck, |_| true) >= wanted
                })
                .await;
            }
            _ => {
                wait::until(LONG, "spooled publishes during the fault", async || {
                    let spooled = |outcome| outcome == Outcome::Spooled;
                    self.book.count_since(struck, spooled) >= wanted
                })
                .await;
            }
        }
    }

    async fn mend(&mut self) {
        self.facts.mending = Some(Instant::now());
        // A server takes its time to start; what is published meanwhile is drained.
        self.load.set_rate(GENTLE);
        match (self.cell.target, self.cell.fault) {
            (Target::RabbitMq | Target::Kafka, Fault::Kill | Fault::Stop) => {
                self.site.node.restart().await;
            }
            (Target::RabbitMq | Target::Kafka, Fault::Pause) => self.site.node.resume().await,
            (Target::RabbitMq | Target::Kafka, Fault::FullDisk) => self.site.node.free_disk().await,
            (Target::RabbitMq | Target::Kafka, fault) => {
                if fault == Fault::LostConfirm {
                    // What was on its way back is lost for good.
                    self.site.link.cut().await;
                }
                self.site.heal_links().await;
            }
            (Target::Hub, Fault::Kill | Fault::Stop) => {
                self.hub.start_again().await;
            }
            (Target::Hub, Fault::Pause) => self.hub.resume(),
            (Target::Hub, Fault::FullDisk) => self.disk.as_ref().expect("a small disk").free(),
            (Target::Consumer, Fault::Kill | Fault::Stop) => {
                self.through.start_again().await;
                self.foreign.start_again();
            }
            (Target::Hub | Target::Consumer, fault) => {
                for link in self.links() {
                    if fault == Fault::LostConfirm {
                        link.cut().await;
                    }
                    link.set_delay(Duration::ZERO);
                    link.set_rate(None);
                    link.heal().await;
                }
            }
        }
    }

    async fn answered(&self, what: &str) {
        let mut last = (self.load.answered(), Instant::now());
        loop {
            if self.load.is_done() {
                return;
            }
            let now = self.load.answered();
            if now != last.0 {
                last = (now, Instant::now());
            }
            assert!(
                last.1.elapsed() < LONG,
                "{what}: no answer any more after {now}; the hub says {}",
                self.hub.everything().await
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn well(&self, when: &str) {
        let pause = Duration::from_millis(20);
        self.hub.until(LONG, pause, when, Seen::is_well).await;
    }

    /// Until both readers have everything, or nothing comes any more; then they
    /// look whether there is more, which could only be repeats.
    async fn read_to_the_end(&self) {
        let foreign = self.foreign.ends();
        let empty = self.through.empty();
        let published = self.book.published().into_iter();
        let wanted: BTreeSet<String> = published
            .filter(|p| p.outcome.is_accepted())
            .map(|p| p.id)
            .collect();
        let has_all = |reader: Reader| {
            let arrivals = self.book.arrivals(reader);
            let arrived: BTreeSet<&String> = arrivals.iter().map(|a| &a.id).collect();
            wanted.iter().all(|id| arrived.contains(id))
        };
        let mut last = (0, Instant::now());
        // The judge says what is missing.
        while last.1.elapsed() < QUIET {
            // What was settled locally never reaches the primary.
            let foreign = self.cell.mode == Mode::Local || has_all(Reader::Foreign);
            if foreign && has_all(Reader::Through) {
                break;
            }
            let arrived = self.book.arrived(Reader::Foreign) + self.book.arrived(Reader::Through);
            if arrived != last.0 {
                last = (arrived, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // A quorum queue that was killed young may not say how long it is.
        let deadline = Instant::now() + LOOKING;
        while Instant::now() < deadline {
            let leases = self.cell.mode == Mode::Events || self.through.empty() >= empty + 4;
            if leases && self.foreign.ends() >= foreign + 2 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.says("a reader could not see whether it is at the end");
    }
}

async fn strike_links(links: &[&TcpProxy], fault: Fault) {
    for link in links {
        match fault {
            Fault::Cut => link.cut().await,
            Fault::HalfOpen => link.half_open(),
            _ => {
                link.set_delay(DELAY);
                link.set_rate(Some(THREE_MBIT));
            }
        }
    }
}

const WARM_UP: u64 = 100;
const LAST: u64 = 300;
/// Messages a second when saturated, all publishers together.
pub const RATE: u32 = 2_000;
/// While there was nothing to do before the fault.
const GENTLE: u32 = 200;
const DELAY: Duration = Duration::from_millis(100);
const THREE_MBIT: u64 = 3_000_000 / 8;
/// Bytes a second to a broker that is drained to: a drain that can be struck.
const NARROW: u64 = 1_500_000;
const START: Duration = Duration::from_secs(60);
/// How long readers look for repeats once they have everything.
const LOOKING: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(90);
/// A reader that gets nothing for this long gets no more. Leases of a reader
/// that died come back sooner; a group at Kafka may need half a minute after
/// its coordinator was stopped.
const QUIET: Duration = Duration::from_secs(60);
