//! A span between a source that is played by hand and a reader.

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Parts, start};
use crate::{
    broker::{
        BrokerType, ConnectionState, Consumer, ConsumerControl, Delivery, Received, RetryMode,
        Settlement, Verdict, consumer::ConsumerState,
    },
    config::WindowSettings,
    error::{Error, ErrorCode},
    hub::group::Group,
    message::{
        Message, MessageId, Timestamp,
        wire::{Failure, Marks},
    },
    topic::Topic,
};

struct Source {
    deliveries: mpsc::Sender<Vec<Delivery>>,
    settlements: mpsc::UnboundedSender<Settlement>,
    verdicts: mpsc::UnboundedReceiver<Settlement>,
    report: watch::Sender<ConsumerState>,
    _connection: watch::Sender<ConnectionState>,
    tag: u64,
}

fn span() -> (Source, Consumer) {
    span_of(None)
}

fn span_of(group: Option<&str>) -> (Source, Consumer) {
    let (control, _, report) = ConsumerControl::new();
    let (deliveries, from_source) = mpsc::channel(4);
    let (settlements, verdicts) = mpsc::unbounded_channel();
    let (connection, connected) = watch::channel(ConnectionState {
        connected: true,
        ..ConnectionState::default()
    });
    let (consumer, task) = start(Parts {
        primary: Consumer {
            deliveries: from_source,
            control,
            retry: RetryMode::Broker,
        },
        connection: connected,
        local: None,
        group: Arc::new(Group::new(
            group.map(str::to_owned),
            &WindowSettings {
                age: Duration::from_secs(60),
                ids: 100,
            },
        )),
        closing: CancellationToken::new(),
        buffer: 4,
        most: 1024,
        recorder: Arc::default(),
        topology: Arc::default(),
        rests: false,
        #[cfg(feature = "schema")]
        checks: None,
    });
    tokio::spawn(task);
    let source = Source {
        deliveries,
        settlements,
        verdicts,
        report,
        _connection: connection,
        tag: 0,
    };
    (source, consumer)
}

impl Source {
    async fn deliver(&mut self, id: &str, attempt: u32) -> u64 {
        self.deliver_settled(id, attempt, &[]).await
    }

    async fn deliver_settled(&mut self, id: &str, attempt: u32, settled: &[&str]) -> u64 {
        let marks = Marks {
            settled: settled.iter().map(|g| (*g).to_owned()).collect(),
            ..Marks::default()
        };
        self.deliver_from("tasks", id, attempt, marks).await
    }

    /// A dead letter of a message that failed there.
    async fn deliver_letter(&mut self, id: &str, original: &str) -> u64 {
        let mut failure = Failure::now("handler_error", "boom", original, None);
        failure.last = Timestamp::from_millis(5);
        let marks = Marks::default().of_letter(failure);
        self.deliver_from("helixagent.dlq", id, 0, marks).await
    }

    async fn deliver_from(&mut self, topic: &str, id: &str, attempt: u32, marks: Marks) -> u64 {
        let mut message = Message::new("t", "x").with_id(MessageId::new(id).unwrap());
        message.retry_count = attempt;
        let received = Received {
            topic: Topic::new(topic).unwrap(),
            message: Arc::new(message),
            marks: Arc::new(marks),
            via: BrokerType::RabbitMq,
        };
        self.tag += 1;
        let delivery = Delivery::new(received, self.settlements.clone(), self.tag);
        self.deliveries.send(vec![delivery]).await.unwrap();
        self.tag
    }

    async fn verdict(&mut self) -> Settlement {
        self.verdicts.recv().await.unwrap()
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    consumer.deliveries.recv().await.unwrap().pop().unwrap()
}

fn retry() -> Verdict {
    Verdict::Retry {
        delay: Duration::from_secs(60),
        failure: Failure::now("handler_error", "boom", "tasks", None),
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_was_not_carried_out_is_handed_out_again() {
    let (mut source, mut consumer) = span();
    source.deliver("a", 0).await;
    next(&mut consumer).await.settle_now(retry());
    let settlement = source.verdict().await;
    assert!(matches!(settlement.verdict, Verdict::Retry { .. }));
    let refused = Error::new(ErrorCode::NackFailed, "the retry queue is full");
    settlement.done.unwrap().send(Err(refused)).unwrap();
    // The source gives the original back, under the attempt it had.
    source.deliver("a", 0).await;
    assert_eq!(next(&mut consumer).await.message.id.as_str(), "a");
}

#[tokio::test(start_paused = true)]
async fn a_retry_whose_source_died_is_handed_out_again() {
    let (mut source, mut consumer) = span();
    source.deliver("a", 0).await;
    next(&mut consumer).await.settle_now(retry());
    drop(source.verdict().await);
    source.deliver("a", 0).await;
    assert_eq!(next(&mut consumer).await.message.id.as_str(), "a");
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_an_attempt_that_was_retried_is_acked_and_the_next_attempt_is_new() {
    let (mut source, mut consumer) = span();
    source.deliver("a", 0).await;
    next(&mut consumer).await.settle_now(retry());
    source.verdict().await.done.unwrap().send(Ok(())).unwrap();
    // The next attempt waits for the lease of this one to end, which it has
    // once it comes through.
    source.deliver("a", 1).await;
    let second = next(&mut consumer).await;
    assert_eq!(second.retry_count, 1);
    second.settle_now(Verdict::Ack);
    assert!(matches!(source.verdict().await.verdict, Verdict::Ack));
    let copy = source.deliver("a", 0).await;
    let settlement = source.verdict().await;
    assert_eq!(settlement.tag, copy);
    assert!(matches!(settlement.verdict, Verdict::Ack));
}

#[tokio::test(start_paused = true)]
async fn what_a_group_has_settled_elsewhere_is_acked_unseen() {
    let (mut source, mut consumer) = span_of(Some("audit"));
    let skipped = source.deliver_settled("a", 0, &["mail", "audit"]).await;
    let settlement = source.verdict().await;
    assert_eq!(settlement.tag, skipped);
    assert!(matches!(settlement.verdict, Verdict::Ack));
    source.deliver_settled("b", 0, &["mail", "audits"]).await;
    assert_eq!(next(&mut consumer).await.message.id.as_str(), "b");

    // A live reader is no group, whatever others are called.
    let (mut source, mut consumer) = span_of(None);
    source.deliver_settled("a", 0, &["mail", "audit"]).await;
    assert_eq!(next(&mut consumer).await.message.id.as_str(), "a");
}

#[tokio::test(start_paused = true)]
async fn each_letter_of_a_message_is_handed_out_and_each_once() {
    let (mut source, mut consumer) = span();
    for original in ["tasks.a", "tasks.b"] {
        source.deliver_letter("a", original).await;
        next(&mut consumer).await.settle_now(Verdict::Ack);
        assert!(matches!(source.verdict().await.verdict, Verdict::Ack));
        let again = source.deliver_letter("a", original).await;
        let settlement = source.verdict().await;
        assert_eq!(settlement.tag, again);
        assert!(matches!(settlement.verdict, Verdict::Ack));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_among_the_dead_letters_stays_and_is_handed_out_again() {
    let (mut source, mut consumer) = span();
    for _ in 0..2 {
        source.deliver_letter("a", "tasks.a").await;
        let failure = Failure::now("handler_error", "no", "helixagent.dlq", None);
        let letter = next(&mut consumer).await;
        letter.settle_now(Verdict::DeadLetter { failure });
        let settlement = source.verdict().await;
        assert!(matches!(settlement.verdict, Verdict::DeadLetter { .. }));
        settlement.done.unwrap().send(Ok(())).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_ends_by_itself_ends_the_span_with_its_last_word() {
    let (source, mut consumer) = span();
    let Source {
        deliveries, report, ..
    } = source;
    drop(deliveries);
    assert!(consumer.deliveries.recv().await.is_none());
    report.send_replace(ConsumerState::Failed("the queue is gone".into()));
    consumer.control.stop().await;
    assert_eq!(
        consumer.control.failure().as_deref(),
        Some("the queue is gone")
    );
}
