//! Random operations, crashes at random steps, and a model of what must be
//! there. A crash is a copy of the folder at that moment, behind something that
//! was confirmed: everything before it must be in the copy.

use std::collections::BTreeMap;

use super::*;

/// A message of the model: (priority, number, body, failed attempts).
type Item = (u8, u64, String, u32);

#[derive(Default)]
struct Model {
    number: u64,
    queues: BTreeMap<&'static str, Vec<Item>>,
    resting: u64,
    /// Bodies by partition.
    events: [Vec<String>; 2],
    position: [i64; 2],
}

impl Model {
    fn put(&mut self, name: &'static str, priority: u8, body: String, failed: u32) {
        self.number += 1;
        let number = self.number;
        let queue = self.queues.entry(name).or_default();
        queue.push((priority, number, body, failed));
        queue.sort_by_key(|(priority, number, ..)| (u8::MAX - priority, *number));
    }

    fn first(&mut self, name: &str) -> Option<Item> {
        let queue = self.queues.get_mut(name)?;
        (!queue.is_empty()).then(|| queue.remove(0))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_was_done_before_a_crash_is_there_after_it() {
    for seed in 0..SEEDS {
        run(seed).await;
    }
}

async fn run(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::default();
    let mut generation = 0;
    let place = |n: usize| dir.path().join(n.to_string());
    let mut broker = fresh(&place(0)).await;
    for step in 0..STEPS {
        let name = QUEUES[random.usize(..QUEUES.len())];
        let body = format!("{seed}.{step}");
        match random.u8(..20) {
            0..=5 => {
                let priority = random.u8(..=10);
                let message = message(&body).with_priority(Priority::new(priority).unwrap());
                publish_one(&broker, name, message).await;
                model.put(name, priority, body, 0);
            }
            6 => {
                let mut task = Task::new("t", body);
                let late = Timestamp::now() + Duration::from_secs(3600);
                task.attributes.scheduled_at = Some(late);
                publish_one(&broker, RESTING, task.into()).await;
                model.resting += 1;
            }
            7..=12 => {
                let taken = next(&broker, name).await;
                let expected = model.first(name);
                assert_eq!(
                    taken.as_ref().map(|d| (body_of(d), d.retry_count)),
                    expected.as_ref().map(|e| (e.2.clone(), e.3)),
                    "seed {seed} step {step}"
                );
                let (Some(taken), Some((priority, number, body, failed))) = (taken, expected)
                else {
                    continue;
                };
                match random.u8(..5) {
                    0 | 1 => taken.ack().await.unwrap(),
                    2 => {
                        taken.requeue().await.unwrap();
                        let queue = model.queues.entry(name).or_default();
                        queue.insert(0, (priority, number, body, failed));
                    }
                    3 => {
                        let failure = Failure::now("handler_error", "boom", name, None);
                        let delay = Duration::ZERO;
                        let retry = Verdict::Retry { delay, failure };
                        taken.settle(retry).await.unwrap();
                        model.put(name, priority, body, failed + 1);
                    }
                    _ => {
                        taken.dead_letter("handler_error", "boom").await.unwrap();
                        model.put(DEAD, priority, body, failed);
                    }
                }
            }
            13..=15 => {
                let partition = random.usize(..2);
                let message = message(&body).with_partition(i32::try_from(partition).unwrap());
                let at = publish_one(&broker, EVENTS, message).await.unwrap();
                assert_eq!(
                    usize::try_from(at.offset).unwrap(),
                    model.events[partition].len()
                );
                model.events[partition].push(body);
            }
            16 => {
                let partition = random.usize(..2);
                let high = i64::try_from(model.events[partition].len()).unwrap();
                let to = random.i64(0..=high);
                broker
                    .commit_offset("g", &topic(EVENTS), i32::try_from(partition).unwrap(), to)
                    .await
                    .unwrap();
                model.position[partition] = to;
            }
            17 if random.u8(..4) == 0 => {
                broker.purge_queue(&topic(name)).await.unwrap();
                model.queues.remove(name);
            }
            18 if random.u8(..4) == 0 => {
                broker.delete_queue(&topic(name)).await.unwrap();
                let options = QueueOptions::default();
                broker.declare_queue(&topic(name), &options).await.unwrap();
                model.queues.remove(name);
            }
            19 => {
                // Confirmed in both logs, behind everything else.
                publish_one(&broker, "tasks.fence", message("x")).await;
                publish_one(&broker, "events.fence", message("x")).await;
                generation += 1;
                snapshot(&place(generation - 1), &place(generation));
                broker.close().await.unwrap();
                std::fs::remove_dir_all(place(generation - 1)).unwrap();
                broker = open(&place(generation)).await;
            }
            _ => {}
        }
    }
    broker.close().await.unwrap();
    let broker = open(&place(generation)).await;
    compare(&broker, &mut model, seed).await;
    broker.close().await.unwrap();
}

async fn fresh(dir: &Path) -> Arc<EmbeddedBroker> {
    let broker = open(dir).await;
    for name in QUEUES.iter().chain([&RESTING]) {
        let options = QueueOptions::default();
        broker.declare_queue(&topic(name), &options).await.unwrap();
    }
    let options = TopicOptions {
        partitions: 2,
        ..TopicOptions::default()
    };
    broker.create_topic(&topic(EVENTS), &options).await.unwrap();
    broker
        .create_consumer_group("g", &stream(EVENTS).pattern().clone(), SeekTo::Beginning)
        .await
        .unwrap();
    broker
}

async fn compare(broker: &EmbeddedBroker, model: &mut Model, seed: u64) {
    for name in QUEUES.iter().chain([&DEAD]) {
        while let Some(expected) = model.first(name) {
            let taken = next(broker, name).await;
            assert_eq!(
                taken.as_ref().map(|d| (body_of(d), d.retry_count)),
                Some((expected.2, expected.3)),
                "seed {seed}, {name}"
            );
            taken.unwrap().ack().await.unwrap();
        }
        assert_eq!(broker.queue_depth(&topic(name)).await.unwrap(), 0);
    }
    let stats = broker.queue_stats(&topic(RESTING)).await.unwrap();
    assert_eq!((stats.messages, stats.messages_ready), (model.resting, 0));
    let everything = SubscribeOptions::default().starting(StartFrom::Earliest);
    let mut reader = broker.consume(&stream(EVENTS), &everything).await.unwrap();
    let mut found: [Vec<String>; 2] = Default::default();
    let held = model.events.iter().map(Vec::len).sum();
    for delivery in take(&mut reader, held).await {
        let partition = usize::try_from(delivery.partition.unwrap()).unwrap();
        found[partition].push(body(&delivery));
    }
    assert_eq!(found, model.events, "seed {seed}");
    for (partition, expected) in (0..).zip(model.position) {
        let position = broker.offset("g", &topic(EVENTS), partition).await.unwrap();
        assert_eq!(position, Some(expected), "seed {seed}");
    }
}

fn body_of(delivery: &Delivery) -> String {
    body(delivery)
}

const SEEDS: u64 = 12;
const STEPS: u32 = 120;
const QUEUES: [&str; 2] = ["tasks.one", "tasks.two"];
const RESTING: &str = "tasks.resting";
const DEAD: &str = "helixagent.dlq";
const EVENTS: &str = "events.seeds";
