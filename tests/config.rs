//! The configuration from the outside: the documented blocks as they are
//! written, what beats what, and every bad input with the message that somebody
//! reads.
#![cfg(feature = "yaml")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{collections::BTreeMap, time::Duration};

use messaging_hub::{
    adapter::{
        kafka::{KafkaConfig, config::RequiredAcks},
        rabbitmq::RabbitMqConfig,
    },
    broker::{Compression, QueueType},
    config::{LogFormat, MessagingConfig, RouteKind, VARIABLES},
    topology::{Topology, TopologyMode},
};
use proptest::prelude::*;

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn load(text: &str, pairs: &[(&str, &str)]) -> MessagingConfig {
    MessagingConfig::from_yaml_str(text, &env(pairs)).unwrap()
}

fn from_env(pairs: &[(&str, &str)]) -> MessagingConfig {
    MessagingConfig::from_env_map(&env(pairs)).unwrap()
}

fn refusal(text: &str, pairs: &[(&str, &str)]) -> String {
    MessagingConfig::from_yaml_str(text, &env(pairs))
        .unwrap_err()
        .message()
        .to_owned()
}

fn env_refusal(pairs: &[(&str, &str)]) -> String {
    MessagingConfig::from_env_map(&env(pairs))
        .unwrap_err()
        .message()
        .to_owned()
}

const BLOCKS: &str = "\
rabbitmq:
  host: ${RABBITMQ_HOST:-localhost}
  port: ${RABBITMQ_PORT:-5672}
  username: ${RABBITMQ_USER:-helixagent}
  password: ${RABBITMQ_PASSWORD:-helixagent123}
  publisher_confirm: true
  prefetch_count: 10
kafka:
  brokers:
    - ${KAFKA_BROKER:-localhost:9092}
  client_id: ${KAFKA_CLIENT_ID:-helixagent}
  group_id: ${KAFKA_GROUP_ID:-helixagent-group}
  compression: lz4
  required_acks: all
";

/// Every kind of secret that a file can have.
const FULL: &str = "\
log: {level: info}
rabbitmq:
  host: localhost
  password: S3cretLit3ral
  port: 5672
  management_url: http://me:S3cretAd2ress@localhost:15672
kafka:
  brokers: [localhost:9092]
  linger: 5ms
  sasl:
    mechanism: PLAIN
    username: me
    password: 'S3cret Lit3ral: M0re'
server:
  http: 127.0.0.1:8090
";

const ENVIRONMENT: &[(&str, &str)] = &[
    ("MESSAGING_ENABLED", "true"),
    ("MESSAGING_FALLBACK_INMEMORY", "true"),
    ("RABBITMQ_HOST", "localhost"),
    ("RABBITMQ_PORT", "5672"),
    ("RABBITMQ_USER", "helixagent"),
    ("RABBITMQ_PASSWORD", "secret"),
    ("RABBITMQ_VHOST", "/"),
    ("KAFKA_BROKERS", "localhost:9092"),
    ("KAFKA_CLIENT_ID", "helixagent"),
    ("KAFKA_GROUP_ID", "helixagent-group"),
];

#[test]
fn the_documented_yaml_block_works_as_it_is_written() {
    let config = load(BLOCKS, &[]);
    let rabbitmq = config.active_rabbitmq().unwrap();
    assert_eq!(rabbitmq.host, "localhost");
    assert_eq!(rabbitmq.port, Some(5672));
    assert_eq!(rabbitmq.username, "helixagent");
    assert_eq!(rabbitmq.password.expose(), "helixagent123");
    assert!(rabbitmq.publisher_confirm);
    assert_eq!(rabbitmq.prefetch_count, 10);
    let kafka = config.active_kafka().unwrap();
    assert_eq!(kafka.brokers, ["localhost:9092"]);
    assert_eq!(kafka.client_id, "helixagent");
    assert_eq!(kafka.group_id, "helixagent-group");
    assert_eq!(kafka.compression, Compression::Lz4);
    assert_eq!(kafka.required_acks, RequiredAcks::All);
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn the_documented_yaml_block_takes_values_from_the_environment() {
    let config = load(
        BLOCKS,
        &[
            ("RABBITMQ_HOST", "rabbit.internal"),
            ("RABBITMQ_PORT", "5673"),
            ("RABBITMQ_PASSWORD", "p: #{}\"'[b]&*!%@`\\"),
            ("KAFKA_BROKER", "one:9092, two:9093"),
        ],
    );
    let rabbitmq = config.active_rabbitmq().unwrap();
    assert_eq!(rabbitmq.host, "rabbit.internal");
    assert_eq!(rabbitmq.port, Some(5673));
    assert_eq!(rabbitmq.password.expose(), "p: #{}\"'[b]&*!%@`\\");
    assert_eq!(
        config.active_kafka().unwrap().brokers,
        ["one:9092", "two:9093"]
    );
}

#[test]
fn the_documented_environment_works_as_it_is_written() {
    let config = from_env(ENVIRONMENT);
    let rabbitmq = config.active_rabbitmq().unwrap();
    assert_eq!(rabbitmq.port, Some(5672));
    assert_eq!(rabbitmq.username, "helixagent");
    assert_eq!(rabbitmq.password.expose(), "secret");
    assert_eq!(rabbitmq.vhost, "/");
    let kafka = config.active_kafka().unwrap();
    assert_eq!(kafka.brokers, ["localhost:9092"]);
    assert!(config.fallback.enabled && config.hub.fallback_enabled);
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn nothing_set_means_no_broker_and_the_built_in_topology() {
    let config = from_env(&[]);
    assert_eq!(config, MessagingConfig::builtin());
    assert!(config.active_rabbitmq().is_none() && config.active_kafka().is_none());
    assert_eq!(config.topology, Topology::helixagent());
    assert_eq!(config.server.http, "127.0.0.1:8090");
    assert_eq!(load("", &[]), config);
    assert_eq!(load("# only a comment\n", &[]), config);
}

#[test]
fn the_environment_beats_the_file_and_the_file_beats_the_default() {
    let file = "\
log: {level: debug}
max_message_bytes: 1000000
hub: {spool: {drain_rate: 40}}
rabbitmq: {host: from-file, prefetch_count: 7}
";
    let plain = load(file, &[]);
    assert_eq!(plain.log.level, "debug");
    assert_eq!(plain.hub.spool.drain_rate, 40);
    assert_eq!(plain.rabbitmq.as_ref().unwrap().prefetch_count, 7);
    let config = load(
        file,
        &[
            ("MESSAGING_LOG", "warn"),
            ("MESSAGING_LOG_FORMAT", "json"),
            ("MESSAGING_SPOOL_DRAIN_RATE", "250"),
            ("RABBITMQ_HOST", "from-env"),
        ],
    );
    assert_eq!(config.log.level, "warn");
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.hub.spool.drain_rate, 250);
    assert_eq!(config.max_message_bytes, 1_000_000);
    let rabbitmq = config.rabbitmq.unwrap();
    assert_eq!(rabbitmq.host, "from-env");
    assert_eq!(rabbitmq.prefetch_count, 7);
    assert_eq!(rabbitmq.heartbeat, Duration::from_secs(5));
}

#[test]
fn a_broker_is_used_when_it_is_named_unless_it_is_switched_off() {
    for (text, pairs, rabbitmq, kafka) in [
        ("", &[("RABBITMQ_URL", "amqp://h")] as &[_], true, false),
        ("", &[("RABBITMQ_HOST", "h")], true, false),
        ("", &[("RABBITMQ_HOST", "")], false, false),
        ("", &[("RABBITMQ_USER", "u")], false, false),
        ("", &[("KAFKA_BROKER", "h:1")], false, true),
        ("", &[("KAFKA_BROKERS", "h:1")], false, true),
        ("rabbitmq: {}\nkafka: {}", &[], true, true),
        ("rabbitmq: {enabled: false}", &[], false, false),
        (
            "rabbitmq: {enabled: false}",
            &[("RABBITMQ_HOST", "h")],
            false,
            false,
        ),
        (
            "rabbitmq: {enabled: false}",
            &[("RABBITMQ_ENABLED", "true")],
            true,
            false,
        ),
        (
            "rabbitmq: {}\nkafka: {}",
            &[("KAFKA_ENABLED", "false")],
            true,
            false,
        ),
        (
            "rabbitmq: {}\nkafka: {}",
            &[("MESSAGING_ENABLED", "false")],
            false,
            false,
        ),
    ] {
        let config = load(text, pairs);
        assert_eq!(
            (
                config.active_rabbitmq().is_some(),
                config.active_kafka().is_some()
            ),
            (rabbitmq, kafka),
            "{text:?} {pairs:?}"
        );
    }
}

#[test]
fn alternative_names_are_read_and_the_first_name_holds() {
    let config = from_env(&[
        ("KAFKA_BROKER", "old:1"),
        ("KAFKA_CONSUMER_GROUP", "g"),
        ("MESSAGING_FALLBACK_ENABLED", "false"),
    ]);
    assert_eq!(config.kafka.as_ref().unwrap().brokers, ["old:1"]);
    assert_eq!(config.kafka.unwrap().group_id, "g");
    assert!(!config.fallback.enabled && !config.hub.fallback_enabled);
    let config = from_env(&[("KAFKA_BROKER", "old:1"), ("KAFKA_BROKERS", "new:1,new:2")]);
    assert_eq!(config.kafka.unwrap().brokers, ["new:1", "new:2"]);
    assert_eq!(
        config.warnings,
        ["KAFKA_BROKER differs from KAFKA_BROKERS, which holds"]
    );
}

#[test]
fn the_servers_own_credentials_count_only_where_nothing_else_gives_them() {
    let own: &[(&str, &str)] = &[
        ("RABBITMQ_HOST", "h"),
        ("RABBITMQ_DEFAULT_USER", "stage7"),
        ("RABBITMQ_DEFAULT_PASS", "p4"),
        ("RABBITMQ_DEFAULT_VHOST", "v"),
    ];
    let r = from_env(own).rabbitmq.unwrap();
    assert_eq!(
        (r.username.as_str(), r.password.expose(), r.vhost.as_str()),
        ("stage7", "p4", "v")
    );
    let mut both = own.to_vec();
    both.push(("RABBITMQ_USER", "me"));
    both.push(("RABBITMQ_PASSWORD", "mine"));
    let r = from_env(&both).rabbitmq.unwrap();
    assert_eq!(
        (r.username.as_str(), r.password.expose(), r.vhost.as_str()),
        ("me", "mine", "v")
    );
}

#[test]
fn an_address_wins_over_the_parts_and_may_be_several() {
    let urls = "amqp://u:p,w@one:5672,amqps://u:p@two:5671/v";
    let config = from_env(&[("RABBITMQ_URL", urls), ("RABBITMQ_HOST", "ignored")]);
    assert_eq!(
        config
            .rabbitmq
            .as_ref()
            .unwrap()
            .url
            .as_ref()
            .unwrap()
            .expose(),
        urls
    );
    assert_eq!(
        config.redacted()["rabbitmq"]["url"],
        "amqp://***@one:5672,amqps://***@two:5671/v"
    );
    assert_eq!(
        env_refusal(&[(
            "RABBITMQ_URL",
            "amqp://u:s3cret@one,two:5672,http://x:s3cret@y"
        )]),
        "rabbitmq.url: every address must begin with amqp:// or amqps:// (several are separated by commas)"
    );
}

#[test]
fn parts_in_the_environment_against_an_address_in_the_file_are_told() {
    let file = "rabbitmq:\n  url: amqp://u:p@file\n";
    let config = load(file, &[("RABBITMQ_HOST", "env")]);
    assert_eq!(config.rabbitmq.as_ref().unwrap().url, None);
    assert_eq!(config.warnings.len(), 1);
    let config = load(file, &[("RABBITMQ_PASSWORD", "x")]);
    assert_eq!(
        config.warnings,
        [
            "RABBITMQ_PASSWORD has no effect: rabbitmq.url of the file wins over the parts (set RABBITMQ_URL or RABBITMQ_HOST)"
        ]
    );
}

#[test]
fn variables_that_nothing_reads_are_warned_about_and_service_links_are_not() {
    let config = load(
        BLOCKS,
        &[
            ("RABBITMQ_PASWORD", "hidden-value"),
            ("KAFKA_SERVICE_HOST", "10.0.0.1"),
            ("KAFKA_PORT_9092_TCP_ADDR", "10.0.0.1"),
            ("RABBITMQ_PORT", "tcp://10.0.0.1:5672"),
            ("PATH", "/bin"),
        ],
    );
    assert_eq!(
        config.warnings,
        ["RABBITMQ_PASWORD is not a variable of this version; it has no effect"]
    );
    assert_eq!(config.rabbitmq.unwrap().port, Some(5672));
    let config = from_env(&[("KAFKA_CLIENT_ID", "x"), ("RABBITMQ_VHOST", "v")]);
    assert_eq!(
        config.warnings,
        [
            "RABBITMQ_VHOST has no effect: RabbitMQ is not used (set RABBITMQ_HOST or RABBITMQ_URL)",
            "KAFKA_CLIENT_ID has no effect: Kafka is not used (set KAFKA_BROKERS)",
        ]
    );
}

#[test]
fn http_port_moves_http_and_the_native_name_wins() {
    assert_eq!(
        from_env(&[("HTTP_PORT", "8080")]).server.http,
        "127.0.0.1:8080"
    );
    assert_eq!(
        from_env(&[("HTTP_PORT", "8080"), ("MESSAGING_HTTP_ADDR", "[::1]:9")])
            .server
            .http,
        "[::1]:9"
    );
}

#[test]
fn what_asks_for_the_tcp_gateway_is_refused_by_name() {
    for name in [
        "TCP_PORT",
        "DELIVERY_MODE",
        "MAX_CONSUMERS",
        "CONSUMER_CHANNEL_BUFFER_SIZE",
        "MESSAGING_TCP_ADDR",
    ] {
        assert_eq!(
            env_refusal(&[(name, "9080")]),
            format!("{name}: asks for the TCP gateway, which this version does not have; unset it")
        );
    }
    assert_eq!(
        refusal("server: {tcp: '127.0.0.1:9080'}", &[]),
        "server.tcp: this version has no TCP gateway; leave it out"
    );
}

#[test]
fn wrong_variables_are_named_all_at_once_and_secrets_are_not_shown() {
    assert_eq!(
        env_refusal(&[
            ("MESSAGING_ENABLED", "perhaps"),
            ("RABBITMQ_HOST", "h"),
            ("RABBITMQ_PORT", "56x"),
            ("RABBITMQ_HEARTBEAT", "often"),
            ("KAFKA_ENABLED", "si"),
            ("KAFKA_BROKERS", "h:1"),
            ("KAFKA_REQUIRED_ACKS", "1"),
        ]),
        "KAFKA_ENABLED=\"si\": expected true or false
MESSAGING_ENABLED=\"perhaps\": expected true or false
RABBITMQ_PORT=\"56x\": expected a port, 1 to 65535
RABBITMQ_HEARTBEAT=\"often\": expected a time such as 500ms, 5s, 2m or 1h
KAFKA_REQUIRED_ACKS=\"1\": expected all, leader or none"
    );
    let shown = env_refusal(&[("RABBITMQ_URL", "ampq://u:s3cretword@h")]);
    assert!(!shown.contains("s3cretword"), "{shown}");
}

#[test]
fn an_unknown_key_is_shown_with_its_line_and_the_keys_that_exist() {
    assert_eq!(
        refusal("kafka:\n  sasl:\n    user: x\n", &[]),
        "configuration:3:5: unknown field `user`, expected one of mechanism, username, password
  |
3 |     user: ***
  |     ^"
    );
    assert!(
        refusal("rabitmq: {}\n", &[])
            .starts_with("configuration:1:1: unknown field `rabitmq`, expected one of enabled, fallback, hub, rabbitmq, kafka,")
    );
}

#[test]
fn a_wrong_type_is_shown_with_its_line_and_what_was_expected() {
    for (text, expected) in [
        (
            "rabbitmq:\n  port: abc\n",
            "configuration:2:9: expected a whole number from 0 to 65535\n  |\n2 |   port: abc\n  |         ^",
        ),
        (
            "kafka:\n  linger: soon\n",
            "configuration:2:11: \"soon\" is not a duration; write 500ms, 5s, 2m, 1h, 7d or milliseconds\n  |\n2 |   linger: soon\n  |           ^",
        ),
        (
            "kafka:\n  compression: lz5\n",
            "configuration:2:16: unknown variant `lz5`, expected one of none, gzip, snappy, lz4, zstd\n  |\n2 |   compression: lz5\n  |                ^",
        ),
        (
            "enabled: 12\n",
            "configuration:1:10: expected true or false\n  |\n1 | enabled: 12\n  |          ^",
        ),
        (
            "hub: [1]\n",
            "configuration:1:6: expected a section: keys with their values\n  |\n1 | hub: [1]\n  |      ^",
        ),
        (
            "enabled: true\nenabled: false\n",
            "configuration:2:1: the key enabled stands twice\n  |\n2 | enabled: false\n  | ^",
        ),
        (
            "kafka:\n",
            "configuration:1:6: an empty section; write {} to use the broker with the defaults, or leave the key out\n  |\n1 | kafka:\n  |      ^",
        ),
        (
            "hub:\n  routes:\n    - {pattern: 'a b', kind: task}\n",
            "configuration:3:17: pattern \"a b\": the character ' ' cannot be part of a topic\n  |\n3 |     - {pattern: 'a b', kind: task}\n  |                 ^",
        ),
    ] {
        assert_eq!(refusal(text, &[]), expected);
    }
}

#[test]
fn a_missing_secret_is_named_with_its_hint() {
    assert_eq!(
        refusal("rabbitmq:\n  password: ${SECRET:?put it into .env}\n", &[]),
        "configuration:2:13: the variable SECRET is not set: put it into .env\n  |\n2 |   password: ***\n  |             ^"
    );
    assert_eq!(
        refusal("rabbitmq:\n  host: ${WHERE}\n", &[]),
        "configuration:2:9: the variable WHERE is not set; set it, or write ${WHERE:-default}\n  |\n2 |   host: ${WHERE}\n  |         ^"
    );
    assert_eq!(
        refusal(
            "rabbitmq:\n  host: ${WHERE:?where is it}\n",
            &[("WHERE", "")]
        ),
        "configuration:2:9: the variable WHERE is empty: where is it\n  |\n2 |   host: ${WHERE:?where is it}\n  |         ^"
    );
}

#[test]
fn quotes_around_a_reference_are_refused_because_they_would_keep_it() {
    assert_eq!(
        refusal("rabbitmq:\n  host: \"${WHERE}\"\n", &[]),
        "configuration:2:10: quotes keep ${...} as it stands; leave them out, or write $${...} if that is meant\n  |\n2 |   host: \"${WHERE}\"\n  |          ^"
    );
    let config = load("rabbitmq:\n  host: h\n  vhost: '$${V}' # \"${V}\"\n", &[]);
    assert_eq!(config.rabbitmq.unwrap().vhost, "$${V}");
}

#[test]
fn no_broken_file_shows_its_secrets() {
    for text in [
        "rabbitmq:\n  pasword: hunter2hunter\n",
        "rabbitmq:\n  password: [hunter2hunter]\n",
        "rabbitmq:\n  password: hunter2hunter: x\n",
        "rabbitmq:\n  password: \"hunter2hunter\n  host: x\n",
        "rabbitmq:\n  password: 'hunter2hunter\n",
        "rabbitmq:\n  password: |\n    hunter2hunter\n  x: }\n",
        "rabbitmq:\n  password:\n    hunter2hunter: [\n",
        "rabbitmq:\n  password: >\n    hunter2hunter\n   bad: [\n",
        "rabbitmq: {host: x, password: hunter2hunter, prefetchh: 3}\n",
        "rabbitmq: {password: hunter2hunter, port: x}\n",
        "rabbitmq:\n  password: @hunter2hunter\n",
        "rabbitmq:\n  password: %hunter2hunter\n",
        "rabbitmq:\n  password: &a *hunter2hunter\n",
        "rabbitmq:\n  password: ${hunter2hunter}x\n  port: y\n",
        "rabbitmq:\n  url: amqp://u:hunter2hunter@h\n  url: x\n",
        "rabbitmq:\n  host: amqp://u:hunter2hunter@h\n",
        "rabbitmq:\n  hosst: amqp://u:hunter2hunter@h\n",
        "rabbitmq:\n  url: http://u:hunter2hunter@h\n",
        "rabbitmq:\n  port: amqp://u:hunter2hunter@h\n",
        "kafka:\n  sasl: {mechanism: PLAN, username: u, password: hunter2hunter}\n",
        "kafka:\n  sasl: {mechanism: PLAIN, username: '', password: hunter2hunter}\n",
        "kafka:\n  settings: {sasl.password: hunter2hunter, a: [}\n",
    ] {
        let shown = MessagingConfig::from_yaml_str(text, &env(&[("OTHER", "x")]))
            .map_or_else(|e| format!("{e} {e:?}"), |c| format!("{c:?}"));
        let named = text.contains("${hunter2hunter}") && !shown.contains(": hunter2hunter");
        assert!(
            named || !shown.contains("hunter2hunter"),
            "{text:?}\n{shown}"
        );
    }
    for text in [
        "rabbitmq:\n  port: ${P}\n",
        "rabbitmq:\n  ${P}: 1\n",
        "log: {format: x}\nkafka:\n  linger: ${P}\n",
        "kafka:\n  compression: ${P}\n",
        "hub:\n  routes:\n  - pattern: ${P}\n    kind: task\n",
        "topology: ${P}\n",
        "topology:\n  queues: ${P}\n",
    ] {
        let shown = refusal(text, &[("P", "hunter2 hunter")]);
        assert!(!shown.contains("hunter2"), "{text:?}\n{shown}");
    }
}

/// Every character left out, and preceded or replaced by every one that means
/// something to YAML.
#[test]
fn a_file_broken_at_any_one_place_shows_no_secret() {
    let whole: Vec<char> = FULL.chars().collect();
    for at in 0..whole.len() {
        let (head, tail) = whole.split_at(at);
        for typo in
            std::iter::once(String::new()).chain("x:[{}\"'#\n ->|&*%@,".chars().map(String::from))
        {
            for rest in [tail, &tail[1..]] {
                let text =
                    head.iter().collect::<String>() + &typo + &rest.iter().collect::<String>();
                let Err(e) = MessagingConfig::from_yaml_str(&text, &BTreeMap::new()) else {
                    continue;
                };
                let shown = format!("{e} {e:?}");
                for secret in ["S3cret", "Lit3ral", "M0re", "Ad2ress"] {
                    assert!(!shown.contains(secret), "{shown}\n---\n{text}");
                }
            }
        }
    }
}

#[test]
fn the_dump_and_the_report_show_no_secret() {
    let config = load(
        "kafka:\n  sasl: {mechanism: PLAIN, username: u, password: hunter2a}\n  settings: {socket.nagle.disable: 'true'}\n",
        &[
            (
                "RABBITMQ_URL",
                "amqp://me:hunter2c@h1,amqp://me:hunt/er2c@h2:1/v",
            ),
            ("RABBITMQ_MANAGEMENT_URL", "http://me:hunter2d@h:15672"),
        ],
    );
    let dump = config.redacted();
    let all = format!("{dump}{}{config:?}", config.report());
    assert!(!all.contains("hunter2") && !all.contains("er2c"), "{all}");
    assert_eq!(dump["kafka"]["settings"]["socket.nagle.disable"], "true");
    assert_eq!(dump["rabbitmq"]["management_url"], "http://***@h:15672");
    assert!(config.report().contains("amqp://***@h2:1/v"));
}

#[test]
fn every_cross_field_problem_is_listed_with_its_path() {
    let text = "\
max_message_bytes: 20000000
hub:
  hedge: {min: 2s, max: 1s}
  retry: {task_delay: 5s}
  spool: {max_bytes: 1000}
  compression: {algorithm: snappy}
  routes:
    - {pattern: 'a.#', kind: task, primary: kafka}
    - {pattern: 'a.#', kind: event, spool: false, during_outage: local}
rabbitmq: {heartbeat: 500ms, prefetch_count: 0, tls: {cert_file: c.pem}}
topology:
  retry_exchange: nowhere
  exchanges:
    - {name: mine, kind: direct}
    - {name: mine, kind: topic}
  queues:
    - {name: q, options: {queue_type: quorum, max_priority: 5, dead_letter_exchange: none}}
    - {name: q, bindings: [{exchange: absent, routing_key: k}]}
  topics:
    - {name: t, options: {partitions: 0, cleanup_policy: shred}}
";
    assert_eq!(
        refusal(text, &[]),
        "\
hub.hedge.max: must not be below hub.hedge.min
hub.compression.algorithm: snappy is Kafka's alone, other brokers' readers would not know it; use zstd, lz4 or gzip
hub.spool.max_bytes: must not be below max_message_bytes, or a message may never fit
hub.routes[0].primary: names kafka, which has no section
hub.routes[0].primary: Kafka has no task queues; use rabbitmq or inmemory, or kind: event
hub.routes[1].pattern: hub.routes[0] has the same pattern and holds
hub.routes[1].during_outage: local hands out spooled messages, and spool is false
rabbitmq.prefetch_count: must be 1 or more; 0 would mean no bound
rabbitmq.heartbeat: must be 1s to 60s: AMQP counts whole seconds, and a dead peer is noticed after twice this
rabbitmq.tls: cert_file and key_file belong together
topology.exchanges[6].name: the exchange mine stands twice
topology.queues[7].options.max_priority: quorum queues ignore it; set queue_type: classic or leave it out
topology.queues[7].options.dead_letter_exchange: the exchange \"none\" is not in exchanges
topology.queues[8].name: the name q stands for two queues
topology.queues[8].bindings[0].exchange: the exchange \"absent\" is not in exchanges
topology.topics[17].options.partitions: must be 1 or more
topology.topics[17].options.cleanup_policy: \"shred\" is none of delete, compact, compact,delete
topology.retry_exchange: the exchange \"nowhere\" is not in exchanges"
    );
    assert_eq!(
        refusal(
            "kafka: {required_acks: leader, linger: 20s, brokers: [], transactional_id: 'a b', transaction_timeout: 1h, settings: {sasl.password: x}}",
            &[]
        ),
        "\
kafka.brokers: must name at least one host:port
kafka.enable_idempotence: needs required_acks: all; set that, or enable_idempotence: false
kafka.linger: must be below kafka.message_timeout
kafka.transactional_id: must be 1 to 200 printable characters without spaces; leave it out for one that is made up
kafka.transaction_timeout: must be 1s to 15m; brokers refuse more unless they are told (transaction.max.timeout.ms)
kafka.settings.sasl.password: a secret has no place here, where it would be shown; use sasl and tls"
    );
}

#[test]
fn a_retry_queue_with_a_fixed_key_is_refused_because_its_messages_vanish() {
    let text = "\
topology:
  queues:
    - name: helixagent.retry
      bindings: [{exchange: helixagent.retry, routing_key: '#'}]
      options: {message_ttl_ms: 60000, dead_letter_exchange: helixagent.tasks, dead_letter_routing_key: '#'}
";
    assert_eq!(
        refusal(text, &[]),
        "\
topology.queues[6].options.dead_letter_routing_key: a retry queue has none, so that a message returns to the queue in its routing key
topology.queues[6].options.dead_letter_exchange: a retry queue needs \"\" (the default exchange)"
    );
}

#[test]
fn the_topology_of_a_file_adds_replaces_or_stands_alone() {
    let add = load(
        "topology:\n  queues: [{name: orders}, {name: helixagent.tasks.llm, aliases: [llm]}]\n",
        &[],
    )
    .topology;
    assert_eq!(add.queues.len(), 8);
    assert_eq!(add.queue("llm").unwrap().options.max_priority, None);
    assert_eq!(add.topics, Topology::helixagent().topics);
    let alone = load("topology: {defaults: false, queues: [{name: orders}]}", &[]).topology;
    assert_eq!(alone.queues.len(), 1);
    assert!(alone.topics.is_empty() && alone.exchanges.is_empty());
    assert_eq!(
        load("topology: check", &[]).topology_mode,
        TopologyMode::Check
    );
    assert_eq!(
        load("topology_mode: ignore", &[]).topology_mode,
        TopologyMode::Ignore
    );
    assert_eq!(
        load("topology: check", &[("MESSAGING_TOPOLOGY_MODE", "apply")]).topology_mode,
        TopologyMode::Apply
    );
}

#[test]
fn the_shipped_file_says_what_holds_without_it() {
    let text = std::fs::read_to_string("configs/messaging.yaml").unwrap();
    let mut config = load(&text, &[]);
    let rabbitmq = config.rabbitmq.take().unwrap();
    assert_eq!(
        rabbitmq,
        RabbitMqConfig {
            port: Some(5672),
            username: "helixagent".to_owned(),
            password: "helixagent123".to_owned().into(),
            ..RabbitMqConfig::default()
        }
    );
    assert_eq!(config.kafka.take().unwrap(), KafkaConfig::default());
    assert_eq!(config, MessagingConfig::builtin());
    // Every variable that the file refers to is a known one.
    for name in text.split("${").skip(1) {
        let name: String = name
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect();
        assert!(VARIABLES.iter().any(|v| v.name == name), "{name}");
    }
}

#[test]
fn the_example_environment_lists_every_variable_and_no_other() {
    let text = std::fs::read_to_string(".env.example").unwrap();
    let listed: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# ")?.split_once('='))
        .filter(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        .collect();
    let known: Vec<(&str, &str)> = VARIABLES.iter().map(|v| (v.name, v.default)).collect();
    assert_eq!(listed, known);
}

#[test]
fn every_default_in_the_table_is_what_holds_without_the_variable() {
    let base = load("rabbitmq: {}\nkafka: {}", &[]);
    for variable in VARIABLES {
        // The port that holds once the variable is used, and TLS changes 5672.
        if variable.default.is_empty() || ["HTTP_PORT", "RABBITMQ_PORT"].contains(&variable.name) {
            continue;
        }
        let config = load(
            "rabbitmq: {}\nkafka: {}",
            &[(variable.name, variable.default)],
        );
        assert_eq!(config, base, "{}", variable.name);
    }
}

#[test]
fn the_built_in_topology_has_what_the_reference_names() {
    let t = Topology::helixagent();
    assert_eq!(t.problems(), []);
    let llm = t.queue("llm").unwrap();
    assert_eq!(llm.options.effective_type(), QueueType::Classic);
    assert_eq!(llm.options.max_priority, Some(10));
    let address = t.amqp_address("background");
    assert_eq!(
        (
            address.exchange.as_str(),
            address.routing_key.as_str(),
            address.queue.as_str()
        ),
        (
            "helixagent.tasks",
            "background",
            "helixagent.tasks.background"
        )
    );
    let retry = &t.queue("helixagent.retry").unwrap().options;
    assert_eq!(retry.effective_type(), QueueType::Quorum);
    assert_eq!(retry.message_ttl_ms, Some(60_000));
    assert_eq!(retry.dead_letter_exchange.as_deref(), Some(""));
    assert_eq!(retry.dead_letter_routing_key, None);
    for queue in t.queues.iter().filter(|q| q.name.contains(".tasks.")) {
        assert_eq!(
            queue.options.dead_letter_exchange.as_deref(),
            Some("helixagent.dlx")
        );
        assert_eq!(
            queue.options.dead_letter_routing_key.as_deref(),
            Some("dlq")
        );
    }
    assert_eq!(t.topics.len(), 17);
    assert_eq!(
        t.topic("helixagent.stream.tokens")
            .unwrap()
            .options
            .partitions,
        12
    );
    assert!(t.topics.iter().all(|t| t.options.compression == "lz4"));
}

#[test]
fn the_built_in_routes_know_tasks_from_events() {
    let routes = MessagingConfig::builtin().hub.effective_routes();
    for (topic, kind) in [
        ("helixagent.tasks.llm", RouteKind::Task),
        ("tasks.mail", RouteKind::Task),
        ("tasks", RouteKind::Task),
        ("task.process", RouteKind::Task),
        ("task", RouteKind::Event),
        ("taskless", RouteKind::Event),
        ("helixagent.events.audit", RouteKind::Event),
        ("event.completed", RouteKind::Event),
        ("user.created", RouteKind::Event),
    ] {
        let route = routes.iter().find(|r| r.pattern.matches(topic)).unwrap();
        assert_eq!(route.kind, kind, "{topic}");
    }
}

#[test]
fn what_a_configuration_weakens_is_said_with_its_clause() {
    let clauses = |config: &MessagingConfig| -> Vec<(String, String)> {
        config
            .weakened()
            .into_iter()
            .map(|w| (w.what, w.clause))
            .collect()
    };
    let has = |config: &MessagingConfig, what: &str, clause: &str| {
        let all = clauses(config);
        assert!(
            all.contains(&(what.to_owned(), clause.to_owned())),
            "{what} is missing in {all:?}"
        );
    };
    has(
        &from_env(&[]),
        "no broker is used, and nothing is kept on a disk",
        "C2, C6",
    );
    let shipped = load(BLOCKS, &[]);
    has(&shipped, "RabbitMQ has a default password", "security");
    has(&shipped, "the fallback keeps messages in memory", "C2, C6");
    has(&shipped, "classic queues: helixagent.tasks.llm", "C2");
    has(&shipped, "every topic has one replica", "C2");
    let weak = load(
        "\
fallback: {enabled: false}
server: {http: '0.0.0.0:8090'}
rabbitmq: {host: far.example, publisher_confirm: false, password: fine}
kafka: {required_acks: leader, enable_idempotence: false, isolation_level: read_uncommitted}
",
        &[],
    );
    has(&weak, "the fallback is off", "C3, C4, C7");
    has(&weak, "HTTP listens on 0.0.0.0:8090", "security");
    has(
        &weak,
        "rabbitmq.publisher_confirm is false",
        "C1, C2, C3, C4",
    );
    has(&weak, "RabbitMQ is reached without TLS", "security");
    has(&weak, "kafka.required_acks is not all", "C1, C2");
    has(&weak, "kafka.enable_idempotence is false", "C5, C6");
    has(&weak, "kafka.isolation_level is read_uncommitted", "C6");
    assert!(
        weak.report()
            .contains("weakened guarantees:\n  the fallback is off (C3, C4, C7): ")
    );
    let by_url = from_env(&[("RABBITMQ_URL", "amqp://stage7:stage7password@rabbitmq:5672")]);
    has(&by_url, "RabbitMQ has a default password", "security");
}

#[test]
fn empty_optional_values_count_as_absent() {
    let config = load(
        "data_dir: ${A:-}\nserver:\n  tcp: ${B:-}\nrabbitmq:\n  url: ${RABBITMQ_URL:-}\n  port: ${C:-}\n",
        &[],
    );
    assert_eq!(config.data_dir, None);
    assert_eq!(config.server.tcp, None);
    let rabbitmq = config.rabbitmq.unwrap();
    assert_eq!((rabbitmq.url, rabbitmq.port), (None, None));
}

#[test]
fn a_missing_file_is_named() {
    let error = MessagingConfig::from_yaml("configs/absent.yaml").unwrap_err();
    assert_eq!(
        error.message(),
        "cannot read the configuration file configs/absent.yaml"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_text_makes_the_loader_panic(text in "\\PC{0,200}|[ a-z:\\-\\[\\]{}\"'$|>&*!%@#,\n]{0,120}") {
        let _ = MessagingConfig::from_yaml_str(&text, &BTreeMap::new());
        let _ = MessagingConfig::from_yaml_str(&format!("rabbitmq:\n  password: {text}\nx: 1\n"), &BTreeMap::new());
    }

    #[test]
    fn no_environment_makes_the_loader_panic(value in "\\PC{0,60}", index in 0..VARIABLES.len(), other in 0..VARIABLES.len()) {
        let env = env(&[(VARIABLES[index].name, &value), (VARIABLES[other].name, &value)]);
        if let Ok(config) = MessagingConfig::from_yaml_str(BLOCKS, &env) {
            let _ = (config.report(), config.redacted());
        }
        let _ = MessagingConfig::from_env_map(&env);
    }

    #[test]
    fn a_secret_from_the_environment_is_never_shown(secret in "[a-zA-Z0-9@:/#$%&*!\"'{}, ]{12,30}") {
        prop_assume!(!secret.contains("://"));
        let unique = format!("Zq9{secret}");
        let env = env(&[("RABBITMQ_PASSWORD", &unique)]);
        for tail in ["", "  prefetchh: 1\n", "  port: x\n", "kafka: [\n"] {
            let text = format!("rabbitmq:\n  password: ${{RABBITMQ_PASSWORD}}\n{tail}");
            let shown = match MessagingConfig::from_yaml_str(&text, &env) {
                Ok(config) => {
                    prop_assert_eq!(config.rabbitmq.as_ref().unwrap().password.expose(), &unique);
                    format!("{config:?}{}{}", config.report(), config.redacted())
                }
                Err(e) => format!("{e}{e:?}"),
            };
            prop_assert!(!shown.contains("Zq9"), "{}", shown);
        }
    }
}
