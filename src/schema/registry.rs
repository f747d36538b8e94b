//! The client of a Confluent-compatible schema registry, with what it has learned.
//! Schemas never change under their id, so they are kept; what a subject's latest
//! version is, and what the registry does not know, is asked again after a while.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::{Client, Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::{
    compiled::{Compiled, Reference},
    frame::{frame, unframe},
};
use crate::{
    config::{RegistrySettings, SchemaFormat},
    error::{Error, ErrorCode, Result},
};

/// A registry. Clones share what it has learned.
#[derive(Clone, Debug)]
pub struct SchemaRegistry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: RegistrySettings,
    client: Client,
    known: Mutex<Known>,
    /// Questions under way: many publishers may want the same schema at once.
    asking: Semaphore,
}

#[derive(Debug, Default)]
struct Known {
    by_id: HashMap<u32, Entry>,
    latest: HashMap<String, Latest>,
}

#[derive(Clone, Debug)]
struct Entry {
    /// The schema, or why there is none.
    schema: std::result::Result<Arc<Compiled>, String>,
    subjects: HashSet<String>,
    asked: Instant,
}

#[derive(Clone, Debug)]
struct Latest {
    /// The schema and its id, or why there is none.
    schema: std::result::Result<(u32, Arc<Compiled>), String>,
    asked: Instant,
}

/// What is known of a schema.
pub(super) enum Lookup {
    Here(Arc<Compiled>),
    /// There is none, or not for that subject.
    No(String),
    /// The registry has to be asked.
    Ask,
}

/// What the registry does not have is asked again after this.
const NO_FOR: Duration = Duration::from_secs(10);

/// Schemas, and subjects, that are kept; beyond that all are learned anew.
const MOST: usize = 10_000;

/// Questions under way at a time.
const QUESTIONS: usize = 4;

/// Bytes of one answer.
const MAX_ANSWER: usize = 8 * 1024 * 1024;

/// How deep references may go.
const DEPTH: usize = 8;

/// How long it is waited for a newer version where one is known.
const REFRESH_PATIENCE: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    #[serde(default)]
    id: u32,
    schema: String,
    #[serde(default)]
    schema_type: Option<String>,
    #[serde(default)]
    references: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    subject: String,
    version: i64,
}

#[derive(Deserialize)]
struct Version {
    subject: String,
}

/// An answer, or that there is none of that name.
enum Answer<T> {
    Has(T),
    No(String),
}

impl SchemaRegistry {
    /// A client. It connects when it is first asked.
    ///
    /// # Errors
    /// `INVALID_CONFIG` for settings that make no client.
    pub fn new(settings: RegistrySettings) -> Result<Self> {
        let client = Client::builder()
            .timeout(settings.timeout)
            .build()
            .map_err(|e| {
                Error::rejected(
                    ErrorCode::InvalidConfig,
                    format!("schemas.registry: no client can be made: {e}"),
                )
            })?;
        Ok(Self(Arc::new(Inner {
            settings,
            client,
            known: Mutex::default(),
            asking: Semaphore::new(QUESTIONS),
        })))
    }

    /// A value in the encoding of a subject's latest schema, in the wire format.
    ///
    /// # Errors
    /// `SCHEMA_INVALID`: it does not fit, or the subject is unknown;
    /// `SCHEMA_UNAVAILABLE`: the registry gives no answer.
    pub async fn encode(&self, subject: &str, value: &Value) -> Result<Bytes> {
        let known = |s: &Self| s.known_latest(subject);
        if known(self).is_none() {
            self.learn_latest(subject).await?;
        }
        let (id, schema) = known(self)
            .unwrap_or_else(|| Err("it was forgotten at once".to_owned()))
            .map_err(|why| invalid(&why))?;
        let body = schema.encode(value).map_err(|why| invalid(&why))?;
        Ok(frame(id, &body))
    }

    /// The value of a payload in the wire format, by the schema that it names.
    ///
    /// # Errors
    /// As [`SchemaRegistry::encode`].
    pub async fn decode(&self, framed: &[u8]) -> Result<Value> {
        let Some((id, body)) = unframe(framed) else {
            return Err(invalid("the payload is not in the registry's wire format"));
        };
        let schema = loop {
            match self.by_id(id, None) {
                Lookup::Here(schema) => break schema,
                Lookup::No(why) => return Err(invalid(&why)),
                Lookup::Ask => self.learn(id).await?,
            }
        };
        schema.decode(body).map_err(|why| invalid(&why))
    }

    /// Registers a schema under a subject and says its id; one that is there
    /// already keeps its own.
    ///
    /// # Errors
    /// `SCHEMA_INVALID`: the registry refuses it, and says why;
    /// `SCHEMA_UNAVAILABLE`.
    pub async fn register(&self, subject: &str, format: SchemaFormat, schema: &str) -> Result<u32> {
        #[derive(Deserialize)]
        struct Registered {
            id: u32,
        }
        let path = ["subjects", subject, "versions"];
        let body = submission(format, schema);
        match self
            .ask::<Registered>(Method::POST, &path, Some(body))
            .await?
        {
            Answer::Has(registered) => Ok(registered.id),
            Answer::No(why) => Err(invalid(&why)),
        }
    }

    /// Whether a schema may be the next version of a subject. A subject that is
    /// not there yet takes any.
    ///
    /// # Errors
    /// As [`SchemaRegistry::register`].
    pub async fn is_compatible(
        &self,
        subject: &str,
        format: SchemaFormat,
        schema: &str,
    ) -> Result<bool> {
        #[derive(Deserialize)]
        struct Compatible {
            is_compatible: bool,
        }
        let path = ["compatibility", "subjects", subject, "versions", "latest"];
        let body = submission(format, schema);
        match self
            .ask::<Compatible>(Method::POST, &path, Some(body))
            .await?
        {
            Answer::Has(answer) => Ok(answer.is_compatible),
            Answer::No(_) => Ok(true),
        }
    }

    /// What is known of a schema by its id, under a subject if that matters.
    pub(super) fn by_id(&self, id: u32, subject: Option<&str>) -> Lookup {
        let known = self.known();
        let Some(entry) = known.by_id.get(&id) else {
            return Lookup::Ask;
        };
        let old = entry.asked.elapsed() >= NO_FOR;
        match (&entry.schema, subject) {
            (Err(_), _) if old => Lookup::Ask,
            (Err(why), _) => Lookup::No(why.clone()),
            (Ok(_), Some(subject)) if !entry.subjects.contains(subject) => {
                if old {
                    // It may have been registered since.
                    return Lookup::Ask;
                }
                Lookup::No(format!(
                    "the schema {id} is not registered under the subject {subject}"
                ))
            }
            (Ok(schema), _) => Lookup::Here(schema.clone()),
        }
    }

    /// What is known of a subject's latest version.
    pub(super) fn latest(&self, subject: &str) -> Lookup {
        match self.known_latest(subject) {
            Some(Ok((_, schema))) => Lookup::Here(schema),
            Some(Err(why)) => Lookup::No(why),
            None => Lookup::Ask,
        }
    }

    fn known_latest(
        &self,
        subject: &str,
    ) -> Option<std::result::Result<(u32, Arc<Compiled>), String>> {
        let known = self.known();
        let latest = known.latest.get(subject)?;
        let lasts = match latest.schema {
            Ok(_) => self.0.settings.refresh,
            Err(_) => NO_FOR,
        };
        (latest.asked.elapsed() < lasts).then(|| latest.schema.clone())
    }

    /// Asks for a schema by its id. Afterwards it is known, or known not to be.
    pub(super) async fn learn(&self, id: u32) -> Result<()> {
        let number = id.to_string();
        let _turn = self.0.asking.acquire().await;
        if !matches!(self.by_id(id, None), Lookup::Ask) && self.is_fresh(id) {
            // Somebody else asked meanwhile.
            return Ok(());
        }
        let stored = self
            .ask::<Stored>(Method::GET, &["schemas", "ids", &number], None)
            .await?;
        let path = ["schemas", "ids", &number, "versions"];
        let schema = match stored {
            Answer::Has(stored) => self.compile(&stored).await?.map(Arc::new),
            Answer::No(why) => Err(format!("the registry has no schema {id}: {why}")),
        };
        let subjects = match schema {
            Ok(_) => match self.ask::<Vec<Version>>(Method::GET, &path, None).await? {
                Answer::Has(versions) => versions.into_iter().map(|v| v.subject).collect(),
                Answer::No(_) => HashSet::new(),
            },
            Err(_) => HashSet::new(),
        };
        let mut known = self.known();
        if known.by_id.len() >= MOST {
            known.by_id.clear();
        }
        known.by_id.insert(
            id,
            Entry {
                schema,
                subjects,
                asked: Instant::now(),
            },
        );
        Ok(())
    }

    fn is_fresh(&self, id: u32) -> bool {
        let known = self.known();
        let asked = known.by_id.get(&id).map(|e| e.asked);
        asked.is_some_and(|at| at.elapsed() < NO_FOR)
    }

    /// Asks for a subject's latest version. One that was known stays where the
    /// registry gives no answer.
    pub(super) async fn learn_latest(&self, subject: &str) -> Result<()> {
        let _turn = self.0.asking.acquire().await;
        if self.known_latest(subject).is_some() {
            return Ok(());
        }
        let before = self.known().latest.get(subject).map(|l| l.schema.clone());
        let path = ["subjects", subject, "versions", "latest"];
        let ask = self.ask::<Stored>(Method::GET, &path, None);
        let answer = match &before {
            Some(Ok(_)) => tokio::time::timeout(REFRESH_PATIENCE, ask)
                .await
                .unwrap_or_else(|_| Err(unavailable("no answer"))),
            _ => ask.await,
        };
        let schema = match answer {
            Ok(Answer::Has(stored)) => self
                .compile(&stored)
                .await?
                .map(|schema| (stored.id, Arc::new(schema))),
            Ok(Answer::No(why)) => Err(format!("the registry has no subject {subject}: {why}")),
            Err(error) => match before {
                Some(Ok(before)) => {
                    tracing::warn!(subject, %error, "the schema's latest version could not be asked for; the one before goes on");
                    Ok(before)
                }
                _ => return Err(error),
            },
        };
        let mut known = self.known();
        if known.latest.len() >= MOST {
            known.latest.clear();
        }
        known.latest.insert(
            subject.to_owned(),
            Latest {
                schema,
                asked: Instant::now(),
            },
        );
        Ok(())
    }

    async fn compile(&self, stored: &Stored) -> Result<std::result::Result<Compiled, String>> {
        let format = match stored.schema_type.as_deref() {
            None | Some("AVRO") => SchemaFormat::Avro,
            Some("JSON") => SchemaFormat::Json,
            Some(other) => {
                return Ok(Err(format!(
                    "the schema is of type {other}; AVRO and JSON are read"
                )));
            }
        };
        let mut references = Vec::new();
        self.references(&stored.references, &mut references, DEPTH)
            .await?;
        Ok(Compiled::parse(format, &stored.schema, &references))
    }

    /// Collects what a schema refers to, the innermost first.
    fn references<'a>(
        &'a self,
        named: &'a [Named],
        into: &'a mut Vec<Reference>,
        depth: usize,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            for one in named {
                if depth == 0 || into.iter().any(|r| r.name == one.name) {
                    continue;
                }
                let version = one.version.to_string();
                let path = ["subjects", &one.subject, "versions", &version];
                // One that is missing shows when the schema is read.
                if let Answer::Has(stored) = self.ask::<Stored>(Method::GET, &path, None).await? {
                    self.references(&stored.references, into, depth - 1).await?;
                    into.push(Reference {
                        name: one.name.clone(),
                        schema: stored.schema,
                    });
                }
            }
            Ok(())
        })
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: Option<Value>,
    ) -> Result<Answer<T>> {
        let settings = &self.0.settings;
        let mut url = reqwest::Url::parse(&settings.url)
            .map_err(|e| unavailable(&format!("its address is none: {e}")))?;
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        let mut request = self
            .0
            .client
            .request(method, url)
            .header("accept", "application/vnd.schemaregistry.v1+json");
        if let Some(user) = &settings.user {
            request = request.basic_auth(user, settings.password.as_ref().map(|p| p.expose()));
        }
        if let Some(body) = body {
            request = request
                .header("content-type", "application/vnd.schemaregistry.v1+json")
                .body(body.to_string());
        }
        let mut response = request
            .send()
            .await
            .map_err(|e| unavailable(&e.without_url().to_string()))?;
        let status = response.status();
        let mut text = Vec::new();
        while let Some(piece) = response
            .chunk()
            .await
            .map_err(|e| unavailable(&e.without_url().to_string()))?
        {
            if text.len() + piece.len() > MAX_ANSWER {
                return Err(unavailable("its answer is too large"));
            }
            text.extend_from_slice(&piece);
        }
        if status.is_success() {
            return serde_json::from_slice(&text)
                .map(Answer::Has)
                .map_err(|e| unavailable(&format!("its answer is not understood: {e}")));
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Problem {
            message: String,
        }
        let problem: Problem = serde_json::from_slice(&text).unwrap_or_default();
        match status {
            StatusCode::NOT_FOUND
            | StatusCode::CONFLICT
            | StatusCode::UNPROCESSABLE_ENTITY
            | StatusCode::BAD_REQUEST => Ok(Answer::No(if problem.message.is_empty() {
                status.to_string()
            } else {
                problem.message
            })),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(unavailable(
                "it refuses the login; check schemas.registry.user and password",
            )),
            other => Err(unavailable(&format!("{other} {}", problem.message))),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn submission(format: SchemaFormat, schema: &str) -> Value {
    let kind = match format {
        SchemaFormat::Avro => "AVRO",
        SchemaFormat::Json => "JSON",
    };
    json!({"schema": schema, "schemaType": kind})
}

pub(super) fn invalid(why: &str) -> Error {
    Error::rejected(ErrorCode::SchemaInvalid, why)
}

fn unavailable(why: &str) -> Error {
    Error::new(
        ErrorCode::SchemaUnavailable,
        format!("the schema registry cannot be asked: {why}"),
    )
}
