"""Proves with pika and kafka-python that the hub reads and writes real brokers
as its wire mapping says. Called by scripts/check-foreign."""

import argparse
import signal
import sys
import time

import events
import foreign_events
import foreign_tasks
import tasks
from envelopes import check_answers
from hub import Hub
from report import Report, die


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--log", required=True, help="where the hub's log goes")
    parser.add_argument("--rabbitmq", required=True, metavar="URL")
    parser.add_argument("--kafka", required=True, metavar="SERVERS")
    parser.add_argument("--count", type=int, default=10_000, help="tasks, and as many events")
    parser.add_argument("--foreign", type=int, default=1_000, help="foreign tasks, and as many events")
    parser.add_argument("--strict", action="store_true", help="a publish that was spooled is a failure")
    parser.add_argument("--seed", type=int, default=None)
    return parser.parse_args()


def check_clean(url):
    """What is in the queues already would be taken for the hub's."""
    connection = tasks.connect(url)
    for queue in [*map(tasks.full, tasks.QUEUES), foreign_tasks.DEAD_LETTERS]:
        found = tasks.depth(connection.channel(), queue)
        if found:
            die(f"queue {queue} holds {found} messages already; this check wants queues of its own")
    connection.close()


def publish(report, hub, name, batches, via, strict):
    started = time.monotonic()
    spooled, count = 0, sum(map(len, batches))
    with report.check(f"{name}: every line is answered as accepted") as c:
        for batch in batches:
            answers = hub.publish_lines(batch[0].topic, [one.line() for one in batch])
            spooled += check_answers(c, batch, answers, via)
        c.detail = f"{count} in {time.monotonic() - started:.1f} s"
    # A late confirm spools and loses nothing; on a busy machine it may happen.
    report.note(f"{spooled} of {count} {name} took the way through the spool")
    if strict:
        with report.check(f"{name}: delivered straight, none spooled on the way") as c:
            c.equal("spooled", spooled, 0)
    with report.check(f"{name}: the spool is empty again") as c:
        hub.wait_connected([via])


def main():
    a = arguments()
    # Told to end, it ends its hub first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = a.seed if a.seed is not None else time.time_ns() % 1_000_000
    run = f"{time.time_ns() // 1_000_000:x}"
    report = Report()
    began = time.time()
    hub = Hub.start(a.binary, a.log, a.config, {"RABBITMQ_URL": a.rabbitmq, "KAFKA_BROKERS": a.kafka})
    try:
        state = hub.wait_connected(["rabbitmq", "kafka"])
        versions = ", ".join(f"{b['type']} {b.get('server_version') or ''}".strip() for b in state["brokers"])
        report.note(f"seed {seed}, run {run}, brokers: {versions}")
        check_clean(a.rabbitmq)
        begin = events.ends(a.kafka)

        task_batches = tasks.make(a.count, seed, run)
        publish(report, hub, "tasks", task_batches, "rabbitmq", a.strict)
        read = tasks.check(report, a.rabbitmq, task_batches, began)
        report.note(f"{read} tasks published by the hub were read by pika")

        event_batches = events.make(a.count, seed, run)
        publish(report, hub, "events", event_batches, "kafka", a.strict)
        read = events.check(report, a.kafka, begin, event_batches, began)
        report.note(f"{read} events published by the hub were read by kafka-python")

        foreign_tasks.check(report, hub, a.rabbitmq, a.foreign, seed, run)
        foreign_events.check(report, hub, a.kafka, begin, event_batches, a.foreign, seed, run)
        with report.check("the hub stayed primary and leaves with status 0") as c:
            _, state = hub.call("GET", "/v1/state")
            for route in state["routes"]:
                c.equal(route["pattern"], (route["state"], route["spool"]["messages"]), ("primary", 0))
            c.equal("exit status", hub.stop(), 0)
        foreign_tasks.check_empty(report, a.rabbitmq)
    finally:
        hub.kill()
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
