//! Work queues over HTTP: lease, then ack, nack or extend by token.

use std::time::Duration;

use axum::{
    Json,
    extract::{Path, Request, State},
    http::StatusCode,
};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{App, envelope, limits, problem::Problem};
use crate::{
    broker::Verdict,
    config::RouteKind,
    error::{Error, ErrorCode},
    message::{Message, Timestamp, wire::Failure},
    topic::Pattern,
};

/// What a lease asks for.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Ask {
    /// Deliveries at most. Default 1.
    max: usize,
    /// How long to wait for a first one, in milliseconds. Default 0.
    wait_ms: u64,
    /// How long the lease lasts, in milliseconds. Default 30 s.
    lease_ms: Option<u64>,
}

impl Default for Ask {
    fn default() -> Self {
        Self {
            max: 1,
            wait_ms: 0,
            lease_ms: None,
        }
    }
}

#[derive(Serialize)]
pub(super) struct Leased {
    deliveries: Vec<Item>,
}

#[derive(Serialize)]
struct Item {
    token: String,
    expires_at: Timestamp,
    message: Message,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Nack {
    retry: Retry,
    reason: Option<String>,
}

/// What becomes of a nacked message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Retry {
    /// After the route's delay, with its attempt counted; to the dead letters
    /// when that was the last.
    #[default]
    Later,
    /// At once, as it is.
    Now,
    /// To the dead letters.
    Never,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Extend {
    lease_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    tokens: Vec<String>,
}

/// `POST /v1/queues/{queue}/lease`.
pub(super) async fn lease(
    State(app): State<App>,
    Path(queue): Path<String>,
    request: Request,
) -> Result<Json<Leased>, Problem> {
    let _intake = app.enter()?;
    let ask: Ask = parameters(request).await?;
    if ask.max == 0 {
        return Err(Problem::parameter("max is 0; ask for at least one delivery").on(&queue));
    }
    let wait = Duration::from_millis(ask.wait_ms);
    if wait > limits::MAX_LEASE_WAIT {
        return Err(Problem::parameter(format!(
            "wait_ms is {}, at most {} is allowed; ask again instead",
            ask.wait_ms,
            limits::MAX_LEASE_WAIT.as_millis()
        ))
        .on(&queue));
    }
    let lasting = lease_time(ask.lease_ms)?;
    known(&app, &queue).await?;
    // `max` is a most, so a smaller one is within it.
    let mut room = app.leases().reserve(ask.max.min(limits::MAX_LEASE_BATCH))?;
    let taken = tokio::select! {
        taken = app.hub().lease(&queue, room.size, wait.max(limits::MIN_LEASE_WAIT)) => {
            taken.map_err(|e| Problem::from(e).on(&queue))?
        }
        () = app.closing().cancelled() => Vec::new(),
    };
    let expires_at = Timestamp::now() + lasting;
    let mut deliveries = Vec::with_capacity(taken.len());
    for delivery in taken {
        let message = delivery.received().message.as_ref().clone();
        app.hub().count_consumed(&message);
        let token = app.leases().grant(&mut room, delivery, lasting)?;
        deliveries.push(Item {
            token,
            expires_at,
            message,
        });
    }
    Ok(Json(Leased { deliveries }))
}

/// `POST /v1/deliveries/{token}/ack`.
pub(super) async fn ack(
    State(app): State<App>,
    Path(token): Path<String>,
) -> Result<StatusCode, Problem> {
    settle(&app, &token, |_| Verdict::Ack).await
}

/// `POST /v1/deliveries/{token}/nack`.
pub(super) async fn nack(
    State(app): State<App>,
    Path(token): Path<String>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let nack: Nack = parameters(request).await?;
    let reason = nack.reason.unwrap_or_default();
    settle(&app, &token, |received| {
        // What its client says is the reason, and whole in the details.
        let why = if reason.is_empty() { "nacked" } else { &reason };
        let failure = Failure::now(
            why,
            reason.as_str(),
            &received.topic,
            received.marks.failure.as_deref(),
        );
        match nack.retry {
            Retry::Now => Verdict::Requeue,
            Retry::Later if received.message.can_retry() => Verdict::Retry {
                delay: app
                    .hub()
                    .task_delays(&received.topic)
                    .after(received.message.retry_count),
                failure,
            },
            Retry::Later | Retry::Never => Verdict::DeadLetter { failure },
        }
    })
    .await
}

/// `POST /v1/deliveries/{token}/extend`.
pub(super) async fn extend(
    State(app): State<App>,
    Path(token): Path<String>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let extend: Extend = parameters(request).await?;
    app.leases().extend(&token, lease_time(extend.lease_ms)?)?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/deliveries/ack`: many at once. 204 when all were acked; otherwise
/// 410, with the tokens that were not in the problem's text; the others were.
pub(super) async fn ack_many(
    State(app): State<App>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let Tokens { tokens } = parameters(request).await?;
    if tokens.len() > limits::MAX_ACK_BATCH {
        return Err(Problem::parameter(format!(
            "{} tokens are too many at once, at most {} are taken",
            tokens.len(),
            limits::MAX_ACK_BATCH
        )));
    }
    let results = join_all(
        tokens
            .iter()
            .map(|token| settle(&app, token, |_| Verdict::Ack)),
    )
    .await;
    let failed: Vec<_> = tokens
        .iter()
        .zip(results)
        .filter_map(|(token, result)| result.err().map(|problem| (token.as_str(), problem)))
        .collect();
    match failed.as_slice() {
        [] => Ok(StatusCode::NO_CONTENT),
        [(_, first), ..] => {
            let names: Vec<_> = failed.iter().map(|(token, _)| *token).collect();
            Err(Problem::gone(format!(
                "{} of {} were not acked, the others were: {} ({first})",
                failed.len(),
                tokens.len(),
                names.join(", ")
            )))
        }
    }
}

/// A queue that does not exist is an answer of its own, also where publishing
/// to it would make it. While its broker cannot be asked, the lease decides.
async fn known(app: &App, queue: &str) -> Result<(), Problem> {
    let pattern = Pattern::new(queue).map_err(|e| Problem::from(e).on(queue))?;
    if app.hub().kind_of_pattern(&pattern) == RouteKind::Event {
        return Err(Error::rejected(
            ErrorCode::QueueNotFound,
            format!(
                "{queue} is no work queue but a stream; read it with GET /v1/stream?pattern={queue}"
            ),
        )
        .on(queue)
        .into());
    }
    if pattern.literal().is_none() {
        // Of the queues that it covers some may be made yet.
        return Ok(());
    }
    match app.hub().queue_stats(queue).await {
        Err(e)
            if matches!(
                e.code(),
                ErrorCode::QueueNotFound | ErrorCode::MessageInvalid
            ) =>
        {
            Err(Problem::from(e).on(queue))
        }
        _ => Ok(()),
    }
}

async fn settle(
    app: &App,
    token: &str,
    verdict: impl FnOnce(&crate::broker::Received) -> Verdict,
) -> Result<StatusCode, Problem> {
    let delivery = app.leases().take(token)?;
    let verdict = verdict(delivery.received());
    let id = delivery.received().message.id.clone();
    let recorder = app.hub().recorder();
    let counter = match &verdict {
        Verdict::Ack => Some(&recorder.messages_processed),
        Verdict::Requeue => None,
        Verdict::Retry { .. } => Some(&recorder.messages_retried),
        Verdict::DeadLetter { .. } => Some(&recorder.messages_dead_lettered),
    };
    match delivery.settle(verdict).await {
        Ok(()) => {
            if let Some(counter) = counter {
                counter.inc();
            }
            Ok(StatusCode::NO_CONTENT)
        }
        // The connection that delivered it is gone, and the lease with it.
        Err(e) if e.code() == ErrorCode::AckFailed => {
            Err(Problem::gone(e.message()).with_id(id.as_str()))
        }
        Err(e) => Err(Problem::from(e).with_id(id.as_str())),
    }
}

fn lease_time(ms: Option<u64>) -> Result<Duration, Problem> {
    let lease = ms.map_or(limits::DEFAULT_LEASE, Duration::from_millis);
    if lease.is_zero() || lease > limits::MAX_LEASE {
        return Err(Error::rejected(
            ErrorCode::InvalidConfig,
            format!(
                "lease_ms must be 1 to {}; a longer lease is extended in time",
                limits::MAX_LEASE.as_millis()
            ),
        )
        .into());
    }
    Ok(lease)
}

/// The JSON parameters of a request; an empty body means the defaults.
pub(super) async fn parameters<T: DeserializeOwned>(request: Request) -> Result<T, Problem> {
    let body = super::read_body(request.into_body(), limits::MAX_COMMAND_BYTES)
        .await
        .map_err(|e| {
            e.unwrap_or_else(|| {
                Problem::too_large(format!(
                    "the body is over the limit of {} bytes",
                    limits::MAX_COMMAND_BYTES
                ))
            })
        })?;
    let json = if body.iter().all(u8::is_ascii_whitespace) {
        &b"{}"[..]
    } else {
        &body[..]
    };
    envelope::object(json)
        .map_err(|e| Problem::parameter(format!("the parameters are not understood: {e}")))
}
