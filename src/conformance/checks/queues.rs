//! What only queues do: priority, expiry, schedules, administration.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::settling::expect_exactly;
use crate::{
    broker::{Delivery, QueueStats},
    conformance::{
        Failure, Fixture, Kind, Reader, Target, Wanted, failure::ensure, fixture::numbered,
        reader::ack_all,
    },
    error::ErrorCode,
    message::{Priority, TaskAttributes, Timestamp},
    topic::Topic,
};

pub(super) async fn higher_priorities_come_first(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = prioritised(&f, &client).await?;
    let order = [1, 5, 10, 8, 5, 1, 10, 8];
    let messages = order.map(|p| numbered(0).with_priority(Priority::clamped(p)));
    f.publish(&client, &topic, messages.to_vec()).await?;
    let mut reader = f.reader(&client, &topic, &f.limited(1)).await?;
    let mut seen = Vec::new();
    for _ in order {
        let delivery = reader.next().await?;
        seen.push(delivery.message.priority.value());
        delivery.ack().await?;
    }
    let mut expected = order;
    expected.sort_by(|a, b| b.cmp(a));
    ensure!(
        seen == expected,
        "expected priorities {expected:?}, seen {seen:?}"
    );
    reader.stop().await
}

pub(super) async fn one_priority_keeps_publish_order(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = prioritised(&f, &client).await?;
    let messages: Vec<_> = (0..30)
        .map(|n| numbered(n).with_priority(Priority::HIGH))
        .collect();
    let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
    f.publish(&client, &topic, messages).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let got = reader.take(ids.len()).await?;
    let seen: Vec<_> = got.iter().map(|d| d.message.id.clone()).collect();
    ensure!(
        seen == ids,
        "expected messages of one priority in publish order, seen {seen:?}"
    );
    ack_all(got).await?;
    reader.stop().await
}

pub(super) async fn priority_is_honoured_under_prefetch(f: Fixture) -> Result<(), Failure> {
    const LIMIT: u16 = 5;
    let client = f.client().await?;
    let topic = prioritised(&f, &client).await?;
    let low: Vec<_> = (0..50)
        .map(|n| numbered(n).with_priority(Priority::LOW))
        .collect();
    f.publish(&client, &topic, low).await?;
    let mut reader = f.reader(&client, &topic, &f.limited(LIMIT)).await?;
    let held = reader.take(usize::from(LIMIT)).await?;
    let urgent: Vec<_> = (0..10)
        .map(|n| numbered(n).with_priority(Priority::CRITICAL))
        .collect();
    f.publish(&client, &topic, urgent).await?;
    // What the prefetch window holds was handed out before; the next to come
    // must be the urgent ones, not the 45 low ones that waited longer.
    ack_all(held).await?;
    for number in 1..=10 {
        let delivery = reader.next().await?;
        ensure!(
            delivery.message.priority == Priority::CRITICAL,
            "expected an urgent message in place {number} after the window, seen priority {}",
            delivery.message.priority.value()
        );
        delivery.ack().await?;
    }
    reader.stop().await
}

pub(super) async fn what_expired_is_not_handed_out(f: Fixture) -> Result<(), Failure> {
    const TTL: Duration = Duration::from_secs(2);
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let lasting = numbered(1);
    let long = numbered(2).with_ttl(Duration::from_secs(3600));
    let expected = [lasting.id.clone(), long.id.clone()];
    // The first opens the way there, which takes time that the short one has not got.
    f.publish(&client, &topic, vec![lasting]).await?;
    let short = numbered(0).with_ttl(TTL);
    f.publish(&client, &topic, vec![short, long]).await?;
    // Until it has expired for certain, also by another machine's clock.
    sleep_until(Instant::now() + TTL * 2).await;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    expect_exactly(&mut reader, &expected).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn a_scheduled_task_waits_for_its_time(f: Fixture) -> Result<(), Failure> {
    const WAIT: Duration = Duration::from_millis(1_500);
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let due = Timestamp::now() + WAIT;
    let mut later = numbered(0);
    later.task = Some(Box::new(TaskAttributes {
        scheduled_at: Some(due),
        ..TaskAttributes::default()
    }));
    let now = numbered(1);
    let order = [now.id.clone(), later.id.clone()];
    f.publish(&client, &topic, vec![later, now]).await?;
    for id in order {
        let delivery = reader.next().await?;
        ensure!(
            delivery.message.id == id,
            "expected the task that is due first, seen {}",
            delivery.message.id
        );
        delivery.ack().await?;
    }
    let now = Timestamp::now();
    ensure!(
        now >= due,
        "expected the task not before {due}, seen it at {now}"
    );
    reader.stop().await
}

pub(super) async fn queue_stats_count(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    f.publish_numbered(&client, &topic, 10).await?;
    stats(&*client, &topic, "10 ready, no consumer", |s| {
        s.messages_ready == 10 && s.messages >= 10 && s.consumers == 0
    })
    .await?;
    let mut reader = f.reader(&client, &topic, &f.limited(4)).await?;
    let held = reader.take(4).await?;
    stats(
        &*client,
        &topic,
        "6 ready, 4 unacked or unknown, 1 consumer",
        |s| s.messages_ready == 6 && s.consumers == 1 && s.messages_unacked.is_none_or(|n| n == 4),
    )
    .await?;
    ack_all(held).await?;
    let rest = reader.take(4).await?;
    ack_all(rest).await?;
    ack_all(reader.take(2).await?).await?;
    reader.stop().await?;
    stats(&*client, &topic, "nothing left, no consumer", |s| {
        s.messages_ready == 0 && s.messages == 0 && s.consumers == 0
    })
    .await
}

pub(super) async fn a_purge_deletes_what_is_ready(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let ids = f.publish_numbered(&client, &topic, 12).await?;
    let mut reader = f.reader(&client, &topic, &f.limited(2)).await?;
    let held = reader.take(2).await?;
    let purged = client.purge_queue(&topic).await?;
    ensure!(
        purged == 10,
        "expected a purge of the 10 ready messages, seen {purged}"
    );
    let given_back: Vec<_> = held.iter().map(|d| d.message.id.clone()).collect();
    ensure!(
        given_back.iter().all(|id| ids.contains(id)),
        "expected two of the published messages in hand, seen {given_back:?}"
    );
    drop(held);
    // What was in a reader's hands is not ready, and comes back.
    expect_exactly(&mut reader, &given_back).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn a_queue_with_a_time_limit_expires_its_messages(
    f: Fixture,
) -> Result<(), Failure> {
    const TTL: Duration = Duration::from_millis(300);
    let client = f.client().await?;
    let wanted = Wanted {
        message_ttl_ms: Some(300),
        ..Wanted::new(Kind::Queue)
    };
    let topic = f.topic_with(&client, &wanted).await?;
    f.publish_numbered(&client, &topic, 3).await?;
    sleep_until(Instant::now() + TTL * 2).await;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    reader.expect_quiet().await?;
    // It expires messages, not readers.
    let ids = f.publish_numbered(&client, &topic, 1).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.stop().await
}

pub(super) async fn single_messages_can_be_taken(f: Fixture) -> Result<(), Failure> {
    const WAIT: Duration = Duration::from_millis(200);
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let none = client.dequeue(&topic, WAIT).await?;
    ensure!(
        none.is_none(),
        "expected nothing from an empty queue, seen {none:?}"
    );
    let ids = f.publish_numbered(&client, &topic, 2).await?;
    // Dropped unsettled, it is given back.
    drop(taken(&*client, &topic).await?);
    let mut seen = Vec::new();
    for _ in &ids {
        let delivery = taken(&*client, &topic).await?;
        seen.push(delivery.message.id.clone());
        delivery.ack().await?;
    }
    ensure!(
        seen.len() == ids.len() && ids.iter().all(|id| seen.contains(id)),
        "expected messages {ids:?}, seen {seen:?}"
    );
    let none = client.dequeue(&topic, WAIT).await?;
    ensure!(
        none.is_none(),
        "expected nothing after the acks, seen {none:?}"
    );
    match client.dequeue(&f.name()?, WAIT).await {
        Err(e) if e.code() == ErrorCode::QueueNotFound => Ok(()),
        seen => Err(Failure::new(format!(
            "expected QUEUE_NOT_FOUND for an unknown queue, seen {seen:?}"
        ))),
    }
}

pub(super) async fn administration_of_an_unknown_queue_says_so(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let unknown = f.name()?;
    let stats = client.queue_stats(&unknown).await.map(|_| ());
    let purge = client.purge_queue(&unknown).await.map(|_| ());
    for (what, result) in [("queue_stats", stats), ("purge_queue", purge)] {
        match result {
            Err(e) if e.code() == ErrorCode::QueueNotFound => {}
            seen => {
                return Err(Failure::new(format!(
                    "{what}: expected QUEUE_NOT_FOUND, seen {seen:?}"
                )));
            }
        }
    }
    Ok(())
}

pub(super) async fn a_queue_declared_differently_is_refused(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    client.declare(&topic, &Wanted::new(Kind::Queue)).await?;
    let other = Wanted {
        max_priority: Some(Priority::MAX),
        ..Wanted::new(Kind::Queue)
    };
    match client.declare(&topic, &other).await {
        Err(e) if e.code() == ErrorCode::QueueDeclareFailed => {}
        seen => {
            return Err(Failure::new(format!(
                "expected QUEUE_DECLARE_FAILED, seen {seen:?}"
            )));
        }
    }
    // The queue and the client are none the worse for it.
    let ids = f.publish_numbered(&client, &topic, 1).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.stop().await
}

/// Takes a message that must be there; one that was just given back may need a
/// moment.
async fn taken(client: &dyn Target, queue: &Topic) -> Result<Delivery, Failure> {
    let taken = client.dequeue(queue, Reader::PATIENCE).await?;
    taken.ok_or_else(|| {
        Failure::new(format!(
            "expected a message within {:?}, none came",
            Reader::PATIENCE
        ))
    })
}

/// A queue with priorities.
async fn prioritised(f: &Fixture, client: &std::sync::Arc<dyn Target>) -> Result<Topic, Failure> {
    let wanted = Wanted {
        max_priority: Some(Priority::MAX),
        ..Wanted::new(Kind::Queue)
    };
    f.topic_with(client, &wanted).await
}

/// Polls until the statistics fit: brokers refresh them with a delay.
async fn stats(
    client: &dyn Target,
    queue: &Topic,
    expected: &str,
    fits: impl Fn(&QueueStats) -> bool,
) -> Result<(), Failure> {
    let deadline = Instant::now() + Reader::PATIENCE;
    loop {
        let seen = client.queue_stats(queue).await?;
        if fits(&seen) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "expected queue statistics with {expected}, seen {seen:?}"
        );
        sleep_until(Instant::now() + POLL).await;
    }
}

const POLL: Duration = Duration::from_millis(50);
