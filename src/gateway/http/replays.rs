//! Replays over HTTP: start, look, cancel. It only asks the hub; a client that
//! goes away changes nothing.

use axum::{
    Json,
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::{App, lease::parameters, problem::Problem};
use crate::{
    hub::MessagingHub,
    replay::{Replay, ReplayRequest},
};

#[derive(Serialize)]
pub(super) struct List {
    replays: Vec<Replay>,
    active: usize,
    max_active: usize,
}

/// `POST /v1/replays`: answers when it is known what there is to be replayed.
pub(super) async fn start(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let _intake = app.enter()?;
    let ask: ReplayRequest = parameters(request).await?;
    let replay = app.hub().start_replay(ask).await.map_err(Problem::from)?;
    // An id has only characters that need no escape.
    let place = format!("/v1/replays/{}", replay.id);
    Ok((
        StatusCode::ACCEPTED,
        [(header::LOCATION, place)],
        Json(replay),
    )
        .into_response())
}

/// `GET /v1/replays`.
pub(super) async fn list(State(app): State<App>) -> Json<List> {
    Json(List {
        replays: app.hub().replays(),
        active: app.hub().active_replays(),
        max_active: MessagingHub::MAX_REPLAYS,
    })
}

/// `GET /v1/replays/{id}`.
pub(super) async fn one(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<Replay>, Problem> {
    Ok(Json(app.hub().replay(&id).map_err(Problem::from)?))
}

/// `POST /v1/replays/{id}/cancel`.
pub(super) async fn cancel(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<Replay>, Problem> {
    let cancelled = app.hub().cancel_replay(&id).await;
    Ok(Json(cancelled.map_err(Problem::from)?))
}
