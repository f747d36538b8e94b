//! What only streams do: groups, positions, history.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::settling::expect_exactly;
use crate::{
    broker::{Delivery, OffsetReset, SeekTo, StartFrom, SubscribeOptions, Verdict},
    conformance::{
        Failure, Fixture, Kind, Reader, Target, Wanted, failure::ensure, fixture::numbered,
        reader::ack_all,
    },
    message::{MessageId, Timestamp},
    topic::Topic,
};

pub(super) async fn each_group_gets_everything(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let mut one = f.reader(&client, &topic, &f.options()).await?;
    let mut two = f.reader(&client, &topic, &f.options()).await?;
    let ids = f.publish_numbered(&client, &topic, 50).await?;
    for reader in [&mut one, &mut two] {
        expect_exactly(reader, &ids).await?;
        reader.expect_quiet().await?;
    }
    one.stop().await?;
    two.stop().await
}

pub(super) async fn members_of_a_group_share_the_work(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let (one, two) = tokio::join!(
        f.reader(&client, &topic, &options),
        f.reader(&client, &topic, &options)
    );
    let (mut one, mut two) = (one?, two?);
    // Until both have a share: members join one after the other.
    let deadline = Instant::now() + Reader::PATIENCE;
    let mut shares = (0, 0);
    let mut round = 0;
    while shares.0 == 0 || shares.1 == 0 {
        ensure!(
            Instant::now() < deadline,
            "expected both members to get messages, seen {shares:?}"
        );
        let messages = (0..30).map(|n| numbered(n).with_key(format!("key {round} {n}")));
        f.publish(&client, &topic, messages.collect()).await?;
        round += 1;
        for (reader, share) in [(&mut one, &mut shares.0), (&mut two, &mut shares.1)] {
            for delivery in reader.take_until_quiet().await {
                *share += 1;
                delivery.settle_now(Verdict::Ack);
            }
        }
    }
    // The group is settled now: each message goes to exactly one of them.
    let messages: Vec<_> = (0..60)
        .map(|n| numbered(n).with_key(format!("final {n}")))
        .collect();
    let ids: HashSet<_> = messages.iter().map(|m| m.id.clone()).collect();
    f.publish(&client, &topic, messages).await?;
    let mut missing = ids.clone();
    while !missing.is_empty() {
        let delivery = tokio::select! {
            delivery = one.next() => delivery?,
            delivery = two.next() => delivery?,
        };
        // Of the rounds before, one may be late.
        let id = &delivery.message.id;
        ensure!(
            missing.remove(id) || !ids.contains(id),
            "expected each of 60 messages at one member of two, seen {id} twice"
        );
        delivery.settle_now(Verdict::Ack);
    }
    one.expect_quiet().await?;
    two.expect_quiet().await?;
    one.stop().await?;
    two.stop().await
}

pub(super) async fn a_groupless_reader_gets_everything_and_moves_no_group(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let options = f.options();
    let before = f.publish_numbered(&client, &topic, 10).await?;
    let mut group = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut group, &before).await?;
    group.stop().await?;

    let mut live = f
        .reader(&client, &topic, &groupless(StartFrom::Latest))
        .await?;
    let mut all = f
        .reader(&client, &topic, &groupless(StartFrom::Earliest))
        .await?;
    let after = f.publish_numbered(&client, &topic, 10).await?;
    expect_exactly(&mut live, &after).await?;
    let everything = [before, after.clone()].concat();
    expect_exactly(&mut all, &everything).await?;
    live.stop().await?;
    all.stop().await?;

    let mut group = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut group, &after).await?;
    group.expect_quiet().await?;
    group.stop().await
}

pub(super) async fn a_new_group_starts_where_it_was_told(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    let before = f.publish_numbered(&client, &topic, 5).await?;
    let from = |reset| SubscribeOptions {
        offset_reset: Some(reset),
        ..f.options()
    };
    let mut late = f
        .reader(&client, &topic, &from(OffsetReset::Latest))
        .await?;
    let mut early = f
        .reader(&client, &topic, &from(OffsetReset::Earliest))
        .await?;
    let after = f.publish_numbered(&client, &topic, 5).await?;
    expect_exactly(&mut late, &after).await?;
    expect_exactly(&mut early, &[before, after].concat()).await?;
    late.expect_quiet().await?;
    late.stop().await?;
    early.stop().await
}

pub(super) async fn a_reader_can_start_at_a_time_or_an_offset(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = single(&f, &client).await?;
    let (messages, times) = timed(10);
    let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
    f.publish(&client, &topic, messages).await?;
    let offset = BTreeMap::from([((topic.as_str().to_owned(), 0), 7)]);
    for (start, first) in [
        (StartFrom::Time(times[4]), 4),
        (StartFrom::Offsets(offset), 7),
        (StartFrom::Earliest, 0),
    ] {
        let mut reader = f.reader(&client, &topic, &groupless(start.clone())).await?;
        let got = reader.take(ids.len() - first).await;
        let got = got.map_err(|e| e.during(&format!("starting at {start:?}")))?;
        let seen: Vec<_> = got.iter().map(|d| d.message.id.clone()).collect();
        ensure!(
            seen == ids[first..],
            "start {start:?}: expected messages {first}.., seen {seen:?}"
        );
        reader.stop().await?;
    }
    Ok(())
}

pub(super) async fn a_reader_with_an_end_reads_to_it_and_ends(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = single(&f, &client).await?;
    let ids = f.publish_numbered(&client, &topic, 1_500).await?;
    // An end in the middle, one that is the last message, and one with nothing
    // before it.
    for (first, end) in [(300, 1_200), (0, 1_500), (40, 40)] {
        let from = BTreeMap::from([((topic.as_str().to_owned(), 0), first)]);
        let mut options = groupless(StartFrom::Offsets(from));
        options.stream.until = Some(BTreeMap::from([(0, end)]));
        let source = f.kind().source_of((&topic).into());
        let mut reader = Reader::new(client.consume(&source, &options).await?);
        let deadline = Instant::now() + Reader::PATIENCE;
        let mut seen = Vec::new();
        loop {
            match reader.poll(deadline).await {
                Ok(Some(delivery)) => seen.push(delivery.message.id.clone()),
                Ok(None) => break,
                Err(_) => {
                    return Err(Failure::new(format!(
                        "expected an end at {end}, seen {} messages and none",
                        seen.len()
                    )));
                }
            }
        }
        let wanted = usize::try_from(first).unwrap_or(0)..usize::try_from(end).unwrap_or(0);
        ensure!(
            Some(&seen[..]) == ids.get(wanted.clone()),
            "expected messages {wanted:?} and the end, seen {} of them",
            seen.len()
        );
        reader.stop().await?;
    }
    Ok(())
}

pub(super) async fn a_position_never_passes_an_unsettled_message(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = single(&f, &client).await?;
    let options = f.options();
    let group = group_of(&options)?;
    f.publish_numbered(&client, &topic, 10).await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    let mut got = reader.take(10).await?;
    // 0, 1 and 2 are done, 3 is not, 4 to 9 are.
    let kept = got.remove(3);
    ack_all(got).await?;
    committed(&*client, &group, &topic, 3).await?;
    kept.ack().await?;
    committed(&*client, &group, &topic, 10).await?;
    reader.stop().await
}

pub(super) async fn a_committed_position_is_where_a_group_goes_on(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = single(&f, &client).await?;
    let options = f.options();
    let group = group_of(&options)?;
    let ids = f.publish_numbered(&client, &topic, 10).await?;
    let fresh = client.offset(&group, &topic, 0).await?;
    ensure!(
        fresh.is_none(),
        "expected no position of a group that never read, seen {fresh:?}"
    );
    client.commit_offset(&group, &topic, 0, 6).await?;
    committed(&*client, &group, &topic, 6).await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut reader, &ids[6..]).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

pub(super) async fn a_group_can_be_moved(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = single(&f, &client).await?;
    let options = f.options();
    let group = group_of(&options)?;
    let (messages, times) = timed(10);
    let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
    f.publish(&client, &topic, messages).await?;
    for (to, first) in [
        (SeekTo::End, 10),
        (SeekTo::Beginning, 0),
        (SeekTo::Offset(8), 8),
        (SeekTo::Time(times[3]), 3),
    ] {
        client.seek(&group, &topic, Some(0), to).await?;
        let mut reader = f.reader(&client, &topic, &options).await?;
        let got = expect_from(&mut reader, &ids, first).await;
        ack_all(got.map_err(|e| e.during(&format!("after a move to {to:?}")))?).await?;
        reader.stop().await?;
    }
    Ok(())
}

pub(super) async fn live_members_follow_a_move(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = single(&f, &client).await?;
    let options = f.options();
    let group = group_of(&options)?;
    let ids = f.publish_numbered(&client, &topic, 10).await?;
    let mut reader = f.reader(&client, &topic, &options).await?;
    expect_exactly(&mut reader, &ids).await?;
    client.seek(&group, &topic, None, SeekTo::Offset(5)).await?;
    ack_all(expect_from(&mut reader, &ids, 5).await?).await?;
    reader.stop().await
}

pub(super) async fn topic_metadata_tells_partitions_and_watermarks(
    f: Fixture,
) -> Result<(), Failure> {
    let client = f.client().await?;
    let topic = f.topic(&client).await?;
    f.publish_numbered(&client, &topic, 30).await?;
    let seen = client.topic_metadata(&topic).await?;
    let messages: i64 = seen
        .partitions
        .iter()
        .map(|p| p.high_watermark - p.low_watermark)
        .sum();
    let partitions = Wanted::new(Kind::Stream).partitions;
    ensure!(
        seen.partitions.len() == usize::try_from(partitions).unwrap_or(0) && messages == 30,
        "expected {partitions} partitions with 30 messages, seen {seen:?}"
    );
    Ok(())
}

pub(super) async fn a_pattern_reads_every_stream_that_matches(f: Fixture) -> Result<(), Failure> {
    let client = f.client().await?;
    let prefix = f.name()?;
    let mut ids = Vec::new();
    for part in ["a", "b", "c.d"] {
        let topic = Topic::new(format!("{prefix}.{part}"))?;
        client.declare(&topic, &Wanted::new(f.kind())).await?;
        ids.extend(f.publish_numbered(&client, &topic, 5).await?);
    }
    let other = f.topic(&client).await?;
    f.publish_numbered(&client, &other, 5).await?;
    let pattern = crate::topic::Pattern::new(format!("{prefix}.#"))?;
    let source = f.kind().source_of(pattern);
    let mut reader = Reader::new(client.consume(&source, &f.options()).await?);
    expect_exactly(&mut reader, &ids).await?;
    reader.expect_quiet().await?;
    reader.stop().await
}

async fn single(f: &Fixture, client: &Arc<dyn Target>) -> Result<Topic, Failure> {
    let wanted = Wanted::single_partition(f.kind());
    f.topic_with(client, &wanted).await
}

fn groupless(start: StartFrom) -> SubscribeOptions {
    SubscribeOptions::default().starting(start)
}

fn group_of(options: &SubscribeOptions) -> Result<String, Failure> {
    let group = options.group_id.clone();
    group.ok_or_else(|| Failure::new("streams are read with a group here"))
}

/// Messages a second apart, the last one a minute ago.
fn timed(count: i64) -> (Vec<crate::message::Message>, Vec<Timestamp>) {
    let begin = Timestamp::now().as_millis() - 60_000 - count * 1_000;
    let times: Vec<_> = (0..count)
        .map(|n| Timestamp::from_millis(begin + n * 1_000))
        .collect();
    let messages = times.iter().enumerate();
    let messages = messages.map(|(n, time)| numbered(n).with_timestamp(*time));
    (messages.collect(), times)
}

/// Expects the messages from `first` on, in order, and nothing after them.
async fn expect_from(
    reader: &mut Reader,
    ids: &[MessageId],
    first: usize,
) -> Result<Vec<Delivery>, Failure> {
    let got = reader.take(ids.len() - first).await?;
    let seen: Vec<_> = got.iter().map(|d| d.message.id.clone()).collect();
    ensure!(
        seen == ids[first..],
        "expected messages {first}.. in order, seen {seen:?}"
    );
    reader.expect_quiet().await?;
    Ok(got)
}

/// Waits until the group's position is `next`; a position beyond it fails at
/// once. It must also stay there: a commit may be on its way.
async fn committed(
    client: &dyn Target,
    group: &str,
    topic: &Topic,
    next: i64,
) -> Result<(), Failure> {
    let deadline = Instant::now() + Reader::PATIENCE;
    let mut settled_at = None;
    loop {
        let seen = client.offset(group, topic, 0).await?;
        ensure!(
            seen.is_none_or(|at| at <= next),
            "expected the group's position at {next}, seen {seen:?} beyond it"
        );
        let now = Instant::now();
        if seen == Some(next) {
            let since = *settled_at.get_or_insert(now);
            if now - since >= Reader::QUIET {
                return Ok(());
            }
        }
        ensure!(
            now < deadline,
            "expected the group's position at {next}, seen {seen:?}"
        );
        sleep_until(now + POLL).await;
    }
}

const POLL: Duration = Duration::from_millis(50);
