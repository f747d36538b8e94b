//! What is asked of, and done to, single queues: each on a channel of its own,
//! which a refusal may cost.

use lapin::{
    Channel,
    options::{QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions},
    types::{FieldTable, ShortString},
};

use super::{
    error::{self, Refusal, refusal},
    link::Link,
    management,
    shared::Shared,
};
use crate::{
    broker::{BrokerType, QueueStats},
    error::{Error, ErrorCode, Result},
    message::Timestamp,
};

/// Messages ready and consumers of a queue.
///
/// # Errors
/// `QUEUE_NOT_FOUND`, `CONNECTION_*`.
pub(super) async fn look(link: &Link, queue: &str) -> Result<(u64, u64)> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let name = short(queue)?;
    let found = on_channel(link, queue, "look at", async |channel| {
        channel
            .queue_declare(name, passive, FieldTable::default())
            .await
    })
    .await?;
    Ok((
        u64::from(found.message_count()),
        u64::from(found.consumer_count()),
    ))
}

/// The state of a queue; what only the management API knows is there when it
/// answers.
pub(super) async fn stats(shared: &Shared, link: &Link, queue: &str) -> Result<QueueStats> {
    // At once: an API that does not answer is waited for, and no longer than that.
    let (looked, figures) =
        tokio::join!(look(link, queue), management::queue(&shared.config, queue));
    let (ready, consumers) = looked?;
    let unacked = figures.as_ref().and_then(|f| f.messages_unacknowledged);
    Ok(QueueStats {
        name: queue.to_owned(),
        messages: ready + unacked.unwrap_or(0),
        consumers,
        messages_ready: ready,
        messages_unacked: unacked,
        message_bytes: figures.as_ref().and_then(|f| f.message_bytes),
        publish_rate: figures
            .as_ref()
            .and_then(management::QueueFigures::publish_rate),
        deliver_rate: figures
            .as_ref()
            .and_then(management::QueueFigures::deliver_rate),
        timestamp: Timestamp::now(),
    })
}

/// Deletes the ready messages; says how many there were.
pub(super) async fn purge(link: &Link, queue: &str) -> Result<u64> {
    let name = short(queue)?;
    on_channel(link, queue, "purge", async |channel| {
        channel
            .queue_purge(name, QueuePurgeOptions::default())
            .await
    })
    .await
    .map(u64::from)
}

/// Deletes a queue. RabbitMQ says yes to a queue that is not there, so that it
/// is looked for first.
pub(super) async fn delete(link: &Link, queue: &str) -> Result<()> {
    look(link, queue).await?;
    let name = short(queue)?;
    on_channel(link, queue, "delete", async |channel| {
        channel
            .queue_delete(name, QueueDeleteOptions::default())
            .await
    })
    .await
    .map(drop)
}

async fn on_channel<T>(
    link: &Link,
    queue: &str,
    what: &str,
    operation: impl AsyncFnOnce(Channel) -> Result<T, lapin::Error>,
) -> Result<T> {
    let channel = link.control_channel().await?;
    let answer = link
        .bounded(link.patience, operation(channel.clone()))
        .await?;
    match answer {
        Ok(value) => {
            // Its result is there; how the channel ends concerns nobody.
            let _ = link
                .bounded(link.patience, channel.close(200, "OK".into()))
                .await;
            Ok(value)
        }
        Err(e) => {
            let said = error::text(&e);
            // 404 is also the answer for a queue whose node is away.
            let gone = refusal(&e) == Some(Refusal::NotFound) && !said.contains("no queue");
            let missing = if gone {
                ErrorCode::BrokerUnavailable
            } else {
                ErrorCode::QueueNotFound
            };
            Err(error::operation(
                &e,
                &format!("{what} queue {queue}"),
                missing,
                ErrorCode::QueueDeclareFailed,
            )
            .on(queue))
        }
    }
}

fn short(queue: &str) -> Result<ShortString> {
    ShortString::try_new(queue).map_err(|_| {
        Error::rejected(
            ErrorCode::InvalidConfig,
            "a queue name has at most 255 bytes",
        )
        .at(BrokerType::RabbitMq)
        .on(queue)
    })
}
