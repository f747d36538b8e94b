//! `POST /v1/topics/{topic}/messages`: every form of body, by its media type.
//!
//! Without `Hub-Publisher` one request is one publisher: what it sends without
//! a key keeps its order. With it, so does everything of that name.

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{Path, Query, Request, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use super::{App, cloudevents, envelope, limits, ndjson, problem::Problem, raw};
use crate::{
    broker::{Outcome, Receipt},
    error::Result as HubResult,
    hub::Publisher,
    message::Message,
};

/// How a body is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Envelope,
    Lines,
    CloudEvent,
    CloudEvents,
    Payload,
}

/// The answer for one element of an array.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Answer {
    /// What became of it.
    Receipt(Receipt),
    /// Why nothing did.
    Failed {
        /// The reason.
        error: Problem,
    },
}

/// What the path's parameters ask for.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Ask {
    /// All of an array, or nothing of it.
    atomic: bool,
}

/// Publishes what the request carries.
pub(super) async fn publish(
    State(app): State<App>,
    Path(topic): Path<String>,
    ask: Result<Query<Ask>, QueryRejection>,
    request: Request,
) -> Result<Response, Problem> {
    let Query(ask) = ask.map_err(|e| Problem::parameter(e.body_text()).on(&topic))?;
    let intake = app.enter()?;
    let (parts, body) = request.into_parts();
    let form = Form::of(&parts.headers);
    if ask.atomic && !matches!(form, Form::Envelope | Form::CloudEvents) {
        return Err(not_an_array(&topic));
    }
    if form != Form::Payload {
        raw::refuse_fields(&parts.headers)?;
        refuse_encoding(&parts.headers)?;
    }
    let publisher = publisher(&app, &topic, &parts.headers)?;
    let max = app.max_message_bytes();
    match form {
        Form::Lines => Ok(ndjson::respond(app, topic, publisher, body, intake)),
        Form::Payload => {
            let body = read(body, max, &topic).await?;
            let message = raw::parse(&parts.headers, body).map_err(|p| p.on(&topic))?;
            one(&publisher, &topic, message).await
        }
        Form::CloudEvent => {
            let body = read(body, limits::envelope_bytes(max), &topic).await?;
            let message = cloudevents::structured(&body).map_err(|p| p.on(&topic))?;
            one(&publisher, &topic, message).await
        }
        Form::Envelope => {
            let body = read(body, batch_bytes(max), &topic).await?;
            if envelope::is_array(&body) {
                let parse = |json: &[u8]| envelope::parse(json, &topic);
                array(&publisher, &topic, &body, ask.atomic, parse).await
            } else if ask.atomic {
                Err(not_an_array(&topic))
            } else if body.len() > limits::envelope_bytes(max) {
                Err(too_large(limits::envelope_bytes(max), &topic))
            } else {
                one(&publisher, &topic, envelope::parse(&body, &topic)?).await
            }
        }
        Form::CloudEvents => {
            let body = read(body, batch_bytes(max), &topic).await?;
            array(
                &publisher,
                &topic,
                &body,
                ask.atomic,
                cloudevents::structured,
            )
            .await
        }
    }
}

impl Form {
    fn of(headers: &HeaderMap) -> Self {
        let essence = headers
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.split(';').next())
            .map(|v| v.trim().to_ascii_lowercase());
        match essence.as_deref() {
            Some("application/vnd.messaging-hub+json") => Self::Envelope,
            Some("application/x-ndjson") => Self::Lines,
            Some("application/cloudevents+json") => Self::CloudEvent,
            Some("application/cloudevents-batch+json") => Self::CloudEvents,
            _ => Self::Payload,
        }
    }
}

async fn one(publisher: &Publisher, topic: &str, message: Message) -> Result<Response, Problem> {
    let id = message.id.clone();
    let receipt = publisher
        .publish(message)
        .await
        .map_err(|e| Problem::from(e).on(topic).with_id(id.as_str()))?;
    Ok((status_of(&receipt), Json(receipt)).into_response())
}

/// The elements of an array: each by itself, or all as one.
async fn array(
    publisher: &Publisher,
    topic: &str,
    body: &[u8],
    atomic: bool,
    parse: impl Fn(&[u8]) -> Result<Message, Problem>,
) -> Result<Response, Problem> {
    let elements = envelope::elements(body).map_err(|p| p.on(topic))?;
    if elements.len() > limits::MAX_BATCH_MESSAGES {
        return Err(Problem::too_large(format!(
            "the array has {} messages, at most {} are taken at once; send application/x-ndjson",
            elements.len(),
            limits::MAX_BATCH_MESSAGES
        ))
        .on(topic));
    }
    let parsed = elements
        .into_iter()
        .map(|element| parse(element.get().as_bytes()));
    if atomic {
        as_one(publisher, topic, parsed).await
    } else {
        many(publisher, topic, parsed).await
    }
}

/// One that cannot be read, or is refused, is the answer for all: nothing of them is
/// published.
async fn as_one(
    publisher: &Publisher,
    topic: &str,
    parsed: impl Iterator<Item = Result<Message, Problem>>,
) -> Result<Response, Problem> {
    let messages: Vec<Message> = parsed.collect::<Result<_, _>>().map_err(|p| p.on(topic))?;
    let receipts = publisher.publish_batch_atomic(messages).await;
    let receipts = receipts.map_err(|e| Problem::from(e).on(topic))?;
    Ok((StatusCode::OK, Json(receipts)).into_response())
}

/// Each element has an answer of its own at its own place. The status is 202
/// when everything was spooled, else 200: the array as such was understood.
async fn many(
    publisher: &Publisher,
    topic: &str,
    parsed: impl Iterator<Item = Result<Message, Problem>>,
) -> Result<Response, Problem> {
    let mut messages = Vec::new();
    // For each element: the id of the message made of it, or why none was.
    let parsed: Vec<_> = parsed
        .map(|element| {
            element.map(|message| {
                let id = message.id.clone();
                messages.push(message);
                id
            })
        })
        .collect();
    let mut outcomes = publisher.publish_batch(messages).await.into_iter();
    let answers: Vec<Answer> = parsed
        .into_iter()
        .map(|parsed| match parsed {
            Err(problem) => Answer::failed(problem, topic),
            Ok(id) => answer(outcomes.next(), topic, id.as_str()),
        })
        .collect();
    let spooled =
        |a: &Answer| matches!(a, Answer::Receipt(r) if status_of(r) == StatusCode::ACCEPTED);
    let status = if !answers.is_empty() && answers.iter().all(spooled) {
        StatusCode::ACCEPTED
    } else {
        StatusCode::OK
    };
    Ok((status, Json(answers)).into_response())
}

impl Answer {
    pub(super) fn failed(problem: Problem, topic: &str) -> Self {
        Self::Failed {
            error: problem.on(topic),
        }
    }
}

/// The answer for a message; `None` where the hub gave fewer outcomes than it
/// got messages, which it never does.
pub(super) fn answer(outcome: Option<HubResult<Receipt>>, topic: &str, id: &str) -> Answer {
    match outcome {
        Some(Ok(receipt)) => Answer::Receipt(receipt),
        Some(Err(e)) => Answer::failed(Problem::from(e).with_id(id), topic),
        None => Answer::failed(
            Problem::from(crate::Error::unknown(
                crate::ErrorCode::UnknownError,
                "the hub gave no outcome",
            ))
            .with_id(id),
            topic,
        ),
    }
}

fn status_of(receipt: &Receipt) -> StatusCode {
    match receipt.outcome {
        // Sent: the broker has it, and was not asked to confirm it.
        Outcome::Delivered { .. } | Outcome::Sent { .. } => StatusCode::OK,
        Outcome::Spooled { .. } => StatusCode::ACCEPTED,
    }
}

fn publisher(app: &App, topic: &str, headers: &HeaderMap) -> Result<Publisher, Problem> {
    let made = match headers.get(raw::PUBLISHER) {
        None => app.hub().publisher(topic),
        Some(name) => {
            let name = raw::text(&axum::http::HeaderName::from_static(raw::PUBLISHER), name)?;
            if name.is_empty() || name.len() > MAX_PUBLISHER_NAME {
                return Err(Problem::invalid(format!(
                    "Hub-Publisher has 1 to {MAX_PUBLISHER_NAME} bytes, this one has {}",
                    name.len()
                ))
                .on(topic));
            }
            app.hub().named_publisher(topic, &name)
        }
    };
    made.map_err(|e| Problem::from(e).on(topic))
}

fn refuse_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => Err(Problem::http(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UNSUPPORTED_ENCODING",
            "a body in this form must not be compressed; a plain body may be, and travels as it stands",
        )),
        _ => Ok(()),
    }
}

async fn read(body: Body, max: usize, topic: &str) -> Result<Bytes, Problem> {
    super::read_body(body, max)
        .await
        .map_err(|e| e.unwrap_or_else(|| too_large(max, topic)).on(topic))
}

fn too_large(max: usize, topic: &str) -> Problem {
    Problem::too_large(format!("the body is over the limit of {max} bytes")).on(topic)
}

fn not_an_array(topic: &str) -> Problem {
    Problem::parameter(
        "atomic=true is for an array: application/vnd.messaging-hub+json or application/cloudevents-batch+json",
    )
    .on(topic)
}

fn batch_bytes(max_message_bytes: usize) -> usize {
    limits::MAX_BATCH_BYTES.max(limits::envelope_bytes(max_message_bytes))
}

/// Bytes of a publisher's name.
const MAX_PUBLISHER_NAME: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_follows_the_media_type_and_not_its_parameters() {
        for (text, form) in [
            (
                "application/vnd.messaging-hub+json; charset=utf-8",
                Form::Envelope,
            ),
            ("Application/X-NDJSON", Form::Lines),
            (
                "application/cloudevents+json;charset=UTF-8",
                Form::CloudEvent,
            ),
            ("application/cloudevents-batch+json", Form::CloudEvents),
            ("application/json", Form::Payload),
            ("", Form::Payload),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, text.parse().unwrap());
            assert_eq!(Form::of(&headers), form, "{text}");
        }
        assert_eq!(Form::of(&HeaderMap::new()), Form::Payload);
    }
}
