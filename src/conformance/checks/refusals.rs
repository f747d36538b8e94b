//! What must be refused is refused, says so, and never arrives.

use crate::{
    broker::PublishOptions,
    conformance::{Failure, Fixture, Kind, failure::ensure, fixture::numbered},
    error::{Assume, ErrorCode},
    message::Message,
};

pub(super) async fn a_publish_to_nowhere_is_refused(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let nowhere = f.name()?;
    let options = PublishOptions::default();
    let result = client.publish(&nowhere, numbered(0), &options).await;
    let error = match result {
        Ok(receipt) => {
            return Err(Failure::new(format!(
                "expected a publish to a {} that does not exist to be refused, seen {receipt:?}",
                f.kind()
            )));
        }
        Err(error) => error,
    };
    let codes = [
        ErrorCode::PublishRejected,
        ErrorCode::QueueNotFound,
        ErrorCode::TopicNotFound,
        ErrorCode::ExchangeNotFound,
    ];
    ensure!(
        error.is_refusal() && codes.contains(&error.code()),
        "expected a refusal with one of {codes:?}, seen {error:?}"
    );
    // The client is none the worse for it.
    let topic = f.topic(&client).await?;
    f.publish_numbered(&client, &topic, 1).await?;
    Ok(())
}

pub(super) async fn messages_around_a_refused_one_are_kept(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let bad = numbered(1).with_header("hub-wire", "9");
    let messages = vec![numbered(0), bad, numbered(2)];
    let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
    let options = PublishOptions::default();
    let outcomes = client.publish_batch(&topic, messages, &options).await;
    let shape: Vec<_> = outcomes.iter().map(Result::is_ok).collect();
    ensure!(
        shape == [true, false, true],
        "expected only the second of three to be refused, seen {outcomes:?}"
    );
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let expected = [ids[0].clone(), ids[2].clone()];
    super::settling::expect_exactly(&mut reader, &expected).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn reserved_headers_are_refused_and_never_arrive(
    f: Fixture,
) -> Result<(), Failure> {
    expect_invalid(&f, numbered(0).with_header("hub-attempt", "5")).await
}

pub(super) async fn an_overlong_type_is_refused_and_never_arrives(
    f: Fixture,
) -> Result<(), Failure> {
    expect_invalid(&f, Message::new("x".repeat(256), "")).await
}

async fn expect_invalid(f: &Fixture, message: Message) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let id = message.id.clone();
    let options = PublishOptions::default();
    let result = client.publish(&topic, message, &options).await;
    match result {
        Err(error)
            if error.code() == ErrorCode::MessageInvalid && error.assume() == Assume::Rejected =>
        {
            ensure!(
                error.message_id() == Some(id.as_str()),
                "expected the error to name message {id}, seen {:?}",
                error.message_id()
            );
        }
        seen => {
            return Err(Failure::new(format!(
                "expected MESSAGE_INVALID, rejected; seen {seen:?}"
            )));
        }
    }
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn no_secret_is_shown(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let mut shown = client.description();
    shown.push(format!("{client:?}"));
    let options = PublishOptions::default();
    if let Err(error) = client.publish(&f.name()?, numbered(0), &options).await {
        shown.extend([error.to_string(), format!("{error:?}")]);
    }
    let missing = f.kind().source(&f.name()?);
    match client.consume(&missing, &f.options()).await {
        Ok(consumer) => {
            shown.push(format!("{consumer:?}"));
            crate::conformance::Reader::new(consumer).stop().await?;
        }
        Err(error) => shown.extend([error.to_string(), format!("{error:?}")]),
    }
    client.close().await?;
    shown.extend(client.description());
    if let Err(error) = client.publish(&f.name()?, numbered(0), &options).await {
        shown.extend([error.to_string(), format!("{error:?}")]);
    }
    for secret in f.factory().secrets() {
        let told = shown.iter().any(|text| text.contains(&secret));
        // Without the text itself: a failure must not spread it either.
        ensure!(!told, "a description or an error contains a secret");
    }
    Ok(())
}

pub(super) async fn a_reader_of_a_missing_queue_does_not_harm_its_client(
    f: Fixture,
) -> Result<(), Failure> {
    debug_assert_eq!(f.kind(), Kind::Queue);
    let client = f.client().await?;
    let missing = f.source(&f.name()?);
    // Refused at once, or waiting for the queue: either is fine.
    let waiting = client.consume(&missing, &f.options()).await;
    let topic = f.topic(&client).await?;
    let ids = f.publish_numbered(&client, &topic, 3).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    super::settling::expect_exactly(&mut reader, &ids).await?;
    drop(waiting);
    reader.stop().await
}
