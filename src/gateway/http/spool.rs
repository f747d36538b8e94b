//! The spool for operators: what lanes hold, the messages themselves, pausing
//! and resuming the drain, an export that streams, and adopting the spool of a
//! hub that will not come back. Nothing else here moves a message.

use std::str::FromStr;

use axum::{
    Json,
    body::Body,
    extract::{Query, Request, State},
    http::header,
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;
use serde::{Deserialize, Serialize};

use super::{App, Intake, lease::parameters, limits, problem::Problem};
use crate::{
    error::{Error, ErrorCode},
    hub::{
        MessagingHub,
        operator::{
            Reached, SpoolCursor, SpoolExport, SpoolFilter, SpoolList, SpooledMessage,
            SpooledStatus,
        },
    },
    message::{Key, Message, MessageId, Timestamp},
    topic::Pattern,
};

/// The query of `GET /v1/spool`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Ask {
    /// Messages instead of lanes. `?entries` alone means true.
    entries: Option<String>,
    topic: Option<String>,
    route: Option<String>,
    cursor: Option<String>,
    limit: Option<usize>,
}

/// The query of `GET /v1/spool/export`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Export {
    pattern: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Pause {
    pattern: Option<String>,
    degrade: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Adopt {
    dir: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Resume {
    pattern: Option<String>,
    rate: Option<Rate>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Rate {
    PerSecond(i64),
    Word(String),
}

/// What was said, and how many lanes it reached.
#[derive(Debug, Serialize)]
pub(super) struct Said {
    pattern: Pattern,
    #[serde(flatten)]
    reached: Reached,
}

#[derive(Serialize)]
struct Entries {
    messages: Vec<Listed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// A message without its payload.
#[derive(Serialize)]
struct Listed {
    topic: String,
    lane: u32,
    seq: u64,
    id: MessageId,
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<Key>,
    priority: u8,
    size: u64,
    age_ms: u64,
    retry_count: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiration: Option<Timestamp>,
    #[serde(flatten)]
    noted: Noted,
}

/// A whole message, as an envelope that can be published again.
#[derive(Serialize)]
struct Exported<'a> {
    #[serde(flatten)]
    message: &'a Message,
    spool: Place,
}

#[derive(Serialize)]
struct Place {
    lane: u32,
    seq: u64,
    since: Timestamp,
    #[serde(flatten)]
    noted: Noted,
}

/// What the hub has noted on a message.
#[derive(Serialize)]
struct Noted {
    status: SpooledStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    due: Option<Timestamp>,
    possible_duplicate: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    settled: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<Failed>,
}

#[derive(Serialize)]
struct Failed {
    reason: String,
    details: String,
    first: Timestamp,
    last: Timestamp,
}

/// `GET /v1/spool`: the lanes and what they hold, or with `entries` the
/// messages, a page at a time.
pub(super) async fn list(
    State(app): State<App>,
    Query(ask): Query<Ask>,
) -> Result<Response, Problem> {
    let filter = SpoolFilter {
        topic: ask.topic.as_deref().map(pattern).transpose()?,
        route: ask.route,
    };
    let entries = match ask.entries.as_deref() {
        None | Some("0" | "false") => false,
        Some("" | "1" | "true") => true,
        Some(other) => {
            return Err(Problem::parameter(format!(
                "entries is {other:?}; use 1 or 0"
            )));
        }
    };
    let most = if entries {
        MessagingHub::MAX_SPOOL_PAGE
    } else {
        limits::MAX_SPOOL_LANES
    };
    let limit = ask.limit.unwrap_or(limits::DEFAULT_SPOOL_PAGE);
    if limit == 0 || limit > most {
        return Err(Problem::parameter(format!(
            "limit is {limit}; ask for 1 to {most}"
        )));
    }
    if !entries {
        if ask.cursor.is_some() {
            return Err(Problem::parameter(
                "cursor goes on with messages, and lanes were asked for; add entries=1",
            ));
        }
        let list: SpoolList = app.hub().spool(&filter, limit);
        return Ok(Json(list).into_response());
    }
    let cursor = ask
        .cursor
        .as_deref()
        .map(SpoolCursor::from_str)
        .transpose()
        .map_err(Problem::from)?;
    let page = app
        .hub()
        .spooled(&filter, cursor.as_ref(), limit)
        .await
        .map_err(Problem::from)?;
    let now = Timestamp::now();
    Ok(Json(Entries {
        messages: page.messages.into_iter().map(|m| listed(m, now)).collect(),
        next: page.next.map(|cursor| cursor.to_string()),
    })
    .into_response())
}

/// `POST /v1/spool/pause`.
pub(super) async fn pause(State(app): State<App>, request: Request) -> Result<Json<Said>, Problem> {
    let _intake = app.enter()?;
    let ask: Pause = parameters(request).await?;
    let pattern = pattern(ask.pattern.as_deref().unwrap_or(ALL))?;
    let reached = app
        .hub()
        .pause_drain(&pattern, ask.degrade)
        .await
        .map_err(Problem::from)?;
    Ok(Json(Said { pattern, reached }))
}

/// `POST /v1/spool/resume`.
pub(super) async fn resume(
    State(app): State<App>,
    request: Request,
) -> Result<Json<Said>, Problem> {
    let _intake = app.enter()?;
    let ask: Resume = parameters(request).await?;
    let pattern = pattern(ask.pattern.as_deref().unwrap_or(ALL))?;
    let wrong = || {
        Problem::parameter(
            "rate is how many messages each lane drains a second, 0 to 4294967295, or \"unlimited\"",
        )
    };
    let rate = match ask.rate {
        None => None,
        Some(Rate::PerSecond(n)) => Some(u32::try_from(n).map_err(|_| wrong())?),
        Some(Rate::Word(word)) if word == "unlimited" => Some(0),
        Some(Rate::Word(_)) => return Err(wrong()),
    };
    let reached = app
        .hub()
        .resume_drain(&pattern, rate)
        .await
        .map_err(Problem::from)?;
    Ok(Json(Said { pattern, reached }))
}

/// `POST /v1/spool/adopt`: moves the spool in a data folder of this machine into
/// this hub, and answers when it is done.
pub(super) async fn adopt(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let intake = app.enter()?;
    let ask: Adopt = parameters(request).await?;
    if !std::path::Path::new(&ask.dir).is_absolute() {
        return Err(Problem::parameter(format!(
            "dir is {:?}; give the whole path of another hub's data folder on this hub's machine",
            ask.dir
        )));
    }
    adopt_from(&app, ask.dir, intake).await
}

#[cfg(feature = "journal")]
async fn adopt_from(app: &App, dir: String, intake: Intake) -> Result<Response, Problem> {
    let hub = app.hub().clone();
    // A client that goes away does not leave it half done, nor does a shutdown.
    let moving = tokio::spawn(async move {
        let _intake = intake;
        hub.adopt_spool(std::path::Path::new(&dir)).await
    });
    let adopted = moving
        .await
        .map_err(|e| {
            Problem::from(
                Error::new(ErrorCode::UnknownError, "adopting a spool panicked").caused_by(e),
            )
        })?
        .map_err(Problem::from)?;
    Ok(Json(adopted).into_response())
}

#[cfg(not(feature = "journal"))]
async fn adopt_from(_app: &App, _dir: String, _intake: Intake) -> Result<Response, Problem> {
    Err(Problem::parameter(
        "this program was built without the feature `journal`; it reads no data folder",
    ))
}

/// `GET /v1/spool/export`: every spooled message as a line of JSON, read from
/// the spool as fast as the client takes it. An export that cannot be finished
/// breaks the connection off, so that it is not taken for a whole one.
pub(super) async fn export(
    State(app): State<App>,
    Query(ask): Query<Export>,
) -> Result<Response, Problem> {
    if app.closing().is_cancelled() {
        return Err(Problem::shutting_down());
    }
    let filter = SpoolFilter {
        topic: ask.pattern.as_deref().map(pattern).transpose()?,
        route: None,
    };
    let export = app.hub().export_spool(&filter);
    let pieces = stream::try_unfold((app, export), |(app, mut export)| async move {
        let piece = tokio::select! {
            piece = piece(&mut export) => piece?,
            () = app.closing().cancelled() => return Err(Error::new(
                ErrorCode::OperationCanceled,
                "the hub is shutting down; the export is not whole",
            )),
        };
        Ok(piece.map(|piece| (piece, (app, export))))
    });
    Ok((
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(pieces),
    )
        .into_response())
}

/// The lines of the next page.
async fn piece(export: &mut SpoolExport) -> Result<Option<Bytes>, Error> {
    let Some(messages) = export.next().await? else {
        return Ok(None);
    };
    let mut out = BytesMut::new();
    for spooled in messages {
        let mut message = spooled.message.as_ref().clone();
        message.topic = Some(spooled.topic.clone());
        let line = Exported {
            message: &message,
            spool: Place {
                lane: spooled.lane,
                seq: spooled.seq,
                since: spooled.since,
                noted: noted(&spooled),
            },
        };
        serde_json::to_writer((&mut out).writer(), &line).map_err(|e| {
            Error::new(
                ErrorCode::SerializationError,
                "a spooled message has no JSON form",
            )
            .on(spooled.topic.as_str())
            .with_id(spooled.message.id.as_str())
            .caused_by(e)
        })?;
        out.put_u8(b'\n');
    }
    Ok(Some(out.freeze()))
}

fn listed(spooled: SpooledMessage, now: Timestamp) -> Listed {
    let age = now.since(spooled.since).as_millis();
    Listed {
        noted: noted(&spooled),
        id: spooled.message.id.clone(),
        kind: spooled.message.kind.clone(),
        key: spooled.message.key.clone(),
        priority: spooled.message.priority.value(),
        retry_count: spooled.message.retry_count,
        expiration: spooled.message.expiration,
        size: spooled.size,
        age_ms: u64::try_from(age).unwrap_or(u64::MAX),
        topic: spooled.topic,
        lane: spooled.lane,
        seq: spooled.seq,
    }
}

fn noted(spooled: &SpooledMessage) -> Noted {
    let marks = &spooled.marks;
    Noted {
        status: spooled.status,
        due: spooled.due,
        possible_duplicate: marks.possible_duplicate,
        settled: marks.settled.clone(),
        failure: marks.failure.as_ref().map(|f| Failed {
            reason: f.reason.clone(),
            details: f.details.clone(),
            first: f.first,
            last: f.last,
        }),
    }
}

fn pattern(text: &str) -> Result<Pattern, Problem> {
    Pattern::new(text).map_err(Problem::from)
}

/// What is meant when nothing is said.
const ALL: &str = "#";
