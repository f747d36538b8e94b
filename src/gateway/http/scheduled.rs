//! What waits for its time, over HTTP: listed, looked at, called off. Tasks are
//! scheduled by publishing them with a `scheduled_at`.

use axum::{
    Json,
    extract::{Path, Query, State},
};
use serde::Deserialize;

use super::{App, problem::Problem};
use crate::hub::schedule::{DEFAULT_PAGE, MAX_PAGE, Page, Scheduled};

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Ask {
    topic: Option<String>,
    limit: Option<usize>,
    after: Option<String>,
}

/// `GET /v1/scheduled`.
pub(super) async fn list(
    State(app): State<App>,
    ask: Result<Query<Ask>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Page>, Problem> {
    let Query(ask) = ask.map_err(|e| Problem::invalid(e.body_text()))?;
    let limit = ask.limit.unwrap_or(DEFAULT_PAGE);
    if limit == 0 || limit > MAX_PAGE {
        return Err(Problem::invalid(format!(
            "limit is {limit}; ask for 1 to {MAX_PAGE} at a time"
        )));
    }
    let after = ask.after.map(|text| text.parse()).transpose();
    let scheduler = app.hub().scheduler();
    let page = scheduler
        .list(ask.topic.as_deref(), after.map_err(Problem::from)?, limit)
        .await;
    Ok(Json(page.map_err(Problem::from)?))
}

/// `GET /v1/scheduled/{topic}/{id}`.
pub(super) async fn one(
    State(app): State<App>,
    Path((topic, id)): Path<(String, String)>,
) -> Result<Json<Scheduled>, Problem> {
    let found = app.hub().scheduler().get(&topic, &id).await;
    Ok(Json(found.map_err(Problem::from)?))
}

/// `DELETE /v1/scheduled/{topic}/{id}`: answers with what was called off.
pub(super) async fn cancel(
    State(app): State<App>,
    Path((topic, id)): Path<(String, String)>,
) -> Result<Json<Scheduled>, Problem> {
    let cancelled = app.hub().scheduler().cancel(&topic, &id).await;
    Ok(Json(cancelled.map_err(Problem::from)?))
}
