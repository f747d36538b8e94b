"""Gives the binary each bad input and checks what it says: the thing by name,
the right status, no secret, and nothing else disturbed. Called by
scripts/check-bad-input."""

import argparse
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from urllib.parse import urlsplit, urlunsplit

import tasks
from hub import Hub, launch, tail
from report import Report, short

SECRET = "s3cr3t-Pa55word"
END_TIMEOUT = 60.0
ENVELOPE = "application/vnd.messaging-hub+json"


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", required=True, help="a folder for files and logs")
    parser.add_argument("--rabbitmq", required=True, metavar="URL")
    parser.add_argument("--kafka", required=True, metavar="SERVERS")
    return parser.parse_args()


class Ended:
    """A run that is expected to end by itself."""

    def __init__(self, a, config=None, env=None, http_address="127.0.0.1:0", more=()):
        self.log = tempfile.mktemp(dir=a.work, suffix=".log")
        process = launch(a.binary, self.log, config, env, http_address, more)
        try:
            said, _ = process.communicate(timeout=END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            said += "(it did not end by itself)"
        self.status = process.returncode
        self.error = "\n".join(tail(self.log, 40))
        self.said = said


def ends(report, name, run, status, *words):
    """It ended with `status` and its message has each of the words."""
    with report.check(name) as c:
        ended = run()
        report.note(re.sub(r"\s*\n\s*", " | ", ended.error[-700:]) or short(ended.said))
        c.equal("exit status", ended.status, status)
        for word in words:
            c.expect(word in ended.error, f"the message does not name {word!r}")
        c.expect(SECRET not in ended.error + ended.said, "the message shows the secret")
        c.expect("panicked" not in ended.error, "it panicked")


def file_of(a, text):
    handle, path = tempfile.mkstemp(dir=a.work, suffix=".yaml")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    return path


def starts(report, a):
    """Bad input that ends the start."""
    unknown = file_of(a, f"rabbitmq:\n  host: localhost\n  pasword: {SECRET}\n")
    ends(report, "unknown YAML key", lambda: Ended(a, unknown), 1, "pasword", "3")
    wrong = file_of(a, "rabbitmq:\n  host: localhost\n  port: many\n")
    ends(report, "wrong type in YAML", lambda: Ended(a, wrong), 1, "port", "3")
    broken = file_of(a, f"rabbitmq:\n  password: {SECRET}\n host: [\n")
    ends(report, "broken YAML", lambda: Ended(a, broken), 1, broken)
    missing = file_of(a, "rabbitmq:\n  host: localhost\n  password: ${HUB_CHECK_PASSWORD:?give the password}\n")
    ends(report, "missing secret variable", lambda: Ended(a, missing), 1, "HUB_CHECK_PASSWORD", "give the password")
    ends(report, "missing file", lambda: Ended(a, "/nowhere/messaging.yaml"), 1, "/nowhere/messaging.yaml")
    number = {"RABBITMQ_HOST": "localhost", "RABBITMQ_PORT": "many", "RABBITMQ_PASSWORD": SECRET}
    ends(report, "wrong value in a variable", lambda: Ended(a, env=number), 1, "RABBITMQ_PORT")
    ends(report, "unknown option", lambda: Ended(a, more=["--colour"]), 2, "--colour")
    ends(report, "open listener without a token", lambda: Ended(a, http_address="0.0.0.0:0"), 1, "0.0.0.0", "token")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ends(report, "port taken", lambda: Ended(a, http_address=address), 1, address, "taken")
    url = urlsplit(a.rabbitmq)
    wrong_url = urlunsplit(url._replace(netloc=f"helixagent:{SECRET}@{url.hostname}:{url.port}"))
    ends(report, "wrong RabbitMQ password", lambda: Ended(a, env={"RABBITMQ_URL": wrong_url}), 1, "AUTHENTICATION_FAILED")


def brokers(a):
    return {"RABBITMQ_URL": a.rabbitmq, "KAFKA_BROKERS": a.kafka}


def refused(report, name, hub, topic, body, status, code, *words, content_type=None, headers=None):
    """A publish that is refused as not accepted, with a problem that says so."""
    with report.check(name) as c:
        got, problem = hub.call(
            "POST",
            f"/v1/topics/{topic}/messages",
            body,
            content_type or "application/octet-stream",
            headers,
        )
        report.note(f"{got} {short(problem, 400)}")
        problem = problem if isinstance(problem, dict) else {}
        wanted = status if isinstance(status, tuple) else (status,)
        c.expect(got in wanted, f"status {got}, expected {status}")
        codes = code if isinstance(code, tuple) else (code,)
        c.expect(problem.get("code") in codes, f"code {problem.get('code')!r}, expected {code!r}")
        c.expect(problem.get("assume") in ("rejected", "not_sent"), f"assume {problem.get('assume')!r}")
        c.equal("retryable", problem.get("retryable"), False)
        for word in words:
            c.expect(word in json.dumps(problem), f"the problem does not name {word!r}")


def warm(hub, topic, envelope):
    """The first publish to a broker that has just started may be so late that
    it is spooled; what is refused only while draining goes to the dead letters
    instead of the caller. This makes the lane's later ones prompt."""
    for _ in range(20):
        _, answer = hub.call("POST", f"/v1/topics/{topic}/messages", envelope, ENVELOPE)
        hub.wait_connected(["kafka"])
        if (answer or {}).get("outcome") == "delivered":
            return


def delivered(c, hub, topic, headers=None):
    status, answer = hub.call("POST", f"/v1/topics/{topic}/messages", b"{}", "application/json", headers)
    c.equal(f"a publish to {topic}", (status, (answer or {}).get("outcome")), (200, "delivered"))


def unknown_exchange(report, a):
    """An exchange that the file does not have, then one that nobody made."""
    binding = "bindings: [{exchange: no.such.exchange, routing_key: astray}]"
    unknown = file_of(a, f"topology:\n  queues:\n    - name: tasks.astray\n      {binding}\n")
    ends(report, "unknown exchange in a binding", lambda: Ended(a, unknown), 1, "no.such.exchange")
    config = file_of(
        a,
        f"""topology_mode: ignore
topology:
  exchanges:
    - {{name: no.such.exchange, kind: direct}}
  queues:
    - name: tasks.astray
      {binding}
    - name: tasks.known
""",
    )
    connection = tasks.connect(a.rabbitmq)
    connection.channel().queue_declare("tasks.known", durable=True, arguments={"x-queue-type": "quorum"})
    hub = Hub.start(a.binary, f"{a.work}/exchange.log", config, {"RABBITMQ_URL": a.rabbitmq})
    try:
        hub.wait_connected(["rabbitmq"])
        refused(
            report, "unknown exchange", hub, "tasks.astray", b"x", (404, 422), "EXCHANGE_NOT_FOUND", "no.such.exchange"
        )
        with report.check("unknown exchange: other queues go on") as c:
            delivered(c, hub, "tasks.known")
            c.equal("messages", tasks.depth(connection.channel(), "tasks.known"), 1)
    finally:
        hub.kill()
        connection.channel().queue_delete("tasks.known")
        connection.close()


def drift(report, a):
    """A queue that exists with other arguments."""
    queue = "helixagent.tasks.debate"
    connection = tasks.connect(a.rabbitmq)
    channel = connection.channel()
    # As it should be but for one argument.
    made = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "helixagent.dlx",
        "x-dead-letter-routing-key": "dlq",
        "x-message-ttl": 123_456,
    }
    channel.queue_declare(queue, durable=True, arguments=made)
    log = f"{a.work}/drift.log"
    hub = Hub.start(a.binary, log, a.config, brokers(a))
    try:
        hub.wait_connected(["rabbitmq", "kafka"])
        with report.check("queue with other arguments: reported at start") as c:
            lines = [line for line in tail(log, 1000) if queue in line and "x-message-ttl" in line]
            report.note(lines[0][:400] if lines else "nothing in the log")
            c.expect(lines, f"the log does not name {queue} with x-message-ttl")
        with report.check("queue with other arguments: in /v1/topology") as c:
            status, found = hub.call("GET", "/v1/topology")
            entries = [d for d in (found or {}).get("drift", []) if queue in str(d.get("object"))]
            report.note(short(entries or found, 2000))
            c.equal("status", status, 200)
            c.expect(any("x-message-ttl" in str(d.get("argument")) for d in entries), f"drift: {short(entries)}")
        with report.check("queue with other arguments: publishing goes on, also to it") as c:
            for topic in ("helixagent.tasks.background", "llm", queue):
                delivered(c, hub, topic)
        with report.check("queue with other arguments: it is left as it was") as c:
            # A declaration with what it was made with answers 406 if it differs.
            channel.queue_declare(queue, durable=True, arguments=made)
            c.expect(channel.is_open, "the queue was changed")
        return hub, connection
    except BaseException:
        hub.kill()
        raise


def messages(report, a, hub, connection):
    """Bad messages for a hub that runs well."""
    limit = 10 * 1024 * 1024
    background, errors = "helixagent.tasks.background", "helixagent.events.errors"
    refused(report, "message over the limit", hub, background, b"x" * (limit + 1), 413, "MESSAGE_TOO_LARGE", str(limit))
    refused(
        report, "unknown task queue", hub, "helixagent.tasks.nosuch", b"x", (404, 422),
        ("QUEUE_NOT_FOUND", "PUBLISH_REJECTED"), "helixagent.tasks.nosuch",
    )
    refused(
        report, "unknown Kafka topic", hub, "helixagent.events.nosuch", b"x", (404, 422),
        "TOPIC_NOT_FOUND", "helixagent.events.nosuch",
    )
    compacted = "helixagent.events.verification.results"
    warm(hub, compacted, {"key": "k", "payload": "aGk=", "partition": 0})
    refused(
        report, "record without a key for a compacted topic", hub, compacted, {"payload": "aGk=", "partition": 0},
        (400, 409, 422), ("PUBLISH_REJECTED", "MESSAGE_INVALID"), content_type=ENVELOPE,
    )
    with report.check("record without a key among good ones: it costs only itself") as c:
        record = lambda n: {"payload": "aGk=", "partition": 0} | ({} if n == 15 else {"key": f"k{n}"})
        answers = hub.publish_lines(compacted, [json.dumps(record(n)).encode() for n in range(1, 31)])
        for answer in answers:
            got = answer.get("outcome") or (answer.get("error") or {}).get("code")
            wanted = ("PUBLISH_REJECTED", "MESSAGE_INVALID") if answer["line"] == 15 else ("delivered",)
            c.expect(got in wanted, f"line {answer['line']}: {got}, expected {wanted}")
    refused(report, "reserved header", hub, background, {"headers": {"hub-id": "x"}}, 400, "MESSAGE_INVALID",
            "hub-id", content_type=ENVELOPE)
    refused(report, "misspelt field", hub, background, {"paylaod": ""}, 400, "MESSAGE_INVALID", "paylaod",
            content_type=ENVELOPE)
    refused(report, "priority out of range", hub, background, b"x", 400, "MESSAGE_INVALID", "11",
            headers={"hub-priority": "11"})
    refused(report, "topic that is no name", hub, "no%20name", b"x", 400, ("MESSAGE_INVALID", "INVALID_CONFIG"), "no name")

    good = lambda n: json.dumps({"type": f"line-{n}", "payload": "aGk="}).encode()
    with report.check("malformed line in the middle of a stream") as c:
        lines = [good(1), b'{"payload": "aGk=", ', good(3), b'{"payload":"%%%"}', b"\xff\xfe", good(6),
                 json.dumps({"payload": base64.b64encode(bytes(limit + 1)).decode()}).encode(), good(8)]
        answers = hub.publish_lines(background, lines)
        for answer in answers:
            report.note(short(answer, 220))
        c.equal("lines answered", [x.get("line") for x in answers], list(range(1, 9)))
        for answer in answers:
            bad = answer["line"] in (2, 4, 5, 7)
            code = (answer.get("error") or {}).get("code")
            wanted = ("MESSAGE_TOO_LARGE" if answer["line"] == 7 else "MESSAGE_INVALID") if bad else None
            c.equal(f"line {answer['line']}: error", code, wanted)
            c.equal(f"line {answer['line']}: outcome", answer.get("outcome"), None if bad else "delivered")
    with report.check("after all that the broker has exactly the good messages") as c:
        channel = connection.channel()
        # One before, four good lines.
        for queue, wanted in ((background, 5), ("helixagent.tasks.llm", 1), ("helixagent.tasks.debate", 1)):
            c.equal(queue, tasks.depth(channel, queue), wanted)
    with report.check("a refusal never triggers failover") as c:
        delivered(c, hub, background)
        delivered(c, hub, errors, {"hub-key": "k"})
        _, state = hub.call("GET", "/v1/state")
        for route in state["routes"]:
            c.equal(route["pattern"], (route["state"], route["spool"]["messages"]), ("primary", 0))
    with report.check("it leaves with status 0") as c:
        c.equal("exit status", hub.stop(), 0)


def main():
    a = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report()
    starts(report, a)
    with report.check("unknown exchange: the hub starts"):
        unknown_exchange(report, a)
    hub = None
    try:
        with report.check("queue with other arguments: the hub starts"):
            hub, connection = drift(report, a)
        if hub:
            messages(report, a, hub, connection)
            connection.close()
    finally:
        if hub:
            hub.kill()
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
