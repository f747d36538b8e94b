//! The command line, run as users run it.
#![cfg(feature = "server")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod process;

use std::{
    io::{BufRead, BufReader, Write},
    process::{Output, Stdio},
};

use process::{Hub, binary, run};
use serde_json::Value;

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn done(output: &Output) -> String {
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}{}",
        out(output),
        err(output)
    );
    out(output)
}

#[test]
fn a_task_goes_round_from_publish_to_subscribe() {
    let hub = Hub::start();
    let said = done(&hub.run(&[
        "publish",
        "tasks",
        "--payload",
        "hello",
        "--id",
        "c1",
        "--type",
        "greet",
        "--key",
        "k",
        "--header",
        "X-A=1=2",
        "--priority",
        "high",
    ]));
    assert_eq!(said, "c1 delivered via inmemory\n");
    let got = done(&hub.run(&["subscribe", "tasks", "--count", "1", "--json"]));
    let message: Value = serde_json::from_str(&got).unwrap();
    assert_eq!(message["id"], "c1");
    assert_eq!(message["type"], "greet");
    assert_eq!(message["headers"]["x-a"], "1=2");
    assert_eq!(message["priority"], 8);
    done(&hub.run(&["publish", "tasks", "--payload", "second"]));
    assert_eq!(
        done(&hub.run(&["subscribe", "tasks", "--count", "1"])),
        "second\n"
    );
}

#[test]
fn a_group_reads_a_stream_once_across_runs() {
    let hub = Hub::start();
    for text in ["one", "two", "three"] {
        done(&hub.run(&[
            "publish",
            "user.created",
            "--payload",
            text,
            "--key",
            "same",
        ]));
    }
    let read = |count: &str| {
        done(&hub.run(&[
            "subscribe",
            "user.created",
            "--group",
            "g",
            "--count",
            count,
        ]))
    };
    assert_eq!(read("1"), "one\n");
    assert_eq!(read("2"), "two\nthree\n");
    let all = ["subscribe", "user.#", "--from", "earliest", "--count", "3"];
    assert_eq!(done(&hub.run(&all)), "one\ntwo\nthree\n");
}

#[test]
fn a_pattern_over_work_queues_prints_what_comes_to_any_of_them() {
    let hub = Hub::start();
    for (topic, body) in [
        ("tasks.p.a", "one"),
        ("tasks.p.b", "two"),
        ("tasks.q", "no"),
    ] {
        done(&hub.run(&["publish", topic, "--payload", body]));
    }
    let printed = done(&hub.run(&["subscribe", "tasks.p.#", "--count", "2"]));
    let mut lines: Vec<_> = printed.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["one", "two"]);
}

#[test]
fn a_payload_comes_from_a_file_or_from_stdin() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("payload");
    std::fs::write(&file, "from a file").unwrap();
    done(&hub.run(&[
        "publish",
        "tasks",
        "--file",
        file.to_str().unwrap(),
        "--json",
    ]));
    assert_eq!(
        done(&hub.run(&["subscribe", "tasks", "--count", "1"])),
        "from a file\n"
    );
    let mut child = hub
        .command(&["publish", "tasks"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"from stdin")
        .unwrap();
    done(&child.wait_with_output().unwrap());
    assert_eq!(
        done(&hub.run(&["subscribe", "tasks", "--count", "1"])),
        "from stdin\n"
    );
}

#[test]
fn ndjson_answers_each_line_while_stdin_is_open_and_fails_when_one_did() {
    let hub = Hub::start();
    let mut child = hub
        .command(&["publish", "tasks", "--ndjson"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap());
    let mut ask = |line: &str| -> Value {
        writeln!(input, "{line}").unwrap();
        input.flush().unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    };
    assert_eq!(ask(r#"{"id":"l1"}"#)["outcome"], "delivered");
    assert_eq!(ask("nonsense")["error"]["code"], "MESSAGE_INVALID");
    assert_eq!(ask(r#"{"id":"l3"}"#)["line"], 3);
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        err(&output).contains("1 lines were not published"),
        "{}",
        err(&output)
    );
}

#[test]
fn state_health_and_topology_say_what_stands_there() {
    let hub = Hub::start();
    assert!(done(&hub.run(&["state"])).contains("inmemory"));
    let state: Value = serde_json::from_str(&done(&hub.run(&["state", "--json"]))).unwrap();
    assert!(state["routes"].is_array());
    assert!(done(&hub.run(&["health"])).starts_with("accepting, primary"));
    done(&hub.run(&["topology", "check"]));
    done(&hub.run(&["topology", "apply"]));
    let wanted: Value = serde_json::from_str(&done(&hub.run(&["topology", "export"]))).unwrap();
    assert!(
        wanted["queues"]
            .as_array()
            .unwrap()
            .iter()
            .any(|q| q["name"] == "helixagent.tasks.llm")
    );
}

#[test]
fn a_broker_that_is_away_hides_nothing_of_the_others_topology() {
    let hub = Hub::start_with(&[], &[("RABBITMQ_URL", "amqp://127.0.0.1:1")]);
    let output = hub.run(&["topology", "check"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    let said = out(&output);
    assert!(said.contains("unreachable: rabbitmq: "), "{said}");
    let found =
        |arguments: &[&str]| -> Value { serde_json::from_str(&out(&hub.run(arguments))).unwrap() };
    for report in [
        found(&["topology", "check", "--json"]),
        found(&["topology", "apply", "--json"]),
    ] {
        assert_eq!(
            report["unreachable"].as_array().unwrap().len(),
            1,
            "{report}"
        );
        // What the embedded broker has.
        assert!(!report["ok"].as_array().unwrap().is_empty(), "{report}");
    }
}

#[test]
fn a_data_folder_that_cannot_be_made_is_named() {
    let output = run(&["serve", "--http", "127.0.0.1:0", "--data", "/proc/nowhere"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    assert!(
        err(&output).contains("cannot make the data folder /proc/nowhere"),
        "{}",
        err(&output)
    );
}

#[test]
fn wrong_usage_is_2_and_failure_is_1_with_what_to_do() {
    for arguments in [
        &["nonsense"][..],
        &["publish"],
        &["publish", "t", "--header", "x"],
        &["subscribe", "t", "--count", "0"],
        &["serve", "--tcp", "127.0.0.1:9080"],
        &["state", "--url", "nonsense"],
        &[],
    ] {
        let output = run(arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            err(&output)
        );
        assert!(!err(&output).is_empty());
    }
    assert_eq!(run(&["--help"]).status.code(), Some(0));
    assert_eq!(run(&["--version"]).status.code(), Some(0));
    let nobody = run(&["state", "--url", "http://127.0.0.1:1"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(
        err(&nobody).contains("messaging-hub serve"),
        "{}",
        err(&nobody)
    );
    let hub = Hub::start();
    let refused = hub.run(&["publish", "bad topic", "--payload", "x"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        err(&refused).contains("MESSAGE_INVALID"),
        "{}",
        err(&refused)
    );
    let grouped = hub.run(&["subscribe", "tasks", "--group", "g"]);
    assert_eq!(grouped.status.code(), Some(2), "{}", err(&grouped));
}

#[test]
fn a_configuration_is_checked_and_shown_without_secrets() {
    assert!(done(&run(&["config", "check"])).contains("can be used"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hub.yaml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, "rabbitmq:\n  password: hidden\n").unwrap();
    let shown = done(&run(&["config", "show", "--config", path]));
    assert!(!shown.contains("hidden"), "{shown}");
    std::fs::write(&file, "servr: {}\n").unwrap();
    let wrong = run(&["config", "check", "--config", path]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(err(&wrong).contains("servr"), "{}", err(&wrong));
    let missing = run(&["serve", "--config", "/nowhere/hub.yaml"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(
        err(&missing).contains("/nowhere/hub.yaml"),
        "{}",
        err(&missing)
    );
    let bad = binary()
        .args(["config", "check"])
        .env("MESSAGING_MAX_MESSAGE_BYTES", "many")
        .output()
        .unwrap();
    assert_eq!(bad.status.code(), Some(1));
    assert!(
        err(&bad).contains("MESSAGING_MAX_MESSAGE_BYTES"),
        "{}",
        err(&bad)
    );
}

#[cfg(feature = "rabbitmq")]
#[test]
fn a_spool_is_listed_paused_resumed_and_exported_to_be_published_again() {
    let hub = Hub::start_with(&[], &[("RABBITMQ_URL", "amqp://127.0.0.1:1")]);
    for id in ["c1", "c2"] {
        let said = done(&hub.run(&["publish", "tasks", "--payload", "x", "--id", id]));
        assert_eq!(said, format!("{id} spooled in memory\n"));
    }
    let listed = done(&hub.run(&["spool", "list"]));
    assert!(
        listed.contains("tasks") && listed.contains("degraded"),
        "{listed}"
    );
    assert!(
        listed.contains("total: 2 messages (0 in doubt)"),
        "{listed}"
    );
    let page = done(&hub.run(&["spool", "list", "--entries", "--limit", "1"]));
    let cursor = page.trim().rsplit_once("more: --cursor ").unwrap().1;
    assert!(page.contains("c1") && !page.contains("c2"), "{page}");
    let rest = done(&hub.run(&["spool", "list", "--entries", "--cursor", cursor]));
    assert!(rest.contains("c2") && !rest.contains("c1"), "{rest}");

    assert_eq!(
        done(&hub.run(&["spool", "pause", "tasks"])),
        "paused tasks: 1 lanes\n"
    );
    assert!(done(&hub.run(&["spool", "list"])).contains("paused; "));
    assert!(done(&hub.run(&["state"])).contains("degraded, paused"));
    assert_eq!(
        done(&hub.run(&["spool", "resume", "--rate", "5/s"])),
        "resumed #: 1 lanes\n"
    );
    let listed = done(&hub.run(&["spool", "list", "--json", "--topic", "tasks"]));
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["lanes"][0]["drain"]["limit"], 5);
    assert_eq!(listed["lanes"][0]["paused"], false);
    done(&hub.run(&["spool", "pause", "--degrade"]));
    assert!(done(&hub.run(&["spool", "list"])).contains("degraded by force"));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spool.ndjson");
    let path = file.to_str().unwrap();
    done(&hub.run(&["spool", "export", "tasks", "--output", path]));
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(done(&hub.run(&["spool", "export"])), text);
    assert_eq!(text.lines().count(), 2);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let other = Hub::start();
    let answers = done(&other.run(&["publish", "tasks", "--ndjson", "--file", path]));
    assert_eq!(answers.matches("delivered").count(), 2, "{answers}");

    for wrong in [
        &["spool"][..],
        &["spool", "list", "--cursor", "x"],
        &["spool", "list", "--route", "a", "--topic", "b"],
        &["spool", "list", "--limit", "0"],
        &["spool", "resume", "--rate", "fast"],
    ] {
        assert_eq!(hub.run(wrong).status.code(), Some(2), "{wrong:?}");
    }
    let nowhere = hub.run(&["spool", "export", "--output", "/proc/nowhere/x"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(
        err(&nowhere).contains("cannot be written"),
        "{}",
        err(&nowhere)
    );
}
