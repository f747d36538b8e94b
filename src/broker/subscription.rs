//! A running subscription.

use std::{fmt, sync::Arc};

use tokio::{sync::Mutex, task::JoinHandle};

use super::ConsumerControl;
use crate::topic::Pattern;

/// A running subscription. Dropping the last clone stops it, unobserved; use
/// [`Subscription::unsubscribe`] to wait until nothing of it is left.
#[derive(Clone)]
pub struct Subscription(Arc<Inner>);

struct Inner {
    id: String,
    topic: Pattern,
    controls: Vec<ConsumerControl>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Subscription {
    /// A subscription over consumers and the tasks that dispatch from them.
    #[must_use]
    pub fn new(
        id: String,
        topic: Pattern,
        controls: Vec<ConsumerControl>,
        tasks: Vec<JoinHandle<()>>,
    ) -> Self {
        Self(Arc::new(Inner {
            id,
            topic,
            controls,
            tasks: Mutex::new(tasks),
        }))
    }

    /// Its id, unique in this process (RabbitMQ: the consumer tag).
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// What it was subscribed to.
    #[must_use]
    pub fn topic(&self) -> &Pattern {
        &self.0.topic
    }

    /// Whether every source of it has the subscription now.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.0.controls.iter().all(ConsumerControl::is_active)
    }

    /// Waits until every source has the subscription; false when one never
    /// will.
    pub async fn active(&self) -> bool {
        for control in &self.0.controls {
            if !control.active().await {
                return false;
            }
        }
        true
    }

    /// Stops handing out, lets running handlers finish and settles their
    /// messages, gives back the rest. Idempotent.
    ///
    /// # Cancel safety
    /// Stopping goes on when the future is dropped; only the waiting ends.
    pub async fn unsubscribe(&self) {
        for control in &self.0.controls {
            control.begin_stop();
        }
        let mut tasks = self.0.tasks.lock().await;
        while let Some(task) = tasks.last_mut() {
            // A dispatcher that panicked has ended too.
            let _ = task.await;
            tasks.pop();
        }
        drop(tasks);
        for control in &self.0.controls {
            control.stop().await;
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for control in &self.controls {
            control.begin_stop();
        }
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("id", &self.0.id)
            .field("topic", &self.0.topic)
            .field("controls", &self.0.controls)
            .finish()
    }
}
