//! lapin without the hub: one task a channel, confirms in a window, acks in
//! batches. The properties and headers are those that the hub writes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable, LongString, ShortString},
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    broker::QueueType,
    cli::{
        Failure,
        bench::{
            latency::{Stamp, Tally},
            load::{CONTENT_TYPE, Load},
            published::Published,
        },
    },
    message::{
        Message,
        wire::{self, Carrier, Marks},
    },
};

/// One connection.
pub(crate) struct Amqp {
    connection: Connection,
}

impl Amqp {
    /// Connects to the first of the addresses.
    pub(crate) async fn connect(urls: &str) -> Result<Self, Failure> {
        let url = urls.split(',').next().unwrap_or_default().trim();
        let connecting = Connection::connect(url, ConnectionProperties::default());
        let connection = connecting
            .await
            .map_err(|e| Failure::new(format!("RabbitMQ cannot be reached: {e}")))?;
        Ok(Self { connection })
    }

    pub(crate) async fn declare(&self, queue: &str, kind: QueueType) -> Result<(), Failure> {
        let kind = match kind {
            QueueType::Classic => "classic",
            QueueType::Quorum => "quorum",
        };
        let mut arguments = FieldTable::default();
        arguments.insert(
            "x-queue-type".into(),
            AMQPValue::LongString(LongString::from(kind)),
        );
        let channel = self.channel().await?;
        let declared =
            channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments);
        declared.await.map_err(|e| wrong("declare", queue, &e))?;
        Ok(())
    }

    pub(crate) async fn purge(&self, queue: &str) -> Result<(), Failure> {
        let channel = self.channel().await?;
        let purged = channel.queue_purge(queue.into(), QueuePurgeOptions::default());
        purged.await.map_err(|e| wrong("purge", queue, &e))?;
        Ok(())
    }

    pub(crate) async fn delete(&self, queue: &str) -> Result<(), Failure> {
        let channel = self.channel().await?;
        let deleted = channel.queue_delete(queue.into(), QueueDeleteOptions::default());
        deleted.await.map_err(|e| wrong("delete", queue, &e))?;
        Ok(())
    }

    /// Publishes what the load says, on a channel of its own.
    pub(crate) async fn publish(&self, queue: &str, load: &Load) -> Result<Published, Failure> {
        let channel = self.confirming().await?;
        let target = ShortString::from(queue);
        let mut turns = load.turns()?;
        let mut flight = FuturesUnordered::new();
        let mut done = Published::new();
        let mut n = 0;
        loop {
            while flight.len() >= load.window
                && let Some(answer) = flight.next().await
            {
                done.confirmed(queue, answer)?;
            }
            let due = if turns.is_paced() {
                loop {
                    tokio::select! {
                        biased;
                        Some(answer) = flight.next() => done.confirmed(queue, answer)?,
                        due = turns.next() => break due,
                    }
                }
            } else {
                // Polled at each turn, or nothing would be written before the
                // window is full.
                while let Some(Some(answer)) = flight.next().now_or_never() {
                    done.confirmed(queue, answer)?;
                }
                turns.next().await
            };
            let Some(due) = due else { break };
            flight.push(publish(&channel, &target, load.message(n, due), due));
            n += 1;
        }
        while let Some(answer) = flight.next().await {
            done.confirmed(queue, answer)?;
        }
        Ok(done)
    }

    /// Starts a consumer that acks `ack_every` messages together.
    pub(crate) async fn consume(
        &self,
        queue: &str,
        prefetch: u16,
        ack_every: u64,
        tally: Arc<Tally>,
    ) -> Result<RawConsumer, Failure> {
        let failed = |e: lapin::Error| wrong("consume", queue, &e);
        let channel = self.channel().await?;
        let qos = channel.basic_qos(prefetch, BasicQosOptions::default());
        qos.await.map_err(failed)?;
        let consumer = channel.basic_consume(
            queue.into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let mut consumer = consumer.await.map_err(failed)?;
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let task = tokio::spawn(async move {
            let multiple = BasicAckOptions { multiple: true };
            let (mut unacked, mut last) = (0, None);
            loop {
                let delivery = tokio::select! {
                    biased;
                    delivery = consumer.next() => delivery,
                    () = stopping.cancelled() => None,
                };
                let Some(delivery) = delivery else { break };
                let delivery = delivery?;
                tally.take(&delivery.data);
                unacked += 1;
                last = Some(delivery.delivery_tag);
                if unacked >= ack_every {
                    channel.basic_ack(delivery.delivery_tag, multiple).await?;
                    (unacked, last) = (0, None);
                }
            }
            if let Some(last) = last {
                channel.basic_ack(last, multiple).await?;
            }
            channel.close(200, "OK".into()).await
        });
        Ok(RawConsumer {
            task,
            stop: stop.drop_guard(),
        })
    }

    /// Publishes one message and waits for its confirm.
    pub(crate) async fn probe(&self, queue: &str) -> Result<(), Failure> {
        let channel = self.confirming().await?;
        let failed = |e: lapin::Error| wrong("publish to", queue, &e);
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
        let written = channel.basic_publish("".into(), queue.into(), options, b"probe", properties);
        match written.await.map_err(failed)?.await.map_err(failed)? {
            Confirmation::Ack(None) => Ok(()),
            other => Err(Failure::new(format!("a probe ended as {other:?}"))),
        }
    }

    /// Takes everything out of a queue, until nothing has come for `idle`; the
    /// numbers of the stamps.
    pub(crate) async fn empty(&self, queue: &str, idle: Duration) -> Result<Vec<u64>, Failure> {
        let failed = |e: lapin::Error| wrong("consume", queue, &e);
        let channel = self.channel().await?;
        let qos = channel.basic_qos(READ_AHEAD, BasicQosOptions::default());
        qos.await.map_err(failed)?;
        let options = BasicConsumeOptions::default();
        let consumer =
            channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
        let mut consumer = consumer.await.map_err(failed)?;
        let mut numbers = Vec::new();
        let mut unacked = 0;
        while let Ok(Some(delivery)) = timeout(idle, consumer.next()).await {
            let delivery = delivery.map_err(failed)?;
            if let Some(stamp) = Stamp::read(&delivery.data) {
                numbers.push(stamp.number);
            }
            unacked += 1;
            if unacked == READ_AHEAD / 2 {
                let acked = BasicAckOptions { multiple: true };
                let acked = channel.basic_ack(delivery.delivery_tag, acked);
                acked.await.map_err(failed)?;
                unacked = 0;
            }
        }
        Ok(numbers)
    }

    async fn confirming(&self) -> Result<Channel, Failure> {
        let channel = self.channel().await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        confirms
            .await
            .map_err(|e| Failure::new(format!("RabbitMQ takes no confirms: {e}")))?;
        Ok(channel)
    }

    async fn channel(&self) -> Result<Channel, Failure> {
        let channel = self.connection.create_channel().await;
        channel.map_err(|e| Failure::new(format!("RabbitMQ opens no channel: {e}")))
    }
}

/// A running consumer; it ends when this is dropped.
pub(crate) struct RawConsumer {
    task: JoinHandle<lapin::Result<()>>,
    stop: DropGuard,
}

impl RawConsumer {
    /// Acks the rest and ends.
    pub(crate) async fn stop(self) -> Result<(), Failure> {
        drop(self.stop);
        match self.task.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Failure::new(format!("the bare consumer ended early: {e}"))),
            Err(e) => Err(Failure::new(format!("the bare consumer ended early: {e}"))),
        }
    }
}

type Answer = lapin::Result<(Instant, Confirmation)>;

impl Published {
    fn confirmed(&mut self, queue: &str, answer: Answer) -> Result<(), Failure> {
        let (due, confirmed) = answer.map_err(|e| wrong("publish to", queue, &e))?;
        match confirmed {
            Confirmation::Ack(None) => {
                self.note(due);
                Ok(())
            }
            other => Err(Failure::new(format!("a bare publish ended as {other:?}"))),
        }
    }
}

async fn publish(channel: &Channel, queue: &ShortString, message: Message, due: Instant) -> Answer {
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = properties(&message, queue.as_str());
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.clone(),
            options,
            &message.payload,
            properties,
        )
        .await?;
    Ok((due, confirm.await?))
}

/// What the hub puts on the wire.
fn properties(message: &Message, queue: &str) -> BasicProperties {
    let mut table = FieldTable::default();
    for (name, value) in wire::encode(message, queue, &Marks::default(), Carrier::Amqp) {
        table.insert(
            name.into_owned().into(),
            AMQPValue::LongString(LongString::from(value.into_owned())),
        );
    }
    BasicProperties::default()
        .with_headers(table)
        .with_message_id(message.id.as_str().into())
        .with_type(message.kind.as_str().into())
        .with_priority(message.priority.value())
        .with_delivery_mode(2)
        .with_timestamp(u64::try_from(message.timestamp.as_millis() / 1000).unwrap_or(0))
        .with_content_type(CONTENT_TYPE.into())
}

fn wrong(what: &str, queue: &str, e: &lapin::Error) -> Failure {
    Failure::new(format!("the bare client cannot {what} {queue}: {e}"))
}

/// Messages that a queue sends ahead while it is emptied.
const READ_AHEAD: u16 = 1000;
