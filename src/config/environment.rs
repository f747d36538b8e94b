//! Reads the environment into the configuration. An empty variable counts as
//! not set, since compose files pass unset ones on as empty. Which variables
//! there are stands in `variables`.

use std::collections::BTreeMap;

use super::{
    MessagingConfig, redact,
    variables::{Effect, VARIABLES, Variable, boolean},
};
use crate::{
    adapter::{kafka::KafkaConfig, rabbitmq::RabbitMqConfig},
    error::{Error, ErrorCode, Result},
};

/// The environment of this process.
pub(super) fn of_process() -> Result<BTreeMap<String, String>> {
    let mut env = BTreeMap::new();
    for (name, value) in std::env::vars_os() {
        // Names and values that are no text are somebody else's, unless we would
        // have read them.
        let Some(name) = name.to_str() else { continue };
        match value.into_string() {
            Ok(value) => {
                env.insert(name.to_owned(), value);
            }
            Err(_) if known(name).is_some() => {
                return Err(invalid(format!("{name}: the value is not UTF-8")));
            }
            Err(_) => {}
        }
    }
    Ok(env)
}

/// Changes the configuration as the variables say.
pub(super) fn apply(config: &mut MessagingConfig, env: &BTreeMap<String, String>) -> Result<()> {
    let env = Env(env);
    let mut problems = Vec::new();
    let mut warnings = Vec::new();
    env.switch_brokers(config, &mut problems);
    let url_in_file = config.rabbitmq.as_ref().is_some_and(|r| {
        r.url
            .as_ref()
            .is_some_and(|url| !url.expose().trim().is_empty())
    });
    for variable in VARIABLES {
        let Some(value) = env.get(variable.name) else {
            continue;
        };
        let result = match &variable.effect {
            Effect::Alternative(first) => match (env.get(first), known(first)) {
                (Some(other), _) => {
                    if other != value {
                        warnings.push(format!(
                            "{} differs from {first}, which holds",
                            variable.name
                        ));
                    }
                    Ok(())
                }
                (None, Some(first)) => set(config, first, value, &mut warnings, variable.name),
                (None, None) => Ok(()),
            },
            _ => set(config, variable, value, &mut warnings, variable.name),
        };
        if let Err(expected) = result {
            problems.push(describe(variable, value, expected));
        }
    }
    if url_in_file && env.get("RABBITMQ_URL").is_none() {
        url_or_parts(config, &env, &mut warnings);
    }
    warnings.extend(env.unknown());
    config.warnings.extend(warnings);
    if problems.is_empty() {
        Ok(())
    } else {
        Err(invalid(problems.join("\n")))
    }
}

/// Whether this is a variable that Kubernetes and old Docker links make for a
/// service that is called rabbitmq or kafka: its value would be read as a port.
pub(super) fn is_service_link(name: &str, value: &str) -> bool {
    name.ends_with("_PORT") && value.starts_with("tcp://")
}

struct Env<'a>(&'a BTreeMap<String, String>);

impl Env<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.get(name)?;
        (!value.is_empty() && !is_service_link(name, value)).then_some(value.as_str())
    }

    /// Makes the sections that the environment asks for.
    fn switch_brokers(&self, config: &mut MessagingConfig, problems: &mut Vec<String>) {
        let mut switch = |name: &'static str| {
            let value = self.get(name)?;
            match boolean(value) {
                Ok(on) => Some(on),
                Err(expected) => {
                    problems.push(format!("{name}={value:?}: {expected}"));
                    None
                }
            }
        };
        let rabbitmq = switch("RABBITMQ_ENABLED");
        let kafka = switch("KAFKA_ENABLED");
        if rabbitmq == Some(true) || self.any(&["RABBITMQ_URL", "RABBITMQ_HOST"]) {
            config.rabbitmq.get_or_insert_with(RabbitMqConfig::default);
        }
        if kafka == Some(true) || self.any(&["KAFKA_BROKERS", "KAFKA_BROKER"]) {
            config.kafka.get_or_insert_with(KafkaConfig::default);
        }
        if let (Some(section), Some(on)) = (&mut config.rabbitmq, rabbitmq) {
            section.enabled = on;
        }
        if let (Some(section), Some(on)) = (&mut config.kafka, kafka) {
            section.enabled = on;
        }
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some())
    }

    /// Variables with our prefixes that nothing reads: probably misspelt.
    fn unknown(&self) -> Vec<String> {
        self.0
            .keys()
            .filter(|name| {
                PREFIXES.iter().any(|p| name.starts_with(p))
                    && known(name).is_none()
                    && !is_service_link_name(name)
            })
            .map(|name| format!("{name} is not a variable of this version; it has no effect"))
            .collect()
    }
}

fn set(
    config: &mut MessagingConfig,
    variable: &Variable,
    value: &str,
    warnings: &mut Vec<String>,
    spelt: &str,
) -> Result<(), &'static str> {
    match &variable.effect {
        Effect::Hub(set) => set(config, value),
        Effect::RabbitMq(set) => match &mut config.rabbitmq {
            Some(section) => set(section, value),
            None => {
                warnings.push(format!(
                    "{spelt} has no effect: RabbitMQ is not used (set RABBITMQ_HOST or RABBITMQ_URL)"
                ));
                Ok(())
            }
        },
        Effect::Kafka(set) => match &mut config.kafka {
            Some(section) => set(section, value),
            None => {
                warnings.push(format!(
                    "{spelt} has no effect: Kafka is not used (set KAFKA_BROKERS)"
                ));
                Ok(())
            }
        },
        Effect::Credential(set) => {
            // Without RabbitMQ they are the server's own variables, and no sign
            // of a mistake.
            if let Some(section) = &mut config.rabbitmq {
                set(section, value);
            }
            Ok(())
        }
        Effect::Refused(why) => Err(why),
        Effect::Alternative(_) | Effect::Switch | Effect::CommandLine => Ok(()),
    }
}

/// The file has an address, the environment has parts of one.
fn url_or_parts(config: &mut MessagingConfig, env: &Env<'_>, warnings: &mut Vec<String>) {
    let Some(section) = &mut config.rabbitmq else {
        return;
    };
    if env.get("RABBITMQ_HOST").is_some() {
        section.url = None;
        warnings.push(
            "RABBITMQ_HOST replaces rabbitmq.url of the file, with its user, password and virtual host"
                .to_owned(),
        );
        return;
    }
    for part in [
        "RABBITMQ_PORT",
        "RABBITMQ_USER",
        "RABBITMQ_PASSWORD",
        "RABBITMQ_VHOST",
    ] {
        if env.get(part).is_some() {
            warnings.push(format!(
                "{part} has no effect: rabbitmq.url of the file wins over the parts (set RABBITMQ_URL or RABBITMQ_HOST)"
            ));
        }
    }
}

fn describe(variable: &Variable, value: &str, expected: &str) -> String {
    if redact::is_secret_name(variable.name) || matches!(variable.effect, Effect::Refused(_)) {
        format!("{}: {expected}", variable.name)
    } else {
        format!("{}={:?}: {expected}", variable.name, redact::address(value))
    }
}

fn known(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|v| v.name == name)
}

/// `RABBITMQ_SERVICE_HOST`, `KAFKA_PORT_9092_TCP_ADDR` and the like.
fn is_service_link_name(name: &str) -> bool {
    PREFIXES.iter().any(|prefix| {
        name.strip_prefix(prefix).is_some_and(|rest| {
            rest.starts_with("SERVICE_") || rest == "PORT" || rest.starts_with("PORT_")
        })
    })
}

fn invalid(message: String) -> Error {
    Error::rejected(ErrorCode::InvalidConfig, message)
}

const PREFIXES: &[&str] = &["MESSAGING_", "RABBITMQ_", "KAFKA_"];
