//! Closing: of readers, subscriptions and clients, in every state.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, future::try_join_all};
use tokio::task::JoinSet;

use super::{
    delivery::{GROUP, publish_logged},
    settling::expect_exactly,
};
use crate::{
    broker::{PublishOptions, Verdict},
    conformance::{
        Failure, Fixture, Kind, Reader,
        failure::ensure,
        fixture::numbered,
        log::{Demand, Log},
    },
    error::ErrorCode,
};

pub(super) async fn readers_may_come_and_go_without_loss(f: Fixture) -> Result<(), Failure> {
    const MESSAGES: usize = 5_000;
    const READERS: usize = 20;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let log = Log::default();
    log.expect(&topic, &[GROUP]);
    let messages = (0..MESSAGES).map(numbered);
    publish_logged(&client, &topic, &log, "publisher", messages).await;
    for number in 0..=READERS {
        let mut reader = f.reader(&client, &topic, &options).await?;
        let last = number == READERS;
        let goal = if last {
            MESSAGES
        } else {
            MESSAGES * number / READERS
        };
        while log.distinct(GROUP) < goal {
            let burst = BURST.min(goal - log.distinct(GROUP));
            for delivery in reader.take(burst).await? {
                let received = delivery.received().clone();
                let settled = delivery.settle_now(Verdict::Ack);
                log.delivered(GROUP, &received, settled);
            }
        }
        // It goes with some in its hands.
        reader.stop().await?;
    }
    // A stream's reader that stops commits what was acked, in order; what was
    // fetched behind a gap may be repeated.
    log.judge(match f.kind() {
        Kind::Queue => Demand::ONCE,
        Kind::Stream => Demand::AT_LEAST_ONCE,
    })?;
    Ok(())
}

pub(super) async fn ten_readers_closed_at_once_lose_nothing(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    try_join_all((0..10).map(|_| async {
        let source = f.source(&topic);
        let reader = Reader::new(client.consume(&source, &options).await?);
        // Some are closed before the backend knows them.
        reader.stop().await
    }))
    .await?;
    let ids = f.publish_numbered(&client, &topic, 50).await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.stop().await
}

pub(super) async fn a_dropped_reader_loses_nothing(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let ids = f.publish_numbered(&client, &topic, 50).await?;
    let mut first = f.reader(&client, &topic, &options).await?;
    drop(first.take(10).await?);
    first.control().begin_stop();
    drop(first);
    let mut second = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut second, &ids).await?;
    second.stop().await
}

pub(super) async fn stopping_wakes_a_waiting_reader(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let control = reader.control().clone();
    let waiting = tokio::spawn(async move {
        let next = reader.next_without_deadline().await;
        next.is_none()
    });
    control.begin_stop();
    let woken = tokio::time::timeout(Reader::PATIENCE, waiting).await;
    ensure!(
        matches!(woken, Ok(Ok(true))),
        "expected a waiting reader to end when it is stopped, seen {woken:?}"
    );
    let stopped = tokio::time::timeout(Reader::PATIENCE, control.stop()).await;
    ensure!(stopped.is_ok(), "expected the consumer to stop, it did not");
    Ok(())
}

pub(super) async fn closing_ends_readers(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    client.close().await?;
    let deadline = tokio::time::Instant::now() + Reader::PATIENCE;
    let end = reader.poll(deadline).await;
    ensure!(
        matches!(end, Ok(None)),
        "expected the reader's channel to end with its client, seen {end:?}"
    );
    Ok(())
}

pub(super) async fn closing_twice_is_fine(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    client.close().await?;
    let (one, two) = tokio::join!(client.close(), client.close());
    one?;
    two?;
    Ok(())
}

pub(super) async fn closing_does_not_wait_for_unread_deliveries(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    f.publish_numbered(&client, &topic, 500).await?;
    // The first shows that the rest is on its way; nobody reads it.
    let held = reader.next().await?;
    closes_in_time(client.close()).await?;
    drop((held, reader));
    Ok(())
}

pub(super) async fn closing_does_not_wait_for_unsettled_deliveries(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    f.publish_numbered(&client, &topic, 10).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let held = reader.take(10).await?;
    closes_in_time(client.close()).await?;
    for delivery in held {
        let error = delivery.ack().await.err();
        ensure!(
            error
                .as_ref()
                .is_some_and(|e| e.code() == ErrorCode::AckFailed),
            "expected ACK_FAILED after close, seen {error:?}"
        );
    }
    Ok(())
}

pub(super) async fn every_handle_fails_after_close(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let other = client.clone();
    let topic = f.topic(&client).await?;
    client.close().await?;
    let options = PublishOptions::default();
    let published = other
        .publish(&topic, numbered(0), &options)
        .await
        .map(|_| ());
    let batch = other
        .publish_batch(&topic, vec![numbered(0)], &options)
        .await;
    let consumed = other.consume(&f.source(&topic), &f.options()).await;
    let healthy = other.health_check().await;
    let attempts = [
        ("publish", published),
        (
            "publish_batch",
            batch.into_iter().try_for_each(|r| r.map(|_| ())),
        ),
        ("consume", consumed.map(|_| ())),
        ("health_check", healthy),
    ];
    for (what, result) in attempts {
        match result {
            Err(e) if e.code() == ErrorCode::OperationCanceled => {}
            seen => {
                return Err(Failure::new(format!(
                    "{what} on a closed client: expected OPERATION_CANCELED, seen {seen:?}"
                )));
            }
        }
    }
    Ok(())
}

pub(super) async fn closing_flushes_what_was_being_published(f: Fixture) -> Result<(), Failure> {
    const PUBLISHERS: usize = 200;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let log = Arc::new(Log::default());
    log.expect(&topic, &[GROUP]);
    let mut publishing = JoinSet::new();
    let (first, mut answered) = tokio::sync::mpsc::channel(PUBLISHERS);
    for publisher in 0..PUBLISHERS {
        let (client, topic, log, first) =
            (client.clone(), topic.clone(), log.clone(), first.clone());
        publishing.spawn(async move {
            let name = format!("publisher {publisher}");
            publish_logged(
                &client,
                &topic,
                &log,
                &name,
                std::iter::once(numbered(publisher)),
            )
            .await;
            // Nobody listens after the first answer.
            let _ = first.send(()).await;
        });
    }
    drop(first);
    answered.recv().await;
    client.close().await?;
    while publishing.join_next().await.is_some() {}

    let client = f.client().await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    while log.missing(GROUP) > 0 {
        let delivery = reader.next().await?;
        log.delivered(GROUP, delivery.received(), true);
        delivery.settle_now(Verdict::Ack);
    }
    for delivery in reader.take_until_quiet().await {
        log.delivered(GROUP, delivery.received(), true);
        delivery.settle_now(Verdict::Ack);
    }
    log.judge(Demand::ONCE)?;
    reader.stop().await
}

pub(super) async fn an_abandoned_publish_harms_nobody(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = PublishOptions::default();
    let abandoned = numbered(0);
    let id = abandoned.id.clone();
    let mut publishing = client.publish(&topic, abandoned, &options);
    // Polled once: begun, and given up.
    let _ = (&mut publishing).now_or_never();
    drop(publishing);
    let ids = f.publish_numbered(&client, &topic, 20).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let mut missing: Vec<_> = ids;
    while !missing.is_empty() {
        let delivery = reader.next().await?;
        let known = missing.iter().position(|m| *m == delivery.message.id);
        ensure!(
            known.is_some() || delivery.message.id == id,
            "message {} came twice or was never published",
            delivery.message.id
        );
        known.map(|at| missing.swap_remove(at));
        delivery.settle_now(Verdict::Ack);
    }
    reader.stop().await
}

pub(super) async fn a_publisher_survives_the_runtime_that_used_it_first(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let first = numbered(0);
    let first_id = first.id.clone();
    let (there, at) = (client.clone(), topic.clone());
    let elsewhere = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::new(format!("no second runtime: {e}")))?;
        let options = PublishOptions::default();
        // The runtime, and every task that was spawned on it, ends here.
        runtime.block_on(there.publish(&at, first, &options))?;
        Ok::<(), Failure>(())
    });
    elsewhere
        .await
        .map_err(|e| Failure::new(format!("the second runtime panicked: {e}")))??;
    let publishing = f.publish_numbered(&client, &topic, 5);
    let publishing = tokio::time::timeout(Reader::PATIENCE, publishing).await;
    let Ok(published) = publishing else {
        return Err(Failure::new(
            "expected publishing to go on after the runtime that used it first, it hangs",
        ));
    };
    let mut ids = published?;
    ids.push(first_id);
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.stop().await
}

pub(super) async fn a_lost_reader_leaves_its_share_to_the_others(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.limited(10);
    let mut lost = f.reader(&client, &topic, &options).await?;
    let ids = f.publish_numbered(&client, &topic, 100).await?;
    // It has messages in its hands and goes without a word.
    let held = lost.take(5).await?;
    let mut other = f.reader(&client, &topic, &options).await?;
    drop((held, lost));
    expect_all(&mut other, ids).await?;
    other.stop().await
}

/// Reads until all have come, tolerating repeats (a rebalance may cause them).
async fn expect_all(
    reader: &mut Reader,
    mut missing: Vec<crate::message::MessageId>,
) -> Result<(), Failure> {
    while !missing.is_empty() {
        let next = reader.next().await;
        let delivery = next.map_err(|e| e.during(&format!("{} missing", missing.len())))?;
        missing.retain(|id| *id != delivery.message.id);
        delivery.settle_now(Verdict::Ack);
    }
    Ok(())
}

async fn closes_in_time(
    closing: impl Future<Output = crate::error::Result<()>>,
) -> Result<(), Failure> {
    match tokio::time::timeout(CLOSE_LIMIT, closing).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Failure::new(format!(
            "expected the client to close within {CLOSE_LIMIT:?}"
        ))),
    }
}

/// How long a close may take that nothing should hold up.
const CLOSE_LIMIT: Duration = Duration::from_secs(20);

/// Messages read between two looks at the log.
const BURST: usize = 50;
