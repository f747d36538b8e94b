//! Ack, give back, drop: what comes again and what does not.

use std::collections::HashSet;

use tokio::time::Instant;

use crate::{
    broker::{Source, SubscribeOptions},
    conformance::{
        Failure, Fixture, Reader, Wanted, failure::ensure, fixture::numbered, reader::ack_all,
    },
    error::ErrorCode,
    message::MessageId,
};

pub(super) async fn what_is_given_back_twice_still_arrives(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let ids = f.publish_numbered(&client, &topic, 100).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    for _ in 0..2 {
        reader.next().await?.requeue().await?;
    }
    expect_exactly(&mut reader, &ids).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn the_next_message_is_withheld_until_the_ack(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let wanted = Wanted::single_partition(f.kind());
    let topic = f.topic_with(&client, &wanted).await?;
    let ids = f.publish_numbered(&client, &topic, 3).await?;
    let mut reader = f.reader(&client, &topic, &f.limited(1)).await?;
    for id in ids {
        let delivery = reader.next().await?;
        ensure!(
            delivery.message.id == id,
            "expected message {id} next, seen {}",
            delivery.message.id
        );
        reader.expect_quiet().await?;
        delivery.ack().await?;
    }
    reader.stop().await
}

pub(super) async fn what_was_acked_never_returns(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let ids = f.publish_numbered(&client, &topic, 20).await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.stop().await?;
    client.close().await?;

    let client = f.client().await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    reader.expect_quiet().await?;
    // The quiet reader is alive: it gets what comes now.
    let ids = f.publish_numbered(&client, &topic, 1).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.stop().await
}

pub(super) async fn what_is_dropped_unsettled_returns(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let ids = f.publish_numbered(&client, &topic, 10).await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    drop(reader.take(5).await?);
    // To the same reader, and, given back with it, to the next one.
    let again = reader.take(5).await?;
    drop(again);
    reader.stop().await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn acks_out_of_order_never_pass_an_unsettled_message(
    f: Fixture,
) -> Result<(), Failure> {
    out_of_order(&f, false).await
}

pub(super) async fn acks_never_pass_a_message_that_was_given_back(
    f: Fixture,
) -> Result<(), Failure> {
    out_of_order(&f, true).await
}

/// Acks all but the fourth of ten, last first, and comes back as a new client:
/// the fourth must come again. A queue brings it alone; a stream may repeat
/// what lies behind it, never what lies before.
async fn out_of_order(f: &Fixture, give_back: bool) -> Result<(), Failure> {
    const KEPT: usize = 3;
    let client = f.client().await?;
    let wanted = Wanted::single_partition(f.kind());
    let topic = f.topic_with(&client, &wanted).await?;
    let options = f.options();
    let ids = f.publish_numbered(&client, &topic, 10).await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    let mut got = reader.take(ids.len()).await?;
    let kept = got.remove(KEPT);
    ensure!(
        kept.message.id == ids[KEPT],
        "expected the fourth message in fourth place, seen {}",
        kept.message.id
    );
    if give_back {
        kept.requeue().await?;
        got.reverse();
        ack_all(got).await?;
    } else {
        got.reverse();
        ack_all(got).await?;
        drop(kept);
    }
    reader.stop().await?;
    client.close().await?;

    let client = f.client().await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    let got = reader.take_some_until_quiet().await?;
    let seen: HashSet<_> = got.iter().map(|d| d.message.id.clone()).collect();
    ensure!(
        seen.contains(&ids[KEPT]),
        "expected the fourth message again, it is lost; seen {seen:?}"
    );
    let allowed = match f.kind() {
        crate::conformance::Kind::Queue => &ids[KEPT..=KEPT],
        crate::conformance::Kind::Stream => &ids[KEPT..],
    };
    let allowed: HashSet<_> = allowed.iter().cloned().collect();
    ensure!(
        seen.is_subset(&allowed),
        "expected at most {allowed:?} again, seen {seen:?}"
    );
    ack_all(got).await?;
    reader.stop().await
}

pub(super) async fn subscribers_that_refuse_everything_lose_nothing(
    f: Fixture,
) -> Result<(), Failure> {
    const SUBSCRIBERS: usize = 3;
    const REFUSED: usize = 100;
    const MESSAGES: usize = 50;
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let ids = f.publish_numbered(&client, &topic, MESSAGES).await?;
    for _ in 0..SUBSCRIBERS {
        let mut reader = f.reader(&client, &topic, &options).await?;
        for _ in 0..REFUSED / MESSAGES {
            // A round at a time, so that no message is given back more often
            // than a delivery limit allows.
            for delivery in reader.take(MESSAGES).await? {
                delivery.requeue().await?;
            }
        }
        reader.stop().await?;
    }
    let mut reader = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut reader, &ids).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn what_is_given_back_is_marked_redelivered(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    f.publish_numbered(&client, &topic, 1).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let first = reader.next().await?;
    ensure!(
        !first.message.redelivered,
        "expected the first delivery unmarked, seen it marked redelivered"
    );
    first.requeue().await?;
    let second = reader.next().await?;
    ensure!(
        second.message.redelivered,
        "expected the second delivery to be marked redelivered, it is not"
    );
    second.ack().await?;
    reader.stop().await
}

pub(super) async fn an_ack_after_close_fails(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    f.publish_numbered(&client, &topic, 1).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    let delivery = reader.next().await?;
    client.close().await?;
    match delivery.ack().await {
        Err(e) if e.code() == ErrorCode::AckFailed => Ok(()),
        other => Err(Failure::new(format!(
            "expected ACK_FAILED for a delivery of a closed client, seen {other:?}"
        ))),
    }
}

pub(super) async fn unsettled_messages_are_bounded_and_acks_resume(
    f: Fixture,
) -> Result<(), Failure> {
    const LIMIT: u16 = 10;
    let client = f.client().await?;
    let wanted = Wanted::single_partition(f.kind());
    let topic = f.topic_with(&client, &wanted).await?;
    let mut ids: HashSet<_> = (f.publish_numbered(&client, &topic, 50).await?)
        .into_iter()
        .collect();
    let mut reader = f.reader(&client, &topic, &f.limited(LIMIT)).await?;
    while !ids.is_empty() {
        let got = reader.take_some_until_quiet().await?;
        ensure!(
            got.len() <= usize::from(LIMIT),
            "expected at most {LIMIT} unsettled messages, seen {}",
            got.len()
        );
        for delivery in &got {
            ensure!(
                ids.remove(&delivery.message.id),
                "message {} came twice",
                delivery.message.id
            );
        }
        ack_all(got).await?;
    }
    reader.stop().await
}

pub(super) async fn a_stuck_reader_holds_a_bounded_number(f: Fixture) -> Result<(), Failure> {
    const LIMIT: u16 = 20;
    const MESSAGES: usize = 1_000;
    let client = f.client().await?;
    let wanted = Wanted::single_partition(f.kind());
    let topic = f.topic_with(&client, &wanted).await?;
    let mut stuck = f.reader(&client, &topic, &f.limited(LIMIT)).await?;
    // Nobody reads while all this is published.
    f.publish_numbered(&client, &topic, MESSAGES).await?;
    let held = stuck.take_some_until_quiet().await?;
    ensure!(
        (1..=usize::from(LIMIT)).contains(&held.len()),
        "expected a stuck reader to hold 1 to {LIMIT} of {MESSAGES} messages, seen {}",
        held.len()
    );
    drop(held);
    stuck.stop().await
}

pub(super) async fn a_dead_letter_leaves_and_can_be_read(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let Some(place) = f.factory().dead_letters(f.kind()) else {
        return Err(Failure::new(
            "DeadLetters is declared, but the factory names no place for them",
        ));
    };
    let bad = numbered(0).with_header("why", "test");
    let id = bad.id.clone();
    f.publish(&client, &topic, vec![bad, numbered(1)]).await?;
    let mut reader = f.reader(&client, &topic, &f.options()).await?;
    for delivery in reader.take(2).await? {
        if delivery.message.id == id {
            delivery.dead_letter("conformance", "on purpose").await?;
        } else {
            delivery.ack().await?;
        }
    }
    reader.expect_quiet().await?;
    reader.stop().await?;

    let options = match &place {
        Source::Queue(_) => SubscribeOptions::default().with_prefetch(u16::MAX),
        Source::Stream(_) => SubscribeOptions::group(format!("conformance.{}", f.unique())),
    };
    let mut reader = Reader::new(client.consume(&place, &options).await?);
    // Other checks, and other users, have dead letters there too. They are held
    // while more come, so as not to come again, and given back whenever nothing
    // does: their owners wait for them as this check does for its own.
    let deadline = Instant::now() + Reader::PATIENCE;
    let mut held = Vec::new();
    let letter = loop {
        let Ok(next) = reader.poll(Instant::now() + Reader::QUIET).await else {
            ensure!(
                Instant::now() < deadline,
                "expected the dead letter within {:?}, seen {} others",
                Reader::PATIENCE,
                held.len()
            );
            held.clear();
            continue;
        };
        match next {
            Some(delivery) if delivery.message.id == id => break delivery,
            Some(delivery) => held.push(delivery),
            None => return Err(Failure::new("expected the dead letter, the reader ended")),
        }
    };
    let failure = letter.marks.failure.clone();
    ensure!(
        letter.message.payload == "payload 0"
            && letter.message.headers.get("why").map(String::as_str) == Some("test"),
        "expected the dead letter unaltered, seen {:?}",
        letter.message
    );
    ensure!(
        failure
            .as_ref()
            .is_some_and(|x| x.reason == "conformance" && x.details == "on purpose"),
        "expected the reason and details with the dead letter, seen {failure:?}"
    );
    letter.ack().await?;
    drop(held);
    reader.stop().await
}

/// Reads and acks exactly these messages, in any order.
pub(super) async fn expect_exactly(reader: &mut Reader, ids: &[MessageId]) -> Result<(), Failure> {
    let mut missing: HashSet<_> = ids.iter().cloned().collect();
    let mut got = Vec::new();
    while !missing.is_empty() {
        let next = reader.next().await;
        let delivery = next.map_err(|e| {
            let left = missing.len();
            e.during(&format!("{left} of {} messages missing", ids.len()))
        })?;
        ensure!(
            missing.remove(&delivery.message.id),
            "message {} came twice or was never published",
            delivery.message.id
        );
        got.push(tokio::spawn(delivery.ack()));
    }
    for ack in got {
        let acked = ack.await;
        acked.map_err(|e| Failure::new(format!("an ack panicked: {e}")))??;
    }
    Ok(())
}
