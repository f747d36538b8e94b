//! The server is killed and comes back: what was confirmed is there, and
//! everybody goes on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::delivery::GROUP;
use crate::{
    broker::{Delivery, Outcome, PublishOptions, Verdict},
    conformance::{
        Failure, Fixture, Reader, Restart, Target,
        failure::ensure,
        fixture::numbered,
        log::{Demand, Log},
    },
    error::ErrorCode,
    message::Message,
    topic::Topic,
};

pub(super) async fn publishers_and_readers_go_on_after_two_kills(
    f: Fixture,
) -> Result<(), Failure> {
    const PUBLISHERS: usize = 100;
    const EACH: usize = 100;
    const EVERYTHING: usize = PUBLISHERS * EACH;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let log = Arc::new(Log::default());
    log.expect(&topic, &[GROUP]);
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    settle_declarations(&f).await;
    let progress = Arc::new(Progress::default());
    let mut publishers = JoinSet::new();
    for publisher in 0..PUBLISHERS {
        let (client, topic) = (client.clone(), topic.clone());
        let (log, progress) = (log.clone(), progress.clone());
        publishers.spawn(async move {
            let name = format!("publisher {publisher}");
            for n in 0..EACH {
                let message = numbered(publisher * EACH + n);
                until_accepted(&client, &topic, &log, &name, n as u64, message).await;
                progress.step();
            }
        });
    }
    // A restart that goes on holds the reader's patience up: how long a server
    // takes to serve again is the machine's affair, not the backend's.
    let away = Away::default();
    let killing = async {
        for goal in [EVERYTHING / 3, EVERYTHING / 2] {
            progress.reach(goal).await;
            away.during(restart(f.restart()?)).await?;
        }
        Ok::<(), Failure>(())
    };
    let reading = async {
        while log.distinct(GROUP) < EVERYTHING {
            let Some(delivery) = away.patiently(&mut reader).await else {
                return Err(Failure::new(format!(
                    "expected {EVERYTHING} messages through two kills, seen {} \
                     (accepted {}), then none for {OUTAGE:?} with the server there: {:?}",
                    log.distinct(GROUP),
                    progress.count.load(Relaxed),
                    log.judge(Demand::AT_LEAST_ONCE).err()
                )));
            };
            let received = delivery.received().clone();
            let settled = delivery.settle_now(Verdict::Ack);
            log.delivered(GROUP, &received, settled);
        }
        Ok(())
    };
    let (killed, read) = tokio::join!(killing, reading);
    killed?;
    read?;
    publishers.join_all().await;
    log.judge(Demand::AT_LEAST_ONCE)?;
    reader.stop().await
}

pub(super) async fn what_was_confirmed_survives_a_kill(f: Fixture) -> Result<(), Failure> {
    const PUBLISHERS: usize = 8;
    const BEFORE: usize = 500;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    settle_declarations(&f).await;
    let log = Arc::new(Log::default());
    log.expect(&topic, &[GROUP]);
    let progress = Arc::new(Progress::default());
    let stop = tokio_util::sync::CancellationToken::new();
    let mut publishers = JoinSet::new();
    for publisher in 0..PUBLISHERS {
        let (client, topic) = (client.clone(), topic.clone());
        let (log, progress, stop) = (log.clone(), progress.clone(), stop.clone());
        publishers.spawn(async move {
            let name = format!("publisher {publisher}");
            let options = PublishOptions::default();
            let mut seq = 0;
            while !stop.is_cancelled() {
                let message = numbered(publisher);
                let result = client.publish(&topic, message.clone(), &options).await;
                log.published(&name, seq, &topic, &message, &result);
                seq += 1;
                match result {
                    Ok(_) => progress.step(),
                    // The server is gone: nothing more can be confirmed.
                    Err(_) => return,
                }
            }
        });
    }
    progress.reach(BEFORE).await;
    let server = f.restart()?;
    server.kill().await.map_err(Failure::new)?;
    stop.cancel();
    server.start().await.map_err(Failure::new)?;
    publishers.join_all().await;

    let client = f.client().await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    while log.missing(GROUP) > 0 {
        let delivery = reader.next().await.map_err(|e| {
            let lost = log.judge(Demand::AT_LEAST_ONCE).err();
            e.during(&format!("after the kill ({lost:?})"))
        })?;
        log.delivered(GROUP, delivery.received(), true);
        delivery.settle_now(Verdict::Ack);
    }
    for delivery in reader.take_until_quiet().await {
        log.delivered(GROUP, delivery.received(), true);
        delivery.settle_now(Verdict::Ack);
    }
    log.judge(Demand::AT_LEAST_ONCE)?;
    reader.stop().await
}

pub(super) async fn a_reader_goes_on_after_a_kill(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    settle_declarations(&f).await;
    let mut missing = f.publish_numbered(&client, &topic, 5).await?;
    let held = reader.take(5).await?;
    restart(f.restart()?).await?;
    let mut stale = 0;
    for delivery in held {
        // A queue gives them out again, so these acks must not pretend to have
        // worked; a stream's position may still be committed.
        let id = delivery.message.id.clone();
        match delivery.ack().await {
            Ok(()) => missing.retain(|m| *m != id),
            Err(e) if e.code() == ErrorCode::AckFailed => stale += 1,
            Err(e) => return Err(e.into()),
        }
    }
    let log = Log::default();
    for n in 0..5 {
        let message = numbered(n);
        missing.push(message.id.clone());
        until_accepted(&client, &topic, &log, "publisher", n as u64, message).await;
    }
    while !missing.is_empty() {
        let delivery = timeout(OUTAGE, reader.next_without_deadline()).await;
        let Ok(Some(delivery)) = delivery else {
            return Err(Failure::new(format!(
                "expected the reader to go on after the kill ({stale} acks failed), {} missing",
                missing.len()
            )));
        };
        missing.retain(|id| *id != delivery.message.id);
        delivery.settle_now(Verdict::Ack);
    }
    reader.stop().await
}

pub(super) async fn while_the_server_is_away_no_delivery_is_claimed(
    f: Fixture,
) -> Result<(), Failure> {
    const ATTEMPTS: usize = 5;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    settle_declarations(&f).await;
    f.publish_numbered(&client, &topic, 1).await?;
    let log = Log::default();
    log.expect(&topic, &[GROUP]);
    let options = PublishOptions {
        timeout: SHORT_TIMEOUT,
        ..PublishOptions::default()
    };
    let server = f.restart()?;
    server.kill().await.map_err(Failure::new)?;
    let mut outcomes = Vec::new();
    for n in 0..ATTEMPTS {
        let message = numbered(n);
        let begun = Instant::now();
        let result = client.publish(&topic, message.clone(), &options).await;
        log.published("publisher", n as u64, &topic, &message, &result);
        ensure!(
            begun.elapsed() < SHORT_TIMEOUT + TIMEOUT_SLACK,
            "expected an outcome within {SHORT_TIMEOUT:?}, it took {:?}",
            begun.elapsed()
        );
        outcomes.push(result);
    }
    // Subscribing works while the server is away.
    let source = f.source(&topic);
    let consumer = client.consume(&source, &f.options()).await;
    server.start().await.map_err(Failure::new)?;
    for outcome in &outcomes {
        let claimed =
            matches!(outcome, Ok(receipt) if matches!(receipt.outcome, Outcome::Delivered { .. }));
        ensure!(
            !claimed,
            "expected no delivery to be claimed while the server was away, seen {outcome:?}"
        );
        let refused = matches!(outcome, Err(error) if error.is_refusal());
        ensure!(
            !refused,
            "expected an outage not to be told as a refusal, seen {outcome:?}"
        );
    }
    let consumer =
        consumer.map_err(|e| Failure::from(e).during("subscribing while the server is away"))?;
    let mut reader = Reader::new(consumer);
    let first = timeout(OUTAGE, reader.next_without_deadline()).await;
    let Ok(Some(first)) = first else {
        return Err(Failure::new(
            "expected the reader to be served once the server was back, it was not",
        ));
    };
    // The message from before the kill, or one that was spooled meanwhile.
    first.settle_now(Verdict::Ack);
    let message = numbered(ATTEMPTS);
    let id = message.id.clone();
    until_accepted(&client, &topic, &log, "publisher", ATTEMPTS as u64, message).await;
    loop {
        let next = timeout(OUTAGE, reader.next_without_deadline()).await;
        let Ok(Some(delivery)) = next else {
            return Err(Failure::new(
                "expected what was published after the kill to arrive, it did not",
            ));
        };
        let found = delivery.message.id == id;
        delivery.settle_now(Verdict::Ack);
        if found {
            return reader.stop().await;
        }
    }
}

/// Waits until a kill leaves what was declared, for readers too, as it is:
/// nothing tells when the server's own records are on its disk.
async fn settle_declarations(f: &Fixture) {
    sleep(f.factory().declaration_settles()).await;
}

/// Publishes until it is accepted, under the same id; notes every attempt.
async fn until_accepted(
    client: &Arc<dyn Target>,
    topic: &Topic,
    log: &Log,
    publisher: &str,
    seq: u64,
    message: Message,
) {
    let options = PublishOptions::default();
    loop {
        let result = client.publish(topic, message.clone(), &options).await;
        log.published(publisher, seq, topic, &message, &result);
        if result.is_ok() {
            return;
        }
        sleep(RETRY).await;
    }
}

async fn restart(server: &dyn Restart) -> Result<(), Failure> {
    server.kill().await.map_err(Failure::new)?;
    server.start().await.map_err(Failure::new)
}

/// Whether the server is being restarted.
#[derive(Default)]
struct Away(watch::Sender<bool>);

impl Away {
    /// Says so while `restart` goes on.
    async fn during<T>(&self, restart: impl Future<Output = T>) -> T {
        self.0.send_replace(true);
        let done = restart.await;
        self.0.send_replace(false);
        done
    }

    /// The next delivery; none when the consumer has ended, or when nothing came
    /// for [`OUTAGE`] while the server was there.
    async fn patiently(&self, reader: &mut Reader) -> Option<Delivery> {
        let mut away = self.0.subscribe();
        loop {
            let there = !*away.borrow_and_update();
            tokio::select! {
                delivery = reader.next_without_deadline() => return delivery,
                _ = away.changed() => {}
                () = sleep(OUTAGE), if there => return None,
            }
        }
    }
}

/// Counts accepted messages and wakes who waits for a number of them.
#[derive(Default)]
struct Progress {
    count: AtomicUsize,
    changed: Notify,
}

impl Progress {
    fn step(&self) {
        self.count.fetch_add(1, Relaxed);
        self.changed.notify_waiters();
    }

    async fn reach(&self, goal: usize) {
        loop {
            // Registered before looking, so that no step between is missed.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.count.load(Relaxed) >= goal {
                return;
            }
            changed.await;
        }
    }
}

/// How long nothing may arrive once the server is back: leader election, the
/// group's session time-out.
const OUTAGE: Duration = Duration::from_secs(90);

/// What a publish is given while the server is away.
const SHORT_TIMEOUT: Duration = Duration::from_secs(2);

/// What a timeout may be overrun by on a busy machine.
const TIMEOUT_SLACK: Duration = Duration::from_secs(2);

/// Pause before a failed publish is repeated, as a patient caller would.
const RETRY: Duration = Duration::from_millis(50);
