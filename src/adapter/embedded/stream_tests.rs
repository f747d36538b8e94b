//! Logs: times, retention, compaction.

use super::*;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millis(ms)
}

fn stream(options: TopicOptions) -> Stream {
    Stream::new(options, None).unwrap()
}

fn add(stream: &mut Stream, now: i64, key: &str, time: i64) -> i64 {
    let message = Message::new("t", "x")
        .with_key(key)
        .with_timestamp(at(time));
    stream
        .append(
            At {
                partition: 0,
                appended: at(now),
                record: None,
            },
            Arc::new(message),
            Arc::default(),
            100,
        )
        .unwrap()
}

#[test]
fn a_time_is_found_although_message_times_do_not_rise() {
    let mut s = stream(TopicOptions {
        retention_ms: 1000,
        ..TopicOptions::default()
    });
    for (now, time) in [(0, 500), (10, 100), (1500, 300), (1500, 900), (1500, 400)] {
        add(&mut s, now, "k", time);
    }
    let p = s.partition(0).unwrap();
    assert_eq!(p.offset_at(at(0)), 0);
    assert_eq!(p.offset_at(at(501)), 3);
    assert_eq!(p.offset_at(at(901)), 5);
    s.retain(at(1600));
    let p = s.partition(0).unwrap();
    assert_eq!((p.low(), p.high()), (2, 5));
    assert_eq!(p.offset_at(at(350)), 3);
    assert_eq!(p.offset_at(at(0)), 2);
}

#[test]
fn retention_by_bytes_drops_the_oldest_only() {
    let mut s = stream(TopicOptions {
        settings: [("retention.bytes".to_owned(), "250".to_owned())].into(),
        ..TopicOptions::default()
    });
    for n in 0..5 {
        add(&mut s, n, "k", n);
    }
    let p = s.partition(0).unwrap();
    assert_eq!((p.low(), p.high()), (3, 5));
    assert_eq!(s.bytes(), 200);
}

#[test]
fn compaction_keeps_the_newest_of_each_key_and_every_offset() {
    let mut s = stream(TopicOptions {
        cleanup_policy: "compact".into(),
        ..TopicOptions::default()
    });
    for (n, key) in ["a", "b", "a", "c", "b"].into_iter().enumerate() {
        add(&mut s, n as i64, key, n as i64);
    }
    s.make_room(at(i64::MAX / 2));
    let p = s.partition(0).unwrap();
    let kept: Vec<i64> = (0..5).filter(|o| p.get(*o).is_some()).collect();
    assert_eq!(kept, [2, 3, 4]);
    assert_eq!(s.bytes(), 300);
}

#[test]
fn settings_are_honoured_or_refused() {
    for (name, value) in [("no.such.setting", "1"), ("retention.bytes", "many")] {
        let options = TopicOptions {
            settings: [(name.to_owned(), value.to_owned())].into(),
            ..TopicOptions::default()
        };
        let error = Stream::new(options, None).unwrap_err();
        assert_eq!(error.code(), ErrorCode::TopicCreateFailed);
    }
}
