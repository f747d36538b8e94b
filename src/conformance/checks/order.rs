//! Order: of a publisher, of a key, through parallel handlers.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::Notify;

use super::delivery::{GROUP, publish_logged, read_logged};
use crate::{
    broker::{HandlerError, Received, SubscribeOptions},
    conformance::{
        Failure, Fixture, Reader, Wanted,
        failure::ensure,
        fixture::numbered,
        log::{Demand, Log},
        reader::ack_all,
    },
};

pub(super) async fn one_reader_gets_publish_order(f: Fixture) -> Result<(), Failure> {
    const MESSAGES: usize = 1_000;
    let client = f.client().await?;
    let wanted = Wanted::single_partition(f.kind());
    let topic = f.topic_with(&client, &wanted).await?;
    let log = Log::default();
    log.expect(&topic, &[GROUP]);
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let messages = (0..MESSAGES).map(numbered);
    publish_logged(&client, &topic, &log, "publisher", messages).await;
    read_logged(&mut reader, &log, MESSAGES).await?;
    log.judge(Demand::ONCE_IN_ORDER)?;
    reader.stop().await
}

pub(super) async fn each_of_sixteen_keys_keeps_its_order(f: Fixture) -> Result<(), Failure> {
    const MESSAGES: usize = 1_000;
    const KEYS: usize = 16;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let log = Log::default();
    log.expect(&topic, &[GROUP]);
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let messages = (0..MESSAGES).map(|n| {
        let key = format!("type {}", n % KEYS);
        numbered(n).with_key(key)
    });
    publish_logged(&client, &topic, &log, "publisher", messages).await;
    read_logged(&mut reader, &log, MESSAGES).await?;
    log.judge(Demand::ONCE_IN_ORDER)?;
    reader.stop().await
}

pub(super) async fn the_key_is_reported_byte_for_byte(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let keys: [&[u8]; 4] = [
        b"plain",
        "schl\u{fc}ssel \u{1F511}".as_bytes(),
        b"\xff\x00\xfe",
        b" ",
    ];
    let messages: Vec<_> = keys
        .iter()
        .map(|key| numbered(0).with_key(key.to_vec()))
        .collect();
    let ids: HashMap<_, _> = messages
        .iter()
        .map(|m| (m.id.clone(), m.key.clone()))
        .collect();
    f.publish(&client, &topic, messages).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let got = reader.take(keys.len()).await?;
    for delivery in &got {
        let expected = ids.get(&delivery.message.id);
        ensure!(
            expected == Some(&delivery.message.key),
            "expected the key {expected:?}, seen {:?}",
            delivery.message.key
        );
    }
    ack_all(got).await?;
    reader.stop().await
}

pub(super) async fn one_key_stays_in_one_partition(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let messages = (0..90).map(|n| numbered(n).with_key(format!("key {}", n % 9)));
    f.publish(&client, &topic, messages.collect()).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let got = reader.take(90).await?;
    let mut partitions = HashMap::new();
    for delivery in &got {
        let Some(partition) = delivery.message.partition else {
            return Err(Failure::new("expected the reader to be told the partition"));
        };
        let first = *partitions
            .entry(delivery.message.key.clone())
            .or_insert(partition);
        ensure!(
            first == partition,
            "key {:?} was seen in partitions {first} and {partition}",
            delivery.message.key
        );
    }
    ack_all(got).await?;
    reader.stop().await
}

pub(super) async fn handlers_of_one_key_run_in_order(f: Fixture) -> Result<(), Failure> {
    const KEYS: usize = 8;
    const EACH: usize = 40;
    #[derive(Default)]
    struct Seen {
        running: HashMap<String, usize>,
        order: HashMap<String, Vec<usize>>,
        broken: Vec<String>,
        most_at_once: usize,
        done: usize,
    }
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (finished, pulse) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let lock = |seen: &Mutex<Seen>, change: &mut dyn FnMut(&mut Seen)| {
        change(&mut seen.lock().unwrap_or_else(PoisonError::into_inner));
    };
    let handler = {
        let (seen, finished, pulse) = (seen.clone(), finished.clone(), pulse.clone());
        move |received: Received| {
            let (seen, finished, pulse) = (seen.clone(), finished.clone(), pulse.clone());
            async move {
                let key = received.key.as_ref().and_then(|k| k.as_str());
                let key = key.unwrap_or_default().to_owned();
                let number: usize = received
                    .headers
                    .get("number")
                    .and_then(|n| n.parse().ok())
                    .ok_or_else(|| HandlerError::reject("no number"))?;
                lock(&seen, &mut |s| {
                    if let Some(other) = s.running.insert(key.clone(), number) {
                        s.broken.push(format!("{key}: {number} while {other} ran"));
                    }
                    s.most_at_once = s.most_at_once.max(s.running.len());
                });
                // Lets the others run meanwhile: keys overlap, one key must not.
                pulse.notify_waiters();
                for _ in 0..YIELDS {
                    tokio::task::yield_now().await;
                }
                lock(&seen, &mut |s| {
                    s.running.remove(&key);
                    s.order.entry(key.clone()).or_default().push(number);
                    s.done += 1;
                    if s.done == KEYS * EACH {
                        finished.notify_one();
                    }
                });
                Ok::<(), HandlerError>(())
            }
        }
    };
    let options = SubscribeOptions {
        concurrency: Some(KEYS),
        ..f.options()
    };
    let subscription = f
        .handler(&client, &topic, options, Arc::new(handler))
        .await?;
    let messages = (0..KEYS * EACH).map(|n| numbered(n).with_key(format!("key {}", n % KEYS)));
    f.publish(&client, &topic, messages.collect()).await?;
    let finished = tokio::time::timeout(Reader::PATIENCE, finished.notified()).await;
    let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    ensure!(
        finished.is_ok(),
        "expected {} handled messages, seen {}",
        KEYS * EACH,
        seen.done
    );
    ensure!(
        seen.broken.is_empty(),
        "expected one handler for each key at a time, seen {:?}",
        seen.broken
    );
    for (key, order) in &seen.order {
        ensure!(
            order.is_sorted(),
            "expected {key} in publish order, seen {order:?}"
        );
    }
    ensure!(
        seen.most_at_once > 1,
        "expected handlers of different keys to run at the same time, they did not"
    );
    subscription.unsubscribe().await;
    Ok(())
}

/// Turns that a handler leaves to others before it ends.
const YIELDS: usize = 20;
