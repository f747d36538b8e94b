"""Kills a broker under load and lets clients that are not ours say what is left:
the hub publishes 2,000 messages a second over HTTP before, during and after.
Called by scripts/check-failover."""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import events
import tasks
from hub import Hub
from ledger import Read, judge
from load import Load
from report import Report, die

# Of each topic; order is kept within one.
KEYS = 20
BEFORE = 4.0
AFTERWARDS = 10.0
RECOVERY = 120.0
POLL = 0.02
SILENCE = 3.0
# An outage counts from here on (C3).
SETTLED = 1.0
P99_LIMIT = 0.010


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", required=True, help="a folder for files and logs")
    parser.add_argument("--brokers", required=True, help="scripts/brokers")
    parser.add_argument("--rabbitmq", required=True, metavar="DIR", help="the node's folder")
    parser.add_argument("--kafka", required=True, metavar="DIR", help="the node's folder")
    parser.add_argument("--kill", choices=("rabbitmq", "kafka"), action="append", help="default: one after the other")
    parser.add_argument("--rate", type=int, default=2_000, help="messages a second")
    parser.add_argument("--away", type=int, default=6, help="seconds until the broker is started again")
    parser.add_argument("--strict", action="store_true", help="a late confirm, and so a slow machine, is a failure")
    return parser.parse_args()


class Node:
    """A broker that can be killed and brought back."""

    def __init__(self, script, folder):
        self.script, self.folder = script, folder
        with open(os.path.join(folder, "node.json")) as file:
            known = json.load(file)
        self.url, self.version = known["url"], f"{known['kind']} {known['version']}"

    def command(self, name):
        done = subprocess.run([self.script, name, self.folder], capture_output=True, text=True)
        if done.returncode:
            die(f"{name} {self.folder}: {done.stderr.strip()}")


class Watch(threading.Thread):
    """Asks /v1/state all the time, and notes the worst state of one kind of
    routes when it changes."""

    def __init__(self, hub, kind):
        super().__init__(daemon=True)
        self.hub, self.kind = hub, kind
        self.states, self.deepest, self.in_doubt, self.polls = [], 0, 0, 0
        self.empty_at = None
        self.changed = threading.Condition()
        self.stopping = threading.Event()
        self.trouble = None

    def run(self):
        connection = self.hub.connection()
        try:
            while not self.stopping.wait(POLL):
                connection.request("GET", "/v1/state")
                self.note(json.loads(connection.getresponse().read()))
        except (OSError, ValueError, http.client.HTTPException) as e:
            self.trouble = e
        finally:
            connection.close()

    def note(self, state):
        now = time.monotonic()
        routes = [r for r in state["routes"] if r["kind"] == self.kind]
        worst = max((r["state"] for r in routes), key=ORDER.index)
        spooled = sum(r["spool"]["messages"] for r in routes)
        with self.changed:
            self.polls += 1
            self.deepest = max(self.deepest, spooled)
            self.in_doubt = max(self.in_doubt, sum(r["spool"]["in_doubt"] for r in routes))
            if not self.states or self.states[-1][1] != worst:
                self.states.append((now, worst))
            self.empty_at = now if spooled == 0 and worst == "primary" else None
            self.changed.notify_all()

    def wait(self, what, condition, within):
        with self.changed:
            if not self.changed.wait_for(lambda: self.trouble or condition(self), within) or self.trouble:
                raise RuntimeError(f"{what}: not within {within} s; states {self.path()} {self.trouble or ''}")

    def forget(self):
        """From now on: what a cold broker's late confirms did is no concern."""
        with self.changed:
            self.states, self.deepest, self.in_doubt = self.states[-1:], 0, 0
        return time.monotonic()

    def path(self):
        return [name for _, name in self.states]

    def stop(self):
        self.stopping.set()
        self.join()


ORDER = ("primary", "draining", "suspect", "degraded")
# One loss and nothing else; suspect comes first when a confirm was late.
STRICT_PATH = re.compile(r"primary( suspect)? degraded draining primary")
# A confirm that is late, on a busy machine, makes a lane suspect at any time, and
# it drains what it spooled meanwhile. The broker is lost once all the same.
LATE = r"( suspect| draining| primary)*"
PATH = re.compile(rf"primary{LATE} degraded{LATE} draining{LATE}")


def holding(config, path):
    """The given file, with routes that hold tasks for the primary."""
    with open(config) as file:
        text = file.read()
    hold = "  routes:\n    - {pattern: 'helixagent.tasks.#', kind: task, primary: rabbitmq, during_outage: hold}\n"
    hold += "    - {pattern: 'helixagent.#', kind: event, primary: kafka, during_outage: hold}\n"
    text, found = re.subn(r"^  routes: \[\].*\n", hold, text, flags=re.M)
    if found != 1:
        die(f"{config} has {found} lines `routes: []` where one was expected")
    with open(path, "w") as file:
        file.write(text)
    return path


def read_tasks(node, names):
    """Everything in the queues, read and acked: topic -> place -> reads."""
    connection = tasks.connect(node.url)
    found = {}
    for queue in names:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=tasks.PREFETCH)
        reads = []
        for method, properties, body in channel.consume(queue, inactivity_timeout=SILENCE):
            if method is None:
                # Silence, and nothing is left that could still come.
                if tasks.depth(channel, queue) == 0:
                    break
                continue
            headers = properties.headers or {}
            marked = "hub-possible-duplicate" in headers or method.redelivered
            reads.append(Read(properties.message_id, headers.get("hub-key"), body, headers.get("n"), marked))
            if len(reads) % 100 == 0:
                channel.basic_ack(method.delivery_tag, multiple=True)
        channel.basic_ack(0, multiple=True)
        channel.cancel()
        channel.close()
        found[queue] = {queue: reads}
    connection.close()
    return found


def read_events(node, names, begin):
    found = {name: {} for name in names}
    for record in events.read(node.url, begin, names):
        text = lambda name: (events.header(record, name) or b"").decode()
        marked = any(name == "hub-possible-duplicate" for name, _ in record.headers)
        one = Read(text("hub-id"), (record.key or b"").decode(), record.value, text("n"), marked)
        found[record.topic].setdefault((record.topic, record.partition), []).append(one)
    return found


def latencies(load, begin, end):
    """Of the publishes that were written between these times."""
    return [took for t in load.topics for at, took in zip(t.sent, t.took) if begin <= at < end]


def percentile(took, percent):
    return sorted(took)[(len(took) - 1) * percent // 100] if took else None


def p99(took):
    return percentile(took, 99)


def milliseconds(seconds):
    return "none" if seconds is None else f"{seconds * 1000:.1f} ms"


def run(report, a, killed, nodes, config):
    kind = {"rabbitmq": "task", "kafka": "event"}[killed]
    topics = [tasks.full(queue) for queue in tasks.QUEUES] if kind == "task" else list(events.TOPICS)
    node = nodes[killed]
    name = f"{killed} killed"
    hub = Hub.start(
        a.binary,
        f"{a.work}/hub-{killed}.log",
        config,
        {"RABBITMQ_URL": nodes["rabbitmq"].url, "KAFKA_BROKERS": nodes["kafka"].url},
    )
    try:
        hub.wait_connected(["rabbitmq", "kafka"])
        begin = events.ends(nodes["kafka"].url) if kind == "event" else None
        if kind == "task":
            connection = tasks.connect(node.url)
            for queue in topics:
                found = tasks.depth(connection.channel(), queue)
                if found:
                    die(f"queue {queue} holds {found} messages already")
            connection.close()
        drive(report, a, name, hub, kind, topics, node, begin)
    finally:
        hub.kill()


def drive(report, a, name, hub, kind, topics, node, begin):
    watch, load = Watch(hub, kind), Load(hub.port, topics, a.rate, KEYS)
    watch.start()
    load.start()
    time.sleep(BEFORE)
    watch.wait("primary before the kill", lambda w: w.empty_at, RECOVERY)
    kill = watch.forget()
    node.command("kill")
    watch.wait("degraded", lambda w: w.states[-1][1] == "degraded", RECOVERY)
    time.sleep(max(0.0, kill + a.away - time.monotonic()))
    restart = time.monotonic()
    node.command("restart")
    served = time.monotonic()
    watch.wait("an empty spool", lambda w: w.empty_at and w.empty_at > served, RECOVERY)
    recovered = watch.states[-1][0]
    time.sleep(AFTERWARDS)
    with watch.changed:
        empty_while_publishing = watch.empty_at
    load.stop()
    watch.wait("an empty spool at the end", lambda w: w.empty_at and w.empty_at > load.ended, RECOVERY)
    watch.stop()
    tell(report, a, name, load, watch, node, (kill, restart, served, recovered))

    with report.check(f"{name}: no publish fails") as c:
        for topic in load.topics:
            for n, code, detail in topic.errors:
                c.wrong(f"{topic.name} {n}: {code}: {detail}")
            c.equal(f"{topic.name}: answers", len(topic.took), len(topic.sent))
        c.detail = f"{load.answered()} published"
    with report.check(f"{name}: the states in their order") as c:
        path = " ".join(watch.path())
        good = (STRICT_PATH if a.strict else PATH).fullmatch(path) and path.endswith(" primary")
        c.expect(good, f"{path}, expected primary, (suspect,) degraded, draining, primary")
        c.detail = path
    with report.check(f"{name}: the spool is empty while publishing goes on") as c:
        c.expect(empty_while_publishing, "it was not empty at the end of the run")
        c.detail = f"{load.ended - recovered:.1f} s before the last publish"
    with report.check(f"{name}: it publishes {a.rate} a second throughout") as c:
        rate = load.answered() / (load.ended - load.began)
        c.expect(rate >= 0.99 * a.rate, f"only {rate:.0f} a second")
        c.detail = f"{rate:.0f} a second"
    away = latencies(load, kill + SETTLED, restart)
    if a.strict:
        with report.check(f"{name}: the 99th percentile while it is away is under {milliseconds(P99_LIMIT)}") as c:
            c.expect(away and p99(away) < P99_LIMIT, f"{milliseconds(p99(away))} of {len(away)} publishes")
    account(report, name, load, read_tasks(node, topics) if kind == "task" else read_events(node, topics, begin), watch)
    with report.check(f"{name}: the hub leaves with status 0") as c:
        c.equal("exit status", hub.stop(), 0)


def tell(report, a, name, load, watch, node, times):
    kill, restart, served, recovered = times
    states = ", ".join(f"{state} {at - kill:+.2f} s" for at, state in watch.states)
    report.note(f"{name} ({node.version}): {states} (from the kill on)")
    report.note(
        f"{name}: started again at {restart - kill:+.2f} s, serving at {served - kill:+.2f} s, "
        f"recovered at {recovered - kill:+.2f} s; {watch.polls} looks at /v1/state"
    )
    outcomes = [outcome for topic in load.topics for outcome in topic.outcomes]
    report.note(
        f"{name}: {len(outcomes)} published, {outcomes.count('delivered')} delivered, {outcomes.count('spooled')} spooled; "
        f"deepest spool {watch.deepest}, most in doubt {watch.in_doubt}"
    )
    for phase, begin, end in (
        ("before", load.began, kill),
        (f"while it is away, from {SETTLED:.0f} s after the kill", kill + SETTLED, restart),
        ("from its start until the hub has recovered", restart, recovered),
        ("afterwards", recovered, load.ended),
    ):
        took = latencies(load, begin, end)
        report.note(
            f"{name}: {phase}: {len(took)} publishes answered in p50 {milliseconds(percentile(took, 50))}, "
            f"p99 {milliseconds(p99(took))}, worst {milliseconds(max(took, default=None))}"
        )


def account(report, name, load, found, watch):
    """What the foreign client read, against what was accepted."""
    verdicts = {topic.name: judge(topic, found[topic.name]) for topic in load.topics}
    for what, words in (
        ("lost", "nothing is lost"),
        ("unexpected", "nothing came that was not published"),
        ("corrupted", "nothing is corrupted"),
        ("reordered", "nothing is reordered per key"),
        ("unmarked", "what is repeated is marked"),
    ):
        with report.check(f"{name}: {words}") as c:
            for topic, verdict in verdicts.items():
                for one in getattr(verdict, what):
                    c.wrong(f"{topic}: {one}")
    repeats = sum(v.repeats for v in verdicts.values())
    with report.check(f"{name}: repeats are at most what was in doubt") as c:
        c.expect(repeats <= WINDOW, f"{repeats}, the window is {WINDOW}")
        c.detail = f"{repeats} duplicated, the window is {WINDOW}"
    for topic, verdict in verdicts.items():
        report.note(f"{name}: {topic}: {verdict}")
    total = sum(v.read for v in verdicts.values())
    report.note(f"{name}: {total} read by a foreign client, {repeats} of them repeats")


# The smallest window of a lane in the configuration (RabbitMQ's): one loss may
# repeat no more than that.
WINDOW = 1_000


def main():
    a = arguments()
    # Told to end, it ends its hub first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report()
    nodes = {"rabbitmq": Node(a.brokers, a.rabbitmq), "kafka": Node(a.brokers, a.kafka)}
    config = holding(a.config, f"{a.work}/hold.yaml")
    for killed in a.kill or ("rabbitmq", "kafka"):
        with report.check(f"{killed} killed: the run goes to its end"):
            run(report, a, killed, nodes, config)
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
