//! A child process is killed with SIGKILL while several tasks publish, ack and
//! commit; what it said on its standard output before is the ledger that its
//! journal is judged by.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use super::*;

/// This test is also the child, where the environment names a folder.
#[test]
fn a_kill_takes_nothing_that_was_promised() {
    if let Some(dir) = std::env::var_os(CHILD_DIR) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(child(PathBuf::from(dir)));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::default();
    for round in 0..ROUNDS {
        let mut child = spawn(dir.path(), round);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut confirmed = 0;
        while confirmed < 300 + 200 * round {
            let line = lines.next().expect("the child ended by itself").unwrap();
            confirmed += usize::from(ledger.note(&line));
        }
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died is said.
        for line in lines.map_while(Result::ok) {
            ledger.note(&line);
        }
    }
    assert!(ledger.acked.len() > 20, "{} acks", ledger.acked.len());
    assert!(!ledger.committed.is_empty());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(judge(dir.path(), &ledger));
}

fn spawn(dir: &Path, round: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "durable::killed::a_kill_takes_nothing_that_was_promised",
        ])
        .env(CHILD_DIR, dir)
        .env(CHILD_ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What the child said.
#[derive(Default)]
struct Ledger {
    /// Confirmed, by topic and publisher.
    confirmed: BTreeMap<(String, String), Vec<u64>>,
    /// Where in its stream, by publisher and number.
    positions: BTreeMap<(String, u64), (i32, i64)>,
    /// Acks that were begun.
    tried: BTreeSet<String>,
    /// Acks that something confirmed later proves synced.
    acked: BTreeSet<String>,
    /// Positions, proved in the same way.
    committed: BTreeMap<i32, i64>,
}

impl Ledger {
    /// Whether this was a confirmation.
    fn note(&mut self, line: &str) -> bool {
        let Some((_, said)) = line.split_once("LEDGER ") else {
            return false;
        };
        // A line that the kill has cut says nothing.
        let Some(said) = said.strip_suffix(" .") else {
            return false;
        };
        let words: Vec<&str> = said.split(' ').collect();
        match words.as_slice() {
            ["confirmed", topic, publisher, number] => {
                let key = ((*topic).to_owned(), (*publisher).to_owned());
                let number = number.parse().unwrap();
                self.confirmed.entry(key).or_default().push(number);
                return true;
            }
            ["position", publisher, number, partition, offset] => {
                let key = ((*publisher).to_owned(), number.parse().unwrap());
                let at = (partition.parse().unwrap(), offset.parse().unwrap());
                self.positions.insert(key, at);
            }
            ["tried", body] => {
                self.tried.insert((*body).to_owned());
            }
            ["acked", body] => {
                self.acked.insert((*body).to_owned());
            }
            ["committed", partition, next] => {
                let (partition, next) = (partition.parse().unwrap(), next.parse().unwrap());
                self.committed.insert(partition, next);
            }
            other => panic!("{other:?}"),
        }
        false
    }
}

async fn judge(dir: &Path, ledger: &Ledger) {
    let broker = open(dir).await;
    for name in [KEPT, WORKED] {
        let mut found: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        while let Some(delivery) = next(&broker, name).await {
            let body = body(&delivery);
            assert!(seen.insert(body.clone()), "{name}: {body} is there twice");
            let was_acked = name == WORKED && ledger.acked.contains(&body);
            assert!(!was_acked, "{name}: {body} was acked and synced");
            let (publisher, number) = body.split_once('/').map_or_else(
                || panic!("{body}"),
                |(p, n)| (p.to_owned(), n.parse().unwrap()),
            );
            assert_eq!(
                delivery.key.as_ref().and_then(|k| k.as_str()),
                Some(publisher.as_str())
            );
            found.entry(publisher).or_default().push(number);
            delivery.ack().await.unwrap();
        }
        for (publisher, numbers) in &found {
            assert!(numbers.is_sorted(), "{name}: {publisher}: {numbers:?}");
        }
        for ((topic, publisher), numbers) in &ledger.confirmed {
            if topic != name {
                continue;
            }
            let there = found.get(publisher).cloned().unwrap_or_default();
            for number in numbers {
                let body = format!("{publisher}/{number}");
                let may_be_done = name == WORKED && ledger.tried.contains(&body);
                assert!(
                    there.contains(number) || may_be_done,
                    "{name}: {body} was confirmed and is lost"
                );
            }
        }
    }
    let events = topic(EVENTS);
    for (partition, next) in &ledger.committed {
        let now = broker.offset(GROUP, &events, *partition).await.unwrap();
        assert!(
            now >= Some(*next),
            "partition {partition}: {now:?} < {next}"
        );
    }
    let described = broker.topic_metadata(&events).await.unwrap();
    let held: i64 = described.partitions.iter().map(|p| p.high_watermark).sum();
    let everything = SubscribeOptions::default().starting(StartFrom::Earliest);
    let mut reader = broker.consume(&stream(EVENTS), &everything).await.unwrap();
    let mut there = BTreeMap::new();
    let mut last: BTreeMap<String, u64> = BTreeMap::new();
    let mut offsets: BTreeMap<i32, i64> = BTreeMap::new();
    for delivery in take(&mut reader, usize::try_from(held).unwrap()).await {
        let (partition, offset) = (delivery.partition.unwrap(), delivery.offset.unwrap());
        let expected = offsets.entry(partition).or_insert(0);
        assert_eq!(offset, *expected, "partition {partition} has a hole");
        *expected += 1;
        let body = body(&delivery);
        let (publisher, number) = body.split_once('/').unwrap();
        let number: u64 = number.parse().unwrap();
        let before = last.insert(publisher.to_owned(), number);
        assert!(
            before < Some(number),
            "{publisher}: {number} after {before:?}"
        );
        there.insert((publisher.to_owned(), number), (partition, offset));
    }
    for (what, at) in &ledger.positions {
        assert_eq!(there.get(what), Some(at), "{what:?}");
    }
    broker.close().await.unwrap();
}

/// Publishes, acks and commits until it is killed.
async fn child(dir: PathBuf) {
    let round = std::env::var(CHILD_ROUND).unwrap();
    let broker = open(&dir).await;
    let mut tasks = tokio::task::JoinSet::new();
    for publisher in 0..3 {
        for name in [KEPT, WORKED, EVENTS] {
            let (broker, who) = (broker.clone(), format!("r{round}p{publisher}"));
            tasks.spawn(async move { publish_for_ever(&broker, name, &who).await });
        }
    }
    let worker = broker.clone();
    tasks.spawn(async move { work(&worker).await });
    let follower = broker.clone();
    tasks.spawn(async move { follow(&follower).await });
    tasks.join_next().await;
    panic!("a task ended");
}

async fn publish_for_ever(broker: &EmbeddedBroker, name: &'static str, who: &str) {
    let mut number = 0_u64;
    loop {
        let numbers: Vec<u64> = (number..number + 5).collect();
        number += 5;
        let messages = numbers
            .iter()
            .map(|n| Arc::new(message(&format!("{who}/{n}")).with_key(who)))
            .collect();
        let receipts = broker
            .publish_batch(&topic(name), messages, &PublishOptions::default())
            .await;
        for (n, receipt) in numbers.iter().zip(receipts) {
            let Outcome::Delivered { position, .. } = receipt.unwrap().outcome else {
                panic!("not confirmed");
            };
            say(&format!("confirmed {name} {who} {n}"));
            if let Some(at) = position {
                say(&format!(
                    "position {who} {n} {} {}",
                    at.partition, at.offset
                ));
            }
        }
    }
}

async fn work(broker: &EmbeddedBroker) {
    let options = SubscribeOptions::default().with_prefetch(20);
    let mut consumer = broker.consume(&queue(WORKED), &options).await.unwrap();
    loop {
        let mut acked = Vec::new();
        for delivery in consumer.deliveries.recv().await.unwrap() {
            let body = body(&delivery);
            say(&format!("tried {body}"));
            delivery.ack().await.unwrap();
            acked.push(body);
        }
        // The log is synced in order: what is confirmed now lies behind them.
        publish(broker, "tasks.fence", &["x"]).await;
        for body in acked {
            say(&format!("acked {body}"));
        }
    }
}

async fn follow(broker: &EmbeddedBroker) {
    let mut consumer = broker
        .consume(&stream(EVENTS), &SubscribeOptions::group(GROUP))
        .await
        .unwrap();
    loop {
        for delivery in consumer.deliveries.recv().await.unwrap() {
            delivery.ack().await.unwrap();
        }
        let mut positions = Vec::new();
        for partition in 0..3 {
            let next = broker.offset(GROUP, &topic(EVENTS), partition).await;
            positions.push((partition, next.unwrap()));
        }
        publish(broker, "events.fence", &["x"]).await;
        for (partition, next) in positions {
            if let Some(next) = next {
                say(&format!("committed {partition} {next}"));
            }
        }
    }
}

/// One write for each line, so that a kill cuts only the last.
fn say(what: &str) {
    let line = format!("LEDGER {what} .\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

const CHILD_DIR: &str = "EMBEDDED_JOURNAL_CHILD";
const CHILD_ROUND: &str = "EMBEDDED_JOURNAL_CHILD_ROUND";
const ROUNDS: usize = 4;
const KEPT: &str = "tasks.kept";
const WORKED: &str = "tasks.worked";
const EVENTS: &str = "events.kept";
const GROUP: &str = "followers";
