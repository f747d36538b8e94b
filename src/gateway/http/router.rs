//! Which path is whose.

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, header},
    middleware::from_fn_with_state,
    response::{Html, IntoResponse},
    routing::{get, post},
};

use super::{
    App, commit, dead_letters, guard, lease, metrics, problem::Problem, publish, replays,
    scheduled, spool, state, stream,
};

/// Every path, behind the guard.
pub(super) fn router(app: &App) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/openapi.json", get(openapi))
        .route("/healthz", get(state::healthz))
        .route("/ready", get(state::ready))
        .route("/metrics", get(metrics::prometheus))
        .route("/v1/metrics", get(metrics::json))
        .route("/v1/health", get(state::health))
        .route("/v1/state", get(state::state))
        .route("/v1/state/changes", get(state::changes))
        .route("/v1/spool", get(spool::list))
        .route("/v1/spool/pause", post(spool::pause))
        .route("/v1/spool/resume", post(spool::resume))
        .route("/v1/spool/export", get(spool::export))
        .route("/v1/spool/adopt", post(spool::adopt))
        .route("/v1/replays", get(replays::list).post(replays::start))
        .route("/v1/replays/{id}", get(replays::one))
        .route("/v1/replays/{id}/cancel", post(replays::cancel))
        .route("/v1/scheduled", get(scheduled::list))
        .route(
            "/v1/scheduled/{topic}/{id}",
            get(scheduled::one).delete(scheduled::cancel),
        )
        .route("/v1/dead-letters", get(dead_letters::list))
        .route(
            "/v1/dead-letters/reprocess",
            post(dead_letters::reprocess_all),
        )
        .route("/v1/dead-letters/purge", post(dead_letters::purge))
        .route("/v1/dead-letters/{id}", get(dead_letters::show))
        .route(
            "/v1/dead-letters/{id}/reprocess",
            post(dead_letters::reprocess),
        )
        .route("/v1/dead-letters/{id}/edit", post(dead_letters::edit))
        .route("/v1/dead-letters/{id}/discard", post(dead_letters::discard))
        .route("/v1/topology", get(state::topology))
        .route("/v1/topology/apply", post(state::apply))
        .route("/v1/topology/wanted", get(state::wanted))
        .route("/v1/topics/{topic}/messages", post(publish::publish))
        .route("/v1/stream", get(stream::stream))
        .route("/v1/stream/commit", post(commit::commit))
        .route("/v1/queues/{queue}/lease", post(lease::lease))
        .route("/v1/deliveries/ack", post(lease::ack_many))
        .route("/v1/deliveries/{token}/ack", post(lease::ack))
        .route("/v1/deliveries/{token}/nack", post(lease::nack))
        .route("/v1/deliveries/{token}/extend", post(lease::extend))
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .layer(from_fn_with_state(app.clone(), guard::guard))
        .with_state(app.clone())
}

async fn unknown(request: Request) -> Problem {
    Problem::http(
        StatusCode::NOT_FOUND,
        "NOT_FOUND",
        format!(
            "there is nothing at {}; /openapi.json lists what there is",
            request.uri().path()
        ),
    )
}

async fn not_allowed(request: Request) -> Problem {
    Problem::http(
        StatusCode::METHOD_NOT_ALLOWED,
        "METHOD_NOT_ALLOWED",
        format!(
            "{} is not done at {}; the header Allow says what is",
            request.method(),
            request.uri().path()
        ),
    )
}

async fn page() -> impl IntoResponse {
    (
        [(
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
        )],
        Html(include_str!("page.html")),
    )
}

async fn openapi() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/json")],
        include_str!("openapi.json"),
    )
}
