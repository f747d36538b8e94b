//! Consume, transform, produce: what comes of each message is there once, whatever
//! dies in the middle.

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use messaging_hub::{
    HandlerError, Message, MessageBroker, SubscribeOptions, Topic,
    adapter::kafka::KafkaConfig,
    broker::{EventStreamBroker, Received, TopicOptions},
    hub::MessagingHub,
};

use crate::{
    common::*,
    foreign::{Seen, committed, committed_when, counts},
    support::{Kafka, need, shared_kafka, unique},
    transactions::hub_over,
};

type Made = Result<Vec<(String, Message)>, HandlerError>;

fn options(group: &str) -> SubscribeOptions {
    SubscribeOptions {
        retry_delay: Some(Duration::from_millis(100)),
        ..SubscribeOptions::group(group)
    }
}

/// What a message says, with its key.
fn copy(received: &Received) -> Message {
    let body = String::from_utf8(received.message.payload.to_vec()).unwrap();
    let mut message = text(&format!("out of {body}"));
    message.key = received.message.key.clone();
    message
}

async fn fill(broker: &messaging_hub::adapter::kafka::KafkaBroker, topic: &Topic, n: usize) {
    let messages = (0..n).map(|i| text(&i.to_string()).with_key(format!("k{}", i % 100)));
    publish(broker, topic, messages.collect()).await;
}

/// Waits until so many are seen, and gives them.
async fn until_seen(bootstrap: &str, topic: &str, n: usize, within: Duration) -> Vec<Seen> {
    let seen = committed_when(bootstrap, &[topic], within, |seen| seen.len() >= n).await;
    assert!(seen.len() >= n, "{} of {n} were seen", seen.len());
    seen
}

fn once_each(seen: &[Seen], n: usize) {
    let counts = counts(seen.iter().map(|s| s.body.clone()));
    for i in 0..n {
        assert_eq!(counts.get(&format!("out of {i}")), Some(&1), "{i}");
    }
    assert_eq!(counts.len(), n);
}

const EVENTS: usize = 10_000;
const CHILD: &str = "TRANSFORM_CHILD";

/// This test is also the process that is killed, where the environment says so.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_events_come_out_once_though_the_process_and_kafka_are_killed() {
    if let Ok(places) = std::env::var(CHILD) {
        let [bootstrap, from, to]: [&str; 3] =
            places.split(' ').collect::<Vec<_>>().try_into().unwrap();
        child(bootstrap, from, to).await;
        return;
    }
    let mut node = need!(Kafka::start().await);
    let broker = connected(config(node.bootstrap())).await;
    let (from, to) = (
        topic(&broker, "in", 3).await,
        topic(&broker, "out", 3).await,
    );
    fill(&broker, &from, EVENTS).await;
    let places = format!("{} {from} {to}", node.bootstrap());
    let bootstrap = node.bootstrap().to_owned();
    let mut transform = spawn(&places);
    let before = until_seen(&bootstrap, &to, 500, 2 * WAIT).await.len();
    let mut seen = before;
    // SIGKILL, twice, at moments that nobody chose.
    for round in 0..2 {
        drop(transform);
        seen = committed(&bootstrap, &[to.as_str()]).await.len();
        eprintln!("killed with {seen} of {EVENTS} seen");
        assert!(seen < EVENTS, "killed too late to show anything");
        transform = spawn(&places);
        let next = before + 500 * (round + 1);
        seen = until_seen(&bootstrap, &to, next, 2 * WAIT).await.len();
    }
    // At once: it has hardly remembered yet who came back.
    node.kill().await;
    assert!(seen < EVENTS, "done before Kafka was killed");
    node.restart().await;
    let seen = until_seen(&bootstrap, &to, EVENTS, 4 * WAIT).await;
    drop(transform);
    once_each(&seen, EVENTS);
    // In the order of each key.
    let mut last: BTreeMap<(i32, usize), usize> = BTreeMap::new();
    for s in &seen {
        let n: usize = s.body.strip_prefix("out of ").unwrap().parse().unwrap();
        let before = last.insert((s.partition, n % 100), n);
        assert!(before.is_none_or(|b| b < n), "{before:?} before {n}");
    }
    broker.close().await.unwrap();
}

/// A process that is killed when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn spawn(places: &str) -> Killed {
    // A build that goes on meanwhile replaces the file, not the program.
    let child = Command::new("/proc/self/exe")
        .args([
            "--exact",
            "--nocapture",
            "transforms::ten_thousand_events_come_out_once_though_the_process_and_kafka_are_killed",
        ])
        .env(CHILD, places)
        .stdout(Stdio::null())
        .spawn();
    Killed(child.unwrap())
}

async fn child(bootstrap: &str, from: &str, to: &str) {
    // Why it stands still, if it does.
    #[cfg(feature = "server")]
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new("messaging_hub=info"))
        .with_writer(std::io::stderr)
        .init();
    let broker = connected(KafkaConfig {
        transaction_timeout: Duration::from_secs(20),
        ..config(bootstrap)
    })
    .await;
    let hub = hub_over(&broker);
    let to = to.to_owned();
    let options = SubscribeOptions {
        // Comes back as who it was: nobody waits for the session of the killed.
        group_instance_id: Some("only".to_owned()),
        max_poll_records: 100,
        ..options("transform")
    };
    let subscription = hub
        .transform(from, options, "transform-1", move |received: Received| {
            let to = to.clone();
            async move {
                // Slow enough for three kills in the middle.
                tokio::time::sleep(Duration::from_millis(2)).await;
                Made::Ok(vec![(to, copy(&received))])
            }
        })
        .await
        .unwrap();
    // Until it is killed.
    std::future::pending::<()>().await;
    drop(subscription);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_tried_again_and_buried_within_the_transaction() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let from = topic(&broker, "fail-in", 2).await;
    let to = Topic::new(unique("fail-out")).unwrap();
    let little = TopicOptions {
        partitions: 2,
        max_message_bytes: Some(20_000),
        ..TopicOptions::default()
    };
    broker.create_topic(&to, &little).await.unwrap();
    fill(&broker, &from, 200).await;
    let hub = hub_over(&broker);
    let tries = Arc::new(AtomicUsize::new(0));
    let handler = {
        let (tries, to) = (tries.clone(), to.clone());
        move |received: Received| {
            let (tries, to) = (tries.clone(), to.to_string());
            async move {
                match &received.message.payload[..] {
                    b"50" => {
                        tries.fetch_add(1, Ordering::SeqCst);
                        Err(HandlerError::retry("never"))
                    }
                    b"60" => panic!("no"),
                    b"70" if received.message.retry_count == 0 => {
                        Err(HandlerError::retry("not yet"))
                    }
                    // Refused by the broker, not by the hub.
                    b"80" => {
                        let noise = (0..50_000).map(|_| fastrand::u8(..)).collect::<Vec<_>>();
                        Ok(vec![(to, Message::new("noise", noise))])
                    }
                    b"90" => Ok(vec![("no topic of that name".to_owned(), text("x"))]),
                    _ => Ok(vec![(to, copy(&received))]),
                }
            }
        }
    };
    let options = SubscribeOptions {
        max_retries: Some(2),
        ..options(&unique("g"))
    };
    let transform = hub
        .transform(&from, options, &unique("t"), handler)
        .await
        .unwrap();
    until_seen(node.bootstrap(), &to, 196, 2 * WAIT).await;
    let is_ours =
        |s: &Seen| s.headers.get("hub-original-topic").map(String::as_str) == Some(from.as_str());
    let letters = ["helixagent.dlq.events"];
    let mut buried = committed_when(node.bootstrap(), &letters, WAIT, |seen| {
        seen.iter().filter(|s| is_ours(s)).count() >= 4
    })
    .await;
    buried.retain(is_ours);
    transform.unsubscribe().await;
    let reasons: BTreeMap<&str, &str> = buried
        .iter()
        .map(|s| (s.body.as_str(), s.headers["hub-failure-reason"].as_str()))
        .collect();
    assert_eq!(buried.len(), 4);
    assert_eq!(
        reasons.into_iter().collect::<Vec<_>>(),
        [
            ("50", "handler_error"),
            ("60", "handler_panic"),
            ("80", "refused"),
            ("90", "refused")
        ]
    );
    // One try and two retries, however often its transaction goes back because of what
    // the broker refuses.
    assert_eq!(tries.load(Ordering::SeqCst), 3);
    assert_eq!(broker.metrics().messages_dead_lettered, 4);
    let seen = committed(node.bootstrap(), &[&to]).await;
    let counts = counts(seen.into_iter().map(|s| s.body));
    assert_eq!(counts.len(), 196);
    assert!(counts.values().all(|n| *n == 1) && counts.contains_key("out of 70"));
    close(hub).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_share_a_transform_and_a_rebalance_in_the_middle_doubles_nothing() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let other = connected(config(node.bootstrap())).await;
    let (from, to) = (
        topic(&broker, "share-in", 4).await,
        topic(&broker, "share-out", 2).await,
    );
    fill(&broker, &from, 2000).await;
    let (first, second) = (hub_over(&broker), hub_over(&other));
    let (group, id) = (unique("g"), unique("t"));
    // How many the first has handled, and whether the second has any yet: the first
    // does not finish alone, however late the second comes.
    let (handled, shared) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let start = |hub: MessagingHub, member: usize| {
        let (to, from, group, id) = (to.clone(), from.clone(), group.clone(), id.clone());
        let (handled, shared) = (handled.clone(), shared.clone());
        async move {
            let options = SubscribeOptions {
                max_poll_records: 200,
                ..options(&group)
            };
            hub.transform(
                &from,
                options,
                &format!("{id}-{member}"),
                move |received: Received| {
                    let to = to.to_string();
                    let (handled, shared) = (handled.clone(), shared.clone());
                    async move {
                        match member {
                            1 => {
                                let late = handled.fetch_add(1, Ordering::SeqCst) >= 1_000;
                                while late && !shared.load(Ordering::SeqCst) {
                                    tokio::time::sleep(Duration::from_millis(10)).await;
                                }
                            }
                            _ => shared.store(true, Ordering::SeqCst),
                        }
                        // Longer than a rebalance may be kept waiting, for a batch.
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        let made = copy(&received).with_header("member", member.to_string());
                        Made::Ok(vec![(to, made)])
                    }
                },
            )
            .await
            .unwrap()
        }
    };
    let a = start(first.clone(), 1).await;
    until_seen(node.bootstrap(), &to, 200, 2 * WAIT).await;
    let b = start(second.clone(), 2).await;
    let by_second = |seen: &[Seen]| seen.iter().any(|s| s.headers["member"] == "2");
    eventually("the second has a share", || async {
        by_second(&committed(node.bootstrap(), &[&to]).await)
    })
    .await;
    // One leaves in the middle, too.
    a.unsubscribe().await;
    let seen = until_seen(node.bootstrap(), &to, 2000, 4 * WAIT).await;
    once_each(&seen, 2000);
    b.unsubscribe().await;
    close(first).await;
    close(second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transform_whose_id_another_opens_ends_with_the_reason() {
    let node = need!(shared_kafka().await);
    let broker = connected(config(node.bootstrap())).await;
    let (from, to) = (
        topic(&broker, "fenced-in", 1).await,
        topic(&broker, "fenced-out", 1).await,
    );
    let hub = hub_over(&broker);
    let (group, id) = (unique("g"), unique("t"));
    let handler = |to: Topic| {
        move |received: Received| {
            let made = vec![(to.to_string(), copy(&received))];
            async move { Made::Ok(made) }
        }
    };
    let first = hub
        .transform(&from, options(&group), &id, handler(to.clone()))
        .await
        .unwrap();
    fill(&broker, &from, 100).await;
    until_seen(node.bootstrap(), &to, 100, 2 * WAIT).await;
    assert!(first.active().await);
    // Opened by another, which does nothing with it.
    let other = hub.transactions(&id).await.unwrap();
    fill(&broker, &from, 1).await;
    eventually("the first has ended", || async { !first.is_active() }).await;
    tokio::time::timeout(WAIT, first.unsubscribe())
        .await
        .unwrap();
    drop(other);
    // The next one goes on where the first was.
    let second = hub
        .transform(&from, options(&group), &id, handler(to.clone()))
        .await
        .unwrap();
    let seen = until_seen(node.bootstrap(), &to, 101, 2 * WAIT).await;
    assert_eq!(seen.len(), 101);
    second.unsubscribe().await;
    // What cannot be honoured.
    for wrong in [
        SubscribeOptions::default(),
        SubscribeOptions {
            auto_ack: true,
            ..options(&group)
        },
    ] {
        let refused = hub.transform(&from, wrong, &id, handler(to.clone())).await;
        assert!(refused.unwrap_err().is_refusal());
    }
    close(hub).await;
}

async fn close(hub: MessagingHub) {
    hub.close(Duration::from_secs(10)).await;
}
