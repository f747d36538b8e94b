//! What a route wants of its payloads.

use std::{path::Path, sync::Arc};

use super::{
    compiled::Compiled,
    frame::unframe,
    registry::{Lookup, SchemaRegistry, invalid},
};
use crate::{
    config::{CheckAt, SchemaFormat, SchemaSettings},
    error::{Error, ErrorCode, Result},
    topic::Topic,
};

/// The check of a route.
#[derive(Debug)]
pub(crate) struct Guard {
    settings: SchemaSettings,
    /// From a file.
    fixed: Option<(Compiled, String)>,
    registry: Option<SchemaRegistry>,
}

/// How a payload looks.
#[derive(Debug)]
pub(crate) enum Looked {
    Fits,
    /// It does not, and why.
    Wrong(String),
    /// The registry has to be asked first.
    Ask(Question),
}

/// What the registry has to be asked.
#[derive(Clone, Debug)]
pub(crate) enum Question {
    Id(u32),
    Latest(String),
}

impl Guard {
    /// The check of a route, with the registry where there is one.
    ///
    /// # Errors
    /// `INVALID_CONFIG`: the file cannot be read, or holds no schema.
    pub(crate) fn new(
        settings: &SchemaSettings,
        registry: Option<&SchemaRegistry>,
    ) -> Result<Self> {
        let fixed = settings
            .file
            .as_deref()
            .map(|file| read(settings.format, file))
            .transpose()?;
        let registry = settings
            .uses_registry()
            .then(|| registry.cloned())
            .flatten();
        if fixed.is_none() && registry.is_none() {
            return Err(Error::rejected(
                ErrorCode::InvalidConfig,
                "a route's schema needs a file, or schemas.registry.url",
            ));
        }
        Ok(Self {
            settings: settings.clone(),
            fixed,
            registry,
        })
    }

    /// Whether it looks at this point.
    pub(crate) fn looks_at(&self, at: CheckAt) -> bool {
        self.settings.check.contains(&at)
    }

    /// Brings the file's schema and the registry's together, as the settings say.
    ///
    /// # Errors
    /// `SCHEMA_INVALID`: they do not go together; `SCHEMA_UNAVAILABLE`.
    pub(crate) async fn start(&self) -> Result<()> {
        let (Some(registry), Some((_, text)), Some(subject)) =
            (&self.registry, &self.fixed, &self.settings.subject)
        else {
            return Ok(());
        };
        let format = self.settings.format;
        if !registry.is_compatible(subject, format, text).await? {
            return Err(invalid(&format!(
                "the schema in the file is not compatible with the latest one of the subject {subject}; change it, or the subject's compatibility level"
            )));
        }
        if self.settings.register {
            let id = registry.register(subject, format, text).await?;
            tracing::info!(subject, id, "registered the schema of a route");
        }
        Ok(())
    }

    /// Looks at a payload. Never waits.
    pub(crate) fn look(&self, topic: &Topic, payload: &[u8]) -> Looked {
        let Some(registry) = &self.registry else {
            return self.look_fixed(payload);
        };
        let subject = self.subject(topic);
        if let Some((id, body)) = unframe(payload) {
            return match registry.by_id(id, Some(&subject)) {
                Lookup::Here(schema) => verdict(schema.check(body)),
                Lookup::No(why) => Looked::Wrong(why),
                Lookup::Ask => Looked::Ask(Question::Id(id)),
            };
        }
        if self.fixed.is_some() {
            return self.look_fixed(payload);
        }
        match self.settings.format {
            // Without its schema's id nobody can read it.
            SchemaFormat::Avro => Looked::Wrong(
                "the payload is not in the registry's wire format (a zero byte, the schema's id in four bytes, Avro)".to_owned(),
            ),
            SchemaFormat::Json => match registry.latest(&subject) {
                Lookup::Here(schema) => verdict(schema.check(payload)),
                Lookup::No(why) => Looked::Wrong(why),
                Lookup::Ask => Looked::Ask(Question::Latest(subject)),
            },
        }
    }

    /// Looks at a payload, and asks the registry if need be.
    ///
    /// # Errors
    /// `SCHEMA_INVALID`, `SCHEMA_UNAVAILABLE`.
    pub(crate) async fn check(&self, topic: &Topic, payload: &[u8]) -> Result<()> {
        for _ in 0..ROUNDS {
            match self.look(topic, payload) {
                Looked::Fits => return Ok(()),
                Looked::Wrong(why) => return Err(invalid(&why)),
                Looked::Ask(question) => self.ask(&question).await?,
            }
        }
        Err(Error::new(
            ErrorCode::SchemaUnavailable,
            "the schema was forgotten as soon as it was known; too many are in use",
        ))
    }

    /// Asks the registry; afterwards the answer is known.
    ///
    /// # Errors
    /// `SCHEMA_UNAVAILABLE`.
    pub(crate) async fn ask(&self, question: &Question) -> Result<()> {
        match (&self.registry, question) {
            (Some(registry), Question::Id(id)) => registry.learn(*id).await,
            (Some(registry), Question::Latest(subject)) => registry.learn_latest(subject).await,
            (None, _) => Ok(()),
        }
    }

    fn look_fixed(&self, payload: &[u8]) -> Looked {
        match &self.fixed {
            Some((schema, _)) => verdict(schema.check(payload)),
            None => Looked::Fits,
        }
    }

    fn subject(&self, topic: &Topic) -> String {
        match &self.settings.subject {
            Some(subject) => subject.clone(),
            // What the registry's own clients do.
            None => format!("{topic}-value"),
        }
    }
}

/// Looks until the answer is known; more than two only when it was forgotten.
const ROUNDS: usize = 4;

fn verdict(checked: std::result::Result<(), String>) -> Looked {
    match checked {
        Ok(()) => Looked::Fits,
        Err(why) => Looked::Wrong(why),
    }
}

fn read(format: SchemaFormat, file: &Path) -> Result<(Compiled, String)> {
    let wrong = |why: String| {
        Error::rejected(
            ErrorCode::InvalidConfig,
            format!("the schema file {}: {why}", file.display()),
        )
    };
    let text = std::fs::read_to_string(file).map_err(|e| wrong(e.to_string()))?;
    let schema = Compiled::parse(format, &text, &[]).map_err(wrong)?;
    Ok((schema, text))
}

/// The checks of all routes that have one.
pub(crate) type Guards = Arc<std::collections::HashMap<crate::topic::Pattern, Arc<Guard>>>;
