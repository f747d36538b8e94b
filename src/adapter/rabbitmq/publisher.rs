//! Opens lanes: decides where a topic is published, and asks the server, on a
//! channel of its own, whether that place exists, so that a wrong name costs
//! nobody's channel.

use std::sync::Arc;

use lapin::{
    ExchangeKind,
    options::{ConfirmSelectOptions, ExchangeDeclareOptions},
    types::{FieldTable, ShortString},
};
use tokio::sync::mpsc;

use super::{
    error::{self, Refusal, refusal, unsupported},
    lane::{self, Port, Target},
    link::Link,
    queue,
    shared::Shared,
};
use crate::{
    broker::{BrokerType, Compression, Confirmation, Lane, LaneOptions, Submission, TopicKind},
    error::{Error, ErrorCode, Result},
    topic::Topic,
};

/// Opens a lane for a topic.
pub(super) async fn open_lane(
    shared: &Arc<Shared>,
    topic: &Topic,
    options: &LaneOptions,
) -> Result<Lane> {
    if !matches!(options.compression, None | Some(Compression::None)) {
        return Err(unsupported(
            "RabbitMQ compresses nothing by itself; publish through the hub, which does, leave compression out, or send a compressed payload with its content_encoding",
        )
        .on(topic.as_str()));
    }
    let (exchange, key) = match &options.address {
        Some(address) => address.clone(),
        None => address_of(shared, topic, options.kind).await?,
    };
    let short = |text: &str| {
        ShortString::try_new(text).map_err(|_| {
            unsupported(format!("{text:?} is longer than 255 bytes")).on(topic.as_str())
        })
    };
    let target = Target {
        topic: shared.topology.canonical(topic).into(),
        exchange: short(&exchange)?,
        key: short(&key)?,
        mandatory: options.mandatory,
        confirm: options.confirm && shared.config.publisher_confirm,
        expires: true,
        window: options.window.max(1),
    };
    let (lane, port) = Lane::pair(options);
    open(
        shared,
        target,
        options.open_timeout,
        port.submissions,
        port.confirmations,
    )
    .await?;
    Ok(lane)
}

/// Opens a channel to `target` and starts the task that owns it.
pub(super) async fn open(
    shared: &Arc<Shared>,
    target: Target,
    within: std::time::Duration,
    submissions: mpsc::Receiver<Vec<Submission>>,
    confirmations: mpsc::Sender<Confirmation>,
) -> Result<()> {
    let link = shared.current()?;
    let opened = tokio::time::timeout(within, async {
        check_exchange(&link, &target).await?;
        let channel = link.publish_channel(within).await?;
        // Asked for even where nobody waits for an answer: only then does the
        // client know what is in flight.
        link.bounded(
            within,
            channel.confirm_select(ConfirmSelectOptions::default()),
        )
        .await?
        .map_err(|e| {
            error::operation(
                &e,
                "ask for confirms",
                ErrorCode::ConnectionFailed,
                ErrorCode::ConnectionFailed,
            )
        })?;
        Ok(channel)
    })
    .await;
    let channel = match opened {
        Ok(channel) => channel?,
        Err(_) => {
            return Err(Error::new(
                ErrorCode::ConnectionTimeout,
                format!(
                    "no publishing channel on {} within {within:?}",
                    link.endpoint
                ),
            )
            .at(BrokerType::RabbitMq)
            .on(target.topic.as_ref()));
        }
    };
    let port = Port {
        submissions,
        confirmations,
    };
    shared
        .tasks
        .spawn(lane::run(shared.clone(), link, channel, target, port));
    Ok(())
}

/// Where a topic is published: a queue that the topology knows by its first
/// binding (or name), a stream to the event exchange with the topic as key,
/// anything else to the queue of its name.
async fn address_of(
    shared: &Shared,
    topic: &Topic,
    kind: Option<TopicKind>,
) -> Result<(String, String)> {
    let topology = &shared.topology;
    let is_queue = topology.queue(topic).is_some() || shared.is_declared(topic);
    let is_stream = shared.is_stream(topic)
        || kind == Some(TopicKind::Stream) && !is_queue && !is_a_queue(shared, topic).await?;
    if is_stream && !is_queue {
        return Ok((
            topology.event_exchange().to_owned(),
            topic.as_str().to_owned(),
        ));
    }
    let address = topology.amqp_address(topic);
    Ok((address.exchange, address.routing_key))
}

/// Whether somebody has made a queue of this name, which is published to then,
/// whatever its topic is by the routes.
async fn is_a_queue(shared: &Shared, name: &str) -> Result<bool> {
    let link = shared.current()?;
    match queue::look(&link, name).await {
        Ok(_) => Ok(true),
        Err(e) if e.code() == ErrorCode::QueueNotFound => Ok(false),
        Err(e) => Err(e),
    }
}

async fn check_exchange(link: &Link, target: &Target) -> Result<()> {
    if target.exchange.as_str().is_empty() {
        // The default exchange is always there; a missing queue comes back as
        // a returned message.
        return Ok(());
    }
    let channel = link.control_channel().await?;
    let passive = ExchangeDeclareOptions {
        passive: true,
        ..ExchangeDeclareOptions::default()
    };
    let found = link
        .bounded(
            link.patience,
            channel.exchange_declare(
                target.exchange.clone(),
                ExchangeKind::Direct,
                passive,
                FieldTable::default(),
            ),
        )
        .await?;
    match found {
        Ok(()) => {
            let _ = link
                .bounded(link.patience, channel.close(200, "OK".into()))
                .await?;
            Ok(())
        }
        Err(e) if refusal(&e) == Some(Refusal::NotFound) => Err(Error::rejected(
            ErrorCode::ExchangeNotFound,
            format!(
                "exchange {:?} does not exist; declare it, or let the topology be applied",
                target.exchange.as_str()
            ),
        )
        .at(BrokerType::RabbitMq)
        .on(target.topic.as_ref())),
        // Not allowed to look is not the same as not there.
        Err(e) if refusal(&e).is_some() => Ok(()),
        Err(e) => Err(error::operation(
            &e,
            "look for the exchange",
            ErrorCode::ExchangeNotFound,
            ErrorCode::ConnectionFailed,
        )),
    }
}
