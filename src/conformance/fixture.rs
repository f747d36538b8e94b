//! What a check works with: clients, fresh topics, readers, publishing.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::{Capability, Factory, Failure, Kind, Reader, Restart, Target, Wanted};
use crate::{
    broker::{Handler, PublishOptions, Receipt, Source, SubscribeOptions, Subscription},
    error::Result,
    message::{Message, MessageId},
    topic::Topic,
};

/// One run of one check for one kind. Clones are the same run.
#[derive(Clone)]
pub struct Fixture {
    factory: Arc<dyn Factory>,
    kind: Kind,
    clients: Arc<Mutex<Vec<Arc<dyn Target>>>>,
}

impl Fixture {
    pub(crate) fn new(factory: Arc<dyn Factory>, kind: Kind) -> Self {
        Self {
            factory,
            kind,
            clients: Arc::default(),
        }
    }

    /// Queue or stream.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The backend.
    #[must_use]
    pub fn factory(&self) -> &dyn Factory {
        &*self.factory
    }

    /// Whether the backend declares a capability, for checks that demand more
    /// where more is declared.
    #[must_use]
    pub fn has(&self, capability: Capability) -> bool {
        self.factory.capabilities().has(capability)
    }

    /// The restart hook.
    ///
    /// # Errors
    /// When there is none.
    pub fn restart(&self) -> Result<&dyn Restart, Failure> {
        let hook = self.factory.restart();
        hook.ok_or_else(|| Failure::new("the factory has no restart hook"))
    }

    /// A connected client, closed at the end of the check.
    ///
    /// # Errors
    /// Why it could not connect.
    pub async fn client(&self) -> Result<Arc<dyn Target>, Failure> {
        let client = self.factory.connect().await?;
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.push(client.clone());
        Ok(client)
    }

    /// Closes every client of this check.
    pub(crate) async fn close(&self) -> Result<(), Failure> {
        let clients = {
            let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *clients)
        };
        for client in clients {
            client.close().await?;
        }
        Ok(())
    }

    /// A name that nothing else uses.
    #[must_use]
    pub fn unique(&self) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = MessageId::generate();
        format!("{id}.{}", NEXT.fetch_add(1, Relaxed))
    }

    /// A topic name that nothing uses and that does not exist.
    ///
    /// # Errors
    /// When the factory makes an invalid name.
    pub fn name(&self) -> Result<Topic, Failure> {
        let name = self.factory.topic_name(self.kind, &self.unique());
        Ok(Topic::new(name)?)
    }

    /// A fresh queue or stream.
    ///
    /// # Errors
    /// Why it could not be made.
    pub async fn topic(&self, client: &Arc<dyn Target>) -> Result<Topic, Failure> {
        self.topic_with(client, &Wanted::new(self.kind)).await
    }

    /// A fresh queue or stream with settings.
    ///
    /// # Errors
    /// Why it could not be made.
    pub async fn topic_with(
        &self,
        client: &Arc<dyn Target>,
        wanted: &Wanted,
    ) -> Result<Topic, Failure> {
        let topic = self.name()?;
        client.declare(&topic, wanted).await?;
        Ok(topic)
    }

    /// What a reader of a topic reads.
    #[must_use]
    pub fn source(&self, topic: &Topic) -> Source {
        self.kind.source(topic)
    }

    /// Options of a reader: for streams with a group of its own. Readers that
    /// get clones of the same options share the work.
    #[must_use]
    pub fn options(&self) -> SubscribeOptions {
        let options = SubscribeOptions {
            prefetch: PREFETCH,
            commit_interval: COMMIT_INTERVAL,
            ..SubscribeOptions::default()
        };
        match self.kind {
            Kind::Queue => options,
            Kind::Stream => SubscribeOptions {
                group_id: Some(format!("conformance.{}", self.unique())),
                ..options
            },
        }
    }

    /// Options that leave `limit` messages unfinished at most.
    #[must_use]
    pub fn limited(&self, limit: u16) -> SubscribeOptions {
        SubscribeOptions {
            prefetch: limit,
            max_poll_records: usize::from(limit),
            ..self.options()
        }
    }

    /// A reader that the backend knows already.
    ///
    /// # Errors
    /// When the subscription fails.
    pub async fn reader(
        &self,
        client: &Arc<dyn Target>,
        topic: &Topic,
        options: &SubscribeOptions,
    ) -> Result<Reader, Failure> {
        let consumer = client.consume(&self.source(topic), options).await?;
        let reader = Reader::new(consumer);
        reader.active().await?;
        Ok(reader)
    }

    /// A handler that the backend knows already.
    ///
    /// # Errors
    /// When the subscription fails.
    pub async fn handler(
        &self,
        client: &Arc<dyn Target>,
        topic: &Topic,
        options: SubscribeOptions,
        handler: Arc<dyn Handler>,
    ) -> Result<Subscription, Failure> {
        let source = self.source(topic);
        let subscription = client.subscribe(&source, options, handler).await?;
        match tokio::time::timeout(Reader::PATIENCE, subscription.active()).await {
            Ok(true) => Ok(subscription),
            Ok(false) => Err(Failure::new("expected an active subscription, it failed")),
            Err(_) => Err(Failure::new(format!(
                "expected an active subscription within {:?}",
                Reader::PATIENCE
            ))),
        }
    }

    /// Publishes messages, all of which must be accepted.
    ///
    /// # Errors
    /// Names the first that was not.
    pub async fn publish(
        &self,
        client: &Arc<dyn Target>,
        topic: &Topic,
        messages: Vec<Message>,
    ) -> Result<Vec<Receipt>, Failure> {
        let ids: Vec<_> = messages.iter().map(|m| m.id.clone()).collect();
        let options = PublishOptions::default();
        let results = client.publish_batch(topic, messages, &options).await;
        if results.len() != ids.len() {
            return Err(Failure::new(format!(
                "expected one outcome for each of {} messages, seen {}",
                ids.len(),
                results.len()
            )));
        }
        let mut receipts = Vec::with_capacity(ids.len());
        for (id, result) in ids.into_iter().zip(results) {
            let receipt = result?;
            if receipt.id != id {
                return Err(Failure::new(format!(
                    "expected the outcome of message {id}, seen that of {}",
                    receipt.id
                )));
            }
            receipts.push(receipt);
        }
        Ok(receipts)
    }

    /// Publishes `count` numbered messages and returns their ids.
    ///
    /// # Errors
    /// As [`Fixture::publish`].
    pub async fn publish_numbered(
        &self,
        client: &Arc<dyn Target>,
        topic: &Topic,
        count: usize,
    ) -> Result<Vec<MessageId>, Failure> {
        let messages: Vec<_> = (0..count).map(numbered).collect();
        let ids = messages.iter().map(|m| m.id.clone()).collect();
        self.publish(client, topic, messages).await?;
        Ok(ids)
    }
}

impl fmt::Debug for Fixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fixture")
            .field("factory", &self.factory.name())
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// A message whose payload and header carry its number.
pub(crate) fn numbered(n: usize) -> Message {
    Message::new("conformance.numbered", format!("payload {n}"))
        .with_header("number", n.to_string())
}

const PREFETCH: u16 = 50;

/// Short, so that positions are visible soon after an ack.
const COMMIT_INTERVAL: Duration = Duration::from_millis(200);
