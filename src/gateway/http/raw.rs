//! Any other body: the payload as it stands, with the rest of the message in
//! `Hub-*` headers or in CloudEvents' `ce-*` headers (binary mode). No I/O.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use bytes::Bytes;

use super::{cloudevents, problem::Problem};
use crate::{
    error::Error,
    message::{DeliveryMode, Message, MessageId, TaskAttributes, Timestamp},
};

/// The order domain of a request; no part of the message.
pub(super) const PUBLISHER: &str = "hub-publisher";

const TRACE_STATE: &str = "tracestate";
const HUB: &str = "hub-";
const USER: &str = "hub-header-";

/// Makes a message of a body and its headers. A `Hub-*` header that is not
/// known is refused, so that a misspelt one cannot be lost.
pub(super) fn parse(headers: &HeaderMap, payload: Bytes) -> Result<Message, Problem> {
    let mut message = Message::new("", payload);
    message.content_type = text_of(headers, &header::CONTENT_TYPE)?;
    message.content_encoding = text_of(headers, &header::CONTENT_ENCODING)?;
    if let Some(parent) = text_of(headers, &HeaderName::from_static("traceparent"))? {
        message.trace_id = Some(parent);
        // The vendors' part of a trace is nothing to the hub, and travels as it is.
        if let Some(state) = trace_state(headers) {
            message.headers.insert(TRACE_STATE.to_owned(), state);
        }
    }
    let is_event = cloudevents::from_headers(headers, &mut message)?;
    for name in headers.keys() {
        let Some(field) = name.as_str().strip_prefix(HUB) else {
            continue;
        };
        let mut values = headers.get_all(name).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(Problem::invalid(format!(
                "the header {name} comes more than once; send it once"
            )));
        };
        let value = text(name, value)?;
        if let Some(user) = name.as_str().strip_prefix(USER) {
            message.headers.insert(user.to_owned(), value);
            continue;
        }
        if is_event && matches!(field, "id" | "type") {
            return Err(Problem::invalid(format!(
                "{name} and ce-{field} say the same; send one of them"
            )));
        }
        set(&mut message, field, value).map_err(|e| {
            let mut p = Problem::invalid(format!("the header {name}: {}", e.message()));
            p = p.with_id(message.id.as_str());
            p
        })?;
    }
    Ok(message)
}

/// Refuses `Hub-*` headers beside a body that carries the fields itself.
pub(super) fn refuse_fields(headers: &HeaderMap) -> Result<(), Problem> {
    match headers
        .keys()
        .find(|n| n.as_str().starts_with(HUB) && n.as_str() != PUBLISHER)
    {
        Some(name) => Err(Problem::invalid(format!(
            "the header {name} goes with a plain body only; here the body's own fields say it"
        ))),
        None => Ok(()),
    }
}

fn set(message: &mut Message, field: &str, value: String) -> Result<(), Error> {
    let number = |what: &str| {
        value
            .parse()
            .map_err(|_| invalid(format!("{value:?} is not {what}")))
    };
    match field {
        "id" => message.id = MessageId::new(&value)?,
        "type" => message.kind = value,
        "key" => message.key = Some(value.into()),
        "priority" => message.priority = value.parse()?,
        "expiration" => message.expiration = Some(expiration(&value, Timestamp::now())?),
        "scheduled-at" => task(message).scheduled_at = Some(expiration(&value, Timestamp::now())?),
        "deadline" => task(message).deadline = Some(expiration(&value, Timestamp::now())?),
        "timestamp" => message.timestamp = value.parse()?,
        "correlation-id" => message.correlation_id = Some(value),
        "reply-to" => message.reply_to = Some(value),
        "trace-id" => message.trace_id = Some(value),
        "max-retries" => message.max_retries = number("a number of retries")?,
        "partition" => {
            message.partition = Some(
                value
                    .parse()
                    .map_err(|_| invalid(format!("{value:?} is not a partition number")))?,
            );
        }
        "delivery-mode" => {
            message.delivery_mode = match value.as_str() {
                "persistent" => DeliveryMode::Persistent,
                "transient" => DeliveryMode::Transient,
                other => return Err(invalid(format!("{other:?}; use persistent or transient"))),
            }
        }
        "publisher" => {}
        _ => {
            return Err(invalid(
                "it is not known; user headers are written Hub-Header-<name>".to_owned(),
            ));
        }
    }
    Ok(())
}

/// What makes a task of a message.
fn task(message: &mut Message) -> &mut TaskAttributes {
    message.task.get_or_insert_default()
}

/// An RFC 3339 time, milliseconds since the epoch as in the JSON form, or a
/// duration from now with its unit (`30s`).
fn expiration(text: &str, now: Timestamp) -> Result<Timestamp, Error> {
    if let Ok(ms) = text.parse::<i64>() {
        return Ok(Timestamp::from_millis(ms));
    }
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    crate::duration::parse(text).map(|d| now + d).map_err(|_| {
        invalid(format!(
            "{text:?}; use an RFC 3339 time, milliseconds since the epoch, or a duration such as 30s"
        ))
    })
}

fn invalid(why: String) -> Error {
    Error::rejected(crate::ErrorCode::MessageInvalid, why)
}

fn text_of(headers: &HeaderMap, name: &HeaderName) -> Result<Option<String>, Problem> {
    headers.get(name).map(|v| text(name, v)).transpose()
}

/// `tracestate`, which may come in several headers that are one list. What is not
/// readable is left out, as its standard asks for.
fn trace_state(headers: &HeaderMap) -> Option<String> {
    let parts = headers.get_all(TRACE_STATE).iter();
    let parts: Vec<&str> = parts.filter_map(|v| v.to_str().ok()).collect();
    (!parts.is_empty()).then(|| parts.join(","))
}

/// Header values are UTF-8, as clients send them today.
pub(super) fn text(name: &HeaderName, value: &HeaderValue) -> Result<String, Problem> {
    String::from_utf8(value.as_bytes().to_vec())
        .map_err(|_| Problem::invalid(format!("the header {name} is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(n, v)| {
                (
                    HeaderName::from_static(n),
                    HeaderValue::from_bytes(v.as_bytes()).unwrap(),
                )
            })
            .collect()
    }

    #[test]
    fn hub_headers_fill_the_message() {
        let m = parse(
            &headers(&[
                ("content-type", "text/plain; charset=utf-8"),
                ("hub-id", "x1"),
                ("hub-type", "t"),
                ("hub-key", "schlüssel"),
                ("hub-priority", "critical"),
                ("hub-expiration", "2100-01-01T00:00:00Z"),
                ("hub-header-x-user", "7"),
                ("hub-publisher", "p"),
                ("accept", "*/*"),
            ]),
            Bytes::from_static(b"\x00body"),
        )
        .unwrap();
        assert_eq!(m.content_type.as_deref(), Some("text/plain; charset=utf-8"));
        assert_eq!((m.id.as_str(), m.kind.as_str()), ("x1", "t"));
        assert_eq!(m.key.unwrap().as_str(), Some("schlüssel"));
        assert_eq!(m.priority.value(), 10);
        assert_eq!(m.expiration.unwrap().as_millis(), 4_102_444_800_000);
        assert_eq!(m.headers.len(), 1);
        assert_eq!(m.headers["x-user"], "7");
        assert_eq!(&m.payload[..], b"\x00body");
    }

    #[test]
    fn a_trace_travels_with_its_vendors_part() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let states = [("tracestate", "a=1"), ("tracestate", "b=2")];
        let mut alone = HeaderMap::new();
        for (name, value) in states {
            alone.append(name, HeaderValue::from_static(value));
        }
        let mut both = alone.clone();
        both.insert("traceparent", HeaderValue::from_static(parent));
        let m = parse(&both, Bytes::new()).unwrap();
        assert_eq!(m.trace_id.as_deref(), Some(parent));
        assert_eq!(m.headers["tracestate"], "a=1,b=2");
        // It says nothing without the other.
        assert!(parse(&alone, Bytes::new()).unwrap().headers.is_empty());
    }

    #[test]
    fn a_hub_header_that_is_unknown_or_wrong_is_refused_by_name() {
        for (name, value) in [
            ("hub-prio", "1"),
            ("hub-priority", "eleven"),
            ("hub-id", ""),
            ("hub-expiration", "soon"),
        ] {
            let p = parse(&headers(&[(name, value)]), Bytes::new()).unwrap_err();
            assert_eq!(p.status(), 400);
            assert!(p.to_string().contains(name), "{p}");
        }
        assert!(refuse_fields(&headers(&[("hub-key", "k")])).is_err());
        assert!(refuse_fields(&headers(&[("hub-publisher", "k")])).is_ok());
    }

    #[test]
    fn an_expiration_is_absolute_or_a_duration_with_its_unit() {
        let now = Timestamp::from_millis(1000);
        assert_eq!(expiration("30s", now).unwrap().as_millis(), 31_000);
        assert_eq!(expiration("5000", now).unwrap().as_millis(), 5000);
    }
}
