//! Confirmed publishes on the side: retries and dead letters, whose originals
//! are acked only when the copy is safe. One task for the whole broker; a lane
//! for each place, so that a place that is missing stops only its own.

use std::{collections::HashMap, sync::Arc, time::Duration};

use lapin::types::ShortString;
use tokio::sync::{mpsc, oneshot};

use super::{error, lane::Target, publisher, shared::Shared};
use crate::{
    broker::{BrokerType, Confirmation, Fate, OrderKey, Submission},
    error::{Error, ErrorCode, Result},
    message::{Message, wire::Marks},
};

/// Sends single messages with a confirm.
#[derive(Clone)]
pub(super) struct Courier(mpsc::Sender<Job>);

/// A message and where it goes.
pub(super) struct Job {
    pub(super) exchange: String,
    pub(super) key: String,
    /// Goes into the header that names the topic.
    pub(super) topic: Arc<str>,
    pub(super) message: Arc<Message>,
    pub(super) marks: Marks,
    /// Whether the message's expiration holds there.
    pub(super) expires: bool,
    answer: Option<oneshot::Sender<Result<()>>>,
}

impl Job {
    pub(super) fn new(
        address: (String, String),
        topic: Arc<str>,
        message: Message,
        marks: Marks,
        expires: bool,
    ) -> Self {
        Self {
            exchange: address.0,
            key: address.1,
            topic,
            message: Arc::new(message),
            marks,
            expires,
            answer: None,
        }
    }
}

impl Courier {
    /// A courier, and the end that its task takes.
    pub(super) fn new() -> (Self, mpsc::Receiver<Job>) {
        let (jobs, queue) = mpsc::channel(WINDOW);
        (Self(jobs), queue)
    }

    /// Publishes and waits for the confirm.
    ///
    /// # Errors
    /// As a lane's confirmation.
    pub(super) async fn send(&self, mut job: Job) -> Result<()> {
        let (answer, outcome) = oneshot::channel();
        job.answer = Some(answer);
        self.0.send(job).await.map_err(|_| error::closed())?;
        outcome.await.map_err(|_| error::closed())?
    }
}

/// The courier's task; ends when the broker is closed.
pub(super) async fn run(shared: Arc<Shared>, mut jobs: mpsc::Receiver<Job>) {
    let (confirm, mut confirmations) = mpsc::channel(WINDOW);
    let mut lanes = HashMap::new();
    let mut pending: HashMap<u64, oneshot::Sender<Result<()>>> = HashMap::new();
    let mut token = 0;
    loop {
        tokio::select! {
            () = shared.closing.cancelled() => return,
            Some(Confirmation { token, fate }) = confirmations.recv() => {
                if let Some(answer) = pending.remove(&token) {
                    let _ = answer.send(outcome(fate));
                }
            }
            Some(mut job) = jobs.recv(), if pending.len() < WINDOW => {
                let Some(answer) = job.answer.take() else { continue };
                token += 1;
                match submit(&shared, &mut lanes, &confirm, token, job).await {
                    Ok(()) => {
                        pending.insert(token, answer);
                    }
                    Err(e) => {
                        let _ = answer.send(Err(e));
                    }
                }
            }
        }
    }
}

/// Where a lane leads, and what it writes on each message.
#[derive(PartialEq, Eq, Hash)]
struct Place {
    exchange: String,
    key: String,
    expires: bool,
    /// Goes into `hub-topic`: the dead letters of several queues lie in one.
    topic: Arc<str>,
}

async fn submit(
    shared: &Arc<Shared>,
    lanes: &mut HashMap<Place, mpsc::Sender<Vec<Submission>>>,
    confirm: &mpsc::Sender<Confirmation>,
    token: u64,
    job: Job,
) -> Result<()> {
    let place = Place {
        exchange: job.exchange,
        key: job.key,
        expires: job.expires,
        topic: job.topic,
    };
    let mut batch = vec![Submission {
        token,
        message: job.message,
        order: OrderKey::Publisher(0),
        marks: job.marks,
        confirm: true,
    }];
    if let Some(lane) = lanes.get(&place) {
        match lane.send(batch).await {
            Ok(()) => return Ok(()),
            // That generation has ended; the next lane takes it.
            Err(returned) => batch = returned.0,
        }
    }
    let long = |_| {
        Error::rejected(
            ErrorCode::InvalidConfig,
            "an exchange or queue name is longer than 255 bytes",
        )
        .at(BrokerType::RabbitMq)
    };
    let target = Target {
        topic: place.topic.clone(),
        exchange: ShortString::try_new(place.exchange.as_str()).map_err(long)?,
        key: ShortString::try_new(place.key.as_str()).map_err(long)?,
        mandatory: true,
        confirm: true,
        expires: place.expires,
        window: WINDOW,
    };
    let (lane, submissions) = mpsc::channel(WINDOW);
    publisher::open(shared, target, OPEN, submissions, confirm.clone()).await?;
    // Bounded room was made for more than one batch.
    lane.send(batch)
        .await
        .map_err(|_| error::unavailable(None))?;
    if lanes.len() >= MOST_LANES {
        // A lane whose sender is gone finishes what it has and closes.
        lanes.clear();
    }
    lanes.insert(place, lane);
    Ok(())
}

fn outcome(fate: Fate) -> Result<()> {
    match fate {
        Fate::Confirmed(_) => Ok(()),
        Fate::Refused(e) | Fate::Overloaded(e) | Fate::Unknown(e) | Fate::Unsent(e) => Err(e),
    }
}

/// Messages on their way at most.
const WINDOW: usize = 1024;
/// Places that have a channel at once, at most.
const MOST_LANES: usize = 64;
/// How long opening a channel may take.
const OPEN: Duration = Duration::from_secs(10);
