//! What should be on the server, looked for and, where allowed, made. Nothing
//! that exists with other arguments is ever touched: it is reported as drift,
//! and the channel that the server closes over it is one made for the look.

use std::time::Duration;

use lapin::{
    Channel, ExchangeKind as AmqpKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::{
    arguments,
    error::{self, Refusal, refusal},
    link::Link,
    shared::Shared,
};
use crate::{
    broker::{BrokerType, QueueOptions},
    error::{Error, ErrorCode, Result},
    topology::{
        Binding, Drift, ExchangeKind, ExchangeSpec, QueueSpec, Topology, TopologyMode,
        TopologyReport, resting,
    },
};

/// The topology with what the adapter itself depends on, where it was not
/// given: the event exchange, the retry exchange and queue, the dead letters.
pub(super) fn effective(wanted: &Topology) -> Topology {
    let mut topology = wanted.clone();
    let retry = topology.retry_exchange().to_owned();
    let events = topology.event_exchange().to_owned();
    let dead = topology.dead_letter_queue().to_owned();
    for name in [&retry, &events] {
        if !topology.exchanges.iter().any(|e| e.name == **name) {
            topology.exchanges.push(ExchangeSpec {
                name: name.clone(),
                kind: ExchangeKind::Topic,
                durable: true,
            });
        }
    }
    if topology.retry_tiers().next().is_none() {
        topology.queues.push(QueueSpec {
            name: retry.clone(),
            options: resting(RETRY),
            bindings: vec![Binding {
                exchange: retry,
                routing_key: "#".into(),
            }],
            aliases: Vec::new(),
        });
    }
    if topology.queue(&dead).is_none() {
        topology.queues.push(QueueSpec {
            name: dead,
            options: QueueOptions::default(),
            bindings: Vec::new(),
            aliases: Vec::new(),
        });
    }
    topology
}

/// How a queue is made that nobody described: durable, replicated, with dead
/// letters.
pub(super) fn safe_queue(topology: &Topology) -> QueueOptions {
    let dead = topology.dead_letter_queue();
    let (exchange, key) = topology
        .queue(dead)
        .and_then(|q| q.bindings.first())
        .map_or((String::new(), dead.to_owned()), |b| {
            (b.exchange.clone(), b.routing_key.clone())
        });
    QueueOptions {
        dead_letter_exchange: Some(exchange),
        dead_letter_routing_key: Some(key),
        ..QueueOptions::default()
    }
}

/// Looks at everything, and makes what is missing when the mode says so.
///
/// # Errors
/// Only when the connection fails; everything else stands in the report.
pub(super) async fn reconcile(
    shared: &Shared,
    link: &Link,
    mode: TopologyMode,
) -> Result<TopologyReport> {
    let mut look = Look {
        link,
        channel: None,
        apply: mode == TopologyMode::Apply,
        report: TopologyReport::default(),
    };
    let topology = &shared.topology;
    if mode != TopologyMode::Ignore {
        for exchange in &topology.exchanges {
            look.exchange(exchange).await?;
        }
        for queue in &topology.queues {
            look.queue(&queue.name, &queue.options).await?;
            look.bindings(queue).await?;
        }
    }
    // Queues that were declared by a call are declared again whatever the
    // mode: they were made with our arguments and must come back with them.
    look.apply = true;
    for (name, options) in shared.declared() {
        if topology.queue(&name).is_none() || mode == TopologyMode::Ignore {
            look.queue(&name, &options).await?;
        }
    }
    look.keep(topology).await?;
    Ok(look.report)
}

/// Declares one queue, or says how the one that exists differs.
///
/// # Errors
/// `QUEUE_DECLARE_FAILED` that names the argument, `INVALID_CONFIG`,
/// `CONNECTION_*`.
pub(super) async fn declare_queue(
    topology: &Topology,
    link: &Link,
    name: &str,
    options: &QueueOptions,
) -> Result<()> {
    let mut look = Look {
        link,
        channel: None,
        apply: true,
        report: TopologyReport::default(),
    };
    arguments::arguments(name, options)?;
    look.queue(name, options).await?;
    look.keep(topology).await?;
    if let Some(drift) = look.report.drift.first() {
        return Err(declare_failed(format!(
            "queue {name} exists with other arguments: {} is {}, expected {}; delete it, or declare it as it is",
            drift.argument, drift.actual, drift.expected
        )));
    }
    match look.report.not_checked.first() {
        Some(why) => Err(declare_failed(why.clone())),
        None => Ok(()),
    }
}

/// Writes to the log what is not as it should be.
pub(super) fn log(report: &TopologyReport) {
    for drift in &report.drift {
        warn!(%drift, "the topology differs; it is left as it is");
    }
    for missing in &report.missing {
        warn!(%missing, "missing on RabbitMQ");
    }
    for why in &report.not_checked {
        info!(%why, "not checked on RabbitMQ");
    }
    for made in &report.created {
        info!(%made, "made on RabbitMQ");
    }
}

/// A look at the server. Each refusal costs the channel, so that the next step
/// takes a new one.
struct Look<'a> {
    link: &'a Link,
    channel: Option<Channel>,
    apply: bool,
    report: TopologyReport,
}

impl Look<'_> {
    async fn exchange(&mut self, spec: &ExchangeSpec) -> Result<()> {
        let object = format!("exchange {}", spec.name);
        let kind = match spec.kind {
            ExchangeKind::Direct => AmqpKind::Direct,
            ExchangeKind::Topic => AmqpKind::Topic,
            ExchangeKind::Fanout => AmqpKind::Fanout,
        };
        let declare = |passive| ExchangeDeclareOptions {
            passive,
            durable: spec.durable,
            ..ExchangeDeclareOptions::default()
        };
        let name = spec.name.as_str();
        if name.len() > MAX_NAME {
            self.report.not_checked.push(format!(
                "{object}: the name is longer than {MAX_NAME} bytes"
            ));
            return Ok(());
        }
        let step = |channel: Channel, passive| {
            let kind = kind.clone();
            async move {
                channel
                    .exchange_declare(name.into(), kind, declare(passive), FieldTable::default())
                    .await
            }
        };
        let channel = self.channel().await?;
        let found = self.step(step(channel, true)).await?;
        if let Some(missing) = self.judge_passive(&object, found) {
            let channel = self.channel().await?;
            let declared = self.step(step(channel, false)).await?;
            self.declared(object, missing, declared);
        }
        Ok(())
    }

    async fn queue(&mut self, name: &str, options: &QueueOptions) -> Result<()> {
        let object = format!("queue {name}");
        let table = match arguments::arguments(name, options) {
            Ok(_) if name.len() > MAX_NAME => {
                self.report.not_checked.push(format!(
                    "{object}: the name is longer than {MAX_NAME} bytes"
                ));
                return Ok(());
            }
            Ok(table) => table,
            Err(e) => {
                self.report.not_checked.push(e.to_string());
                return Ok(());
            }
        };
        let flags = arguments::flags(options);
        let step = |channel: Channel, passive| {
            let table = if passive {
                FieldTable::default()
            } else {
                table.clone()
            };
            async move {
                channel
                    .queue_declare(name.into(), QueueDeclareOptions { passive, ..flags }, table)
                    .await
                    .map(drop)
            }
        };
        let channel = self.channel().await?;
        let found = self.step(step(channel, true)).await?;
        if let Some(missing) = self.judge_passive(&object, found) {
            let channel = self.channel().await?;
            let declared = self.step(step(channel, false)).await?;
            self.declared(object, missing, declared);
        }
        Ok(())
    }

    /// Binding again what is bound does nothing; whether a binding exists
    /// cannot be asked over AMQP.
    async fn bindings(&mut self, queue: &QueueSpec) -> Result<()> {
        for Binding {
            exchange,
            routing_key,
        } in &queue.bindings
        {
            let object = format!("binding {exchange} --{routing_key}--> {}", queue.name);
            if !self.apply {
                self.report
                    .not_checked
                    .push(format!("{object}: bindings cannot be asked for over AMQP"));
                continue;
            }
            match self.bind(&queue.name, exchange, routing_key).await? {
                Ok(()) => self.report.ok.push(object),
                Err(e) => self.refused(&object, &e),
            }
        }
        Ok(())
    }

    async fn bind(
        &mut self,
        queue: &str,
        exchange: &str,
        key: &str,
    ) -> Result<Result<(), lapin::Error>> {
        let channel = self.channel().await?;
        let bind = channel.queue_bind(
            queue.into(),
            exchange.into(),
            key.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        self.step(bind).await
    }

    /// Has the server write to its disk that what it made is there.
    ///
    /// RabbitMQ with Mnesia answers a declare when the queue is written as
    /// prepared; that it is decided follows, and in about one of ten declares of
    /// a classic queue (4.0.5, 400 of them) reaches the disk only two seconds
    /// later. A node that is killed before forgets the queue, and with it every
    /// message that it confirmed. The next change writes the decision of the one
    /// before: a binding of the hub's own resting queue, which matches nothing,
    /// is made and removed. Where that is refused, all is as it would be without.
    async fn keep(&mut self, topology: &Topology) -> Result<()> {
        let Some(tier) = topology.retry_tiers().next() else {
            return Ok(());
        };
        if self.report.created.is_empty() {
            return Ok(());
        }
        let (queue, exchange) = (tier.queue.name.as_str(), tier.exchange);
        // Its own: binding again what another hub has bound would change nothing.
        let key = format!("hub-declared-{}", Uuid::new_v4());
        if let Err(e) = self.bind(queue, exchange, &key).await? {
            debug!(
                queue,
                said = error::text(&e),
                "declared, and perhaps not on the disk yet"
            );
            return Ok(());
        }
        let channel = self.channel().await?;
        let unbind = channel.queue_unbind(
            queue.into(),
            exchange.into(),
            key.as_str().into(),
            FieldTable::default(),
        );
        if let Err(e) = self.step(unbind).await? {
            debug!(
                queue,
                said = error::text(&e),
                "a binding that matches nothing is left"
            );
        }
        Ok(())
    }

    /// From the answer to a passive declare: whether to declare with the
    /// expected arguments, and whether that would make something that is
    /// missing. It makes the server say how what exists differs.
    fn judge_passive(&mut self, object: &str, found: Result<(), lapin::Error>) -> Option<bool> {
        match found {
            Ok(()) => Some(false),
            Err(e) if refusal(&e) == Some(Refusal::NotFound) => {
                if !self.apply {
                    self.report.missing.push(object.to_owned());
                }
                self.apply.then_some(true)
            }
            Err(e) => {
                self.refused(object, &e);
                None
            }
        }
    }

    fn declared(&mut self, object: String, missing: bool, declared: Result<(), lapin::Error>) {
        match declared {
            Ok(()) if missing => self.report.created.push(object),
            Ok(()) => self.report.ok.push(object),
            Err(e) => self.refused(&object, &e),
        }
    }

    fn refused(&mut self, object: &str, e: &lapin::Error) {
        let said = error::text(e);
        match error::drift(&said) {
            Some(drift) => self.report.drift.push(Drift {
                broker: BrokerType::RabbitMq,
                ..drift
            }),
            None => self.report.not_checked.push(format!("{object}: {said}")),
        }
    }

    /// One operation. The outer error is the connection's, the inner one the
    /// server's answer.
    async fn step<T>(
        &mut self,
        operation: impl Future<Output = Result<T, lapin::Error>>,
    ) -> Result<Result<T, lapin::Error>> {
        let answer = self.link.bounded(self.link.patience, operation).await?;
        if let Err(e) = &answer {
            self.channel = None;
            if refusal(e).is_none() {
                return Err(Error::new(
                    ErrorCode::ConnectionClosed,
                    format!("{} failed: {}", self.link.endpoint, error::text(e)),
                )
                .at(BrokerType::RabbitMq));
            }
        }
        Ok(answer)
    }

    async fn channel(&mut self) -> Result<Channel> {
        if let Some(channel) = &self.channel {
            return Ok(channel.clone());
        }
        let channel = self.link.control_channel().await?;
        self.channel = Some(channel.clone());
        Ok(channel)
    }
}

fn declare_failed(why: String) -> Error {
    Error::rejected(ErrorCode::QueueDeclareFailed, why).at(BrokerType::RabbitMq)
}

/// How long a failed message rests where nothing else is set.
const RETRY: Duration = Duration::from_secs(60);
/// The most bytes of a name over AMQP.
const MAX_NAME: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_retry_queue_returns_messages_to_the_queue_that_the_key_names() {
        // Fault 5: a dead-letter key of its own made messages vanish.
        let topology = effective(&Topology::default());
        let queue = topology.retry_tiers().next().unwrap().queue;
        assert_eq!(queue.options.dead_letter_exchange.as_deref(), Some(""));
        assert_eq!(queue.options.dead_letter_routing_key, None);
        assert_eq!(queue.options.message_ttl_ms, Some(60_000));
        assert_eq!(queue.bindings[0].routing_key, "#");
        arguments::arguments(&queue.name, &queue.options).unwrap();
    }

    #[test]
    fn what_was_given_is_kept() {
        let mut wanted = effective(&Topology::default());
        wanted.queues[0].options.message_ttl_ms = Some(1_000);
        assert_eq!(effective(&wanted), wanted);
        let delay = wanted.retry_tiers().next().unwrap().delay;
        assert_eq!(delay, Duration::from_secs(1));
    }
}
