//! lapin without the hub.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use futures_util::{StreamExt, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueuePurgeOptions},
};
use messaging_hub::{
    Message,
    message::wire::{self, Carrier, Marks},
};

use super::{message, rate};

/// lapin alone: one connection, one channel, as many confirms outstanding as
/// the hub has.
pub(crate) struct RawAmqp {
    channel: Channel,
    _connection: Connection,
}

impl RawAmqp {
    pub(crate) async fn connect(url: &str) -> Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default())
            .await
            .context("lapin cannot connect")?;
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        Ok(Self {
            channel,
            _connection: connection,
        })
    }

    pub(crate) async fn purge(&self, queue: &str) -> Result<()> {
        let purged = self
            .channel
            .queue_purge(queue.into(), QueuePurgeOptions::default());
        purged.await.context("the queue cannot be purged")?;
        Ok(())
    }

    pub(crate) async fn run(&self, queue: &str, count: usize, window: usize) -> Result<f64> {
        let started = Instant::now();
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let mut waiting = FuturesUnordered::new();
        for n in 0..count {
            if waiting.len() == window
                && let Some(confirmed) = waiting.next().await
            {
                acked(confirmed)?;
            }
            let message = message(n, false);
            let properties = properties(&message, queue);
            waiting.push(async move {
                let confirm = self
                    .channel
                    .basic_publish(
                        "".into(),
                        queue.into(),
                        options,
                        &message.payload,
                        properties,
                    )
                    .await?;
                confirm.await
            });
        }
        while let Some(confirmed) = waiting.next().await {
            acked(confirmed)?;
        }
        Ok(rate(count, started))
    }
}

fn acked(confirmed: lapin::Result<Confirmation>) -> Result<()> {
    match confirmed? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("a publish ended as {other:?}"),
    }
}

/// What the hub puts on the wire.
fn properties(message: &Message, queue: &str) -> BasicProperties {
    let mut table = lapin::types::FieldTable::default();
    for (name, value) in wire::encode(message, queue, &Marks::default(), Carrier::Amqp) {
        let value = lapin::types::LongString::from(value.into_owned());
        table.insert(
            name.into_owned().into(),
            lapin::types::AMQPValue::LongString(value),
        );
    }
    BasicProperties::default()
        .with_headers(table)
        .with_message_id(message.id.as_str().into())
        .with_type(message.kind.as_str().into())
        .with_priority(message.priority.value())
        .with_delivery_mode(2)
        .with_timestamp(u64::try_from(message.timestamp.as_millis() / 1000).unwrap_or(0))
        .with_content_type("application/json".into())
}
