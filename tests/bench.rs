//! `messaging-hub bench`, run as users run it, for a short time: that every row
//! is there, that its numbers are numbers, that what cannot be honoured is
//! refused, and that nothing is left behind. How large the numbers are is
//! nobody's business here.
#![cfg(feature = "server")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;
mod support;

use std::{
    process::{Output, Stdio},
    time::Duration,
};

use process::{binary, run};
use serde_json::Value;
use support::{RabbitVersion, need, shared_kafka, shared_rabbit, wait};

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a scenario to its end, away from the runtime; the JSON that it printed.
async fn bench(arguments: &[&str]) -> Value {
    let mut command = binary();
    command.arg("bench").args(arguments).arg("--json");
    let ended = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output());
    let output = ended.await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Checks what every answer has, and returns the names of its rows.
fn checked<'a>(answer: &'a Value, scenario: &str) -> Vec<&'a str> {
    assert_eq!(answer["scenario"], scenario);
    let settings = answer["settings"].as_object().unwrap();
    for field in ["time_s", "size", "confirm", "cores", "weakened", "version"] {
        assert!(settings.contains_key(field), "{field}: {settings:?}");
    }
    let rows = answer["rows"].as_array().unwrap();
    for row in rows {
        let number = |field: &str| {
            row[field]
                .as_f64()
                .unwrap_or_else(|| panic!("{field}: {row}"))
        };
        assert!(number("rate") > 0.0, "{row}");
        assert!(number("ratio") > 0.0, "{row}");
        assert!(row["durability"].is_string(), "{row}");
        if !row["p50_us"].is_null() {
            let (p50, p99, p999) = (number("p50_us"), number("p99_us"), number("p999_us"));
            assert!(0.0 < p50 && p50 <= p99 && p99 <= p999, "{row}");
        }
    }
    rows.iter().map(|r| r["name"].as_str().unwrap()).collect()
}

/// Whether the ratios of a scenario of pairs have their intervals.
fn has_intervals(answer: &Value) {
    for row in answer["rows"].as_array().unwrap() {
        let number = |field: &str| row[field].as_f64().unwrap();
        let ratio = number("ratio");
        assert!(number("ratio_low") <= ratio, "{row}");
        assert!(ratio <= number("ratio_high"), "{row}");
        assert!(row["no_difference_shown"].is_boolean(), "{row}");
    }
}

#[tokio::test]
async fn the_embedded_broker_is_measured_and_nothing_is_lost() {
    let answer = bench(&["embedded", "-z", "1", "--pairs", "2"]).await;
    let names = checked(&answer, "embedded");
    assert_eq!(names.len(), 5, "{names:?}");
    assert!(names[0].starts_with("hub"), "{names:?}");
    assert!(names.iter().any(|n| n.contains("10 subscribers")));
    assert!(names[4].contains("mpsc"), "{names:?}");
    has_intervals(&answer);
}

#[tokio::test]
async fn a_pace_is_kept_and_shown() {
    let flags = [
        "embedded", "-z", "1", "--pairs", "1", "-r", "500", "-x", "2",
    ];
    let answer = bench(&flags).await;
    checked(&answer, "embedded");
    assert_eq!(answer["settings"]["rate"], 500);
    // The last arrives when it was due, not when it could have been sent.
    let rate = answer["rows"][0]["rate"].as_f64().unwrap();
    assert!((500.0..=1100.0).contains(&rate), "{rate}");
    assert!(answer["rows"][0]["ratio_low"].is_null());
}

#[cfg(feature = "journal")]
#[tokio::test]
async fn the_journal_is_measured_beside_a_bare_file_and_its_folder_goes() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let answer = bench(&["journal", "-z", "1", "--pairs", "2", "--data", data]).await;
    let names = checked(&answer, "journal");
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(names[2].contains("lone publisher"), "{names:?}");
    assert_eq!(answer["rows"][0]["durability"], "fsync");
    has_intervals(&answer);
    assert_eq!(std::fs::read_dir(data).unwrap().count(), 0);
}

#[tokio::test]
async fn http_is_measured_beside_a_bare_server() {
    let answer = bench(&["http", "-z", "1", "--pairs", "2"]).await;
    let names = checked(&answer, "http");
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(names[0].contains("hub"), "{names:?}");
    assert!(names[3].contains("1,000 lines"), "{names:?}");
    has_intervals(&answer);
}

#[tokio::test]
async fn a_running_hub_is_measured_over_http_and_keeps_nothing() {
    let hub = process::Hub::start();
    let flags = [
        "http", "-z", "1", "--pairs", "1", "-x", "4", "--url", &hub.url,
    ];
    let answer = bench(&flags).await;
    assert_eq!(checked(&answer, "http").len(), 4);
    assert_eq!(answer["settings"]["url"], hub.url);
    assert_eq!(answer["rows"][0]["durability"], "as configured");
}

#[test]
fn a_table_is_for_people_and_says_how_sure_it_is() {
    let output = run(&["bench", "embedded", "-z", "1", "--pairs", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    for word in [
        "MSG/S", "P99.9", "HUB/ROW", "cores", "load", "weakened", "none",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_eq!(err(&output), "");
}

#[test]
fn what_a_scenario_cannot_honour_is_refused_with_what_to_do() {
    let amqp = ["--rabbitmq", "amqp://127.0.0.1:1"];
    for (arguments, why) in [
        (vec!["bench"], "<SCENARIO>"),
        (vec!["bench", "nonsense"], "nonsense"),
        (vec!["bench", "embedded", "-x", "0"], "--producers"),
        (vec!["bench", "embedded", "-A", "10"], "-A does not apply"),
        (vec!["bench", "embedded", "-y", "0"], "use -y 1 or more"),
        (vec!["bench", "embedded", "-s", "4"], "use -s 16 or more"),
        (vec!["bench", "embedded", "--svg", "x"], "--svg does not"),
        (
            vec!["bench", "embedded", "--url", "http://127.0.0.1:1"],
            "--url does not",
        ),
        (vec!["bench", "journal", "--kafka", "x"], "--kafka does not"),
        (vec!["bench", "http", "-c", "10"], "-c does not apply"),
        (
            vec!["bench", "http", "--url", "http://127.0.0.1:1", "-y", "1"],
            "leave them out",
        ),
        (vec!["bench", "rabbitmq"], "--rabbitmq amqp://"),
        (
            vec!["bench", "rabbitmq", amqp[0], amqp[1], "-q", "5", "-A", "6"],
            "-A 6 is above -q 5",
        ),
        (vec!["bench", "kafka"], "--kafka host:port"),
        (
            vec!["bench", "kafka", "--queue-type", "quorum"],
            "--queue-type does not",
        ),
        (vec!["bench", "failover"], "--rabbitmq amqp://"),
        (
            vec!["bench", "failover", "--pairs", "2"],
            "--pairs does not",
        ),
        (vec!["bench", "failover", "-y", "1"], "-y does not"),
        (
            vec!["bench", "failover", "--broker-kill", "true"],
            "--broker-start",
        ),
        (vec!["bench", "failover", "-z", "2"], "use 8 or more"),
        (
            vec!["bench", "failover", "--rabbitmq", "amqps://127.0.0.1:1"],
            "--broker-kill",
        ),
    ] {
        let output = run(&arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            err(&output)
        );
        assert!(
            err(&output).contains(why),
            "{arguments:?}: {}",
            err(&output)
        );
    }
    let output = run(&["bench", "rabbitmq", amqp[0], amqp[1]]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
}

#[cfg(feature = "rabbitmq")]
#[tokio::test]
async fn rabbitmq_is_measured_beside_lapin_and_its_queues_go() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let flags = [
        "rabbitmq",
        "-z",
        "1",
        "--pairs",
        "1",
        "--rabbitmq",
        rabbit.url(),
    ];
    let answer = bench(&flags).await;
    let names = checked(&answer, "rabbitmq");
    assert_eq!(
        names,
        [
            "publish classic, hub",
            "publish classic, lapin",
            "publish quorum, hub",
            "publish quorum, lapin",
            "end to end classic, hub",
            "end to end classic, lapin",
            "end to end quorum, hub",
            "end to end quorum, lapin",
        ]
    );
    assert_eq!(answer["rows"][0]["durability"], "page cache");
    assert_eq!(answer["rows"][2]["durability"], "fsync");
    // One that is interrupted takes its queues away as well.
    let own = "tasks.bench.quorum";
    let mut child = binary()
        .args(["bench", "rabbitmq", "-z", "60", "-y", "0"])
        .args(["--queue-type", "quorum", "--rabbitmq", rabbit.url()])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait::until(Duration::from_secs(60), "a queue is made", || async {
        rabbit
            .ctl(&["-q", "list_queues", "name"])
            .await
            .contains(own)
    })
    .await;
    let interrupted = std::process::Command::new("kill")
        .args(["-s", "INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(interrupted.success());
    let status = tokio::task::spawn_blocking(move || child.wait());
    let status = wait::within(Duration::from_secs(60), "it ends", status).await;
    assert_eq!(status.unwrap().unwrap().code(), Some(1));
    let queues = rabbit.ctl(&["-q", "list_queues", "name"]).await;
    assert!(!queues.contains(own), "{queues}");
}

#[cfg(feature = "rabbitmq")]
#[tokio::test]
async fn a_failover_is_measured_without_a_loss_and_drawn() {
    let rabbit = need!(shared_rabbit(RabbitVersion::V4).await);
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("failover.svg");
    let flags = [
        "failover",
        "-z",
        "8",
        "-r",
        "2000",
        "--rabbitmq",
        rabbit.url(),
    ];
    let answer = bench(&[&flags[..], &["--svg", svg.to_str().unwrap()]].concat()).await;
    let names = checked(&answer, "failover");
    assert_eq!(names, ["before", "outage (cut)", "drain", "after"]);
    let settings = &answer["settings"];
    assert_eq!(settings["fault"], "cut");
    assert_eq!(settings["lost"], 0);
    assert!(settings["recovery_ms"].is_number(), "{settings}");
    assert!(settings["drain_rate"].as_f64().unwrap() > 0.0, "{settings}");
    assert!(answer["rows"][1]["spooled"].as_u64().unwrap() > 0);
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("in ms"));
    let queues = rabbit.ctl(&["-q", "list_queues", "name"]).await;
    assert!(!queues.contains("tasks.bench.failover"), "{queues}");
}

#[cfg(feature = "kafka")]
#[tokio::test]
async fn kafka_is_measured_beside_rdkafka_and_its_topics_go() {
    let kafka = need!(shared_kafka().await);
    let flags = [
        "kafka",
        "-z",
        "1",
        "--pairs",
        "1",
        "--kafka",
        kafka.bootstrap(),
    ];
    let answer = bench(&flags).await;
    let names = checked(&answer, "kafka");
    assert_eq!(
        names,
        [
            "produce, hub",
            "produce, rdkafka",
            "consume, hub",
            "consume, rdkafka"
        ]
    );
    assert!(answer["rows"][2]["p50_us"].is_null());
    let tool = "org.apache.kafka.tools.TopicCommand";
    let topics = kafka.ctl(&[tool, "--list"]).await;
    assert!(!topics.contains("events.bench"), "{topics}");
}
