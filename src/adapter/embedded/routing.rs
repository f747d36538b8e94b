//! Which queues a publish reaches: exchanges and bindings of the topology,
//! resolved as AMQP would. Pure.

use crate::{
    error::{Error, ErrorCode, Result},
    topic::Pattern,
    topology::{Binding, ExchangeKind, Topology},
};

/// The names of the queues that `exchange` routes `key` to. The default
/// exchange (empty name) routes to the queue named by the key, known or not.
///
/// # Errors
/// `EXCHANGE_NOT_FOUND`.
pub(super) fn route(topology: &Topology, exchange: &str, key: &str) -> Result<Vec<String>> {
    if exchange.is_empty() {
        return Ok(vec![topology.canonical(key).to_owned()]);
    }
    let Some(spec) = topology.exchanges.iter().find(|e| e.name == exchange) else {
        return Err(Error::new(
            ErrorCode::ExchangeNotFound,
            format!("the topology has no exchange {exchange:?}; add it under topology.exchanges"),
        ));
    };
    Ok(topology
        .queues
        .iter()
        .filter(|q| {
            q.bindings
                .iter()
                .any(|b| b.exchange == exchange && binds(spec.kind, b, key))
        })
        .map(|q| q.name.clone())
        .collect())
}

fn binds(kind: ExchangeKind, binding: &Binding, key: &str) -> bool {
    match kind {
        ExchangeKind::Fanout => true,
        ExchangeKind::Direct => binding.routing_key == key,
        // A binding that is no pattern of ours still matches literally.
        ExchangeKind::Topic => Pattern::new(&binding.routing_key)
            .map_or(binding.routing_key == key, |pattern| pattern.matches(key)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::QueueOptions,
        topology::{ExchangeSpec, QueueSpec},
    };

    fn topology() -> Topology {
        let exchange = |name: &str, kind| ExchangeSpec {
            name: name.into(),
            kind,
            durable: true,
        };
        let queue = |name: &str, exchange: &str, key: &str| QueueSpec {
            name: name.into(),
            options: QueueOptions::default(),
            bindings: vec![Binding {
                exchange: exchange.into(),
                routing_key: key.into(),
            }],
            aliases: Vec::new(),
        };
        Topology {
            exchanges: vec![
                exchange("direct", ExchangeKind::Direct),
                exchange("topic", ExchangeKind::Topic),
                exchange("fanout", ExchangeKind::Fanout),
            ],
            queues: vec![
                queue("d1", "direct", "a"),
                queue("d2", "direct", "b"),
                queue("t1", "topic", "log.*"),
                queue("t2", "topic", "log.#"),
                queue("f1", "fanout", ""),
                queue("f2", "fanout", "x"),
            ],
            ..Topology::default()
        }
    }

    #[test]
    fn exchanges_route_as_amqp_does() {
        let topology = topology();
        for (exchange, key, expected) in [
            ("direct", "a", vec!["d1"]),
            ("direct", "c", vec![]),
            ("topic", "log.x", vec!["t1", "t2"]),
            ("topic", "log.x.y", vec!["t2"]),
            ("fanout", "whatever", vec!["f1", "f2"]),
            ("", "some.queue", vec!["some.queue"]),
        ] {
            assert_eq!(route(&topology, exchange, key).unwrap(), expected);
        }
        assert_eq!(
            route(&topology, "missing", "a").unwrap_err().code(),
            ErrorCode::ExchangeNotFound
        );
    }
}
