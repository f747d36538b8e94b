//! A schema that was read, and payloads against it. Pure: no network, and no
//! reference that was not handed over is followed.

use std::{
    io::{self, Read},
    sync::Once,
};

use apache_avro::{
    Schema, reader::datum::GenericDatumReader, types::Value as AvroValue,
    writer::datum::GenericDatumWriter,
};
use serde_json::Value;

use crate::config::SchemaFormat;

/// A schema that another one refers to.
#[derive(Clone, Debug)]
pub(super) struct Reference {
    pub(super) name: String,
    pub(super) schema: String,
}

/// A schema, ready to judge.
#[derive(Debug)]
pub(super) enum Compiled {
    Json(Box<jsonschema::Validator>),
    Avro { schema: Schema, others: Vec<Schema> },
}

/// Memory that one length in an Avro payload may ask for.
const AVRO_BYTES: usize = 64 * 1024 * 1024;

static AVRO_LIMIT: Once = Once::new();

/// Where schemas without an address of their own stand.
const BASE: &str = "hub:///";

impl Compiled {
    /// Reads a schema. The error says what is wrong with it.
    pub(super) fn parse(
        format: SchemaFormat,
        text: &str,
        references: &[Reference],
    ) -> Result<Self, String> {
        match format {
            SchemaFormat::Json => Self::json(text, references),
            SchemaFormat::Avro => Self::avro(text, references),
        }
    }

    fn json(text: &str, references: &[Reference]) -> Result<Self, String> {
        let schema: Value =
            serde_json::from_str(text).map_err(|e| format!("the schema is not JSON: {e}"))?;
        let mut registry = jsonschema::Registry::new();
        for reference in references {
            let other: Value = serde_json::from_str(&reference.schema)
                .map_err(|e| format!("the schema {} is not JSON: {e}", reference.name))?;
            let address = if reference.name.contains("://") {
                reference.name.clone()
            } else {
                format!("{BASE}{}", reference.name)
            };
            registry = registry
                .add(address, other)
                .map_err(|e| format!("the schema {}: {e}", reference.name))?;
        }
        let registry = registry
            .prepare()
            .map_err(|e| format!("the schema's references: {e}"))?;
        jsonschema::options()
            .with_base_uri(BASE)
            .with_registry(&registry)
            .build(&schema)
            .map(|validator| Self::Json(Box::new(validator)))
            .map_err(|e| format!("the schema is no JSON Schema: {e}"))
    }

    fn avro(text: &str, references: &[Reference]) -> Result<Self, String> {
        AVRO_LIMIT.call_once(|| {
            apache_avro::util::max_allocation_bytes(AVRO_BYTES);
        });
        Schema::parse_str_with_list(text, references.iter().map(|r| r.schema.as_str()))
            .map(|(schema, others)| Self::Avro { schema, others })
            .map_err(|e| format!("the schema is no Avro schema: {e}"))
    }

    /// Whether a payload fits; the error says what does not, and where.
    pub(super) fn check(&self, payload: &[u8]) -> Result<(), String> {
        match self {
            Self::Json(validator) => {
                let value: Value = serde_json::from_slice(payload)
                    .map_err(|e| format!("the payload is not JSON: {e}"))?;
                fits(validator, &value)
            }
            Self::Avro { .. } => self.read(payload).map(drop),
        }
    }

    /// A value in the schema's encoding.
    pub(super) fn encode(&self, value: &Value) -> Result<Vec<u8>, String> {
        match self {
            Self::Json(validator) => {
                fits(validator, value)?;
                serde_json::to_vec(value).map_err(|e| e.to_string())
            }
            Self::Avro { schema, others } => {
                let wrong = |e: apache_avro::Error| format!("it is not as its schema says: {e}");
                let value = AvroValue::try_from(value.clone()).map_err(wrong)?;
                let all: Vec<&Schema> = others.iter().chain([schema]).collect();
                let value = value.resolve_schemata(schema, all.clone()).map_err(wrong)?;
                GenericDatumWriter::builder(schema)
                    .schemata(all)
                    .map_err(wrong)?
                    .build()
                    .map_err(wrong)?
                    .write_value_to_vec(value)
                    .map_err(wrong)
            }
        }
    }

    /// A payload as a value.
    pub(super) fn decode(&self, payload: &[u8]) -> Result<Value, String> {
        match self {
            Self::Json(validator) => {
                let value = serde_json::from_slice(payload)
                    .map_err(|e| format!("the payload is not JSON: {e}"))?;
                fits(validator, &value)?;
                Ok(value)
            }
            Self::Avro { .. } => self
                .read(payload)?
                .try_into()
                .map_err(|e: apache_avro::Error| format!("it has no JSON form: {e}")),
        }
    }

    fn read(&self, payload: &[u8]) -> Result<AvroValue, String> {
        let Self::Avro { schema, others } = self else {
            return Err("the schema is not Avro".to_owned());
        };
        let wrong = |e: apache_avro::Error| format!("the payload is not as its schema says: {e}");
        let all: Vec<&Schema> = others.iter().chain([schema]).collect();
        let mut rest = Exact {
            rest: payload,
            short: false,
        };
        let value = GenericDatumReader::builder(schema)
            .writer_schemata(all)
            .map_err(wrong)?
            .build()
            .map_err(wrong)?
            .read_value(&mut rest)
            .map_err(wrong)?;
        if rest.short {
            return Err("the payload ends before what its schema says".to_owned());
        }
        if !rest.rest.is_empty() {
            return Err(format!(
                "the payload goes on for {} bytes behind what its schema says",
                rest.rest.len()
            ));
        }
        Ok(value)
    }
}

/// A payload that notices when more is asked of it than it has: the decoder takes
/// some ends for a null.
struct Exact<'a> {
    rest: &'a [u8],
    short: bool,
}

impl Read for Exact<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.short |= self.rest.is_empty() && !into.is_empty();
        self.rest.read(into)
    }
}

fn fits(validator: &jsonschema::Validator, value: &Value) -> Result<(), String> {
    match validator.iter_errors(value).next() {
        None => Ok(()),
        Some(error) => {
            let place = error.instance_path().to_string();
            let place = if place.is_empty() { "/" } else { &place };
            Err(format!("at {place}: {error}"))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    const POINT: &str = r#"{"type":"record","name":"Point","fields":[
        {"name":"x","type":"int"},{"name":"label","type":["null","string"],"default":null}]}"#;

    #[test]
    fn json_says_what_does_not_fit_and_where() {
        let schema =
            json!({"type":"object","required":["id"],"properties":{"id":{"type":"string"}}});
        let schema = Compiled::parse(SchemaFormat::Json, &schema.to_string(), &[]).unwrap();
        schema.check(br#"{"id":"a","more":1}"#).unwrap();
        let wrong = schema.check(br#"{"id":7}"#).unwrap_err();
        assert!(wrong.contains("/id") && wrong.contains("string"), "{wrong}");
        let wrong = schema.check(b"{}").unwrap_err();
        assert!(
            wrong.contains("id") && wrong.contains("required"),
            "{wrong}"
        );
        assert!(schema.check(b"{").unwrap_err().contains("not JSON"));
    }

    #[test]
    fn a_json_schema_may_refer_to_what_was_handed_over_and_to_nothing_else() {
        let main = r#"{"type":"object","properties":{"who":{"$ref":"person.json"}}}"#;
        let person = Reference {
            name: "person.json".into(),
            schema: r#"{"type":"object","required":["name"]}"#.into(),
        };
        let schema = Compiled::parse(SchemaFormat::Json, main, &[person]).unwrap();
        schema.check(br#"{"who":{"name":"n"}}"#).unwrap();
        assert!(schema.check(br#"{"who":{}}"#).is_err());
        assert!(Compiled::parse(SchemaFormat::Json, main, &[]).is_err());
        let far = r#"{"$ref":"http://127.0.0.1:1/x.json"}"#;
        assert!(Compiled::parse(SchemaFormat::Json, far, &[]).is_err());
    }

    #[test]
    fn avro_reads_the_whole_payload_or_refuses_it() {
        let schema = Compiled::parse(SchemaFormat::Avro, POINT, &[]).unwrap();
        let value = json!({"x": 7, "label": "here"});
        let body = schema.encode(&value).unwrap();
        schema.check(&body).unwrap();
        assert_eq!(schema.decode(&body).unwrap(), value);
        for cut in 0..body.len() {
            assert!(schema.check(&body[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = body.clone();
        longer.push(0);
        assert!(schema.check(&longer).unwrap_err().contains("goes on"));
        assert!(schema.encode(&json!({"x": "no number"})).is_err());
    }

    #[test]
    fn avro_knows_the_types_that_it_refers_to() {
        let line = r#"{"type":"record","name":"Line","fields":[
            {"name":"from","type":"Point"},{"name":"to","type":"Point"}]}"#;
        let point = Reference {
            name: "point".into(),
            schema: POINT.into(),
        };
        let schema = Compiled::parse(SchemaFormat::Avro, line, &[point]).unwrap();
        let value = json!({"from": {"x": 1, "label": null}, "to": {"x": 2, "label": "b"}});
        let body = schema.encode(&value).unwrap();
        assert_eq!(schema.decode(&body).unwrap(), value);
        assert!(Compiled::parse(SchemaFormat::Avro, line, &[]).is_err());
    }

    #[test]
    fn a_length_that_asks_for_all_memory_is_refused() {
        let schema = Compiled::parse(SchemaFormat::Avro, r#"{"type":"bytes"}"#, &[]).unwrap();
        // A length of 2^62.
        let bomb = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        assert!(schema.check(&bomb).is_err());
    }
}
