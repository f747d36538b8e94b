//! The YAML form: the same fields as [`MessagingConfig`], and `topology` either
//! as a section or as a mode. It refuses keys that it does not know.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::{
    FallbackSettings, HubSettings, LogConfig, MessagingConfig, SchemasSettings, ServerConfig,
    environment, source,
};
use crate::{
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    topology::{ExchangeSpec, QueueSpec, TopicSpec, Topology, TopologyMode},
};

/// Reads a file's text; `${NAME}` comes from `env`.
pub(super) fn parse(
    text: &str,
    name: &str,
    env: &BTreeMap<String, String>,
) -> crate::error::Result<MessagingConfig> {
    // A file of comments alone is the empty configuration.
    let blank = |line: &str| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line == "---"
    };
    if text.lines().all(blank) {
        return Ok(MessagingConfig::builtin());
    }
    source::refuse_quoted_reference(text, name)?;
    let properties = env
        .iter()
        .filter(|(name, value)| !environment::is_service_link(name, value))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let options = serde_saphyr::options! {
        // Own snippets: they hide secrets that stand in the file itself.
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_documents: 1,
            max_events: MAX_EVENTS,
            max_property_expansion_depth: 16,
            max_total_property_interpolation_work: 16 * 1024 * 1024,
        },
    }
    .with_properties(properties);
    serde_saphyr::from_str_with_options::<FileConfig>(text, options)
        .map(FileConfig::into_config)
        .map_err(|e| source::explain(&e, text, name, env))
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FileConfig {
    enabled: bool,
    fallback: FallbackSettings,
    hub: HubSettings,
    #[serde(deserialize_with = "section")]
    rabbitmq: Option<RabbitMqConfig>,
    #[serde(deserialize_with = "section")]
    kafka: Option<KafkaConfig>,
    topology: TopologyKey,
    topology_mode: Option<TopologyMode>,
    schemas: SchemasSettings,
    server: ServerConfig,
    max_message_bytes: u64,
    data_dir: Option<PathBuf>,
    log: LogConfig,
}

impl Default for FileConfig {
    fn default() -> Self {
        let config = MessagingConfig::builtin();
        Self {
            enabled: config.enabled,
            fallback: config.fallback,
            hub: config.hub,
            rabbitmq: None,
            kafka: None,
            topology: TopologyKey::Section(Box::default()),
            topology_mode: None,
            schemas: config.schemas,
            server: config.server,
            max_message_bytes: config.max_message_bytes,
            data_dir: None,
            log: config.log,
        }
    }
}

impl FileConfig {
    fn into_config(self) -> MessagingConfig {
        let (topology, mode) = match self.topology {
            TopologyKey::Mode(mode) => (Topology::helixagent(), Some(mode)),
            TopologyKey::Section(section) => (section.into_topology(), None),
        };
        MessagingConfig {
            enabled: self.enabled,
            fallback: self.fallback,
            hub: self.hub,
            rabbitmq: self.rabbitmq,
            kafka: self.kafka,
            topology,
            topology_mode: self.topology_mode.or(mode).unwrap_or_default(),
            schemas: self.schemas,
            server: self.server,
            max_message_bytes: self.max_message_bytes,
            data_dir: self.data_dir,
            log: self.log,
            warnings: Vec::new(),
        }
    }
}

/// A broker is used where its section stands. A key with nothing below it leaves
/// open what is meant.
fn section<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    match Option::<T>::deserialize(d)? {
        Some(section) => Ok(Some(section)),
        None => Err(serde::de::Error::custom(
            "an empty section; write {} to use the broker with the defaults, or leave the key out",
        )),
    }
}

/// `topology: check`, or `topology:` with entries.
enum TopologyKey {
    Mode(TopologyMode),
    Section(Box<TopologySection>),
}

impl<'de> Deserialize<'de> for TopologyKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = TopologyKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("apply, check or ignore, or a section with queues and topics")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<TopologyKey, E> {
                match text {
                    "apply" => Ok(TopologyKey::Mode(TopologyMode::Apply)),
                    "check" => Ok(TopologyKey::Mode(TopologyMode::Check)),
                    "ignore" => Ok(TopologyKey::Mode(TopologyMode::Ignore)),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<TopologyKey, E> {
                Ok(TopologyKey::Section(Box::default()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TopologyKey, A::Error> {
                TopologySection::deserialize(MapAccessDeserializer::new(map))
                    .map(|section| TopologyKey::Section(Box::new(section)))
            }
        }

        d.deserialize_any(Either)
    }
}

/// Entries to add to the built-in topology, or to replace those of the same
/// name; with `defaults: false` they are all there is.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TopologySection {
    defaults: bool,
    exchanges: Vec<ExchangeSpec>,
    queues: Vec<QueueSpec>,
    topics: Vec<TopicSpec>,
    groups: Vec<String>,
    event_exchange: Option<String>,
    retry_exchange: Option<String>,
    dead_letter_queue: Option<String>,
    dead_letter_topic: Option<String>,
}

impl Default for TopologySection {
    fn default() -> Self {
        Self {
            defaults: true,
            exchanges: Vec::new(),
            queues: Vec::new(),
            topics: Vec::new(),
            groups: Vec::new(),
            event_exchange: None,
            retry_exchange: None,
            dead_letter_queue: None,
            dead_letter_topic: None,
        }
    }
}

impl TopologySection {
    fn into_topology(self) -> Topology {
        let mut base = if self.defaults {
            Topology::helixagent()
        } else {
            Topology::default()
        };
        overlay(&mut base.exchanges, self.exchanges, |e| &e.name);
        overlay(&mut base.queues, self.queues, |q| &q.name);
        overlay(&mut base.topics, self.topics, |t| &t.name);
        overlay(&mut base.groups, self.groups, |g| g);
        base.event_exchange = self.event_exchange.or(base.event_exchange);
        base.retry_exchange = self.retry_exchange.or(base.retry_exchange);
        base.dead_letter_queue = self.dead_letter_queue.or(base.dead_letter_queue);
        base.dead_letter_topic = self.dead_letter_topic.or(base.dead_letter_topic);
        base
    }
}

/// Only the built-in entries can be replaced: two of one name in the file stay
/// two, so that validation reports them.
fn overlay<T>(base: &mut Vec<T>, added: Vec<T>, name: impl Fn(&T) -> &String) {
    let mut builtin = base.len();
    for item in added {
        let same = base
            .get(..builtin)
            .and_then(|known| known.iter().position(|b| name(b) == name(&item)));
        match same.and_then(|i| base.get_mut(i)) {
            Some(known) => *known = item,
            None => base.push(item),
        }
        builtin = builtin.min(base.len());
    }
}

/// Far above any real file, and far below what would hold up a start.
const MAX_EVENTS: usize = 200_000;
