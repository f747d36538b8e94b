//! Whose doing a fence is: another consumer's that came with our
//! `group.instance.id`, which ends this one, or the broker's that forgot who had it.
//!
//! A static member that comes back is given a member id of its own, and a Kafka that
//! is killed within the next second or two may have lost it (seen with 4.1): once it
//! is back it fences the only consumer there is, for good, as the client library has
//! it. So a fence that comes right after the brokers did is answered by joining anew.
//! Where there are two of an id after all, this takes it back, once; the other is
//! fenced while its brokers are there, and ends.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    config::FromClientConfigAndContext,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::KafkaError,
    types::RDKafkaErrorCode as Code,
};

use super::subscribed;
use crate::{
    adapter::kafka::{error::raw_code, link::Link},
    topic::Pattern,
};

/// What one member knows of it.
#[derive(Debug)]
pub(in crate::adapter::kafka) struct Fence {
    /// When the group had us last.
    joined: Mutex<Option<Instant>>,
    /// A member that the broker remembers hears of a fence within this.
    session: Duration,
}

impl Fence {
    pub(in crate::adapter::kafka) fn new(session: Duration) -> Self {
        Self {
            joined: Mutex::default(),
            session,
        }
    }

    /// Partitions were assigned, none included.
    pub(in crate::adapter::kafka) fn joined(&self) {
        *self.lock() = Some(Instant::now());
    }

    /// Whether an error is a fence, and of the broker's own making.
    pub(in crate::adapter::kafka) fn is_forgotten(&self, error: &KafkaError, link: &Link) -> bool {
        let fenced = matches!(error, KafkaError::MessageConsumptionFatal(_))
            && raw_code(error) == Some(Code::FencedInstanceId);
        fenced && forgotten(*self.lock(), link.up_since(), Instant::now(), self.session)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        // A time is whole whenever the lock is free.
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client in the place of one that was fenced, and is of no use any more. It is given
/// nothing before it is polled.
///
/// # Errors
/// Why there is none.
pub(in crate::adapter::kafka) fn join_anew<C: ConsumerContext>(
    settings: &ClientConfig,
    pattern: &Pattern,
    context: C,
    fence: &KafkaError,
) -> Result<BaseConsumer<C>, String> {
    tracing::warn!(target: "messaging_hub::kafka", %pattern, error = %fence,
        "fenced right after the brokers came back, which had forgotten this member: it joins again");
    let joined = BaseConsumer::from_config_and_context(settings, context)
        .and_then(|client| client.subscribe(&[&subscribed(pattern)]).map(|()| client));
    joined.map_err(|e| format!("joining again: {e}"))
}

fn forgotten(
    joined: Option<Instant>,
    up_since: Option<Instant>,
    now: Instant,
    session: Duration,
) -> bool {
    // Without a first join it is another's: nothing of ours could be forgotten.
    joined.is_some_and(|joined| {
        up_since.is_none_or(|up| joined < up && now.saturating_duration_since(up) < session)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_right_after_the_brokers_came_back_is_theirs_and_any_other_is_anothers() {
        let (start, session) = (Instant::now(), Duration::from_secs(45));
        let at = |s| start + Duration::from_secs(s);
        let ask = |joined: Option<u64>, up: Option<u64>, now| {
            forgotten(joined.map(at), up.map(at), at(now), session)
        };
        assert!(ask(Some(1), Some(10), 11), "the first thing that is heard");
        assert!(ask(Some(1), None, 11), "before the link knows");
        assert!(!ask(Some(1), Some(0), 11), "nothing was away");
        assert!(!ask(Some(12), Some(10), 13), "joined since");
        assert!(!ask(Some(1), Some(10), 55), "remembered until now");
        assert!(!ask(None, Some(10), 11), "never was a member");
        assert!(!ask(None, None, 11));
    }
}
