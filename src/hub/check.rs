//! What every message must stand before it is published, whichever way it goes: it
//! is filled from the options, then its size, form, times and schema are looked at.

use super::{MessagingHub, compress::Plan, publish::TopicEntry, schedule};
use crate::{
    broker::PublishOptions,
    compression,
    error::{Error, ErrorCode, Result},
    message::{
        Message, Timestamp,
        wire::{Marks, names::COMPRESSED},
    },
    topic::Topic,
    topology::Topology,
};

impl MessagingHub {
    /// Fills and checks a message, and compresses it where the hub does that. Says
    /// when it is due, if that is later, and how it is compressed.
    ///
    /// # Errors
    /// Why it is refused.
    ///
    /// # Cancel safety
    /// Dropped, nothing was published.
    pub(super) async fn check(
        &self,
        entry: &TopicEntry,
        message: &mut Message,
        options: &PublishOptions,
        marks: &Marks,
    ) -> Result<(Option<Timestamp>, Plan)> {
        let topic = &entry.topic;
        apply(message, options, topic, &self.0.topology)?;
        if message.max_retries == Message::DEFAULT_MAX_RETRIES {
            // A message that carries the default has said nothing.
            message.max_retries = self.0.config.retry.max_retries;
        }
        // The copy of a letter, or a replayed one, that cannot be expanded here goes on
        // as it stands, with the mark that no publisher may set.
        let ours = marks.are_of_a_copy() || marks.replay.is_some();
        let packed = (ours && compression::is_marked(message))
            .then(|| message.headers.remove(COMPRESSED))
            .flatten();
        message
            .validate(self.0.max_message_bytes)
            .map_err(|e| e.on(topic.as_str()))?;
        if let Some(algorithm) = packed {
            message.headers.insert(COMPRESSED.to_owned(), algorithm);
        }
        if message
            .expires_at()
            .is_some_and(|at| at <= Timestamp::now())
        {
            return Err(Error::rejected(
                ErrorCode::MessageExpired,
                "the message's expiration, or its deadline, has passed already",
            )
            .on(topic.as_str())
            .with_id(message.id.as_str()));
        }
        if message.key.is_none() && entry.keyed_only {
            // Kafka would refuse it too, and with it the batch that it is in.
            return Err(Error::rejected(
                ErrorCode::MessageInvalid,
                "the topic is compacted, which keeps the last message of each key; give the message a key",
            )
            .on(topic.as_str())
            .with_id(message.id.as_str()));
        }
        let due = message
            .task
            .as_ref()
            .and_then(|t| t.scheduled_at)
            .filter(|at| *at > Timestamp::now());
        if due.is_some() && !self.can_schedule() {
            return Err(schedule::no_fallback()
                .on(topic.as_str())
                .with_id(message.id.as_str()));
        }
        #[cfg(feature = "schema")]
        if !message.headers.contains_key(COMPRESSED) {
            self.check_schema(entry, message).await?;
        }
        let compression = self.compression(entry, options)?;
        self.compress(message, compression.hub).await;
        Ok((due, compression))
    }
}

/// Fills what the message leaves open from the options.
fn apply(
    message: &mut Message,
    options: &PublishOptions,
    topic: &Topic,
    topology: &Topology,
) -> Result<()> {
    if let Some(named) = message.topic.take()
        && topology.canonical(&named) != topic.as_str()
    {
        return Err(Error::rejected(
            ErrorCode::MessageInvalid,
            format!("the message names the topic {named:?}, but it was published to {topic}; leave topic out, or publish it there"),
        )
        .on(topic.as_str())
        .with_id(message.id.as_str()));
    }
    if message.content_type.is_none() {
        message.content_type = Some(options.content_type.clone());
    }
    if message.content_encoding.is_none() {
        message
            .content_encoding
            .clone_from(&options.content_encoding);
    }
    if message.key.is_none() {
        message.key.clone_from(&options.key);
    }
    if options.partition.is_some() {
        message.partition = options.partition;
    }
    // Facts about an earlier reading, not wishes for this publish.
    message.redelivered = false;
    message.offset = None;
    Ok(())
}
