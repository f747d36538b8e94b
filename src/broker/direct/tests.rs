//! The outcomes that no live broker gives on demand, played step by step by a
//! peer at the other end of the lane.

use std::{sync::Arc, time::Duration};

use super::{scripted::Peer, *};
use crate::{
    broker::{Confirmation, Fate, Outcome, Position, Submission, lane::LanePort},
    error::Assume,
};

fn topic() -> Topic {
    Topic::new("tasks.test").unwrap()
}

fn messages(n: usize) -> Vec<Arc<Message>> {
    (0..n)
        .map(|i| Arc::new(Message::new("t", i.to_string())))
        .collect()
}

type Publishing = tokio::task::JoinHandle<Vec<Result<Receipt>>>;

fn publish(
    publisher: &Arc<DirectPublisher>,
    peer: &Arc<Peer>,
    messages: Vec<Arc<Message>>,
    options: PublishOptions,
) -> Publishing {
    let (publisher, peer) = (publisher.clone(), peer.clone());
    tokio::spawn(async move {
        publisher
            .publish_batch(peer.as_ref(), &topic(), messages, &options)
            .await
    })
}

fn quick() -> PublishOptions {
    PublishOptions {
        timeout: Duration::from_secs(5),
        ..PublishOptions::default()
    }
}

fn answer(port: &LanePort, submission: &Submission, fate: Fate) {
    let token = submission.token;
    port.confirmations
        .try_send(Confirmation { token, fate })
        .unwrap();
}

fn payloads(batch: &[Submission]) -> Vec<String> {
    batch
        .iter()
        .map(|s| String::from_utf8_lossy(&s.message.payload).into_owned())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn every_message_gets_its_own_outcome_in_order() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    let publishing = publish(&publisher, &peer, messages(5), quick());
    let (_, _, mut port) = opened.recv().await.unwrap();
    let batch = port.submissions.recv().await.unwrap();
    assert_eq!(payloads(&batch), ["0", "1", "2", "3", "4"]);
    let error = || Error::new(ErrorCode::PublishFailed, "as scripted");
    let position = Position {
        partition: 0,
        offset: 7,
    };
    answer(&port, &batch[4], Fate::Unsent(error()));
    answer(&port, &batch[3], Fate::Unknown(error()));
    answer(&port, &batch[2], Fate::Overloaded(error()));
    answer(&port, &batch[1], Fate::Refused(error()));
    answer(&port, &batch[0], Fate::Confirmed(Some(position)));
    let results = publishing.await.unwrap();
    assert_eq!(
        results[0].as_ref().unwrap().outcome,
        Outcome::Delivered {
            via: peer.broker_type(),
            position: Some(position)
        }
    );
    let assumed: Vec<_> = results[1..]
        .iter()
        .map(|r| r.as_ref().unwrap_err().assume())
        .collect();
    assert_eq!(
        assumed,
        [
            Assume::Rejected,
            Assume::NotSent,
            Assume::Unknown,
            Assume::NotSent
        ]
    );
    let metrics = peer.metrics();
    assert_eq!(metrics.messages_published, 5);
    assert_eq!(metrics.publish_successes, 1);
    assert_eq!(metrics.publish_failures, 4);
    assert_eq!(metrics.publish_confirmations, 1);
    assert_eq!(metrics.batches_published, 1);
    publisher.close().await;
}

#[tokio::test(start_paused = true)]
async fn without_confirm_a_written_message_is_sent_and_no_more() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    let options = PublishOptions {
        confirm: false,
        ..quick()
    };
    let publishing = publish(&publisher, &peer, messages(1), options);
    let (_, lane, mut port) = opened.recv().await.unwrap();
    assert!(!lane.confirm);
    let batch = port.submissions.recv().await.unwrap();
    assert!(!batch[0].confirm);
    answer(&port, &batch[0], Fate::Confirmed(None));
    let results = publishing.await.unwrap();
    let via = peer.broker_type();
    assert_eq!(results[0].as_ref().unwrap().outcome, Outcome::Sent { via });
}

#[tokio::test(start_paused = true)]
async fn a_message_written_and_not_answered_in_time_is_unknown() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    let publishing = publish(&publisher, &peer, messages(1), quick());
    let (_, _, mut port) = opened.recv().await.unwrap();
    let _batch = port.submissions.recv().await.unwrap();
    let error = publishing.await.unwrap().remove(0).unwrap_err();
    assert_eq!(error.code(), ErrorCode::PublishTimeout);
    assert_eq!(error.assume(), Assume::Unknown);
    assert_eq!(peer.metrics().publish_timeouts, 1);
}

#[tokio::test(start_paused = true)]
async fn what_finds_no_room_in_time_is_not_sent_and_never_written_later() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    // More than window, task and intake hold together.
    let publishing = publish(&publisher, &peer, messages(5000), quick());
    let (_, lane, mut port) = opened.recv().await.unwrap();
    let results = publishing.await.unwrap();
    let unknown = results
        .iter()
        .take_while(|r| r.as_ref().unwrap_err().assume() == Assume::Unknown)
        .count();
    assert!(unknown <= lane.window, "{unknown} in flight");
    for result in &results[unknown..] {
        let error = result.as_ref().unwrap_err();
        assert_eq!(error.code(), ErrorCode::Timeout);
        assert_eq!(error.assume(), Assume::NotSent);
    }
    // Everything that was written is confirmed now, so the window is free; the
    // next message is the next one written.
    let next = publish(
        &publisher,
        &peer,
        vec![Arc::new(Message::new("t", "next"))],
        quick(),
    );
    let mut written = Vec::new();
    loop {
        let batch = port.submissions.recv().await.unwrap();
        written.extend(payloads(&batch));
        for submission in &batch {
            answer(&port, submission, Fate::Confirmed(None));
        }
        if written.last().is_some_and(|p| p == "next") {
            break;
        }
    }
    assert_eq!(written.len(), unknown + 1);
    assert!(next.await.unwrap()[0].is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_ends_answers_for_everything_and_the_next_publish_opens_another() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    // Forty batches: more than the lane's channel takes without the adapter, so
    // some are written and the rest wait in the task.
    let options = PublishOptions {
        batch_size: 1,
        linger: Duration::ZERO,
        ..quick()
    };
    let publishing = publish(&publisher, &peer, messages(40), options);
    let (_, _, mut port) = opened.recv().await.unwrap();
    let first = port.submissions.recv().await.unwrap();
    answer(&port, &first[0], Fate::Confirmed(None));
    // Time stands still until nothing can move any more.
    tokio::time::sleep(Duration::from_millis(1)).await;
    drop(port);
    let results = publishing.await.unwrap();
    assert!(results[0].is_ok());
    let assumed: Vec<_> = results[1..]
        .iter()
        .map(|r| r.as_ref().unwrap_err().assume())
        .collect();
    let written = assumed
        .iter()
        .take_while(|a| **a == Assume::Unknown)
        .count();
    assert!((1..39).contains(&written), "{written} written");
    assert!(assumed[written..].iter().all(|a| *a == Assume::NotSent));

    let again = publish(&publisher, &peer, messages(1), quick());
    let (_, _, mut port) = opened.recv().await.unwrap();
    let batch = port.submissions.recv().await.unwrap();
    answer(&port, &batch[0], Fate::Confirmed(None));
    assert!(again.await.unwrap()[0].is_ok());
}

#[tokio::test(start_paused = true)]
async fn without_a_connection_nothing_is_sent_and_the_reason_is_told() {
    let (peer, _opened) = Peer::new(1);
    peer.connection.send_modify(|c| {
        c.connected = false;
        c.reason = Some("refused by 127.0.0.1".into());
    });
    let publisher = Arc::new(DirectPublisher::default());
    let results = publish(&publisher, &peer, messages(2), quick())
        .await
        .unwrap();
    for result in results {
        let error = result.unwrap_err();
        assert_eq!(error.code(), ErrorCode::BrokerUnavailable);
        assert_eq!(error.assume(), Assume::NotSent);
        assert!(error.message().contains("refused by 127.0.0.1"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_the_broker_refuses_is_a_refusal() {
    let (peer, _opened) = Peer::new(1);
    *peer.refusal.lock().unwrap() = Some(Error::new(ErrorCode::QueueNotFound, "no such queue"));
    let publisher = Arc::new(DirectPublisher::default());
    let error = publish(&publisher, &peer, messages(1), quick())
        .await
        .unwrap()
        .remove(0)
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::QueueNotFound);
    assert!(error.is_refusal());
}

#[tokio::test(start_paused = true)]
async fn an_invalid_message_is_refused_and_the_others_go() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default().with_max_message_bytes(4));
    let batch = vec![
        Arc::new(Message::new("t", "too large")),
        Arc::new(Message::new("t", "ok")),
    ];
    let publishing = publish(&publisher, &peer, batch, quick());
    let (_, _, mut port) = opened.recv().await.unwrap();
    let batch = port.submissions.recv().await.unwrap();
    assert_eq!(payloads(&batch), ["ok"]);
    answer(&port, &batch[0], Fate::Confirmed(None));
    let results = publishing.await.unwrap();
    assert_eq!(
        results[0].as_ref().unwrap_err().code(),
        ErrorCode::MessageTooLarge
    );
    assert!(results[1].is_ok());
}

#[tokio::test(start_paused = true)]
async fn options_fill_what_the_message_leaves_open() {
    let (peer, mut opened) = Peer::new(4);
    let publisher = Arc::new(DirectPublisher::default());
    let options = PublishOptions {
        content_type: "text/plain".to_owned(),
        content_encoding: Some("gzip".to_owned()),
        key: Some("k".into()),
        partition: Some(3),
        exchange: "x".to_owned(),
        routing_key: "r".to_owned(),
        mandatory: false,
        ..quick()
    };
    let batch = vec![
        Arc::new(Message::new("t", "open")),
        Arc::new(
            Message::new("t", "set")
                .with_content_type("a/b")
                .with_key("mine"),
        ),
    ];
    let publishing = publish(&publisher, &peer, batch, options);
    let (lane, lane_options, mut port) = opened.recv().await.unwrap();
    assert_eq!(lane, 3);
    assert_eq!(lane_options.address, Some(("x".into(), "r".into())));
    assert!(!lane_options.mandatory);
    let batch = port.submissions.recv().await.unwrap();
    let (open, set) = (&batch[0].message, &batch[1].message);
    assert_eq!(open.content_type.as_deref(), Some("text/plain"));
    assert_eq!(open.content_encoding.as_deref(), Some("gzip"));
    assert_eq!(open.partition, Some(3));
    assert_eq!(batch[0].order, OrderKey::Key("k".into()));
    assert_eq!(set.content_type.as_deref(), Some("a/b"));
    assert_eq!(batch[1].order, OrderKey::Key("mine".into()));
    for submission in &batch {
        answer(&port, submission, Fate::Confirmed(None));
    }
    assert!(publishing.await.unwrap().iter().all(Result::is_ok));
}

#[tokio::test(start_paused = true)]
async fn a_stalled_lane_does_not_hold_up_another() {
    let (peer, mut opened) = Peer::new(2);
    let publisher = Arc::new(DirectPublisher::default());
    let batch = vec![
        Arc::new(Message::new("t", "stalled").with_partition(0)),
        Arc::new(Message::new("t", "goes").with_partition(1)),
    ];
    let publishing = publish(&publisher, &peer, batch, quick());
    let (_, _, _stalled) = opened.recv().await.unwrap();
    let (lane, _, mut port) = opened.recv().await.unwrap();
    assert_eq!(lane, 1);
    let batch = port.submissions.recv().await.unwrap();
    answer(&port, &batch[0], Fate::Confirmed(None));
    let results = publishing.await.unwrap();
    assert!(results[0].is_err());
    assert!(results[1].is_ok());
}

#[tokio::test(start_paused = true)]
async fn small_batches_linger_only_while_the_lane_is_busy() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    let began = Instant::now();
    let first = publish(&publisher, &peer, messages(1), quick());
    let (_, _, mut port) = opened.recv().await.unwrap();
    let batch = port.submissions.recv().await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO);
    let second = publish(&publisher, &peer, messages(1), quick());
    let lingered = port.submissions.recv().await.unwrap();
    assert!(began.elapsed() >= PublishOptions::default().linger);
    answer(&port, &batch[0], Fate::Confirmed(None));
    answer(&port, &lingered[0], Fate::Confirmed(None));
    assert!(first.await.unwrap()[0].is_ok());
    assert!(second.await.unwrap()[0].is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_idle_lane_is_closed_and_opened_again_when_wanted() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    for _ in 0..2 {
        let publishing = publish(&publisher, &peer, messages(1), quick());
        let (_, _, mut port) = opened.recv().await.unwrap();
        let batch = port.submissions.recv().await.unwrap();
        answer(&port, &batch[0], Fate::Confirmed(None));
        assert!(publishing.await.unwrap()[0].is_ok());
        assert!(port.submissions.recv().await.is_none(), "closed when idle");
    }
}

#[tokio::test(start_paused = true)]
async fn closing_waits_for_what_is_in_flight_and_refuses_what_comes_later() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    let publishing = publish(&publisher, &peer, messages(1), quick());
    let (_, _, mut port) = opened.recv().await.unwrap();
    let batch = port.submissions.recv().await.unwrap();
    let closing = tokio::spawn({
        let publisher = publisher.clone();
        async move { publisher.close().await }
    });
    tokio::task::yield_now().await;
    assert!(!closing.is_finished());
    answer(&port, &batch[0], Fate::Confirmed(None));
    closing.await.unwrap();
    assert!(publishing.await.unwrap()[0].is_ok());
    let error = publish(&publisher, &peer, messages(1), quick())
        .await
        .unwrap()
        .remove(0)
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::OperationCanceled);
    assert_eq!(error.assume(), Assume::NotSent);
}

#[tokio::test(start_paused = true)]
async fn closing_gives_up_on_a_lane_that_does_not_answer() {
    let (peer, mut opened) = Peer::new(1);
    let publisher = Arc::new(DirectPublisher::default());
    let options = PublishOptions {
        timeout: CLOSE_GRACE * 10,
        ..PublishOptions::default()
    };
    let publishing = publish(&publisher, &peer, messages(1), options);
    let (_, _, mut port) = opened.recv().await.unwrap();
    let _batch = port.submissions.recv().await.unwrap();
    publisher.close().await;
    let error = publishing.await.unwrap().remove(0).unwrap_err();
    assert_eq!(error.code(), ErrorCode::OperationCanceled);
    assert_eq!(error.assume(), Assume::Unknown);
}

#[tokio::test(start_paused = true)]
async fn the_least_recently_used_lane_makes_room_when_there_are_too_many() {
    let count = u32::try_from(lanes::MAX_LANES).unwrap() + 1;
    let (peer, mut opened) = Peer::new(count);
    let publisher = Arc::new(DirectPublisher::default());
    let mut ports = Vec::new();
    for partition in 0..count {
        let message = Message::new("t", "").with_partition(i32::try_from(partition).unwrap());
        let publishing = publish(&publisher, &peer, vec![Arc::new(message)], quick());
        let (lane, _, mut port) = opened.recv().await.unwrap();
        assert_eq!(lane, partition);
        let batch = port.submissions.recv().await.unwrap();
        answer(&port, &batch[0], Fate::Confirmed(None));
        assert!(publishing.await.unwrap()[0].is_ok());
        ports.push(port);
        tokio::time::advance(Duration::from_micros(1)).await;
    }
    assert!(ports[0].submissions.is_closed());
    assert!(!ports[1].submissions.is_closed());
}
