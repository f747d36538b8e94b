//! What operators and probes ask: state and its changes, health, readiness,
//! topology.

use std::{convert::Infallible, time::Duration};

use axum::{
    Json,
    extract::{Query, State},
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{Stream, stream};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::broadcast::{Receiver, error::RecvError};

use super::{App, limits, problem::Problem};
use crate::{
    hub::state::{HubState, LaneState, StateChange},
    topology::{Topology, TopologyReport},
};

/// The query of `/v1/state`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Ask {
    /// Stream the changes instead. `?watch` alone means true.
    watch: Option<String>,
}

#[derive(Serialize)]
struct Ready {
    status: &'static str,
    state: LaneState,
}

/// `GET /v1/state`.
pub(super) async fn state(
    State(app): State<App>,
    Query(ask): Query<Ask>,
) -> Result<Response, Problem> {
    match ask.watch.as_deref() {
        None | Some("false") => Ok(Json(app.hub().state()).into_response()),
        Some("" | "true") => changes(State(app)).await,
        Some(other) => Err(Problem::parameter(format!(
            "watch is {other:?}; use true or false"
        ))),
    }
}

/// `GET /v1/state/changes`: an event `state` with the whole state, then one
/// event `change` for each change. A client that falls behind gets the whole
/// state again.
pub(super) async fn changes(State(app): State<App>) -> Result<Response, Problem> {
    if app.closing().is_cancelled() {
        return Err(Problem::shutting_down());
    }
    // First the subscription, then the snapshot: a change between the two is
    // told twice rather than not at all.
    let receiver = app.hub().state_changes();
    let events = events(app, receiver);
    Ok(Sse::new(events)
        .keep_alive(KeepAlive::new().interval(limits::HEARTBEAT))
        .into_response())
}

fn events(
    app: App,
    receiver: Receiver<StateChange>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(
        (app, receiver, true),
        |(app, mut receiver, first)| async move {
            let event = if first {
                snapshot(&app)
            } else {
                let change = tokio::select! {
                    change = receiver.recv() => change,
                    () = app.closing().cancelled() => return None,
                };
                match change {
                    Ok(change) => named("change", &change),
                    Err(RecvError::Lagged(_)) => snapshot(&app),
                    Err(RecvError::Closed) => return None,
                }
            };
            Some((Ok(event), (app, receiver, false)))
        },
    )
}

fn snapshot(app: &App) -> Event {
    named("state", &app.hub().state())
}

fn named(name: &str, data: &impl Serialize) -> Event {
    // Plain data always has a JSON form.
    Event::default()
        .event(name)
        .data(serde_json::to_string(data).unwrap_or_default())
}

/// `GET /healthz`: 200 while the process serves.
pub(super) async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: 200 while publishes are accepted, else 503.
pub(super) async fn ready(State(app): State<App>) -> Response {
    let accepting = !app.closing().is_cancelled() && app.hub().is_accepting();
    let state = worst(&app.hub().state());
    let (code, status) = if accepting {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not_ready")
    };
    (code, Json(Ready { status, state })).into_response()
}

/// `GET /v1/health`: asks every broker by a round trip.
pub(super) async fn health(State(app): State<App>) -> Response {
    let found = app.hub().health_check().await;
    let healthy = found.values().all(Result::is_ok);
    let brokers: serde_json::Map<String, Value> = found
        .into_iter()
        .map(|(broker, result)| {
            let value = match result {
                Ok(()) => json!({"healthy": true}),
                Err(why) => json!({"healthy": false, "reason": why}),
            };
            (broker.as_str().to_owned(), value)
        })
        .collect();
    let accepting = !app.closing().is_cancelled() && app.hub().is_accepting();
    Json(json!({
        "accepting": accepting,
        "healthy": healthy,
        "state": worst(&app.hub().state()),
        "brokers": brokers,
    }))
    .into_response()
}

/// `GET /v1/topology`: what exists and what does not.
pub(super) async fn topology(State(app): State<App>) -> Result<Json<TopologyReport>, Problem> {
    look(&app, false).await
}

/// `POST /v1/topology/apply`: makes what is missing.
pub(super) async fn apply(State(app): State<App>) -> Result<Json<TopologyReport>, Problem> {
    let _intake = app.enter()?;
    look(&app, true).await
}

/// `GET /v1/topology/wanted`: what should exist.
pub(super) async fn wanted(State(app): State<App>) -> Json<Topology> {
    Json(app.topology().clone())
}

async fn look(app: &App, apply: bool) -> Result<Json<TopologyReport>, Problem> {
    let report = app.hub().topology_within(apply, LOOK_TIMEOUT).await;
    Ok(Json(report.map_err(Problem::from)?))
}

fn worst(state: &HubState) -> LaneState {
    state
        .routes
        .iter()
        .map(|r| r.state)
        .max()
        .unwrap_or_default()
}

/// How long a look at the brokers may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);
