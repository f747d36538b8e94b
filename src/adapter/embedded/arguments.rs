//! Queue options: how two differ, and how they are read from arguments by
//! AMQP's names. Pure.

use std::collections::BTreeMap;

use crate::{
    broker::{QueueOptions, QueueType},
    error::{Error, ErrorCode, Result},
};

/// The arguments that differ, with both values.
pub(super) fn differences(
    is: &QueueOptions,
    wanted: &QueueOptions,
) -> Vec<(&'static str, String, String)> {
    let mut found = Vec::new();
    macro_rules! compare {
        ($($field:ident as $name:literal),*) => {
            $(if is.$field != wanted.$field {
                found.push(($name, format!("{:?}", is.$field), format!("{:?}", wanted.$field)));
            })*
        };
    }
    compare!(
        durable as "durable",
        auto_delete as "auto-delete",
        exclusive as "exclusive",
        dead_letter_exchange as "x-dead-letter-exchange",
        dead_letter_routing_key as "x-dead-letter-routing-key",
        message_ttl_ms as "x-message-ttl",
        expires_ms as "x-expires",
        max_length as "x-max-length",
        max_length_bytes as "x-max-length-bytes",
        overflow as "x-overflow",
        max_priority as "x-max-priority",
        dead_letter_strategy as "x-dead-letter-strategy",
        single_active_consumer as "x-single-active-consumer"
    );
    if is.effective_type() != wanted.effective_type() {
        found.push((
            "x-queue-type",
            format!("{:?}", is.effective_type()),
            format!("{:?}", wanted.effective_type()),
        ));
    }
    found
}

/// Queue options from the arguments of a subscription, by AMQP's names.
///
/// # Errors
/// `INVALID_CONFIG` that names the argument.
pub(super) fn options_from(arguments: &BTreeMap<String, String>) -> Result<QueueOptions> {
    let mut options = QueueOptions::default();
    for (name, value) in arguments {
        let wrong = || {
            Error::rejected(
                ErrorCode::InvalidConfig,
                format!("queue argument {name} = {value:?} is not understood"),
            )
        };
        let number = || value.parse::<u64>().map_err(|_| wrong());
        match name.as_str() {
            "x-message-ttl" => options.message_ttl_ms = Some(number()?),
            "x-expires" => options.expires_ms = Some(number()?),
            "x-max-length" => options.max_length = Some(number()?),
            "x-max-length-bytes" => options.max_length_bytes = Some(number()?),
            "x-overflow" => options.overflow = Some(value.clone()),
            "x-dead-letter-exchange" => options.dead_letter_exchange = Some(value.clone()),
            "x-dead-letter-routing-key" => {
                options.dead_letter_routing_key = Some(value.clone());
            }
            "x-dead-letter-strategy" => options.dead_letter_strategy = Some(value.clone()),
            "x-max-priority" => {
                options.max_priority = Some(value.parse().map_err(|_| wrong())?);
            }
            "x-single-active-consumer" => {
                options.single_active_consumer = value.parse().map_err(|_| wrong())?;
            }
            "x-queue-type" => {
                options.queue_type = Some(match value.as_str() {
                    "quorum" => QueueType::Quorum,
                    "classic" => QueueType::Classic,
                    _ => return Err(wrong()),
                });
            }
            _ => return Err(wrong()),
        }
    }
    Ok(options)
}
