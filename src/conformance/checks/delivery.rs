//! Everything that was accepted arrives, unaltered, where it should.

use std::sync::Arc;

use futures_util::future::try_join_all;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    broker::{Outcome, PublishOptions, Receipt},
    conformance::{
        Capability, Failure, Fixture, Kind, Reader, Target,
        failure::ensure,
        fixture::numbered,
        log::{Demand, Log},
        reader::ack_all,
    },
    message::Message,
    topic::Topic,
};

pub(super) async fn everything_published_arrives_once_and_unaltered(
    f: Fixture,
) -> Result<(), Failure> {
    round_trip(&f, 100).await
}

pub(super) async fn ten_runs_at_once_do_not_disturb_each_other(f: Fixture) -> Result<(), Failure> {
    try_join_all((0..10).map(|_| round_trip(&f, 100))).await?;
    Ok(())
}

/// Publishes and reads `count` messages; the reader's channel ends with it.
async fn round_trip(f: &Fixture, count: usize) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let log = Log::default();
    log.expect(&topic, &[GROUP]);
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    publish_logged(&client, &topic, &log, "publisher", (0..count).map(numbered)).await;
    read_logged(&mut reader, &log, count).await?;
    reader.expect_quiet().await?;
    ensure!(
        log.accepted() == count,
        "expected {count} accepted publishes, seen {}",
        log.accepted()
    );
    log.judge(Demand::ONCE)?;
    reader.stop().await
}

pub(super) async fn many_publishers_and_subscribers_share_the_work(
    f: Fixture,
) -> Result<(), Failure> {
    const PUBLISHERS: usize = 50;
    const EACH: usize = 100;
    const SUBSCRIBERS: usize = 50;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let log = Arc::new(Log::default());
    log.expect(&topic, &[GROUP]);
    let options = f.options();
    let mut readers = JoinSet::new();
    let everything = PUBLISHERS * EACH;
    let all_read = tokio_util::sync::CancellationToken::new();
    // Groups are joined by all members at once: one at a time, each would wait
    // for a rebalance of its own.
    let joining = (0..SUBSCRIBERS).map(|_| f.reader(&client, &topic, &options));
    for mut reader in try_join_all(joining).await? {
        let (log, all_read) = (log.clone(), all_read.clone());
        readers.spawn(async move {
            loop {
                let delivery = tokio::select! {
                    next = reader.next_without_deadline() => match next {
                        Some(delivery) => delivery,
                        None => return Err(Failure::new("a reader ended early")),
                    },
                    () = all_read.cancelled() => return reader.stop().await,
                };
                let received = delivery.received().clone();
                let settled = delivery.ack().await.is_ok();
                log.delivered(GROUP, &received, settled);
                if log.distinct(GROUP) == everything {
                    all_read.cancel();
                }
            }
        });
    }
    let mut publishers = JoinSet::new();
    for publisher in 0..PUBLISHERS {
        let (client, topic, log) = (client.clone(), topic.clone(), log.clone());
        publishers.spawn(async move {
            let name = format!("publisher {publisher}");
            let mine = (0..EACH).map(|n| numbered(publisher * EACH + n));
            publish_logged(&client, &topic, &log, &name, mine).await;
        });
    }
    publishers.join_all().await;
    ensure!(
        log.accepted() == everything,
        "expected {everything} accepted publishes, seen {}",
        log.accepted()
    );
    while let Some(joined) = readers.join_next().await {
        joined.map_err(|e| Failure::new(format!("a reader panicked: {e}")))??;
    }
    // Members of a stream's group join one after the other; each rebalance may
    // repeat what was not committed.
    log.judge(match f.kind() {
        Kind::Queue => Demand::ONCE,
        Kind::Stream => Demand::AT_LEAST_ONCE,
    })?;
    Ok(())
}

pub(super) async fn many_topics_at_once_each_get_their_own(f: Fixture) -> Result<(), Failure> {
    const TOPICS: usize = 20;
    const EACH: usize = 50;
    let client = f.client().await?;
    try_join_all((0..TOPICS).map(|_| async {
        let topic = f.topic(&client).await?;
        let log = Log::default();
        log.expect(&topic, &[GROUP]);
        publish_logged(&client, &topic, &log, "publisher", (0..EACH).map(numbered)).await;
        let mut reader = f.reader(&client, &topic, &f.options()).await?;
        read_logged(&mut reader, &log, EACH).await?;
        log.judge(Demand::ONCE)?;
        reader.stop().await
    }))
    .await?;
    Ok(())
}

pub(super) async fn topics_do_not_leak_into_each_other(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let (one, two) = (f.topic(&client).await?, f.topic(&client).await?);
    let mut first = f.reader(&client, &one, &f.options()).await?;
    let mut second = f.reader(&client, &two, &f.options()).await?;
    let mine = f.publish_numbered(&client, &one, 1).await?;
    let theirs = f.publish_numbered(&client, &two, 1).await?;
    for (reader, topic, ids) in [(&mut first, &one, mine), (&mut second, &two, theirs)] {
        let delivery = reader.next().await?;
        ensure!(
            ids.contains(&delivery.message.id) && delivery.topic == *topic,
            "expected message {ids:?} of {topic}, seen {} of {}",
            delivery.message.id,
            delivery.topic
        );
        ensure!(
            delivery.message.topic.as_deref() == Some(topic.as_str()),
            "expected the message to name its topic {topic}, seen {:?}",
            delivery.message.topic
        );
        delivery.ack().await?;
        reader.expect_quiet().await?;
    }
    first.stop().await?;
    second.stop().await
}

pub(super) async fn what_closed_publishers_left_arrives(f: Fixture) -> Result<(), Failure> {
    const CLIENTS: usize = 4;
    const PUBLISHERS: usize = 5;
    const EACH: usize = 500;
    let maker = f.client().await?;
    let topic = f.topic(&maker).await?;
    maker.close().await?;
    let log = Log::default();
    log.expect(&topic, &[GROUP]);
    for client_number in 0..CLIENTS {
        let client = f.client().await?;
        let publishing = (0..PUBLISHERS).map(|n| {
            let (client, topic, log) = (&client, &topic, &log);
            async move {
                let name = format!("publisher {client_number}.{n}");
                publish_logged(client, topic, log, &name, (0..EACH).map(numbered)).await;
            }
        });
        futures_util::future::join_all(publishing).await;
        client.close().await?;
    }
    let everything = CLIENTS * PUBLISHERS * EACH;
    ensure!(
        log.accepted() == everything,
        "expected {everything} accepted publishes, seen {}",
        log.accepted()
    );
    let client = f.client().await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    read_logged(&mut reader, &log, everything).await?;
    log.judge(Demand::ONCE)?;
    reader.stop().await
}

pub(super) async fn every_batch_size_gives_an_outcome_for_each(f: Fixture) -> Result<(), Failure> {
    const SIZES: [usize; 5] = [1, 2, 10, 101, 1001];
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut ids = Vec::new();
    for size in SIZES {
        ids.extend(f.publish_numbered(&client, &topic, size).await?);
    }
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let mut seen = Vec::new();
    while seen.len() < ids.len() {
        let delivery = reader.next().await?;
        seen.push(delivery.message.id.clone());
        delivery.settle_now(crate::broker::Verdict::Ack);
    }
    seen.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    ids.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    ensure!(
        seen == ids,
        "expected exactly the {} messages of all batches, the ids differ",
        ids.len()
    );
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn without_a_confirm_the_outcome_is_sent(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let options = PublishOptions {
        confirm: false,
        ..PublishOptions::default()
    };
    let receipt = client.publish(&topic, numbered(0), &options).await?;
    ensure!(
        matches!(receipt.outcome, Outcome::Sent { .. }),
        "expected the outcome Sent without a confirm, seen {receipt:?}"
    );
    // Nothing is promised, but on a healthy backend it arrives.
    super::settling::expect_exactly(&mut reader, &[receipt.id]).await?;
    reader.stop().await
}

pub(super) async fn declaring_twice_changes_nothing(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let wanted = crate::conformance::Wanted::new(f.kind());
    let topic = f.topic_with(&client, &wanted).await?;
    let ids = f.publish_numbered(&client, &topic, 3).await?;
    client.declare(&topic, &wanted).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    super::settling::expect_exactly(&mut reader, &ids).await?;
    reader.stop().await
}

pub(super) async fn an_empty_batch_gives_no_outcomes(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = PublishOptions::default();
    let outcomes = client.publish_batch(&topic, Vec::new(), &options).await;
    ensure!(
        outcomes.is_empty(),
        "expected no outcomes of an empty batch, seen {}",
        outcomes.len()
    );
    Ok(())
}

pub(super) async fn late_subscribers_get_what_was_published_before(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut ids = f.publish_numbered(&client, &topic, 50).await?;
    // A stream keeps its history for every new group, a queue for one reader.
    let readers = match f.kind() {
        Kind::Stream if f.has(Capability::HistoryReplay) => 2,
        Kind::Stream | Kind::Queue => 1,
    };
    ids.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    for _ in 0..readers {
        let mut reader = f.reader(&client, &topic, &f.options()).await?;
        let got = reader.take(ids.len()).await?;
        let mut seen: Vec<_> = got.iter().map(|d| d.message.id.clone()).collect();
        seen.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        ensure!(seen == ids, "expected the 50 earlier messages, seen others");
        ack_all(got).await?;
        reader.stop().await?;
    }
    Ok(())
}

pub(super) async fn receipts_tell_the_position(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    // A hub may have spooled what a stalled server did not confirm in time: it
    // has no position then. Once the server answers again it must tell one.
    let deadline = Instant::now() + Reader::PATIENCE;
    let mut published = 0;
    let receipts = loop {
        let messages: Vec<_> = (0..20)
            .map(|n| numbered(n).with_key(format!("key {n}")))
            .collect();
        let receipts = f.publish(&client, &topic, messages).await?;
        published += receipts.len();
        let spooled = |r: &Receipt| matches!(r.outcome, Outcome::Spooled { .. });
        if !receipts.iter().any(spooled) || Instant::now() > deadline {
            break receipts;
        }
    };
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let mut got = Vec::with_capacity(published);
    while got.len() < published {
        let delivery = reader.next().await?;
        got.push(delivery.received().clone());
        delivery.settle_now(crate::broker::Verdict::Ack);
    }
    for receipt in &receipts {
        let Outcome::Delivered {
            position: Some(position),
            ..
        } = receipt.outcome
        else {
            return Err(Failure::new(format!(
                "expected a position, seen {receipt:?}"
            )));
        };
        let found = got.iter().find(|d| d.message.id == receipt.id);
        let seen = found.map(|d| (d.message.partition, d.message.offset));
        let expected = (Some(position.partition), Some(position.offset));
        ensure!(
            seen == Some(expected),
            "message {}: the receipt says {expected:?}, the reader saw {seen:?}",
            receipt.id
        );
    }
    reader.stop().await
}

/// Publishes messages as one batch and notes each outcome.
pub(super) async fn publish_logged(
    client: &Arc<dyn Target>,
    topic: &Topic,
    log: &Log,
    publisher: &str,
    messages: impl Iterator<Item = Message>,
) {
    let messages: Vec<_> = messages.collect();
    let options = PublishOptions::default();
    let outcomes = client
        .publish_batch(topic, messages.clone(), &options)
        .await;
    for ((seq, message), outcome) in (0..).zip(&messages).zip(&outcomes) {
        log.published(publisher, seq, topic, message, outcome);
    }
}

/// Reads until the group has `count` different messages, acking each.
pub(super) async fn read_logged(
    reader: &mut Reader,
    log: &Log,
    count: usize,
) -> Result<(), Failure> {
    let mut seen = std::collections::HashSet::new();
    while seen.len() < count {
        let next = reader.next().await;
        let delivery = next.map_err(|e| {
            let missing = log.judge(Demand::AT_LEAST_ONCE).err();
            let missing = missing.map_or_else(String::new, |m| format!(" ({m})"));
            e.during(&format!(
                "after {} of {count} messages{missing}",
                seen.len()
            ))
        })?;
        seen.insert(delivery.message.id.clone());
        log.delivered(GROUP, delivery.received(), true);
        delivery.settle_now(crate::broker::Verdict::Ack);
    }
    Ok(())
}

/// The group of checks that have one.
pub(super) const GROUP: &str = "readers";
