//! Looking on from the side while the broker is away and comes back: a bare
//! client that tries to publish, and the hub's spool as it fills and empties.

use std::time::{Duration, Instant};

use tokio::{task::JoinHandle, time::timeout};

use super::super::baseline::amqp::Amqp;
use crate::{
    cli::Failure,
    hub::{MessagingHub, operator::SpoolFilter, state::LaneState},
};

/// What the hub's spool did, by its own account.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SpoolSeen {
    /// It held that much when the drain began.
    pub(super) held: u64,
    pub(super) most: u64,
    pub(super) draining: Option<Instant>,
    /// The first time that it held less than the moment before.
    pub(super) first: Option<Instant>,
    pub(super) empty: Option<Instant>,
}

/// Watches the spool from when the broker is given back until it is empty.
pub(super) fn spool(hub: MessagingHub) -> JoinHandle<SpoolSeen> {
    tokio::spawn(async move {
        let mut seen = SpoolSeen::default();
        let mut last = 0;
        loop {
            let list = hub.spool(&SpoolFilter::default(), 1);
            let now = Instant::now();
            let held = list.total.messages;
            let state = list.lanes.first().map(|lane| lane.state);
            seen.most = seen.most.max(held);
            if seen.draining.is_none() && state.is_none_or(|s| s <= LaneState::Draining) {
                seen.draining = Some(now);
                seen.held = last.max(held);
            }
            if seen.draining.is_some() {
                if seen.first.is_none() && held < last {
                    seen.first = Some(now);
                }
                if held == 0 {
                    seen.first.get_or_insert(now);
                    seen.empty = Some(now);
                    return seen;
                }
            }
            last = held;
            tokio::time::sleep(LOOK).await;
        }
    })
}

/// Tries as a bare client until a message is confirmed; when that was.
pub(super) async fn probe(url: &str, queue: &str) -> Result<Instant, Failure> {
    let until = Instant::now() + PATIENCE;
    loop {
        let attempt = async { Amqp::connect(url).await?.probe(queue).await };
        match timeout(ATTEMPT, attempt).await {
            Ok(Ok(())) => return Ok(Instant::now()),
            Ok(Err(e)) if Instant::now() >= until => {
                return Err(Failure::new(format!(
                    "RabbitMQ did not come back within {} s: {}",
                    PATIENCE.as_secs(),
                    e.message
                )));
            }
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// From one look to the next.
const LOOK: Duration = Duration::from_millis(5);
/// How long one try of the bare client may take: a broker that starts accepts
/// before it answers.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long a broker may take to start.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);
