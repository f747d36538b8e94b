//! The job, stepped in virtual time.

use std::{sync::Arc, time::Duration};

use super::{
    Outcome,
    copy::Copied,
    job::{Action, BATCHES, Job},
    plan::Stretch,
    progress::ReplayStatus,
    request::{ReplayRequest, Wanted},
};
use crate::{
    broker::{BrokerType, Received},
    error::{Error, ErrorCode},
    message::{Message, MessageId, Timestamp},
    topic::Topic,
};

const ZERO: Duration = Duration::ZERO;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Partitions with a first offset and an end.
type Spans<'a> = &'a [(i32, i64, i64)];

fn job(json: &str, stretches: &[(&str, Spans<'_>)]) -> Job {
    let request: ReplayRequest = serde_json::from_str(json).unwrap();
    let wanted = Wanted::check(&request, |name| Topic::new(name)).unwrap();
    let mut job = Job::new(wanted, Timestamp::from_millis(1_000_000));
    let stretches = stretches.iter().map(|(topic, partitions)| {
        let first = partitions
            .iter()
            .map(|(p, first, _)| (*p, *first))
            .collect();
        let end = partitions.iter().map(|(p, _, end)| (*p, *end)).collect();
        Stretch::new(Topic::new(topic).unwrap(), &first, &end, &end)
    });
    job.planned(stretches.collect());
    job
}

/// A message whose time is its offset.
fn at(topic: &str, partition: i32, offset: i64, id: &str) -> Received {
    let mut message = Message::new("kind", "x")
        .with_id(MessageId::new(id).unwrap())
        .with_timestamp(Timestamp::from_millis(offset));
    message.partition = Some(partition);
    message.offset = Some(offset);
    Received {
        topic: Topic::new(topic).unwrap(),
        message: Arc::new(message),
        marks: Arc::default(),
        via: BrokerType::Kafka,
    }
}

fn published(batch: &[Copied]) -> Vec<Outcome> {
    let first = |c: &Copied| c.marks.replay.as_ref().unwrap().of.clone();
    batch.iter().map(|c| Outcome::Published(first(c))).collect()
}

fn failed() -> Outcome {
    Outcome::Failed(Error::new(ErrorCode::SpoolFull, "no room"))
}

fn batch(job: &mut Job, now: Duration) -> Vec<Copied> {
    match job.next(now) {
        Action::Publish(batch) => batch,
        other => panic!("{other:?}"),
    }
}

fn opens(job: &mut Job, n: usize) {
    let action = job.next(ZERO);
    assert!(matches!(action, Action::Open(m) if m == n), "{action:?}");
}

/// Reads offsets of partition 0 of a topic, expecting to be asked for each.
fn read(job: &mut Job, topic: &str, offsets: std::ops::Range<i64>) {
    for offset in offsets {
        assert!(matches!(job.next(ZERO), Action::Read), "before {offset}");
        job.message(&at(topic, 0, offset, &format!("{topic}-{offset}")));
    }
}

#[test]
fn it_reads_each_topic_to_its_end_and_publishes_in_batches() {
    let mut job = job(
        r#"{"pattern":"t.*","options":{"batch_size":2}}"#,
        &[
            ("t.a", &[(0, 0, 3)]),
            ("t.empty", &[]),
            ("t.b", &[(0, 5, 6)]),
        ],
    );
    opens(&mut job, 0);
    read(&mut job, "t.a", 0..2);
    let first = batch(&mut job, ZERO);
    assert_eq!(first.len(), 2);
    assert_eq!(first[0].target.as_str(), "t.a", "the same topic");
    job.settled(ZERO, published(&first));
    read(&mut job, "t.a", 2..3);
    job.ended();
    let rest = batch(&mut job, ZERO);
    assert_eq!(rest.len(), 1, "what is left at the end of a topic");
    job.settled(ZERO, published(&rest));
    opens(&mut job, 2);
    read(&mut job, "t.b", 5..6);
    job.ended();
    let last = batch(&mut job, ZERO);
    assert!(matches!(job.next(ZERO), Action::Settle));
    job.settled(ZERO, published(&last));
    assert!(matches!(job.next(ms(2_000)), Action::End));
    let p = job.progress(ms(9_999));
    assert_eq!(p.status, ReplayStatus::Completed);
    assert_eq!((p.total, p.replayed, p.skipped, p.failed), (4, 4, 0, 0));
    assert_eq!((p.offsets_read, p.offsets_total), (4, 4));
    assert_eq!(p.last_id.as_deref(), Some("t.b-5"));
    assert_eq!(p.current.unwrap().offset, 5);
    assert_eq!(p.ended_at, Some(Timestamp::from_millis(1_002_000)));
    assert!((p.rate - 2.0).abs() < 1e-9, "{}", p.rate);
}

#[test]
fn offsets_that_do_not_exist_are_passed_with_the_end() {
    let mut job = job(r#"{"topic":"t"}"#, &[("t", &[(0, 0, 100), (1, 10, 20)])]);
    opens(&mut job, 0);
    job.message(&at("t", 0, 41, "a"));
    // A source that had to connect again goes back a little; that is no message.
    job.message(&at("t", 0, 41, "a"));
    job.message(&at("t", 0, 40, "b"));
    assert_eq!(job.progress(ZERO).offsets_read, 42);
    assert_eq!(job.progress(ZERO).total, 110);
    job.ended();
    let only = batch(&mut job, ZERO);
    job.settled(ZERO, published(&only));
    assert!(matches!(job.next(ZERO), Action::End));
    let p = job.progress(ZERO);
    assert_eq!((p.offsets_read, p.offsets_total), (110, 110));
    assert_eq!(p.total, 1, "at the end it is what there was");
}

#[test]
fn a_time_range_takes_its_start_and_leaves_its_end_also_out_of_order() {
    let mut job = job(
        r#"{"topic":"t","from_time":10,"to_time":20,"options":{"dry_run":true}}"#,
        &[("t", &[(0, 0, 40)])],
    );
    opens(&mut job, 0);
    for offset in [9, 10, 19, 20, 30] {
        job.message(&at("t", 0, offset, &offset.to_string()));
    }
    // Written late: it waited in a spool.
    let mut late = at("t", 0, 31, "late");
    Arc::make_mut(&mut late.message).timestamp = Timestamp::from_millis(12);
    job.message(&late);
    job.ended();
    assert!(matches!(job.next(ZERO), Action::End));
    let p = job.progress(ZERO);
    assert_eq!((p.replayed, p.skipped, p.total), (3, 0, 3));
    assert_eq!(p.last_id.as_deref(), Some("late"));
}

#[test]
fn what_is_filtered_out_or_comes_twice_is_skipped() {
    let mut job = job(
        r#"{"topic":"t","filter":{"types":["kind"]},"options":{"skip_duplicates":true,"dry_run":true}}"#,
        &[("t", &[(0, 0, 9)])],
    );
    opens(&mut job, 0);
    job.message(&at("t", 0, 0, "a"));
    job.message(&at("t", 0, 1, "a"));
    let mut other = at("t", 0, 2, "b");
    Arc::make_mut(&mut other.message).kind = "other".into();
    job.message(&other);
    // A replay of the first, in the topic that is replayed.
    let mut again = at("t", 0, 3, "c");
    Arc::make_mut(&mut again.marks).replay = Some(Box::new(crate::message::wire::Replayed {
        of: "a".into(),
        by: "r".into(),
    }));
    job.message(&again);
    let p = job.progress(ZERO);
    assert_eq!((p.replayed, p.skipped), (1, 3));
}

#[test]
fn a_pause_stands_between_two_batches_and_no_other() {
    let mut job = job(
        r#"{"topic":"t","options":{"batch_size":1,"delay_between":"50ms","preserve_order":false}}"#,
        &[("t", &[(0, 0, 2)])],
    );
    opens(&mut job, 0);
    read(&mut job, "t", 0..1);
    let first = batch(&mut job, ms(5));
    job.message(&at("t", 0, 1, "b"));
    assert!(matches!(job.next(ms(6)), Action::Settle), "one at a time");
    job.settled(ms(10), published(&first));
    let action = job.next(ms(10));
    assert!(
        matches!(action, Action::Pause(until) if until == ms(60)),
        "{action:?}"
    );
    assert!(matches!(job.next(ms(59)), Action::Pause(_)));
    let second = batch(&mut job, ms(60));
    job.settled(ms(61), published(&second));
    assert!(matches!(job.next(ms(61)), Action::Read));
    job.ended();
    assert!(
        matches!(job.next(ms(61)), Action::End),
        "no pause after the last"
    );
}

#[test]
fn in_order_a_failure_ends_it_and_keeps_the_first_error() {
    let mut job = job(
        r#"{"topic":"t","options":{"batch_size":3}}"#,
        &[("t", &[(0, 0, 9)])],
    );
    opens(&mut job, 0);
    read(&mut job, "t", 0..3);
    let first = batch(&mut job, ZERO);
    let mut outcomes = published(&first[..1]);
    outcomes.extend([failed(), Outcome::NotTried]);
    job.message(&at("t", 0, 3, "d"));
    job.settled(ZERO, outcomes);
    assert!(matches!(job.next(ms(1)), Action::End));
    let p = job.progress(ms(1));
    assert_eq!(p.status, ReplayStatus::Failed);
    assert_eq!((p.replayed, p.failed), (1, 1));
    assert!(p.error.unwrap().contains("SPOOL_FULL"));
}

#[test]
fn without_order_several_batches_are_under_way_and_failures_are_passed() {
    let mut job = job(
        r#"{"topic":"t","options":{"batch_size":1,"preserve_order":false}}"#,
        &[("t", &[(0, 0, 20)])],
    );
    opens(&mut job, 0);
    let mut under_way = Vec::new();
    for n in 0..BATCHES as i64 {
        read(&mut job, "t", n..n + 1);
        under_way.push(batch(&mut job, ZERO));
    }
    job.message(&at("t", 0, 9, "more"));
    assert!(matches!(job.next(ZERO), Action::Settle));
    job.settled(ZERO, vec![failed()]);
    under_way[0] = batch(&mut job, ZERO);
    job.ended();
    for batch in &under_way {
        assert!(matches!(job.next(ZERO), Action::Settle));
        job.settled(ZERO, published(batch));
    }
    assert!(matches!(job.next(ZERO), Action::End));
    let p = job.progress(ZERO);
    assert_eq!(p.status, ReplayStatus::Completed);
    assert_eq!((p.replayed, p.failed, p.total), (BATCHES as u64, 1, 5));
    assert!(p.error.is_some());
}

#[test]
fn a_cancel_waits_for_what_is_under_way_and_publishes_nothing_more() {
    let mut job = job(
        r#"{"topic":"t","options":{"batch_size":2}}"#,
        &[("t", &[(0, 0, 9)])],
    );
    opens(&mut job, 0);
    read(&mut job, "t", 0..2);
    let first = batch(&mut job, ZERO);
    read(&mut job, "t", 2..4);
    job.cancel();
    job.fail(&Error::new(
        ErrorCode::ConsumeFailed,
        "the source was stopped",
    ));
    assert!(matches!(job.next(ZERO), Action::Settle));
    job.settled(ZERO, published(&first));
    assert!(matches!(job.next(ms(3)), Action::End));
    assert!(matches!(job.next(ms(4)), Action::End));
    let p = job.progress(ms(4));
    assert_eq!((p.status, p.replayed), (ReplayStatus::Cancelled, 2));
    assert_eq!(p.total, 9, "what was left is not forgotten");
}

#[test]
fn a_dry_run_publishes_nothing_and_needs_no_pause() {
    let mut job = job(
        r#"{"topic":"t","options":{"batch_size":1,"delay_between":"1h","dry_run":true}}"#,
        &[("t", &[(0, 0, 5)])],
    );
    opens(&mut job, 0);
    read(&mut job, "t", 0..5);
    job.ended();
    assert!(matches!(job.next(ZERO), Action::End));
    assert_eq!(job.progress(ZERO).replayed, 5);
}
