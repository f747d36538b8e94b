//! `POST /v1/stream/commit`: a client commits what it has handled.

use axum::{
    extract::{Request, State},
    http::StatusCode,
};
use futures_util::future::join_all;
use serde::Deserialize;
use tokio::sync::oneshot;

use super::{
    App,
    cursor::Cursor,
    lease,
    problem::Problem,
    stream,
    streams::{Commit, Found},
};
use crate::error::{Error, ErrorCode, Result as HubResult};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    group: String,
    cursor: String,
}

/// Commits up to the cursor. Where the stream that gave it out still runs, its
/// deliveries are acked; otherwise the group's positions are set.
pub(super) async fn commit(
    State(app): State<App>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let ask: Ask = lease::parameters(request).await?;
    stream::check_group(&ask.group)?;
    let cursor = Cursor::decode(&ask.cursor)?;
    match app.streams().find(&cursor.stream, &ask.group) {
        Found::OtherGroup(group) => Err(Problem::parameter(format!(
            "the cursor belongs to a stream of group {group:?}, not of {:?}",
            ask.group
        ))),
        Found::Ended => positions(&app, &ask.group, &cursor).await,
        Found::Live(commits) => {
            let (deliveries, held) = oneshot::channel();
            let commit = Commit {
                upto: cursor.given,
                deliveries,
            };
            // A stream that ended just now has given everything back. A commit
            // that could not be sent comes back in the error and holds the
            // other end of `held`: it is dropped before that is waited for.
            let sent = commits.send(commit).await.is_ok();
            let held = if sent { held.await.ok() } else { None };
            let Some(held) = held else {
                return positions(&app, &ask.group, &cursor).await;
            };
            let (done, answer) = oneshot::channel();
            // In a task: a client that hangs up must not turn acks into
            // redeliveries.
            app.spawn(async move {
                let results = join_all(held.into_iter().map(|d| d.ack())).await;
                let _ = done.send(results.into_iter().collect::<HubResult<()>>());
            });
            answer
                .await
                .unwrap_or_else(|_| {
                    Err(Error::new(
                        ErrorCode::AckFailed,
                        "the commit was cut short; commit again",
                    ))
                })
                .map_err(Problem::from)?;
            Ok(StatusCode::NO_CONTENT)
        }
    }
}

async fn positions(app: &App, group: &str, cursor: &Cursor) -> Result<StatusCode, Problem> {
    app.hub()
        .commit_positions(group, &cursor.positions)
        .await
        .map_err(Problem::from)?;
    Ok(StatusCode::NO_CONTENT)
}
