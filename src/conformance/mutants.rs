//! The suite judged by its catch: a broker that is broken in one way each must
//! fail at least one check.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{
    Capabilities, Capability, Factory, Filter, Kind, Status, Target, Wanted,
    embedded::EmbeddedFactory, run,
};
use crate::{
    broker::{
        BrokerType, Consumer, Delivery, Handler, Outcome, PublishOptions, QueueStats, Receipt,
        Received, Source, SubscribeOptions, Subscription, Verdict,
    },
    error::Result,
    message::Message,
    topic::Topic,
};

/// One way of being broken.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    DropsEveryTenth,
    Duplicates,
    Reorders,
    SwallowsUnroutable,
    CorruptsHeader,
    TruncatesPayload,
    ForgetsPriority,
    AcksInsteadOfGivingBack,
    LiesAboutReceipts,
    KeepsWorkingAfterClose,
    IgnoresPrefetch,
}

struct Broken {
    inner: EmbeddedFactory,
    fault: Fault,
}

#[async_trait]
impl Factory for Broken {
    fn name(&self) -> String {
        format!("{:?}", self.fault)
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities().without(Capability::Streams)
    }

    async fn connect(&self) -> Result<Arc<dyn Target>> {
        Ok(Arc::new(BrokenTarget {
            inner: self.inner.connect().await?,
            fault: self.fault,
            published: AtomicUsize::new(0),
        }))
    }
}

struct BrokenTarget {
    inner: Arc<dyn Target>,
    fault: Fault,
    published: AtomicUsize,
}

impl BrokenTarget {
    fn pretend(message: &Message) -> Result<Receipt> {
        Ok(Receipt {
            id: message.id.clone(),
            outcome: Outcome::Delivered {
                via: BrokerType::InMemory,
                position: None,
            },
        })
    }

    async fn publish_one(
        &self,
        topic: &Topic,
        mut message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        let number = self.published.fetch_add(1, Relaxed);
        match self.fault {
            Fault::DropsEveryTenth if number % 10 == 9 => return Self::pretend(&message),
            Fault::Duplicates if number % 10 == 9 => {
                self.inner.publish(topic, message.clone(), options).await?;
            }
            Fault::CorruptsHeader => {
                for value in message.headers.values_mut() {
                    *value = value.trim().to_owned();
                }
            }
            Fault::TruncatesPayload => {
                let most = message.payload.len().min(64 * 1024);
                message.payload.truncate(most);
            }
            Fault::ForgetsPriority => message.priority = crate::Priority::NORMAL,
            _ => {}
        }
        let pretended = Self::pretend(&message);
        let result = self.inner.publish(topic, message, options).await;
        match self.fault {
            Fault::SwallowsUnroutable | Fault::KeepsWorkingAfterClose if result.is_err() => {
                pretended
            }
            Fault::LiesAboutReceipts => result.map(|mut receipt| {
                receipt.id = crate::MessageId::generate();
                receipt
            }),
            _ => result,
        }
    }
}

#[async_trait]
impl Target for BrokenTarget {
    async fn declare(&self, topic: &Topic, wanted: &Wanted) -> Result<()> {
        self.inner.declare(topic, wanted).await
    }

    async fn publish(
        &self,
        topic: &Topic,
        message: Message,
        options: &PublishOptions,
    ) -> Result<Receipt> {
        self.publish_one(topic, message, options).await
    }

    async fn publish_batch(
        &self,
        topic: &Topic,
        mut messages: Vec<Message>,
        options: &PublishOptions,
    ) -> Vec<Result<Receipt>> {
        let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
        if self.fault == Fault::Reorders {
            for pair in messages.chunks_mut(2) {
                pair.reverse();
            }
        }
        let mut outcomes = Vec::new();
        for message in messages {
            let id = message.id.clone();
            outcomes.push((id, self.publish_one(topic, message, options).await));
        }
        outcomes.sort_by_key(|(id, _)| ids.iter().position(|other| other == id));
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    }

    async fn consume(&self, source: &Source, options: &SubscribeOptions) -> Result<Consumer> {
        let mut options = options.clone();
        if self.fault == Fault::IgnoresPrefetch {
            options.prefetch = u16::MAX;
        }
        let consumer = self.inner.consume(source, &options).await?;
        if self.fault != Fault::AcksInsteadOfGivingBack {
            return Ok(consumer);
        }
        let Consumer {
            mut deliveries,
            control,
            retry,
        } = consumer;
        let (tx, rx) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(batch) = deliveries.recv().await {
                let batch = batch.into_iter().map(acked_whatever_is_said).collect();
                if tx.send(batch).await.is_err() {
                    return;
                }
            }
        });
        Ok(Consumer {
            deliveries: rx,
            control,
            retry,
        })
    }

    async fn subscribe(
        &self,
        source: &Source,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription> {
        self.inner.subscribe(source, options, handler).await
    }

    fn description(&self) -> Vec<String> {
        self.inner.description()
    }

    async fn health_check(&self) -> Result<()> {
        self.inner.health_check().await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }

    async fn queue_stats(&self, queue: &Topic) -> Result<QueueStats> {
        self.inner.queue_stats(queue).await
    }

    async fn purge_queue(&self, queue: &Topic) -> Result<u64> {
        self.inner.purge_queue(queue).await
    }
}

/// A delivery whose every verdict becomes an ack.
fn acked_whatever_is_said(delivery: Delivery) -> Delivery {
    let (received, settle): (Received, _) = delivery.into_parts();
    let Some((inner, tag)) = settle else {
        return Delivery::unsettled(received);
    };
    let (tx, mut rx) = mpsc::unbounded_channel::<crate::broker::Settlement>();
    tokio::spawn(async move {
        if let Some(mut settlement) = rx.recv().await {
            settlement.verdict = Verdict::Ack;
            settlement.tag = tag;
            let _ = inner.send(settlement);
        }
    });
    Delivery::new(received, tx, tag)
}

/// Runs some checks over a broken broker and expects one of them to fail.
async fn caught_by(fault: Fault, checks: &str) {
    let factory = Arc::new(Broken {
        inner: EmbeddedFactory::new(),
        fault,
    });
    let report = run(factory, &Filter::containing(checks)).await;
    assert!(!report.rows.is_empty(), "no check is named {checks}");
    assert!(report.failures().count() > 0, "not caught:\n{report}");
}

macro_rules! caught {
    ($($name:ident: $fault:ident by $check:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            caught_by(Fault::$fault, $check).await;
        }
    )*};
}

caught! {
    the_suite_catches_a_broker_that_drops_every_tenth_message: DropsEveryTenth
        by "queue/everything_published_arrives_once";
    the_suite_catches_a_broker_that_duplicates: Duplicates
        by "queue/everything_published_arrives_once";
    the_suite_catches_a_broker_that_reorders: Reorders
        by "queue/one_reader_gets_publish_order";
    the_suite_catches_a_broker_that_swallows_the_unroutable: SwallowsUnroutable
        by "queue/a_publish_to_nowhere_is_refused";
    the_suite_catches_a_broker_that_alters_a_header: CorruptsHeader
        by "queue/headers_come_back_byte_for_byte";
    the_suite_catches_a_broker_that_truncates_payloads: TruncatesPayload
        by "queue/payloads_of_every_size";
    the_suite_catches_a_broker_that_forgets_priority: ForgetsPriority
        by "queue/higher_priorities_come_first";
    the_suite_catches_a_broker_that_loses_what_is_given_back: AcksInsteadOfGivingBack
        by "queue/what_is_given_back_twice_still_arrives";
    the_suite_catches_a_broker_that_answers_for_the_wrong_message: LiesAboutReceipts
        by "queue/every_batch_size";
    the_suite_catches_a_broker_that_works_after_close: KeepsWorkingAfterClose
        by "queue/every_handle_fails_after_close";
    the_suite_catches_a_broker_that_ignores_prefetch: IgnoresPrefetch
        by "queue/a_stuck_reader_holds_a_bounded_number";
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_suite_passes_the_same_broker_unbroken() {
    let names = [
        "late_subscribers",
        "everything_published_arrives_once",
        "one_reader_gets_publish_order",
        "a_publish_to_nowhere",
        "headers_come_back",
        "payloads_of_every_size",
        "higher_priorities",
        "what_is_given_back_twice",
        "every_batch_size",
        "every_handle_fails",
        "a_stuck_reader",
    ];
    let factory = Arc::new(Broken {
        inner: EmbeddedFactory::new(),
        fault: Fault::None,
    });
    let report = run(factory, &Filter::containing(&names.join(","))).await;
    let ran = report.rows.iter();
    let ran = ran.filter(|row| row.check.starts_with(Kind::Queue.as_str()));
    assert!(ran.clone().count() >= names.len());
    for row in ran {
        assert_eq!(row.status, Status::Pass, "{report}");
    }
}
