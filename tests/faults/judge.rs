//! Judges a cell: the ledger's verdict, the bound of C6 from the test's own
//! record, and how long publishes waited.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use messaging_hub::conformance::ledger::{self, Outcome};
use serde::Serialize;

use crate::book::{Arrival, Attempt, Book, Reader};
use crate::cell::{Cell, Fault, Mode, Moment, Target};
use crate::hiccup::Hiccups;
use crate::hub::Seen;
use crate::site::PARTITIONS;
use crate::through::LEASED;

/// What the run did and saw, beside the book.
#[derive(Default)]
pub struct Facts {
    pub struck: Option<Instant>,
    /// When the blow had been dealt: a process that is killed takes messages up
    /// to its last moment.
    pub gone: Option<Instant>,
    pub mending: Option<Instant>,
    pub mended: Option<Instant>,
    /// Connections that the hub made to the broker from the strike on.
    pub reconnects: u64,
    /// When a connection was lost: what was under way then may come twice.
    losses: Vec<Instant>,
    /// When the strike cost a connection, that the hub should have noticed it.
    noticed: Option<Instant>,
    /// When a hub died.
    hubs: Vec<Instant>,
    /// What the foreign reader's own losses may repeat.
    pub repeatable: u64,
    pub left: u64,
    /// It was asked to end, and its exit status was not 0.
    stopped_badly: bool,
    state: String,
    spool: u64,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub cell: String,
    pub seed: u64,
    pub passed: bool,
    pub why: Vec<String>,
    pub published: u64,
    pub spooled: u64,
    pub repeated: u64,
    pub failed: u64,
    /// The state and the spool's depth when it was struck.
    pub struck_in: String,
    pub outage_ms: u128,
    pub outage_publishes: u64,
    pub p99_ms: f64,
    pub worst_ms: f64,
    pub limit_ms: f64,
    pub hiccup_ms: f64,
    pub sync_ms: f64,
    /// What publishes waited just before, when nothing was wrong.
    pub before_ms: f64,
    pub lost: u64,
    pub unexpected: u64,
    pub corrupted: u64,
    pub reordered: u64,
    pub left_over: u64,
    pub twice_in_process: u64,
    pub duplicates: u64,
    pub bound: u64,
    pub through_duplicates: u64,
    pub through_bound: u64,
    pub seconds: f64,
}

impl Facts {
    /// What `/v1/state` said just before the strike.
    pub fn at(&mut self, seen: &Seen) {
        self.state.clone_from(&seen.state);
        self.spool = seen.messages;
    }

    pub fn stopped(&mut self, status: ExitStatus) {
        self.stopped_badly |= !status.success();
    }

    pub fn lost_a_connection(&mut self, at: Instant) {
        self.losses.push(at);
    }

    /// Once it is over it is known what the fault cost.
    pub fn count_the_strike(&mut self, cell: Cell) {
        let struck = self.struck.expect("struck");
        match (cell.target, cell.fault) {
            (Target::Hub, Fault::Kill | Fault::Stop) => self.hubs.push(self.gone.unwrap_or(struck)),
            // A slow link need not cost the connection.
            (Target::RabbitMq, Fault::Slow) if self.reconnects == 0 => {}
            // What was written before the hub noticed.
            (Target::RabbitMq | Target::Kafka, _) => self.noticed = Some(struck + HEDGE),
            _ => {}
        }
    }

    /// How often the foreign reader may see something again: for each lost
    /// connection what was published and not known to be delivered, a lane's
    /// window at most; for a lost hub also what nobody had answered; and what
    /// its own losses repeat. A machine that let timers go off late, by `late`,
    /// let the hub notice as late.
    fn bound(&self, cell: Cell, book: &Book, late: Duration) -> u64 {
        let window = match cell.mode {
            Mode::Events => KAFKA_WINDOW,
            Mode::Hold | Mode::Local => RABBITMQ_WINDOW,
        };
        let doubt = |at: &Instant| in_doubt(book, *at, window);
        let noticed = self.noticed.map(|at| at + late);
        let lost: u64 = self.losses.iter().chain(&noticed).map(doubt).sum();
        let hubs = self.hubs.iter();
        let died: u64 = hubs.map(|at| doubt(at) + book.unanswered_by(*at)).sum();
        lost + died
    }
}

pub fn judge(
    cell: Cell,
    seed: u64,
    book: &Book,
    facts: &Facts,
    hiccups: &Hiccups,
    began: Instant,
) -> Row {
    let attempts = book.attempts();
    let foreign = book.arrivals(Reader::Foreign);
    let through = book.arrivals(Reader::Through);
    let verdict = ledger::check(&history(cell, book, facts, &foreign, &through));
    let reordered = reordered(cell, book, &foreign, &through);
    let twice = twice_in_process(book, &through);
    let of = |group: &str| -> u64 {
        let own = verdict
            .duplicated
            .iter()
            .filter(|d| d.finding.group == group);
        own.map(|d| d.extra).sum()
    };
    let struck = facts.struck.unwrap();
    let (late, _) = hiccups.worst(struck, struck + HEDGE);
    let in_doubt = facts.bound(cell, book, late);
    let bound = in_doubt + facts.repeatable;
    let through_bound = match facts.hubs.len() as u64 {
        0 => 0,
        hubs => in_doubt + hubs * LEASED,
    };
    // A server that must start again is away until it has.
    let mending = match (cell.target, cell.fault) {
        (Target::RabbitMq | Target::Kafka, Fault::Kill | Fault::Stop) => facts.mended.unwrap(),
        _ => facts.mending.unwrap(),
    };
    // While draining a publish may wait for room before it is written.
    let from = match cell.moment {
        Moment::Draining => struck,
        _ => struck - HEDGE,
    };
    let (p99, worst, counted) = waits(&attempts, from, struck, mending);
    let (hiccup, sync) = hiccups.worst(struck - HEDGE, mending + HEDGE);
    let before = usual(&attempts, struck);
    let limit = HEDGE + sync + hiccup * 2 + before + SLACK;
    let failed: Vec<&Attempt> = attempts
        .iter()
        .filter(|a| a.answered.is_some() && !a.outcome.is_accepted())
        .collect();
    let weak = attempts
        .iter()
        .filter(|a| a.outcome == Outcome::Spooled && a.problem.is_some())
        .count();
    let row = Row {
        cell: cell.to_string(),
        seed,
        passed: false,
        why: Vec::new(),
        published: verdict.accepted,
        spooled: count(&attempts, |a| a.outcome == Outcome::Spooled),
        repeated: count(&attempts, |a| a.again > 0),
        failed: failed.len() as u64,
        struck_in: format!("{} {}", facts.state, facts.spool),
        outage_ms: (mending - struck).as_millis(),
        outage_publishes: counted,
        p99_ms: millis(p99),
        worst_ms: millis(worst),
        limit_ms: millis(limit),
        hiccup_ms: millis(hiccup),
        sync_ms: millis(sync),
        before_ms: millis(before),
        lost: verdict.lost.len() as u64,
        unexpected: verdict.unexpected.len() as u64,
        corrupted: (verdict.corrupted.len() + verdict.ambiguous.len()) as u64,
        reordered: reordered.len() as u64,
        left_over: facts.left,
        twice_in_process: twice.len() as u64,
        duplicates: of(FOREIGN),
        bound,
        through_duplicates: of(THROUGH),
        through_bound,
        seconds: began.elapsed().as_secs_f64(),
    };
    let mut why = Vec::new();
    let mut must = |holds: bool, text: String| {
        if !holds {
            why.push(text);
        }
    };
    let some = |all: &[ledger::Finding]| {
        let all: Vec<String> = all
            .iter()
            .take(5)
            .map(|f| format!("{} to {}", f.id, f.group))
            .collect();
        all.join(", ")
    };
    must(row.lost == 0, format!("lost: {}", some(&verdict.lost)));
    must(
        row.unexpected == 0,
        format!("unexpected: {}", some(&verdict.unexpected)),
    );
    must(
        row.corrupted == 0,
        format!("corrupted: {}", some(&verdict.corrupted)),
    );
    must(
        row.reordered == 0,
        format!(
            "reordered: {}",
            reordered[..reordered.len().min(5)].join(", ")
        ),
    );
    must(row.left_over == 0, "the spool is not empty".to_owned());
    must(
        twice.is_empty(),
        format!(
            "twice in one process: {}",
            twice[..twice.len().min(5)].join(", ")
        ),
    );
    must(
        row.duplicates <= bound,
        "more duplicates than were in doubt".to_owned(),
    );
    must(
        row.through_duplicates <= through_bound,
        "more duplicates through the hub than were unsettled".to_owned(),
    );
    // A full disk may refuse, or take into memory only and say so, and may make
    // wait: C2 and C3 speak of a disk that syncs.
    let may_refuse = cell.target == Target::Hub && cell.fault == Fault::FullDisk;
    must(
        may_refuse || failed.is_empty(),
        format!(
            "publishes failed: {}",
            failed
                .first()
                .and_then(|a| a.problem.clone())
                .unwrap_or_default()
        ),
    );
    must(
        may_refuse || weak == 0,
        format!("{weak} were spooled in memory only"),
    );
    // The hub's clients wait for what happens to the hub, or to their own link.
    let waits_for_hub = cell.target == Target::Hub;
    must(
        waits_for_hub || worst <= limit,
        format!("a publish waited {worst:?}"),
    );
    must(
        !facts.stopped_badly,
        "the hub's exit status is not 0".to_owned(),
    );
    Row {
        passed: why.is_empty(),
        why,
        ..row
    }
}

fn history(
    cell: Cell,
    book: &Book,
    facts: &Facts,
    foreign: &[Arrival],
    through: &[Arrival],
) -> ledger::History {
    let mut delivered = deliveries(book, FOREIGN, foreign.iter());
    delivered.extend(deliveries(book, THROUGH, through.iter()));
    let mut groups = BTreeSet::from([THROUGH.to_owned()]);
    if cell.mode != Mode::Local {
        // A task that was settled locally never reaches the primary.
        groups.insert(FOREIGN.to_owned());
    }
    ledger::History {
        published: book.published(),
        delivered,
        expected_groups: BTreeMap::from([(book.topic.clone(), groups)]),
        left_over: BTreeMap::from([("spool".to_owned(), facts.left)]),
    }
}

pub fn deliveries<'a>(
    book: &Book,
    group: &str,
    arrivals: impl Iterator<Item = &'a Arrival>,
) -> Vec<ledger::Delivered> {
    arrivals
        .enumerate()
        .map(|(index, arrival)| ledger::Delivered {
            group: group.to_owned(),
            consumer: group.to_owned(),
            topic: book.topic.clone(),
            id: arrival.id.clone(),
            payload_hash: arrival.payload_hash,
            key: arrival.key.clone(),
            index: index as u64,
            redelivered: arrival.marked,
            settled: arrival.settled,
        })
        .collect()
}

/// What is out of order, where C5 promises order: what reached the primary
/// (the foreign reader's first deliveries), a stream's group, and what came from
/// the spool alone. Leases compete with those before them, and get dispatch
/// order only.
fn reordered(cell: Cell, book: &Book, foreign: &[Arrival], through: &[Arrival]) -> Vec<String> {
    // A link that was lost took deliveries with it, which the broker repeats
    // later and says so: when they came first, and whether in order, nobody saw.
    // A second copy of such a message is no first delivery either.
    let mut unseen = HashSet::new();
    let first = foreign.iter().filter(|a| {
        if a.again {
            unseen.insert(a.id.as_str());
        }
        !unseen.contains(a.id.as_str())
    });
    let mut found = out_of_order(book, FOREIGN, first);
    match cell.mode {
        Mode::Events => found.extend(out_of_order(book, THROUGH, through.iter())),
        Mode::Local => {
            let reached: HashSet<&str> = foreign.iter().map(|a| a.id.as_str()).collect();
            // What a hub had handed out when it died comes again from the next.
            for life in through.iter().map(|a| a.life).collect::<BTreeSet<u32>>() {
                let local = through
                    .iter()
                    .filter(|a| a.life == life && !a.marked && !reached.contains(a.id.as_str()));
                found.extend(out_of_order(book, "the spool", local));
            }
        }
        Mode::Hold => {}
    }
    found
}

fn out_of_order<'a>(
    book: &Book,
    group: &str,
    arrivals: impl Iterator<Item = &'a Arrival>,
) -> Vec<String> {
    let history = ledger::History {
        published: book.published(),
        delivered: deliveries(book, group, arrivals),
        ..ledger::History::default()
    };
    let found = ledger::check(&history).reordered.into_iter();
    found
        .map(|r| {
            format!(
                "{} after {} of {} to {group}",
                r.finding.id,
                r.after,
                r.key.as_deref().unwrap_or_default(),
            )
        })
        .collect()
}

/// What came again, within one life of the hub, after it had been settled.
fn twice_in_process(book: &Book, through: &[Arrival]) -> Vec<String> {
    let lives: BTreeSet<u32> = through.iter().map(|a| a.life).collect();
    let mut found = Vec::new();
    for life in lives {
        let own = through.iter().filter(|a| a.life == life);
        let history = ledger::History {
            published: book.published(),
            delivered: deliveries(book, "life", own),
            ..ledger::History::default()
        };
        let again = ledger::check(&history).duplicated.into_iter();
        found.extend(again.map(|d| d.finding.id));
    }
    found
}

/// The 99th percentile from a second after the strike on, the longest wait of
/// what was written between `from` and the mending and answered after the
/// strike, and how many these were.
fn waits(
    attempts: &[Attempt],
    from: Instant,
    struck: Instant,
    mending: Instant,
) -> (Duration, Duration, u64) {
    let judged = attempts.iter().filter(|a| {
        a.again == 0
            && a.written >= from
            && a.written <= mending
            && a.answered.is_some_and(|at| at >= struck)
    });
    let (mut worst, mut counted, mut settled) = (Duration::ZERO, 0, Vec::new());
    for attempt in judged {
        let took = attempt.took().unwrap_or_default();
        worst = worst.max(took);
        counted += 1;
        if attempt.written >= struck + HEDGE {
            settled.push(took);
        }
    }
    settled.sort_unstable();
    (permille(&settled, 990), worst, counted)
}

/// Of sorted waits the one that so many in a thousand do not exceed.
pub fn permille(sorted: &[Duration], share: usize) -> Duration {
    let place = sorted.len().saturating_sub(1) * share / 1000;
    sorted.get(place).copied().unwrap_or_default()
}

/// What the loss of a connection at this moment may repeat: what nobody had
/// said to be delivered, a lane's window at most.
pub fn in_doubt(book: &Book, at: Instant, window: u64) -> u64 {
    book.not_delivered_by(at).min(window)
}

/// What nine of ten publishes waited at most while nothing was wrong: the way,
/// the broker, and the lines in front of them. Where there were none: nothing.
fn usual(attempts: &[Attempt], struck: Instant) -> Duration {
    let mut waits: Vec<Duration> = attempts
        .iter()
        .filter(|a| a.outcome == Outcome::Delivered && a.answered.is_some_and(|at| at < struck))
        .filter_map(Attempt::took)
        .collect();
    waits.sort_unstable();
    let at = waits.len() * 9 / 10;
    waits.get(at).copied().unwrap_or_default()
}

fn count(attempts: &[Attempt], wanted: impl Fn(&Attempt) -> bool) -> u64 {
    attempts.iter().filter(|a| wanted(a)).count() as u64
}

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}

/// What a topic's lanes may have in flight together.
pub const RABBITMQ_WINDOW: u64 = 1_000;
pub const KAFKA_WINDOW: u64 = 10_000 * PARTITIONS;
const FOREIGN: &str = "foreign";
const THROUGH: &str = "through";
/// The longest hedge: `hub.hedge.max`.
pub const HEDGE: Duration = Duration::from_secs(1);
/// For the way to the hub and back, and its own work.
pub const SLACK: Duration = Duration::from_millis(250);
