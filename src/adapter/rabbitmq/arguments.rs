//! From queue options to AMQP arguments. Combinations that RabbitMQ would
//! refuse, or take and ignore, are refused here with the reason.

use std::collections::BTreeMap;

use lapin::{
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable, ShortString},
};

use super::error::unsupported;
use crate::{
    broker::{QueueOptions, QueueType},
    error::Result,
};

/// Declare flags of a queue.
pub(super) fn flags(options: &QueueOptions) -> QueueDeclareOptions {
    QueueDeclareOptions {
        passive: false,
        durable: options.durable,
        exclusive: options.exclusive,
        auto_delete: options.auto_delete,
        nowait: false,
    }
}

/// Arguments of a queue.
///
/// # Errors
/// `INVALID_CONFIG` that names the options which do not go together.
pub(super) fn arguments(queue: &str, options: &QueueOptions) -> Result<FieldTable> {
    check(options).map_err(|why| unsupported(format!("queue {queue}: {why}")))?;
    let mut table = FieldTable::default();
    let mut put = |name: &'static str, value: AMQPValue| {
        table.insert(name.into(), value);
    };
    put(
        "x-queue-type",
        text(match options.effective_type() {
            QueueType::Quorum => "quorum",
            QueueType::Classic => "classic",
        }),
    );
    for (name, value) in [
        ("x-dead-letter-exchange", &options.dead_letter_exchange),
        (
            "x-dead-letter-routing-key",
            &options.dead_letter_routing_key,
        ),
        ("x-overflow", &options.overflow),
        ("x-dead-letter-strategy", &options.dead_letter_strategy),
    ] {
        if let Some(value) = value {
            put(name, text(value));
        }
    }
    for (name, value) in [
        ("x-message-ttl", options.message_ttl_ms),
        ("x-expires", options.expires_ms),
        ("x-max-length", options.max_length),
        ("x-max-length-bytes", options.max_length_bytes),
        ("x-max-priority", options.max_priority.map(u64::from)),
    ] {
        if let Some(value) = value {
            let number = i64::try_from(value).map_err(|_| {
                unsupported(format!(
                    "queue {queue}: {name} {value} is more than RabbitMQ counts"
                ))
            })?;
            put(name, AMQPValue::LongLongInt(number));
        }
    }
    if options.single_active_consumer {
        put("x-single-active-consumer", AMQPValue::Boolean(true));
    }
    Ok(table)
}

/// Adds arguments that were given as text: whole numbers and booleans are sent
/// as such, since RabbitMQ refuses `x-max-length: "10"`.
pub(super) fn overlay(table: &mut FieldTable, given: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in given {
        let key = ShortString::try_new(name.as_str()).map_err(|_| {
            unsupported(format!("queue argument {name:?} is longer than 255 bytes"))
        })?;
        let typed = if let Ok(number) = value.parse::<i64>() {
            AMQPValue::LongLongInt(number)
        } else if let Ok(flag) = value.parse::<bool>() {
            AMQPValue::Boolean(flag)
        } else {
            text(value)
        };
        table.insert(key, typed);
    }
    Ok(())
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn check(options: &QueueOptions) -> Result<(), String> {
    let quorum = options.effective_type() == QueueType::Quorum;
    if quorum {
        if options.max_priority.is_some() {
            return Err(
                "a quorum queue ignores max_priority; leave queue_type out, or set it to classic"
                    .into(),
            );
        }
        for (set, name) in [
            (options.exclusive, "exclusive"),
            (options.auto_delete, "auto_delete"),
            (!options.durable, "durable: false"),
        ] {
            if set {
                return Err(format!(
                    "a quorum queue cannot have {name}; set queue_type to classic"
                ));
            }
        }
        if options.overflow.as_deref() == Some("reject-publish-dlx") {
            return Err("a quorum queue knows no overflow reject-publish-dlx; use reject-publish, or queue_type classic".into());
        }
    }
    if let Some(overflow) = &options.overflow
        && !["drop-head", "reject-publish", "reject-publish-dlx"].contains(&overflow.as_str())
    {
        return Err(format!(
            "overflow {overflow:?} is none of drop-head, reject-publish, reject-publish-dlx"
        ));
    }
    match options.dead_letter_strategy.as_deref() {
        None | Some("at-most-once") => {}
        Some("at-least-once") => {
            if !quorum {
                return Err("dead_letter_strategy at-least-once needs a quorum queue".into());
            }
            if options.overflow.as_deref() != Some("reject-publish") {
                return Err(
                    "dead_letter_strategy at-least-once needs overflow reject-publish".into(),
                );
            }
            if options.dead_letter_exchange.is_none() {
                return Err(
                    "dead_letter_strategy at-least-once needs a dead_letter_exchange".into(),
                );
            }
        }
        Some(other) => {
            return Err(format!(
                "dead_letter_strategy {other:?} is neither at-most-once nor at-least-once"
            ));
        }
    }
    if options.dead_letter_routing_key.is_some() && options.dead_letter_exchange.is_none() {
        return Err("dead_letter_routing_key needs a dead_letter_exchange".into());
    }
    if options.expires_ms == Some(0) {
        return Err("expires_ms must be more than 0".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> QueueOptions {
        QueueOptions::default()
    }

    #[test]
    fn a_queue_is_quorum_unless_an_option_needs_classic() {
        let kind = |o: &QueueOptions| match arguments("q", o).unwrap().inner().get("x-queue-type") {
            Some(AMQPValue::LongString(s)) => s.to_string(),
            other => format!("{other:?}"),
        };
        assert_eq!(kind(&options()), "quorum");
        assert_eq!(
            kind(&QueueOptions {
                max_priority: Some(10),
                ..options()
            }),
            "classic"
        );
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let refused = [
            (
                QueueOptions {
                    queue_type: Some(QueueType::Quorum),
                    max_priority: Some(10),
                    ..options()
                },
                "max_priority",
            ),
            (
                QueueOptions {
                    queue_type: Some(QueueType::Quorum),
                    exclusive: true,
                    ..options()
                },
                "exclusive",
            ),
            (
                QueueOptions {
                    dead_letter_strategy: Some("at-least-once".into()),
                    dead_letter_exchange: Some(String::new()),
                    ..options()
                },
                "reject-publish",
            ),
            (
                QueueOptions {
                    overflow: Some("drop".into()),
                    ..options()
                },
                "overflow",
            ),
            (
                QueueOptions {
                    dead_letter_routing_key: Some("dlq".into()),
                    ..options()
                },
                "dead_letter_exchange",
            ),
        ];
        for (options, word) in refused {
            let error = arguments("q", &options).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("queue q"), "{error}");
        }
    }

    #[test]
    fn arguments_given_as_text_get_their_type() {
        let mut table = FieldTable::default();
        let given = [("x-max-length", "10"), ("x-a", "true"), ("x-b", "text")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        overlay(&mut table, &given).unwrap();
        assert_eq!(
            table.inner().get("x-max-length"),
            Some(&AMQPValue::LongLongInt(10))
        );
        assert_eq!(table.inner().get("x-a"), Some(&AMQPValue::Boolean(true)));
    }
}
