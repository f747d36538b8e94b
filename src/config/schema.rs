//! What payloads of a route must look like, and where schemas come from.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::secret::Secret;

/// Schemas for all routes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchemasSettings {
    /// A Confluent-compatible registry. Default: none.
    pub registry: Option<RegistrySettings>,
}

/// How a registry is reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistrySettings {
    /// Its address, such as `http://localhost:8081`.
    pub url: String,
    /// Default: none, no login.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// How long an answer may take. Default 5 s.
    #[serde(default = "five_seconds", with = "crate::duration")]
    pub timeout: Duration,
    /// How long the latest version of a subject is taken for the latest. Default
    /// 5 min.
    #[serde(default = "five_minutes", with = "crate::duration")]
    pub refresh: Duration,
}

/// What payloads of a route must look like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchemaSettings {
    /// `json` (JSON Schema) or `avro`.
    pub format: SchemaFormat,
    /// A file with the schema, for payloads that name none. Default: none, the
    /// registry's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The registry's subject. Default: the topic and `-value`; none with a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Register the file under the subject at the start. Default false: it is only
    /// looked whether it would be compatible.
    #[serde(default)]
    pub register: bool,
    /// Where payloads are looked at. What does not fit is refused at `publish`, and
    /// goes to the dead letters at `consume`. Default both.
    #[serde(default = "everywhere")]
    pub check: Vec<CheckAt>,
}

/// Kinds of schemas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchemaFormat {
    /// JSON Schema, of the draft that it names; default 2020-12.
    Json,
    /// Avro.
    Avro,
}

/// Where payloads are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckAt {
    /// Before they are accepted.
    Publish,
    /// Before they are handed out.
    Consume,
}

impl RegistrySettings {
    /// A registry at an address, with the defaults.
    #[must_use]
    pub fn at(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            user: None,
            password: None,
            timeout: five_seconds(),
            refresh: five_minutes(),
        }
    }
}

impl SchemaSettings {
    /// Whether the registry has a part in it.
    #[must_use]
    pub fn uses_registry(&self) -> bool {
        self.file.is_none() || self.subject.is_some()
    }
}

const fn five_seconds() -> Duration {
    Duration::from_secs(5)
}

const fn five_minutes() -> Duration {
    Duration::from_secs(300)
}

fn everywhere() -> Vec<CheckAt> {
    vec![CheckAt::Publish, CheckAt::Consume]
}
