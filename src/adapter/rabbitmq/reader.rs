//! One queue's consumer over all generations: subscribes whenever there is a
//! connection, and again when the server ended the subscription.

use std::{sync::Arc, time::Duration};

use lapin::{
    Channel,
    options::{QueueBindOptions, QueueDeclareOptions},
    types::ShortString,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    arguments,
    backoff::Backoff,
    board::Board,
    courier::Courier,
    error,
    link::Link,
    session::{End, Plan, Session},
    shared::Shared,
    watchdog::Watchdog,
};
use crate::{
    broker::{Delivery, QueueOptions, QueueType},
    error::{ErrorCode, Result},
};

/// Which queue is read, and whether it is ours to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    /// One that exists.
    Existing(String),
    /// One that is declared for the subscription, and bound if a binding is
    /// given. `live` ones belong to one connection and have a new name on each.
    Own {
        name: String,
        live: bool,
        arguments: std::collections::BTreeMap<String, String>,
        /// Exchange and pattern.
        binding: Option<(String, String)>,
    },
}

impl Queue {
    /// The name that the board shows.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Existing(name) | Self::Own { name, .. } => name,
        }
    }
}

/// One queue's reader.
pub(super) struct Reader {
    pub(super) shared: Arc<Shared>,
    pub(super) courier: Courier,
    pub(super) queue: Queue,
    pub(super) plan: Plan,
    pub(super) deliveries: mpsc::Sender<Vec<Delivery>>,
    pub(super) stopping: CancellationToken,
    pub(super) board: Arc<Board>,
}

impl Reader {
    /// Runs until it is stopped, the reader lets go, or the broker is closed.
    pub(super) async fn run(self) {
        let mut links = self.shared.link.subscribe();
        let mut backoff = Backoff::new(self.shared.config.reconnect_delay, LONGEST_PAUSE);
        let interval = self.shared.config.consumer_check_interval;
        let mut watchdog =
            (!interval.is_zero()).then(|| Watchdog::new(Instant::now().into_std(), interval));
        while !self.over() {
            let link = links.borrow_and_update().clone();
            let end = match link {
                Some(link) if !link.lost.is_cancelled() => {
                    self.serve(&link, &mut backoff, &mut watchdog).await
                }
                _ => End::Lost,
            };
            self.board.set(self.queue.name(), false);
            match end {
                End::Stopped => break,
                End::Lost => {
                    // The link changes when the next generation stands; the old
                    // one may be there for a moment longer.
                    tokio::select! {
                        () = self.stopped() => break,
                        changed = links.changed() => if changed.is_err() { break },
                    }
                }
                End::Broken(why) => {
                    warn!(queue = self.queue.name(), %why, "the subscription ended; subscribing again");
                    self.shared.recorder.subscribe_errors.inc();
                    self.shared.recorder.total_errors.inc();
                    tokio::select! {
                        () = self.stopped() => break,
                        () = tokio::time::sleep(backoff.pause()) => {}
                    }
                }
            }
        }
        self.board.remove(self.queue.name());
    }

    async fn serve(
        &self,
        link: &Link,
        backoff: &mut Backoff,
        watchdog: &mut Option<Watchdog>,
    ) -> End {
        let started = std::time::Instant::now();
        let prepared = async {
            let channel = link.control_channel().await?;
            let name = self.prepare(link, &channel).await?;
            Ok::<_, crate::error::Error>((channel, name))
        };
        let (channel, name) = match prepared.await {
            Ok(prepared) => prepared,
            Err(_) if link.lost.is_cancelled() => return End::Lost,
            Err(e) => return End::Broken(e.message().to_owned()),
        };
        let session = Session {
            shared: &self.shared,
            courier: &self.courier,
            link,
            plan: &self.plan,
            deliveries: &self.deliveries,
            stopping: &self.stopping,
        };
        session
            .run(channel, &name, watchdog, || {
                backoff.reset();
                self.shared
                    .recorder
                    .subscribe_latency
                    .record(started.elapsed());
                info!(queue = %name, generation = link.generation, "subscribed");
                self.board.set(self.queue.name(), true);
            })
            .await
    }

    /// Declares and binds the subscription's own queue; gives the name to read.
    async fn prepare(&self, link: &Link, channel: &Channel) -> Result<String> {
        let Queue::Own {
            name,
            live,
            arguments: given,
            binding,
        } = &self.queue
        else {
            return Ok(self.queue.name().to_owned());
        };
        let (name, options) = if *live {
            (
                format!("{name}.{}", uuid::Uuid::now_v7().simple()),
                QueueOptions {
                    durable: false,
                    exclusive: true,
                    auto_delete: true,
                    ..QueueOptions::default()
                },
            )
        } else {
            let options = QueueOptions {
                // Arguments that quorum queues do not know need the other type.
                queue_type: given
                    .contains_key("x-max-priority")
                    .then_some(QueueType::Classic),
                ..QueueOptions::default()
            };
            (name.clone(), options)
        };
        let mut table = arguments::arguments(&name, &options)?;
        arguments::overlay(&mut table, given)?;
        let short = |text: &str| {
            ShortString::try_new(text)
                .map_err(|_| error::unsupported(format!("{text:?} is longer than 255 bytes")))
        };
        let fail = |e: lapin::Error, what: &str| {
            error::operation(
                &e,
                &format!("{what} queue {name}"),
                ErrorCode::ExchangeNotFound,
                ErrorCode::QueueDeclareFailed,
            )
        };
        let flags = QueueDeclareOptions {
            passive: false,
            ..arguments::flags(&options)
        };
        link.bounded(
            link.patience,
            channel.queue_declare(short(&name)?, flags, table),
        )
        .await?
        .map_err(|e| fail(e, "declare"))?;
        if let Some((exchange, key)) = binding {
            let bind = channel.queue_bind(
                short(&name)?,
                short(exchange)?,
                short(key)?,
                QueueBindOptions::default(),
                Default::default(),
            );
            link.bounded(link.patience, bind)
                .await?
                .map_err(|e| fail(e, "bind"))?;
        }
        Ok(name)
    }

    fn over(&self) -> bool {
        self.stopping.is_cancelled()
            || self.shared.closing.is_cancelled()
            || self.deliveries.is_closed()
    }

    async fn stopped(&self) {
        tokio::select! {
            () = self.stopping.cancelled() => {}
            () = self.shared.closing.cancelled() => {}
            () = self.deliveries.closed() => {}
        }
    }
}

/// The longest pause before subscribing again to a queue that cannot be read.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
