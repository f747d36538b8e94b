//! Every record comes back as it was written.

use proptest::prelude::*;

use super::*;
use crate::message::{MessageId, Priority};

fn full() -> Content {
    let at = Timestamp::from_millis;
    Content {
        message: Arc::new(Message {
            id: MessageId::new("id-1").unwrap(),
            kind: "llm.request".into(),
            payload: Bytes::from_static(b"\0\xff payload"),
            content_type: Some("application/json".into()),
            content_encoding: Some("gzip".into()),
            headers: [("a".to_owned(), "\u{e4} \"b\"".to_owned())].into(),
            timestamp: at(1_700_000_000_123),
            priority: Priority::CRITICAL,
            key: Some(Key::from(vec![0xff, 0])),
            retry_count: 2,
            max_retries: 9,
            trace_id: Some("t".into()),
            correlation_id: Some("c".into()),
            reply_to: Some("r".into()),
            // A time that has no RFC 3339 form comes back, too.
            expiration: Some(at(i64::MAX)),
            delivery_mode: DeliveryMode::Transient,
            state: MessageState::DeadLettered,
            error: Some("boom".into()),
            redelivered: false,
            partition: None,
            offset: None,
            topic: None,
            task: Some(Box::new(TaskAttributes {
                deadline: Some(at(1)),
                scheduled_at: Some(at(i64::MAX)),
                started_at: Some(at(3)),
                completed_at: Some(at(4)),
                worker_id: Some("w".into()),
                parent_task_id: Some("p".into()),
                metadata: [("m".to_owned(), "n".to_owned())].into(),
            })),
            event: Some(Box::new(EventAttributes {
                source: "/s".into(),
                subject: Some("sub".into()),
                data_schema: Some("schema".into()),
                extensions: [("x".to_owned(), "y".to_owned())].into(),
            })),
        }),
        marks: Arc::new(Marks {
            possible_duplicate: true,
            settled: vec!["g1".into(), "g2".into()],
            failure: Some(Box::new(Failure {
                reason: "expired".into(),
                details: "late".into(),
                first: at(5),
                last: at(6),
                original_topic: "tasks.x".into(),
                retries: 0,
            })),
            replay: Some(Box::new(Replayed {
                of: "first".into(),
                by: "again".into(),
            })),
            reprocess: 2,
        }),
        routing_key: Some("key".into()),
    }
}

#[test]
fn a_message_with_everything_and_one_with_nothing_come_back() {
    let nothing = Content {
        message: Arc::new(Message::default()),
        marks: Arc::default(),
        routing_key: None,
    };
    for content in [full(), nothing] {
        let task = Record::Task {
            queue: 7,
            ready: Timestamp::from_millis(-5),
            rests: true,
            content: content.clone(),
        };
        assert_eq!(Record::decode(&task.encode()), Ok(task));
        let event = Record::Event {
            stream: u64::MAX,
            partition: 3,
            offset: i64::MAX,
            appended: Timestamp::from_millis(8),
            content,
        };
        assert_eq!(Record::decode(&event.encode()), Ok(event));
    }
}

#[test]
fn the_rest_comes_back() {
    for record in [
        Record::Queue {
            name: "tasks.x".into(),
            options: QueueOptions {
                max_priority: Some(3),
                message_ttl_ms: Some(9),
                single_active_consumer: true,
                ..QueueOptions::default()
            },
        },
        Record::Handed {
            queue: 1,
            below: 200,
        },
        Record::Stream {
            name: "events.x".into(),
            options: TopicOptions {
                partitions: 12,
                settings: [("retention.bytes".to_owned(), "5".to_owned())].into(),
                ..TopicOptions::default()
            },
        },
        Record::Base {
            stream: 4,
            partition: 1,
            next: 77,
        },
        Record::Position {
            group: "gr\u{fc}n".into(),
            stream: 4,
            partition: 2,
            committed: 5,
            next: 9,
        },
    ] {
        assert_eq!(Record::decode(&record.encode()), Ok(record));
    }
}

#[test]
fn a_later_version_is_refused_with_what_to_do() {
    let mut body = Record::Handed { queue: 1, below: 2 }.encode().to_vec();
    body[0] = 9;
    let why = Record::decode(&body).unwrap_err();
    assert!(why.contains("version 9") && why.contains("later"), "{why}");
}

proptest! {
    #[test]
    fn what_is_cut_or_altered_never_panics(cut in 0usize..400, at in 0usize..400, byte: u8) {
        let whole = Record::Task {
            queue: 7,
            ready: Timestamp::from_millis(5),
            rests: false,
            content: full(),
        }
        .encode();
        let _ = Record::decode(&whole[..cut.min(whole.len())]);
        let mut altered = whole.to_vec();
        let at = at % altered.len();
        altered[at] = byte;
        let _ = Record::decode(&altered);
    }

    #[test]
    fn every_payload_comes_back(payload: Vec<u8>, header: String, key: Vec<u8>) {
        let message = Message::new("t", payload)
            .with_header("h", header)
            .with_key(key);
        let record = Record::Event {
            stream: 1,
            partition: 0,
            offset: 0,
            appended: message.timestamp,
            content: Content {
                message: Arc::new(message),
                marks: Arc::default(),
                routing_key: None,
            },
        };
        prop_assert_eq!(Record::decode(&record.encode()), Ok(record));
    }
}
