//! CloudEvents 1.0 over HTTP: structured JSON, batches, and the `ce-*` headers
//! of binary mode. No I/O.
//!
//! The extension `partitionkey` is the message's key, as in CloudEvents' own
//! Kafka binding; other extensions are kept with the event.

use std::collections::BTreeMap;

use axum::http::HeaderMap;
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde_json::value::RawValue;

use super::{problem::Problem, raw};
use crate::{
    error::Result as HubResult,
    message::{EventAttributes, Message, MessageId},
};

const CE: &str = "ce-";
const VERSION: &str = "1.0";

/// Reads one structured event.
pub(super) fn structured(json: &[u8]) -> Result<Message, Problem> {
    let fields: BTreeMap<String, &RawValue> = serde_json::from_slice(json)
        .map_err(|e| Problem::invalid(format!("the body is not a CloudEvent: {e}")))?;
    let mut message = Message::default();
    message.event = Some(Box::default());
    let mut seen = Required::default();
    for (name, value) in &fields {
        if matches!(name.as_str(), "data" | "data_base64") || value.get() == "null" {
            continue;
        }
        attribute(&mut message, &mut seen, name, &scalar(name, value)?)?;
    }
    seen.check().map_err(|p| p.with_id(message.id.as_str()))?;
    let is_json = message.content_type.as_deref().is_none_or(is_json);
    message.payload = match (fields.get("data"), fields.get("data_base64")) {
        (Some(_), Some(_)) => {
            return Err(Problem::invalid(
                "the CloudEvent has data and data_base64; send one of them",
            )
            .with_id(message.id.as_str()));
        }
        // Kept as it was written, digit for digit.
        (Some(data), None) if is_json => Bytes::copy_from_slice(data.get().as_bytes()),
        (Some(data), None) => match serde_json::from_str::<String>(data.get()) {
            Ok(text) => text.into(),
            Err(_) => Bytes::copy_from_slice(data.get().as_bytes()),
        },
        (None, Some(data)) => {
            let text: String = serde_json::from_str(data.get())
                .map_err(|_| Problem::invalid("data_base64 is not a text"))?;
            BASE64_STANDARD
                .decode(text)
                .map_err(|e| Problem::invalid(format!("data_base64 is not base64: {e}")))?
                .into()
        }
        (None, None) => Bytes::new(),
    };
    if message.content_type.is_none() {
        message.content_type = Some("application/json".to_owned());
    }
    Ok(message)
}

/// Takes `ce-*` headers into `message`; says whether there were any.
pub(super) fn from_headers(headers: &HeaderMap, message: &mut Message) -> Result<bool, Problem> {
    let mut seen = Required::default();
    let mut any = false;
    for (name, value) in headers {
        let Some(attr) = name.as_str().strip_prefix(CE) else {
            continue;
        };
        if !any {
            any = true;
            message.event = Some(Box::default());
        }
        if attr == "datacontenttype" {
            return Err(Problem::invalid(
                "in binary mode the data's type is the header Content-Type, not ce-datacontenttype",
            ));
        }
        let value = percent_decode(&raw::text(name, value)?);
        attribute(message, &mut seen, attr, &value)?;
    }
    if any {
        seen.check().map_err(|p| p.with_id(message.id.as_str()))?;
    }
    Ok(any)
}

/// Which of the four attributes that every event has were there.
#[derive(Default)]
struct Required {
    id: bool,
    source: bool,
    version: bool,
    kind: bool,
}

impl Required {
    fn check(&self) -> Result<(), Problem> {
        for (there, name) in [
            (self.version, "specversion"),
            (self.id, "id"),
            (self.source, "source"),
            (self.kind, "type"),
        ] {
            if !there {
                return Err(Problem::invalid(format!(
                    "the CloudEvent has no {name}; specversion, id, source and type are required"
                )));
            }
        }
        Ok(())
    }
}

fn attribute(
    message: &mut Message,
    seen: &mut Required,
    name: &str,
    value: &str,
) -> Result<(), Problem> {
    let in_attribute = |e: crate::Error| {
        Problem::invalid(format!("the CloudEvents attribute {name}: {}", e.message()))
    };
    let event: &mut EventAttributes = message.event.get_or_insert_default();
    match name {
        "specversion" if value == VERSION => seen.version = true,
        "specversion" => {
            return Err(Problem::invalid(format!(
                "CloudEvents specversion {value:?} is not known; use {VERSION:?}"
            )));
        }
        "id" => {
            message.id = MessageId::new(value).map_err(in_attribute)?;
            seen.id = true;
        }
        "type" => {
            seen.kind = !value.is_empty();
            value.clone_into(&mut message.kind);
        }
        "source" => {
            seen.source = !value.is_empty();
            value.clone_into(&mut event.source);
        }
        "subject" => event.subject = Some(value.to_owned()),
        "dataschema" => event.data_schema = Some(value.to_owned()),
        "datacontenttype" => message.content_type = Some(value.to_owned()),
        "time" => {
            let time: HubResult<_> = value.parse();
            message.timestamp = time.map_err(in_attribute)?;
        }
        "partitionkey" => message.key = Some(value.into()),
        extension
            if !extension.is_empty()
                && extension
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) =>
        {
            event
                .extensions
                .insert(extension.to_owned(), value.to_owned());
        }
        other => {
            return Err(Problem::invalid(format!(
                "{other:?} is not a CloudEvents attribute: names have lower-case letters and digits only"
            )));
        }
    }
    Ok(())
}

/// Attribute values are texts, numbers or booleans.
fn scalar(name: &str, value: &RawValue) -> Result<String, Problem> {
    let text = value.get();
    match text.as_bytes().first() {
        Some(b'"') => serde_json::from_str(text)
            .map_err(|e| Problem::invalid(format!("the CloudEvents attribute {name}: {e}"))),
        Some(b'{' | b'[') | None => Err(Problem::invalid(format!(
            "the CloudEvents attribute {name} must be a text, a number or a boolean"
        ))),
        Some(_) => Ok(text.to_owned()),
    }
}

fn is_json(media_type: &str) -> bool {
    let essence = media_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    essence.ends_with("/json") || essence.ends_with("+json")
}

/// Header values are percent-encoded UTF-8 (CloudEvents HTTP binding 3.1.3.2);
/// a percent sign without two digits stands for itself.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while let Some(b) = bytes.get(i) {
        let digit = |at: usize| {
            bytes
                .get(at)
                .and_then(|b| (*b as char).to_digit(16))
                .and_then(|d| u8::try_from(d).ok())
        };
        match (b, digit(i + 1), digit(i + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push(high * 16 + low);
                i += 3;
            }
            _ => {
                out.push(*b);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structured_event_keeps_its_data_digit_for_digit() {
        let m = structured(
            br#"{"specversion":"1.0","id":"e1","source":"/s","type":"t","time":"2026-01-02T03:04:05Z",
                "partitionkey":"k","tenant":7,"data":{"n":12345678901234567890.10}}"#,
        )
        .unwrap();
        assert_eq!(&m.payload[..], br#"{"n":12345678901234567890.10}"#);
        assert_eq!(m.content_type.as_deref(), Some("application/json"));
        assert_eq!(m.key.unwrap().as_str(), Some("k"));
        let event = m.event.unwrap();
        assert_eq!(event.source, "/s");
        assert_eq!(event.extensions["tenant"], "7");
    }

    #[test]
    fn text_and_binary_data_are_read_as_what_they_are() {
        let text = structured(
            br#"{"specversion":"1.0","id":"e","source":"s","type":"t","datacontenttype":"text/plain","data":"hi"}"#,
        )
        .unwrap();
        assert_eq!(&text.payload[..], b"hi");
        let binary = structured(
            br#"{"specversion":"1.0","id":"e","source":"s","type":"t","data_base64":"AP8="}"#,
        )
        .unwrap();
        assert_eq!(&binary.payload[..], b"\x00\xff");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (json, word) in [
            (&br#"{"id":"e","source":"s","type":"t"}"#[..], "specversion"),
            (
                br#"{"specversion":"0.3","id":"e","source":"s","type":"t"}"#,
                "0.3",
            ),
            (br#"{"specversion":"1.0","source":"s","type":"t"}"#, "id"),
            (
                br#"{"specversion":"1.0","id":"e","source":"s","type":"t","Bad":"x"}"#,
                "Bad",
            ),
            (
                br#"{"specversion":"1.0","id":"e","source":"s","type":"t","time":"now"}"#,
                "time",
            ),
            (b"[]", "CloudEvent"),
        ] {
            let problem = structured(json).unwrap_err();
            assert!(problem.to_string().contains(word), "{problem}");
        }
    }

    #[test]
    fn binary_mode_headers_are_percent_decoded() {
        let mut headers = HeaderMap::new();
        for (n, v) in [
            ("ce-specversion", "1.0"),
            ("ce-id", "e1"),
            ("ce-source", "/a%20b"),
            ("ce-type", "t"),
            ("ce-subject", "100%"),
        ] {
            headers.insert(n, v.parse().unwrap());
        }
        let mut m = Message::default();
        assert!(from_headers(&headers, &mut m).unwrap());
        let event = m.event.unwrap();
        assert_eq!(event.source, "/a b");
        assert_eq!(event.subject.as_deref(), Some("100%"));
        headers.remove("ce-type");
        assert!(from_headers(&headers, &mut Message::default()).is_err());
    }
}
