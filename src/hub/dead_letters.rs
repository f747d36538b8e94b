//! Dead letters through the hub: which places keep them, and the way back for
//! their copies. What is decided, and how, is [`crate::dead_letter`]'s business.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{MessagingHub, route::RouteKind};
use crate::{
    broker::{PublishOptions, Receipt, dispatch::TypeRouter},
    dead_letter::{
        self, DeadLetter, DeadLetterProcessor, Edit, LetterPage, LetterQuery, Outlet, Place,
        ProcessorOptions, Purged, Reprocessed, ReprocessedMany,
    },
    error::Result,
    message::{Message, wire::Marks},
    metrics::MetricsRecorder,
    topic::Topic,
};

impl MessagingHub {
    /// A page of the dead letters that a query means, over every broker, oldest
    /// failure first.
    ///
    /// # Errors
    /// The hub is closed. A broker that cannot be asked is named in the page.
    ///
    /// # Cancel safety
    /// What was looked at is given back. So it is with the other calls; of them,
    /// one that is dropped may leave a letter open whose copy was published, and
    /// doing it again does nothing twice.
    pub async fn dead_letters(
        &self,
        query: &LetterQuery,
        offset: usize,
        limit: usize,
    ) -> Result<LetterPage> {
        self.check_open()?;
        let places = self.dead_letter_places();
        let desk = &self.0.desk;
        desk.list(self, &places, query, offset, limit).await
    }

    /// One dead letter, by its id, or by its message's where that names one.
    ///
    /// # Errors
    /// Several letters have that message id; a broker cannot be asked.
    pub async fn dead_letter(&self, id: &str) -> Result<Option<DeadLetter>> {
        self.check_open()?;
        let places = self.dead_letter_places();
        self.0.desk.show(self, &places, id).await
    }

    /// Publishes a copy of a dead letter to where it came from, or, edited, to
    /// where the edit says; when the copy is safe the letter is processed. None:
    /// there is no such letter. Doing it twice does nothing twice.
    ///
    /// # Errors
    /// As [`MessagingHub::dead_letter`], and as a publish: then the letter stays.
    pub async fn reprocess_dead_letter(
        &self,
        id: &str,
        edit: Option<&Edit>,
    ) -> Result<Option<Reprocessed>> {
        self.check_open()?;
        let places = self.dead_letter_places();
        self.0.desk.reprocess(self, &places, id, edit).await
    }

    /// As [`MessagingHub::reprocess_dead_letter`], for up to `limit` letters that
    /// a query means and that are not processed yet.
    ///
    /// # Errors
    /// The hub is closed. What went wrong with single letters stands with them.
    pub async fn reprocess_dead_letters(
        &self,
        query: &LetterQuery,
        limit: usize,
    ) -> Result<ReprocessedMany> {
        self.check_open()?;
        let places = self.dead_letter_places();
        let desk = &self.0.desk;
        desk.reprocess_all(self, &places, query, limit).await
    }

    /// Gives a dead letter up, for a reason that is kept with it until it is
    /// purged. None: there is no such letter.
    ///
    /// # Errors
    /// As [`MessagingHub::dead_letter`]; `MESSAGE_INVALID` without a reason, or
    /// for a letter that was processed.
    pub async fn discard_dead_letter(&self, id: &str, reason: &str) -> Result<Option<DeadLetter>> {
        self.check_open()?;
        let places = self.dead_letter_places();
        self.0.desk.discard(self, &places, id, reason).await
    }

    /// Takes away for good the processed and discarded letters that a query
    /// means. Open ones are never purged.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for the status of open letters.
    pub async fn purge_dead_letters(&self, query: &LetterQuery) -> Result<Purged> {
        self.check_open()?;
        let places = self.dead_letter_places();
        self.0.desk.purge(self, &places, query).await
    }

    /// Starts a processor: it tries dead letters again with the handlers of their
    /// types, until they are taken, or `max_attempts` are over. It ends with the
    /// hub, or when it is stopped. Within a Tokio runtime.
    ///
    /// # Errors
    /// `INVALID_CONFIG` that names the option.
    pub fn dead_letter_processor(
        &self,
        handlers: TypeRouter,
        options: ProcessorOptions,
    ) -> Result<DeadLetterProcessor> {
        self.check_open()?;
        options.check()?;
        let stopping = self.0.closing.child_token();
        let stop = stopping.clone();
        let inner = Arc::downgrade(&self.0);
        let hub = move || {
            let hub = Self(inner.upgrade()?);
            let places = hub.dead_letter_places();
            Some((hub, places))
        };
        let desk = self.0.desk.clone();
        let task = dead_letter::run(desk, hub, handlers, options, stop);
        let task = self.0.tasks.spawn(task);
        Ok(DeadLetterProcessor::new(stopping, task))
    }

    /// Everything that keeps dead letters, over all brokers.
    fn dead_letter_places(&self) -> Vec<Place> {
        let topology = &self.0.topology;
        let mut places = Vec::new();
        for broker in self.all_brokers() {
            let queue = Topic::new(topology.dead_letter_queue());
            let decided = Topic::new(topology.decided_queue());
            if broker.task_queue().is_some()
                && let (Ok(queue), Ok(decided)) = (queue, decided)
            {
                places.push(Place::queue(broker.clone(), queue, decided));
            }
            if broker.event_stream().is_some() {
                for name in topology.dead_letter_topics() {
                    if let Ok(topic) = Topic::new(name) {
                        places.push(Place::log(broker.clone(), topic));
                    }
                }
            }
        }
        places
    }
}

#[async_trait]
impl Outlet for MessagingHub {
    fn is_queue(&self, topic: &str) -> bool {
        self.kind_of(topic) == RouteKind::Task
    }

    fn max_message_bytes(&self) -> usize {
        self.0.max_message_bytes
    }

    fn recorder(&self) -> &MetricsRecorder {
        &self.0.recorder
    }

    async fn publish(&self, topic: &Topic, message: Message, marks: Marks) -> Result<Receipt> {
        let topic = self.canonical(topic)?;
        let options = PublishOptions {
            timeout: PATIENCE,
            ..PublishOptions::default()
        };
        self.publish_again(&topic, message, marks, &options).await
    }
}

/// How long the copy of a letter may take, while the letter is held.
const PATIENCE: Duration = Duration::from_secs(20);
