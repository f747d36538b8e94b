//! The streams that wait for their client's commits (`ack=cursor`), so that a
//! commit finds the deliveries that it means.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
};

use tokio::sync::{mpsc, oneshot};

use super::{limits, problem::Problem};
use crate::broker::Delivery;

/// Asks a stream for what it gave out up to `upto`, to be acked.
pub(super) struct Commit {
    /// How many messages the stream had given at the client's cursor.
    pub(super) upto: u64,
    /// Gets the deliveries.
    pub(super) deliveries: oneshot::Sender<Vec<Delivery>>,
}

/// Streams by their id.
#[derive(Default)]
pub(super) struct Streams(Mutex<HashMap<String, Open>>);

struct Open {
    group: String,
    commits: mpsc::Sender<Commit>,
}

/// Where a commit goes.
pub(super) enum Found {
    /// To this stream.
    Live(mpsc::Sender<Commit>),
    /// The stream belongs to another group.
    OtherGroup(String),
    /// The stream has ended; positions can be committed directly.
    Ended,
}

impl Streams {
    /// Enters a stream; it gets commits through the receiver.
    pub(super) fn open(&self, id: &str, group: &str) -> Result<mpsc::Receiver<Commit>, Problem> {
        let mut streams = self.lock();
        if streams.len() >= limits::MAX_STREAMS {
            return Err(Problem::http(
                axum::http::StatusCode::SERVICE_UNAVAILABLE,
                "STREAMS_FULL",
                format!(
                    "{} streams with ack=cursor are open, which is the limit",
                    limits::MAX_STREAMS
                ),
            )
            .retry_after(std::time::Duration::from_secs(1)));
        }
        let (commits, receiver) = mpsc::channel(WAITING_COMMITS);
        let open = Open {
            group: group.to_owned(),
            commits,
        };
        streams.insert(id.to_owned(), open);
        Ok(receiver)
    }

    /// Takes a stream off.
    pub(super) fn close(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Finds the stream that a cursor came from.
    pub(super) fn find(&self, id: &str, group: &str) -> Found {
        match self.lock().get(id) {
            Some(open) if open.group == group => Found::Live(open.commits.clone()),
            Some(open) => Found::OtherGroup(open.group.clone()),
            None => Found::Ended,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Commits that wait for one stream.
const WAITING_COMMITS: usize = 16;
