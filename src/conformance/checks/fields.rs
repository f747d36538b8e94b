//! Every field of a message comes back as it was published.

use std::collections::BTreeMap;

use crate::{
    broker::Delivery,
    conformance::{Failure, Fixture, Kind, Wanted, failure::ensure, fixture::numbered},
    message::{
        DeliveryMode, Event, EventAttributes, Key, Message, Priority, TaskAttributes, Timestamp,
    },
};

pub(super) async fn every_field_comes_back(f: Fixture) -> Result<(), Failure> {
    let mut message = Message::new("conformance.fields", &b"{\"a\":1}"[..])
        .with_content_type("application/vnd.test+json")
        .with_content_encoding("identity")
        .with_header("tenant", "one")
        .with_timestamp(Timestamp::from_millis(1_700_000_000_123))
        .with_priority(Priority::HIGH)
        .with_key("a key")
        .with_max_retries(7)
        .with_trace_id("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .with_correlation_id("correlation 1")
        .with_reply_to("replies.of.this")
        // Whole milliseconds, an hour from now: it must not expire here.
        .with_expiration(Timestamp::now() + HOUR)
        .with_delivery_mode(DeliveryMode::Persistent);
    message.retry_count = 2;
    let seen = one(&f, message.clone()).await?;
    same(&message, &seen.message)
}

pub(super) async fn a_bare_message_comes_back_bare(f: Fixture) -> Result<(), Failure> {
    let message = Message::new("", "");
    let seen = one(&f, message.clone()).await?;
    same(&message, &seen.message)
}

pub(super) async fn a_transient_message_comes_back(f: Fixture) -> Result<(), Failure> {
    let message = numbered(0).with_delivery_mode(DeliveryMode::Transient);
    let seen = one(&f, message.clone()).await?;
    same(&message, &seen.message)
}

pub(super) async fn task_attributes_come_back(f: Fixture) -> Result<(), Failure> {
    let mut message = numbered(0);
    message.task = Some(Box::new(TaskAttributes {
        deadline: Some(Timestamp::from_millis(4_102_444_800_001)),
        scheduled_at: Some(Timestamp::from_millis(1_600_000_000_002)),
        worker_id: Some("worker 1".to_owned()),
        parent_task_id: Some("parent 1".to_owned()),
        metadata: BTreeMap::from([
            ("model".to_owned(), "large".to_owned()),
            ("empty".to_owned(), String::new()),
        ]),
        ..TaskAttributes::default()
    }));
    let seen = one(&f, message.clone()).await?;
    same(&message, &seen.message)
}

pub(super) async fn event_attributes_come_back(f: Fixture) -> Result<(), Failure> {
    let mut event = Event::new("llm.request.started", "/agents/1", "{}");
    event.subject = Some("request 1".to_owned());
    event.data_schema = Some("https://example.com/schema.json".to_owned());
    event.correlation_id = Some("correlation 1".to_owned());
    event.key = Some(Key::from("request 1"));
    event.extensions = BTreeMap::from([("tenant".to_owned(), "one".to_owned())]);
    let message = Message::from(event);
    let seen = one(&f, message.clone()).await?;
    let expected: Option<&EventAttributes> = message.event.as_deref();
    ensure!(
        seen.message.event.as_deref() == expected,
        "expected the event attributes {expected:?}, seen {:?}",
        seen.message.event
    );
    same(&message, &seen.message)
}

pub(super) async fn headers_come_back_byte_for_byte(f: Fixture) -> Result<(), Failure> {
    let mut message = numbered(0)
        .with_header("empty", "")
        .with_header("spaces", "  around  ")
        .with_header("unicode", "gr\u{fc}\u{df}e \u{1F980} \u{202e}")
        .with_header("escapes", "a=b&c=%20;\"quoted\"\\ \t\r\n'x'")
        .with_header("null", "a\0b")
        .with_header("number", "0042")
        .with_header("boolean", "true")
        .with_header("long", "x".repeat(4_000))
        .with_header("x-dotted.name_with-signs", "yes")
        .with_header("content-language", "de");
    let already = message.headers.len();
    for n in already..24 {
        message = message.with_header(format!("extra-{n}"), format!("value {n}"));
    }
    let seen = one(&f, message.clone()).await?;
    for (name, value) in &message.headers {
        ensure!(
            seen.message.headers.get(name) == Some(value),
            "header {name}: expected {value:?}, seen {:?}",
            seen.message.headers.get(name)
        );
    }
    same(&message, &seen.message)
}

pub(super) async fn payloads_of_every_size_and_byte_come_back(f: Fixture) -> Result<(), Failure> {
    const MIB: usize = 1024 * 1024;
    let client = f.client().await?;
    let wanted = Wanted {
        max_message_bytes: (f.kind() == Kind::Stream).then_some(4 * MIB as u64),
        ..Wanted::new(f.kind())
    };
    let topic = f.topic_with(&client, &wanted).await?;
    let mut payloads: Vec<Vec<u8>> = [0, 1, 255, 64 * 1024, MIB]
        .into_iter()
        .map(|size| (0..size).map(|n| (n * 31 % 251) as u8).collect())
        .collect();
    payloads.push((0..=255).collect());
    payloads.push(b"\xff\xfe not UTF-8 \x80\x00".to_vec());
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    for payload in payloads {
        let message = Message::new("conformance.payload", payload);
        f.publish(&client, &topic, vec![message.clone()]).await?;
        let delivery = reader.next().await?;
        ensure!(
            delivery.message.payload == message.payload,
            "expected a payload of {} bytes back, seen {} bytes that differ",
            message.payload.len(),
            delivery.message.payload.len()
        );
        delivery.ack().await?;
    }
    reader.stop().await
}

pub(super) async fn readers_are_told_where_it_came_from(f: Fixture) -> Result<(), Failure> {
    let seen = one(&f, numbered(0)).await?;
    let message = &seen.message;
    ensure!(
        message.topic.as_deref() == Some(seen.topic.as_str()),
        "expected the topic {}, seen {:?}",
        seen.topic,
        message.topic
    );
    let placed = message.partition.is_some() && message.offset.is_some();
    ensure!(
        placed == (f.kind() == Kind::Stream),
        "expected partition and offset on streams only, seen {:?} and {:?} on a {}",
        message.partition,
        message.offset,
        f.kind()
    );
    Ok(())
}

/// Publishes one message and reads it back.
async fn one(f: &Fixture, message: Message) -> Result<Delivery, Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    f.publish(&client, &topic, vec![message]).await?;
    reader.next().await
}

/// Compares everything that the publisher chose, field by field.
fn same(expected: &Message, seen: &Message) -> Result<(), Failure> {
    macro_rules! compare {
        ($($field:ident),*) => {$(
            ensure!(
                expected.$field == seen.$field,
                "field {}: expected {:?}, seen {:?}",
                stringify!($field),
                expected.$field,
                seen.$field
            );
        )*};
    }
    compare!(
        id,
        kind,
        payload,
        content_encoding,
        headers,
        timestamp,
        priority,
        key,
        retry_count,
        max_retries,
        trace_id,
        correlation_id,
        reply_to,
        expiration,
        delivery_mode,
        task,
        event
    );
    // Without a media type the options' default may be filled in.
    let default = crate::broker::PublishOptions::default().content_type;
    let wanted = expected.content_type.as_deref();
    let got = seen.content_type.as_deref();
    ensure!(
        got == wanted || (wanted.is_none() && got == Some(default.as_str())),
        "field content_type: expected {wanted:?}, seen {got:?}"
    );
    ensure!(
        !seen.redelivered,
        "expected a first delivery unmarked, seen it marked redelivered"
    );
    Ok(())
}

const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);
