"""What the challenges share: how a check is written down, run and reported, the
brokers as they can be killed, and small questions to the hub."""

import argparse
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback

here = os.path.dirname(os.path.abspath(__file__))
root = os.path.dirname(os.path.dirname(here))
sys.path[:0] = [here, os.path.join(root, "tests", "foreign")]

import hub as hubs  # noqa: E402
import sabotage  # noqa: E402

CONFIG = os.path.join(root, "configs", "messaging.yaml")
CHECKS = []
CLEANERS = []


class Skip(Exception):
    """Cannot be done here, and why."""


class Wrong(Exception):
    """Was done, and something else came of it."""


def check(name, slow=False):
    """Marks a function as a check. They run in the order in which they stand."""

    def mark(function):
        CHECKS.append((name, slow, function))
        return function

    return mark


def want(ok, text):
    if not ok:
        raise Wrong(text() if callable(text) else text)


def same(what, got, wanted):
    want(got == wanted, lambda: f"{what}: {short(got)}, expected {short(wanted)}")


def short(value, limit=300):
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


# Where the subject is broken on purpose nobody waits long for what will not come.
PATIENCE = 1.0


def until(what, question, within=60.0, every=0.1):
    """The first true answer."""
    within *= PATIENCE
    end = time.monotonic() + within
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > end:
            raise Wrong(f"not within {within:.0f} s: {what}")
        time.sleep(every)


def text64(text):
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def from64(text):
    return base64.b64decode(text)


class Broker:
    """A broker, which can be killed if it is ours."""

    def __init__(self, script, node, address):
        self.script, self.node = script, node
        self.address = address
        if node:
            with open(os.path.join(node, "node.json")) as file:
                self.known = json.load(file)
            self.address = self.known["url"]

    def command(self, name):
        if not self.node:
            raise Skip("the broker is not ours to be killed")
        done = subprocess.run([self.script, name, self.node], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip()}")

    @contextlib.contextmanager
    def killed(self):
        """kill -9; served again at the end."""
        self.command("kill")
        try:
            yield
        finally:
            self.command("restart")


class World:
    """The hub under test, and everything around it."""

    def __init__(self, arguments, brokers):
        self.arguments, self.brokers = arguments, brokers
        self.run = f"{time.time_ns() // 1_000_000:x}"
        self.number = 0
        self.sabotage = sabotage.find(arguments.sabotage) if arguments.sabotage else None
        self.hub = None
        self.data = os.path.join(arguments.work, "data")

    def serve_words(self):
        """How a further hub is started."""
        return self.sabotage.more if self.sabotage else ()

    def environment(self):
        env = {}
        if "rabbitmq" in self.brokers:
            broker = self.brokers["rabbitmq"]
            env["RABBITMQ_URL"] = broker.address
            if broker.node and broker.known.get("management_url"):
                env["RABBITMQ_MANAGEMENT_URL"] = broker.known["management_url"].replace("://", "://guest:guest@")
        if "kafka" in self.brokers:
            env["KAFKA_BROKERS"] = self.brokers["kafka"].address
        return env

    def config(self):
        """The shipped configuration, without the section of a broker that is not
        here: a section alone would mean that it is used."""
        if set(self.brokers) == {"rabbitmq", "kafka"}:
            return CONFIG
        return None

    def start(self, data=None, env=None, more=()):
        """The hub, connected; behind whatever breaks it on purpose."""
        env = {**self.environment(), **(env or {})}
        data = data or self.data
        if self.sabotage:
            env.update(self.sabotage.env)
            if self.sabotage.forgets:
                data = tempfile.mkdtemp(dir=self.arguments.work)
            more = (*more, *self.sabotage.more)
        running = hubs.Hub.start(
            self.arguments.binary,
            os.path.join(self.arguments.work, "hub.log"),
            self.config(),
            env,
            more=["--data", data, *more],
        )
        if self.sabotage:
            running = self.sabotage.wrap(running)
        return running

    def restart_hub(self, kill=False):
        if kill:
            self.hub.kill()
        else:
            self.hub.stop()
        self.hub = self.start()

    def new(self, prefix="c"):
        """An id of its own."""
        self.number += 1
        return f"{prefix}-{self.run}-{self.number}"

    # --- the hub, asked ---

    def publish(self, topic, body=None, headers=None, status=None, **fields):
        """One message; the answer. Without a body it is an envelope. Where nothing
        is said, what a late confirm has spooled is waited for: that is no failure."""
        if body is None and headers is not None:
            fields["headers"] = headers
        if body is not None:
            sent = {"content-type": "text/plain", **(headers or {})}
            got, answer = self.hub.call("POST", f"/v1/topics/{topic}/messages", body, sent.pop("content-type"), sent)
        else:
            got, answer = self.hub.call(
                "POST", f"/v1/topics/{topic}/messages", fields, "application/vnd.messaging-hub+json"
            )
        if status is None:
            want(got in (200, 202), lambda: f"HTTP {got} {short(answer)}, expected 200")
            if got == 202:
                until("what a late confirm spooled to be moved", lambda: self.state()[1] == 0, 60 / PATIENCE)
                answer = {**answer, "outcome": "delivered", "via": self.via(topic)}
        else:
            want(got == status, lambda: f"HTTP {got} {short(answer)}, expected {status}")
        return answer

    def via(self, topic):
        tasks = topic.startswith(("helixagent.tasks.", "tasks")) or "." not in topic
        return "rabbitmq" if tasks else "kafka"

    def lease(self, queue, most=10, wait=5000, lease=30000):
        status, answer = self.hub.call(
            "POST", f"/v1/queues/{queue}/lease", {"max": most, "wait_ms": wait, "lease_ms": lease}
        )
        want(status == 200, lambda: f"lease: HTTP {status} {short(answer)}")
        return answer["deliveries"]

    def settle(self, delivery, how="ack", **more):
        status, answer = self.hub.call("POST", f"/v1/deliveries/{delivery['token']}/{how}", more)
        want(status == 204, lambda: f"{how}: HTTP {status} {short(answer)}")

    def lease_all(self, queue, count, within=60.0, ack=True):
        """So many, each settled; the messages in the order in which they came."""
        got = []
        end = time.monotonic() + within * PATIENCE
        while len(got) < count:
            want(time.monotonic() < end, lambda: f"{len(got)} of {count} came out of {queue}")
            for delivery in self.lease(queue, min(1000, count - len(got)), 1000):
                got.append(delivery)
        if ack:
            for at in range(0, len(got), 1000):
                tokens = [d["token"] for d in got[at : at + 1000]]
                status, answer = self.hub.call("POST", "/v1/deliveries/ack", {"tokens": tokens})
                want(status == 204, lambda: f"ack: HTTP {status} {short(answer)}")
        return [d["message"] for d in got]

    def quiet(self, queue, wait=1500):
        """Nothing comes."""
        found = self.lease(queue, 1, wait)
        for delivery in found:
            self.settle(delivery, "nack", retry="now")
        want(not found, lambda: f"{queue} still has {short(found)}")

    def state(self, kind=None):
        """The worst state of routes, and how much is spooled."""
        _, state = self.hub.call("GET", "/v1/state")
        routes = [r for r in state["routes"] if kind in (None, r["kind"])]
        order = ("primary", "draining", "suspect", "degraded")
        return max((r["state"] for r in routes), key=order.index), sum(r["spool"]["messages"] for r in routes)

    def is_well(self, kind=None):
        return self.state(kind) == ("primary", 0)

    def metric(self, name):
        _, text = self.hub.call("GET", "/metrics")
        values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)]
        return sum(map(float, values)) if values else None

    def command(self, *words, stdin=None, status=0, within=60):
        """The binary, talking to the hub; what it printed."""
        done = subprocess.run(
            [self.arguments.binary, *words, "--url", f"http://127.0.0.1:{self.hub.port}"],
            input=stdin,
            capture_output=True,
            text=True,
            env=hubs.clean(),
            timeout=within,
        )
        want(
            done.returncode == status,
            lambda: f"{' '.join(words)}: exit status {done.returncode}, expected {status}: {short(done.stderr)}",
        )
        return done.stdout

    def letters(self, **query):
        words = "&".join(f"{k}={v}" for k, v in query.items())
        status, page = self.hub.call("GET", f"/v1/dead-letters?{words}")
        want(status == 200, lambda: f"dead letters: HTTP {status} {short(page)}")
        return page["letters"]

    def letter_of(self, id, within=30.0):
        return until(
            f"a dead letter of {id}",
            lambda: next((one for one in self.letters(limit=1000) if one["message_id"] == id), None),
            within,
        )


def main(needs, description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--binary")
    parser.add_argument("--work")
    parser.add_argument("--brokers")
    for name in needs:
        parser.add_argument(f"--{name}-node")
    parser.add_argument("--rabbitmq-url")
    parser.add_argument("--kafka-servers")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--json")
    parser.add_argument("--sabotage")
    arguments = parser.parse_args()
    if arguments.list:
        for name, _, _ in CHECKS:
            print(name)
        return 0
    if arguments.sabotage == "help":
        sabotage.tell()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    addresses = {"rabbitmq": arguments.rabbitmq_url, "kafka": arguments.kafka_servers}
    brokers = {
        name: Broker(arguments.brokers, getattr(arguments, f"{name}_node"), addresses[name]) for name in needs
    }
    world = World(arguments, brokers)
    if world.sabotage:
        global PATIENCE
        PATIENCE = 0.15
    results = []
    began = time.time()
    try:
        world.hub = world.start()
        if not world.sabotage:
            world.hub.wait_connected(list(needs))
        for name, slow, function in CHECKS:
            if arguments.only and arguments.only not in name:
                continue
            results.append(one(world, name, slow and arguments.short, function))
    finally:
        if world.hub:
            world.hub.kill()
    return tell(world, arguments, results, began)


def one(world, name, left_out, function):
    start = time.monotonic()
    try:
        if left_out:
            raise Skip("left out of the short form")
        for clean in CLEANERS:
            # What a failed check left is no concern of the next one.
            clean(world)
        detail = function(world)
        verdict, why = "PASS", detail
    except Skip as skip:
        verdict, why = "SKIP", str(skip)
    except Exception as error:  # a check that cannot go on has failed
        if not isinstance(error, Wrong):
            traceback.print_exc(file=sys.stderr)
        kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        verdict, why = "FAIL", f"{kind}{error}"
    took = time.monotonic() - start
    if verdict == "PASS":
        print(f"PASS {name}" + (f" ({why})" if why else ""), flush=True)
    else:
        print(f"{verdict} {name}: {why}", flush=True)
    return {"name": name, "verdict": verdict.lower(), "detail": why, "seconds": round(took, 3)}


def tell(world, arguments, results, began):
    count = {verdict: sum(r["verdict"] == verdict for r in results) for verdict in ("pass", "fail", "skip")}
    print(f"{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped", flush=True)
    for result in results:
        if result["verdict"] == "fail":
            print(f"failed: {result['name']}", flush=True)
    if arguments.json:
        known = {name: getattr(b, "known", {"url": "given"}) for name, b in world.brokers.items()}
        report = {
            "challenge": os.path.basename(sys.argv[0]).removesuffix(".py"),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": round(time.time() - began, 1),
            "brokers": {n: {k: v for k, v in b.items() if k in ("kind", "version")} for n, b in known.items()},
            "sabotage": arguments.sabotage,
            "passed": count["pass"],
            "failed": count["fail"],
            "skipped": count["skip"],
            "checks": results,
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
            file.write("\n")
    if not count["pass"] and not count["fail"]:
        print("nothing was checked", file=sys.stderr)
        return 2
    return 1 if count["fail"] else 0
