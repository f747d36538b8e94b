//! Dead letters for operators: listed, shown, reprocessed (as they are or
//! edited), discarded with a reason, and what is decided purged. What a request
//! began is finished also when its client goes away.

use std::future::Future;

use axum::{
    Json,
    extract::{Path, Query, Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{App, Intake, envelope, lease::parameters, limits, problem::Problem};
use crate::{
    broker::BrokerType,
    dead_letter::{
        Away, DeadLetter, Decision, Edit, LetterQuery, LetterStatus, Purged, Reprocessed,
    },
    error::{Error, ErrorCode, Result as HubResult},
    hub::MessagingHub,
    message::{Key, MessageId, Timestamp},
    topic::Pattern,
};

/// Which letters are meant.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Ask {
    status: Option<String>,
    topic: Option<String>,
    reason: Option<String>,
    broker: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    limit: Option<usize>,
    offset: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct EditBody {
    patch: Option<Value>,
    message: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Nothing {}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Discard {
    reason: String,
}

#[derive(Serialize)]
struct Page {
    letters: Vec<Listed>,
    total: usize,
    complete: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    away: Vec<Away>,
}

/// A letter without its payload.
#[derive(Serialize)]
struct Listed {
    id: String,
    broker: BrokerType,
    place: String,
    message_id: MessageId,
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<Key>,
    size: usize,
    original_queue: Option<String>,
    original_topic: Option<String>,
    failure_reason: String,
    failure_details: String,
    retry_count: u32,
    first_failure: Timestamp,
    last_failure: Timestamp,
    next_retry: Option<Timestamp>,
    status: LetterStatus,
    reprocessed: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    decision: Option<Decision>,
}

#[derive(Serialize)]
struct Many {
    results: Vec<Value>,
    complete: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    away: Vec<Away>,
}

/// `GET /v1/dead-letters`: a page, oldest failure first.
pub(super) async fn list(
    State(app): State<App>,
    Query(ask): Query<Ask>,
) -> Result<Response, Problem> {
    let limit = ask.limit(limits::MAX_DEAD_LETTERS)?;
    let offset = ask.offset.unwrap_or(0);
    let query = ask.query()?;
    let hub = app.hub().clone();
    let page = whole(None, async move {
        hub.dead_letters(&query, offset, limit).await
    })
    .await?;
    Ok(Json(Page {
        letters: page.letters.into_iter().map(listed).collect(),
        total: page.total,
        complete: page.complete,
        away: page.away,
    })
    .into_response())
}

/// `GET /v1/dead-letters/{id}`: everything about one.
pub(super) async fn show(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<DeadLetter>, Problem> {
    let (hub, name) = (app.hub().clone(), id.clone());
    let letter = whole(None, async move { hub.dead_letter(&name).await }).await?;
    letter.map(Json).ok_or_else(|| unknown(&id))
}

/// `POST /v1/dead-letters/{id}/reprocess`.
pub(super) async fn reprocess(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let intake = app.enter()?;
    let Nothing {} = parameters(request).await?;
    again(&app, id, None, intake).await
}

/// `POST /v1/dead-letters/{id}/edit`: changes the message and reprocesses it.
pub(super) async fn edit(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let intake = app.enter()?;
    let most = limits::envelope_bytes(app.max_message_bytes());
    let body: EditBody = large(request, most).await?;
    let edit = match (body.patch, body.message) {
        (Some(patch), None) => Edit::patch(patch),
        (None, Some(message)) => Edit::replacement(message),
        _ => {
            return Err(Problem::parameter(
                "say patch (a JSON merge patch over the message) or message (new content in its place), one of both",
            ));
        }
    };
    again(&app, id, Some(edit?), intake).await
}

/// `POST /v1/dead-letters/reprocess`: all that a query means.
pub(super) async fn reprocess_all(
    State(app): State<App>,
    request: Request,
) -> Result<Response, Problem> {
    let intake = app.enter()?;
    let ask: Ask = parameters(request).await?;
    if ask.offset.is_some() {
        return Err(Problem::parameter(
            "offset is for lists; what is reprocessed leaves the list",
        ));
    }
    let limit = ask.limit(limits::MAX_DEAD_LETTERS)?;
    let query = ask.query()?;
    if query.status == Some(LetterStatus::Processed) {
        return Err(Problem::parameter(
            "processed letters are done with; name another status",
        ));
    }
    let hub = app.hub().clone();
    let many = whole(Some(intake), async move {
        hub.reprocess_dead_letters(&query, limit).await
    })
    .await?;
    let mut results = Vec::with_capacity(many.results.len());
    for result in many.results {
        results.push(described(result)?);
    }
    Ok(Json(Many {
        results,
        complete: many.complete,
        away: many.away,
    })
    .into_response())
}

/// `POST /v1/dead-letters/{id}/discard`.
pub(super) async fn discard(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, Problem> {
    let intake = app.enter()?;
    let body: Discard = parameters(request).await?;
    let (hub, name) = (app.hub().clone(), id.clone());
    let letter = whole(Some(intake), async move {
        hub.discard_dead_letter(&name, &body.reason).await
    })
    .await?;
    let letter = letter.ok_or_else(|| unknown(&id))?;
    json(&listed(letter)).map(Json)
}

/// `POST /v1/dead-letters/purge`: takes decided letters away for good.
pub(super) async fn purge(
    State(app): State<App>,
    request: Request,
) -> Result<Json<Purged>, Problem> {
    let intake = app.enter()?;
    let ask: Ask = parameters(request).await?;
    if ask.limit.is_some() || ask.offset.is_some() {
        return Err(Problem::parameter(
            "limit and offset are for lists; a purge takes all that the query means",
        ));
    }
    let query = ask.query()?;
    let hub = app.hub().clone();
    whole(
        Some(intake),
        async move { hub.purge_dead_letters(&query).await },
    )
    .await
    .map(Json)
}

async fn again(
    app: &App,
    id: String,
    edit: Option<Edit>,
    intake: Intake,
) -> Result<Response, Problem> {
    let (hub, name): (MessagingHub, _) = (app.hub().clone(), id.clone());
    let done = whole(Some(intake), async move {
        hub.reprocess_dead_letter(&name, edit.as_ref()).await
    })
    .await?;
    let done = done.ok_or_else(|| unknown(&id))?;
    // 202 as for a publish whose copy is not at its broker yet.
    let status = match &done {
        Reprocessed::LeftOpen { .. } => StatusCode::ACCEPTED,
        _ => StatusCode::OK,
    };
    Ok((status, Json(described(done)?)).into_response())
}

impl Ask {
    fn limit(&self, most: usize) -> Result<usize, Problem> {
        let limit = self.limit.unwrap_or(limits::DEFAULT_SPOOL_PAGE);
        if limit == 0 || limit > most {
            return Err(Problem::parameter(format!(
                "limit is {limit}; ask for 1 to {most}"
            )));
        }
        Ok(limit)
    }

    fn query(self) -> Result<LetterQuery, Problem> {
        Ok(LetterQuery {
            status: self.status.as_deref().map(word).transpose()?,
            topic: self
                .topic
                .as_deref()
                .map(Pattern::new)
                .transpose()
                .map_err(Problem::from)?,
            reason: self.reason,
            broker: self.broker.as_deref().map(word).transpose()?,
            kind: self.kind,
        })
    }
}

/// A word of a fixed set, by its JSON form.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, Problem> {
    serde_json::from_value(Value::from(text))
        .map_err(|e| Problem::parameter(format!("{text:?} is not known: {e}")))
}

/// A result, with the problem where there is one.
fn described(done: Reprocessed) -> Result<Value, Problem> {
    let mut value = json(&done)?;
    if let (Reprocessed::Failed { error, .. }, Some(fields)) = (&done, value.as_object_mut()) {
        let problem = json(&Problem::from(error.clone()))?;
        fields.insert("error".to_owned(), problem);
    }
    Ok(value)
}

fn json(value: &impl Serialize) -> Result<Value, Problem> {
    serde_json::to_value(value).map_err(|e| {
        Problem::from(
            Error::new(ErrorCode::SerializationError, "the answer has no JSON form").caused_by(e),
        )
    })
}

/// Finishes what was begun also when the client goes away, or the hub closes: half of
/// it would be a copy that was published and a letter that is still open.
async fn whole<T: Send + 'static>(
    intake: Option<Intake>,
    work: impl Future<Output = HubResult<T>> + Send + 'static,
) -> Result<T, Problem> {
    let work = async move {
        let _intake = intake;
        work.await
    };
    tokio::spawn(work)
        .await
        .map_err(|e| {
            Problem::from(
                Error::new(ErrorCode::UnknownError, "looking at dead letters panicked")
                    .caused_by(e),
            )
        })?
        .map_err(Problem::from)
}

/// Parameters that may hold a whole payload.
async fn large<T: DeserializeOwned>(request: Request, most: usize) -> Result<T, Problem> {
    let body = super::read_body(request.into_body(), most)
        .await
        .map_err(|e| {
            e.unwrap_or_else(|| {
                Problem::too_large(format!("the body is over the limit of {most} bytes"))
            })
        })?;
    envelope::object(&body)
        .map_err(|e| Problem::parameter(format!("the parameters are not understood: {e}")))
}

fn listed(letter: DeadLetter) -> Listed {
    let message = &letter.original_message;
    Listed {
        message_id: message.id.clone(),
        kind: message.kind.clone(),
        key: message.key.clone(),
        size: message.payload.len(),
        id: letter.id,
        broker: letter.broker,
        place: letter.place,
        original_queue: letter.original_queue,
        original_topic: letter.original_topic,
        failure_reason: letter.failure_reason,
        failure_details: letter.failure_details,
        retry_count: letter.retry_count,
        first_failure: letter.first_failure,
        last_failure: letter.last_failure,
        next_retry: letter.next_retry,
        status: letter.status,
        reprocessed: letter.reprocessed,
        decision: letter.decision,
    }
}

fn unknown(id: &str) -> Problem {
    Problem::http(
        StatusCode::NOT_FOUND,
        "NOT_FOUND",
        format!(
            "no dead letter {id:?} is here; it may have been purged, or another hub looks at it just now"
        ),
    )
    .with_id(id)
}
