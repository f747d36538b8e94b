//! A consumer read one delivery at a time, with deadlines.

use std::{collections::VecDeque, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::Failure;
use crate::broker::{Consumer, ConsumerControl, Delivery};

/// Reads a [`Consumer`].
#[derive(Debug)]
pub struct Reader {
    consumer: Consumer,
    waiting: VecDeque<Delivery>,
}

impl Reader {
    /// How long a delivery that must come may take; generous, because a group
    /// may have to be rebalanced first.
    pub const PATIENCE: Duration = Duration::from_secs(20);

    /// How long nothing must come before a check believes that nothing will.
    /// Absence has no signal to wait for; this is well above what any backend
    /// takes to hand out a message that it is going to hand out.
    pub const QUIET: Duration = Duration::from_millis(700);

    /// Wraps a consumer.
    #[must_use]
    pub fn new(consumer: Consumer) -> Self {
        Self {
            consumer,
            waiting: VecDeque::new(),
        }
    }

    /// The consumer's control.
    #[must_use]
    pub fn control(&self) -> &ConsumerControl {
        &self.consumer.control
    }

    /// Waits until the backend has the subscription.
    ///
    /// # Errors
    /// When it never will, or not in time.
    pub async fn active(&self) -> Result<(), Failure> {
        match tokio::time::timeout(Self::PATIENCE, self.consumer.control.active()).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failure::new(format!(
                "expected an active consumer, it failed: {:?}",
                self.consumer.control.failure()
            ))),
            Err(_) => Err(Failure::new(format!(
                "expected an active consumer within {:?}",
                Self::PATIENCE
            ))),
        }
    }

    /// The next delivery, or none when the consumer has ended.
    ///
    /// # Errors
    /// When none comes by `deadline`.
    pub async fn poll(&mut self, deadline: Instant) -> Result<Option<Delivery>, Elapsed> {
        loop {
            if let Some(delivery) = self.waiting.pop_front() {
                return Ok(Some(delivery));
            }
            match timeout_at(deadline, self.consumer.deliveries.recv()).await {
                Ok(Some(batch)) => self.waiting.extend(batch),
                Ok(None) => return Ok(None),
                Err(_) => return Err(Elapsed),
            }
        }
    }

    /// The next delivery, however long it takes; none when the consumer ended.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next_without_deadline(&mut self) -> Option<Delivery> {
        loop {
            if let Some(delivery) = self.waiting.pop_front() {
                return Some(delivery);
            }
            self.waiting.extend(self.consumer.deliveries.recv().await?);
        }
    }

    /// The next delivery.
    ///
    /// # Errors
    /// When none comes.
    pub async fn next(&mut self) -> Result<Delivery, Failure> {
        match self.poll(Instant::now() + Self::PATIENCE).await {
            Ok(Some(delivery)) => Ok(delivery),
            Ok(None) => Err(Failure::new(format!(
                "expected a delivery, the consumer ended: {:?}",
                self.consumer.control.failure()
            ))),
            Err(Elapsed) => Err(Failure::new(format!(
                "expected a delivery within {:?}, none came",
                Self::PATIENCE
            ))),
        }
    }

    /// The next `count` deliveries, unsettled.
    ///
    /// # Errors
    /// When fewer come.
    pub async fn take(&mut self, count: usize) -> Result<Vec<Delivery>, Failure> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let next = self.next().await;
            taken.push(
                next.map_err(|e| {
                    e.during(&format!("after {} of {count} deliveries", taken.len()))
                })?,
            );
        }
        Ok(taken)
    }

    /// Expects that nothing comes.
    ///
    /// # Errors
    /// Names what came.
    pub async fn expect_quiet(&mut self) -> Result<(), Failure> {
        match self.poll(Instant::now() + Self::QUIET).await {
            Ok(Some(delivery)) => Err(Failure::new(format!(
                "expected nothing more, message {} came (redelivered: {})",
                delivery.message.id, delivery.message.redelivered
            ))),
            Ok(None) | Err(Elapsed) => Ok(()),
        }
    }

    /// Everything that comes until nothing comes any more, unsettled.
    pub async fn take_until_quiet(&mut self) -> Vec<Delivery> {
        let mut taken = Vec::new();
        while let Ok(Some(delivery)) = self.poll(Instant::now() + Self::QUIET).await {
            taken.push(delivery);
        }
        taken
    }

    /// The same, of a reader to which something must come.
    ///
    /// # Errors
    /// When nothing comes.
    pub async fn take_some_until_quiet(&mut self) -> Result<Vec<Delivery>, Failure> {
        let mut taken = vec![self.next().await?];
        taken.extend(self.take_until_quiet().await);
        Ok(taken)
    }

    /// Gives back what is unsettled here and stops.
    ///
    /// # Errors
    /// When the consumer does not stop in time.
    pub async fn stop(mut self) -> Result<(), Failure> {
        self.consumer.control.begin_stop();
        self.waiting.clear();
        let stopping = async {
            while self.consumer.deliveries.recv().await.is_some() {}
            self.consumer.control.stop().await;
        };
        let stopped = tokio::time::timeout(Self::PATIENCE, stopping).await;
        stopped.map_err(|_| {
            Failure::new(format!(
                "expected the consumer to stop within {:?}",
                Self::PATIENCE
            ))
        })
    }
}

/// Nothing came in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

/// Acks deliveries together, since a backend may settle in batches.
pub(crate) async fn ack_all(deliveries: impl IntoIterator<Item = Delivery>) -> Result<(), Failure> {
    for result in join_all(deliveries.into_iter().map(Delivery::ack)).await {
        result?;
    }
    Ok(())
}
