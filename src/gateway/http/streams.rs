//! The streams of groups that are open: a commit (`ack=cursor`) finds the deliveries
//! that it means, and a client that resumes ends the stream that it lost.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

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
    /// The stream that it resumes.
    resumes: Option<String>,
    /// With `ack=cursor`.
    commits: Option<mpsc::Sender<Commit>>,
    /// Asks it to end.
    ending: CancellationToken,
    /// Cancelled once its consumer has left its group.
    over: CancellationToken,
}

/// What a stream has of its entry.
#[derive(Default)]
pub(super) struct Entered {
    /// With `ack=cursor`.
    pub(super) commits: Option<mpsc::Receiver<Commit>>,
    /// Cancelled when it has to end.
    pub(super) ending: CancellationToken,
    /// The streams that it takes the place of: each is cancelled once its consumer has
    /// left the group.
    pub(super) replaced: Vec<CancellationToken>,
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
    /// Enters a stream; one that commits gets its client's through the receiver. It
    /// ends the stream that it resumes, and whatever else resumed that: a client that
    /// comes back with the same cursor has got nothing from those.
    pub(super) fn open(
        &self,
        id: &str,
        group: &str,
        resumes: Option<String>,
        commits: bool,
    ) -> Result<Entered, Problem> {
        let mut streams = self.lock();
        if commits
            && streams.values().filter(|s| s.commits.is_some()).count() >= limits::MAX_STREAMS
        {
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
        let (commits, receiver) = match commits {
            true => Some(mpsc::channel(WAITING_COMMITS)).unzip(),
            false => (None, None),
        };
        let lost = resumes.as_deref().unwrap_or_default();
        let replaced = streams
            .iter()
            .filter(|_| !lost.is_empty())
            .filter(|(id, s)| {
                s.group == group && (*id == lost || s.resumes.as_deref() == Some(lost))
            })
            .map(|(_, s)| {
                s.ending.cancel();
                s.over.clone()
            })
            .collect();
        let ending = CancellationToken::new();
        let open = Open {
            group: group.to_owned(),
            resumes,
            commits,
            ending: ending.clone(),
            over: CancellationToken::new(),
        };
        streams.insert(id.to_owned(), open);
        Ok(Entered {
            commits: receiver,
            ending,
            replaced,
        })
    }

    /// Takes a stream off, whose consumer has ended.
    pub(super) fn close(&self, id: &str) {
        if let Some(open) = self.lock().remove(id) {
            open.over.cancel();
        }
    }

    /// Finds the stream that a cursor came from.
    pub(super) fn find(&self, id: &str, group: &str) -> Found {
        match self.lock().get(id) {
            Some(Open {
                group: of,
                commits: Some(commits),
                ..
            }) => match of == group {
                true => Found::Live(commits.clone()),
                false => Found::OtherGroup(of.clone()),
            },
            // One with `ack=auto` commits by itself, and has no say in it.
            Some(_) | None => Found::Ended,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        // Nothing under this lock can panic half-way, so a poisoned one is whole.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Commits that wait for one stream.
const WAITING_COMMITS: usize = 16;
