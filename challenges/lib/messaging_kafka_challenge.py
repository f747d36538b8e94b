"""The checks of the Kafka challenge; kafka-python is the judge."""

import base64
import json
import subprocess
import sys
import threading
import time
from urllib.parse import quote

from challenge import Skip, check, main, same, text64, until, want

import events  # noqa: E402, found through challenge
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

AUDIT = "helixagent.events.audit"
METRICS = "helixagent.events.metrics"
ERRORS = "helixagent.events.errors"
TOKENS = "helixagent.stream.tokens"
COMPACTED = "helixagent.events.verification.results"
DEAD = "helixagent.dlq.events"


def servers(w):
    return w.brokers["kafka"].address


def ends(w, *topics):
    return events.ends(servers(w), topics)


def read(w, begin, *topics):
    return events.read(servers(w), begin, topics)


def value(record, name):
    found = events.header(record, name)
    return None if found is None else found.decode()


def ids(records):
    return [value(r, "hub-id") for r in records]


def producer(w, **more):
    return KafkaProducer(bootstrap_servers=servers(w).split(","), acks="all", **more)


def put(w, topic, messages):
    """(key, body, headers) by kafka-python; the metadata of each."""
    one = producer(w)
    sent = [one.send(topic, value=b, key=k, headers=h or []) for k, b, h in messages]
    one.flush()
    done = [s.get(timeout=30) for s in sent]
    one.close()
    return done


class Listener:
    """A stream that is live, read by a thread."""

    def __init__(self, w, pattern, group=None, start=None, last=None, ack=None):
        query = f"pattern={quote(pattern)}"
        for name, text in (("group", group), ("from", start), ("ack", ack)):
            query += f"&{name}={quote(text)}" if text else ""
        self.connection = w.hub.connection(120)
        headers = {"accept": "text/event-stream", **({"last-event-id": last} if last else {})}
        self.connection.request("GET", f"/v1/stream?{query}", headers=headers)
        answer = self.connection.getresponse()
        want(answer.status == 200, f"stream: HTTP {answer.status}")
        import hub as hubs

        self.stream, self.got, self.over = hubs.Stream(self.connection, answer), [], False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            for _, cursor, message in self.stream:
                self.got.append((cursor, message))
        except Exception:  # the other end closed it
            pass
        self.over = True

    def ids(self):
        return [m["id"] for _, m in list(self.got)]

    def wait(self, count, within=60):
        until(f"{count} messages (came: {len(self.got)})", lambda: len(self.got) >= count, within)
        return self.got

    def close(self):
        try:
            self.connection.sock and self.connection.sock.shutdown(2)
        except OSError:
            pass
        self.connection.close()
        self.thread.join(5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def committed(w, group, topic):
    """The group's committed offsets, asked of the broker itself."""
    one = KafkaConsumer(bootstrap_servers=servers(w).split(","), group_id=group, enable_auto_commit=False)
    parts = [TopicPartition(topic, p) for p in sorted(one.partitions_for_topic(topic))]
    found = {p.partition: one.committed(p) or 0 for p in parts}
    one.close()
    return found


# --- what is there ---


@check("the hub is connected to Kafka")
def _(w):
    _, state = w.hub.call("GET", "/v1/state")
    seen = next(b for b in state["brokers"] if b["type"] == "kafka")
    want(seen["connected"], f"not connected: {seen}")
    want(servers(w) in ",".join(seen["endpoints"]), f"endpoints: {seen['endpoints']}")


@check("the ten topics are there with their partitions")
def _(w):
    one = KafkaConsumer(bootstrap_servers=servers(w).split(","))
    found = {t: len(one.partitions_for_topic(t) or ()) for t in events.TOPICS}
    one.close()
    same("partitions", found, events.TOPICS)
    _, wanted = w.hub.call("GET", "/v1/topology/wanted")
    names = {t["name"] for t in wanted["topics"]}
    want(set(events.TOPICS) <= names, f"the hub does not want {set(events.TOPICS) - names}")


@check("a topic that is missing is reported, made by topology apply, and then usable")
def _(w):
    admin = KafkaAdminClient(bootstrap_servers=servers(w).split(","))
    admin.delete_topics([ERRORS])
    until("it to be gone", lambda: ERRORS not in admin.list_topics(), 30)
    out = w.command("topology", "check", "--json", status=1)
    want(ERRORS in out, f"no word of it: {out[:300]}")
    w.command("topology", "apply")
    until("it to be there", lambda: ERRORS in admin.list_topics(), 30)
    admin.close()

    def usable():
        status, answer = w.hub.call("POST", f"/v1/topics/{ERRORS}/messages", b"x", "text/plain")
        return status == 200

    until("a publish to be delivered", usable, 60)


# --- publishing ---


@check("a plain body is read by kafka-python as it was sent")
def _(w):
    begin, id = ends(w, AUDIT), w.new()
    answer = w.publish(
        AUDIT,
        "hello, wörld".encode(),
        {"content-type": "text/plain", "hub-id": id, "hub-type": "greet", "hub-key": "k1", "hub-correlation-id": "c1"},
    )
    same("outcome", (answer["outcome"], answer["via"]), ("delivered", "kafka"))
    got = read(w, begin, AUDIT)
    same("count", len(got), 1)
    r = got[0]
    same("key and value", (r.key, r.value.decode()), (b"k1", "hello, wörld"))
    same(
        "headers",
        [value(r, n) for n in ("hub-id", "hub-type", "content-type", "hub-correlation-id", "hub-wire")],
        [id, "greet", "text/plain", "c1", "1"],
    )


@check("the position in the answer is the position at the broker")
def _(w):
    begin, id = ends(w, AUDIT), w.new()
    answer = w.publish(AUDIT, b"x", {"hub-id": id, "hub-key": "where"})
    (r,) = read(w, begin, AUDIT)
    same("position", answer["position"], {"partition": r.partition, "offset": r.offset})


@check("an asked-for partition is the one")
def _(w):
    begin = ends(w, AUDIT)
    for partition in (5, 0, 3):
        w.publish(AUDIT, b"x", {"hub-partition": str(partition)})
    same("partitions", sorted(r.partition for r in read(w, begin, AUDIT)), [0, 3, 5])


@check("an envelope with a binary key and user headers comes through")
def _(w):
    begin, id, key = ends(w, AUDIT), w.new(), b"\xff\x00k"
    payload = bytes(range(256))
    w.publish(
        AUDIT,
        id=id,
        payload=text64(payload),
        key={"base64": base64.b64encode(key).decode()},
        headers={"tenant": "größe"},
        content_type="application/octet-stream",
    )
    (r,) = read(w, begin, AUDIT)
    same("key and value", (r.key, r.value), (key, payload))
    same("headers", (value(r, "tenant"), value(r, "hub-id")), ("größe", id))


@check("a record's time is the message's")
def _(w):
    begin = ends(w, AUDIT)
    w.publish(AUDIT, payload=text64("x"), timestamp="2026-01-31T12:34:56.789Z")
    (r,) = read(w, begin, AUDIT)
    same("timestamp", r.timestamp, 1769862896789)


@check("a CloudEvent is a Kafka CloudEvent in binary mode")
def _(w):
    begin, id = ends(w, AUDIT), w.new()
    status, _ = w.hub.call(
        "POST",
        f"/v1/topics/{AUDIT}/messages",
        {"specversion": "1.0", "id": id, "type": "t.y", "source": "/here", "subject": "s", "data": {"a": 1}},
        "application/cloudevents+json",
    )
    same("status", status, 200)
    (r,) = read(w, begin, AUDIT)
    same("data", json.loads(r.value), {"a": 1})
    same("attributes", [value(r, f"ce_{n}") for n in ("source", "subject")], ["/here", "s"])
    same("id and type", [value(r, "hub-id"), value(r, "hub-type")], [id, "t.y"])


@check("1,000 keyed lines of NDJSON arrive once each, in the order of their keys")
def _(w):
    begin = ends(w, METRICS)
    sent = [(w.new(), f"k{n % 37}") for n in range(1000)]
    lines = [json.dumps({"id": id, "key": key, "payload": text64(id)}).encode() for id, key in sent]
    answers = w.hub.publish_lines(METRICS, lines)
    same("accepted", sum(a.get("outcome") in ("delivered", "spooled") for a in answers), 1000)
    until("the hub to be well", lambda: w.is_well("event"))
    got = read(w, begin, METRICS)
    same("once each", sorted(ids(got)), sorted(id for id, _ in sent))
    by_key = {}
    for r in got:
        by_key.setdefault(r.key.decode(), []).append(value(r, "hub-id"))
    for key, found in by_key.items():
        same(f"order of {key}", found, [id for id, k in sent if k == key])
    places = {}
    for r in got:
        places.setdefault(r.key, set()).add(r.partition)
    want(all(len(p) == 1 for p in places.values()), "a key is in two partitions")


@check("a malformed line leaves the lines beside it alone")
def _(w):
    begin, first, last = ends(w, AUDIT), w.new(), w.new()
    answers = w.hub.publish_lines(
        AUDIT, [json.dumps({"id": first, "key": "k"}).encode(), b"nonsense", json.dumps({"id": last, "key": "k"}).encode()]
    )
    want("error" in answers[1], f"no error: {answers[1]}")
    same("what kafka-python reads", ids(read(w, begin, AUDIT)), [first, last])


@check("a repeated id is accepted once, and answered as before")
def _(w):
    begin, id = ends(w, AUDIT), w.new()
    first = w.publish(AUDIT, b"one", {"hub-id": id})
    second = w.publish(AUDIT, b"two", {"hub-id": id})
    same("answers", second, first)
    same("what kafka-python reads", [(value(r, "hub-id"), r.value) for r in read(w, begin, AUDIT)], [(id, b"one")])


@check("an unknown topic is refused, and nothing is spooled")
def _(w):
    status, answer = w.hub.call("POST", "/v1/topics/events.nobody.made/messages", b"x", "text/plain")
    same("status, code, assume", (status, answer.get("code"), answer.get("assume")), (404, "TOPIC_NOT_FOUND", "rejected"))
    same("spooled", w.state("event")[1], 0)


@check("a compacted topic wants keys")
def _(w):
    begin = ends(w, COMPACTED)
    status, answer = w.hub.call("POST", f"/v1/topics/{COMPACTED}/messages", b"x", "text/plain")
    same("status", status, 400)
    want("key" in answer.get("detail", ""), f"{answer}")
    w.publish(COMPACTED, b"x", {"hub-key": "k"})
    same("what kafka-python reads", len(read(w, begin, COMPACTED)), 1)


@check("a message over the limit is refused with 413")
def _(w):
    status, answer = w.hub.call(
        "POST", f"/v1/topics/{AUDIT}/messages", b"x" * (10 * 1024 * 1024 + 1), "application/octet-stream"
    )
    same("status and code", (status, (answer or {}).get("code")), (413, "MESSAGE_TOO_LARGE"))


@check("twenty publishers at once lose nothing")
def _(w):
    begin, wanted, trouble = ends(w, METRICS), [w.new() for _ in range(400)], []

    def work(part):
        for id in part:
            try:
                w.publish(METRICS, b"x", {"hub-id": id})
            except Exception as e:  # told below
                trouble.append(e)

    threads = [threading.Thread(target=work, args=(wanted[n::20],)) for n in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    want(not trouble, lambda: f"{len(trouble)} failed, first: {trouble[0]}")
    until("the hub to be well", lambda: w.is_well("event"))
    same("what kafka-python reads", sorted(ids(read(w, begin, METRICS))), sorted(wanted))


@check("the command line publishes and subscribes")
def _(w):
    begin, id = ends(w, AUDIT), w.new()
    out = w.command("publish", AUDIT, "--payload", "by hand", "--id", id, "--key", "k")
    want(id in out and "delivered via kafka" in out, out)
    (r,) = read(w, begin, AUDIT)
    same("value", r.value, b"by hand")
    out = w.command("subscribe", AUDIT, "--from", "earliest", "--count", "1")
    want(out.strip(), "nothing came")


# --- reading ---


@check("what kafka-python publishes is streamed as it was sent")
def _(w):
    with Listener(w, AUDIT) as live:
        (place,) = put(w, AUDIT, [(b"fk", b"from outside", [("x-text", "größe".encode())])])
        ((_, m),) = live.wait(1)
    same("payload and key", (base64.b64decode(m["payload"]), m["key"]), (b"from outside", "fk"))
    same("place", (m["partition"], m["offset"]), (place.partition, place.offset))
    same("header", m["headers"].get("x-text"), "größe")


@check("an id that the hub had to make is the same at each reading")
def _(w):
    start = str(int(time.time() * 1000) - 1)
    (place,) = put(w, AUDIT, [(b"k", w.new().encode(), None)])
    found = []
    for _ in range(2):
        with Listener(w, AUDIT, start="earliest") as one:
            until(
                "it",
                lambda: [m for _, m in list(one.got) if (m["partition"], m["offset"]) == (place.partition, place.offset)],
            )
            found.append([m["id"] for _, m in one.got if (m["partition"], m["offset"]) == (place.partition, place.offset)])
    same("ids", found[0], found[1])


@check("a stream without a group begins at what is new")
def _(w):
    w.publish(AUDIT, b"old")
    with Listener(w, AUDIT) as live:
        id = w.new()
        w.publish(AUDIT, b"new", {"hub-id": id})
        live.wait(1)
        time.sleep(0.5)
        same("ids", live.ids(), [id])


@check("a stream resumes behind the last event that a client saw")
def _(w):
    wanted = [w.new() for _ in range(10)]
    with Listener(w, AUDIT) as live:
        for id in wanted[:6]:
            w.publish(AUDIT, b"x", {"hub-id": id, "hub-key": "one"})
        live.wait(6)
        cursor = live.got[3][0]
    for id in wanted[6:]:
        w.publish(AUDIT, b"x", {"hub-id": id, "hub-key": "one"})
    with Listener(w, AUDIT, last=cursor) as live:
        live.wait(6)
        time.sleep(0.5)
        same("ids", live.ids(), wanted[4:])


@check("a stream from a time begins there")
def _(w):
    before = w.new()
    w.publish(TOKENS, b"x", {"hub-id": before, "hub-key": "k"})
    time.sleep(0.1)
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{int(time.time() * 1000) % 1000:03}Z"
    time.sleep(0.1)
    after = w.new()
    w.publish(TOKENS, b"x", {"hub-id": after, "hub-key": "k"})
    with Listener(w, TOKENS, start=start) as one:
        one.wait(1)
        same("ids", one.ids(), [after])


@check("a pattern covers topics, and no others")
def _(w):
    with Listener(w, "helixagent.events.*") as live:
        a, b, c = w.new(), w.new(), w.new()
        w.publish(AUDIT, b"x", {"hub-id": a})
        w.publish(TOKENS, b"x", {"hub-id": c})
        w.publish(METRICS, b"x", {"hub-id": b})
        live.wait(2)
        time.sleep(0.5)
        same("ids", sorted(live.ids()), sorted([a, b]))


@check("two groups get everything, two members of one share it")
def _(w):
    g1, g2 = w.new("g"), w.new("g")
    wanted = [w.new() for _ in range(60)]
    with Listener(w, METRICS, g1, "latest") as a, Listener(w, METRICS, g1, "latest") as b, Listener(
        w, METRICS, g2, "latest"
    ) as c:
        # Both members own partitions when both have got something.
        probes = []

        def spread():
            id = w.new("probe")
            probes.append(id)
            w.publish(METRICS, b"p", {"hub-id": id, "hub-partition": str(len(probes) % 3)})
            return a.got and b.got and c.got

        until("both members to have partitions", spread, 60, 0.2)
        w.hub.publish_lines(
            METRICS, [json.dumps({"id": id, "partition": n % 3}).encode() for n, id in enumerate(wanted)]
        )
        until("all at both groups", lambda: set(wanted) <= set(a.ids() + b.ids()) and set(wanted) <= set(c.ids()), 60)
        time.sleep(1)
        shared = [i for i in a.ids() + b.ids() if i in set(wanted)]
        same("once in the group", sorted(shared), sorted(wanted))
        want(
            set(a.ids()) & set(wanted) and set(b.ids()) & set(wanted),
            "one member got everything",
        )


@check("what a group has acked is committed at the broker")
def _(w):
    group, id = w.new("g"), w.new()
    with Listener(w, AUDIT, group, "latest") as one:
        answer = w.publish(AUDIT, b"x", {"hub-id": id, "hub-key": "c"})
        one.wait(1)
        place = answer["position"]
        until(
            "its offset to be committed",
            lambda: committed(w, group, AUDIT).get(place["partition"]) == place["offset"] + 1,
            30,
            0.5,
        )


@check("a group goes on where it was, after its reader and the hub were gone")
def _(w):
    group = w.new("g")
    first, second = w.new(), w.new()
    with Listener(w, AUDIT, group, "latest") as one:
        place = w.publish(AUDIT, b"x", {"hub-id": first, "hub-key": "s"})["position"]
        one.wait(1)
        until(
            "the commit", lambda: committed(w, group, AUDIT).get(place["partition"]) == place["offset"] + 1, 30, 0.5
        )
    w.publish(AUDIT, b"x", {"hub-id": second, "hub-key": "s"})
    w.restart_hub()
    w.hub.wait_connected(["kafka"])
    with Listener(w, AUDIT, group) as one:
        one.wait(1)
        time.sleep(0.5)
        same("ids", one.ids(), [second])


@check("a client that commits itself gets again what it has not committed")
def _(w):
    group = w.new("g")
    wanted = [w.new() for _ in range(4)]
    with Listener(w, AUDIT, group, "latest", ack="cursor") as one:
        for id in wanted:
            w.publish(AUDIT, b"x", {"hub-id": id, "hub-key": "cc"})
        one.wait(4)
        status, answer = w.hub.call("POST", "/v1/stream/commit", {"group": group, "cursor": one.got[1][0]})
        want(status in (200, 204), f"commit: HTTP {status} {answer}")
    with Listener(w, AUDIT, group) as one:
        one.wait(2)
        time.sleep(0.5)
        same("ids", one.ids(), wanted[2:])


# --- again ---


@check("a replay by time brings just what lies in it, into another topic")
def _(w):
    group = w.new("g")
    old = w.new()
    w.publish(METRICS, b"x", {"hub-id": old, "hub-key": "r"})
    time.sleep(0.2)
    start = now()
    time.sleep(0.2)
    inside = [w.new() for _ in range(20)]
    w.hub.publish_lines(
        METRICS, [json.dumps({"id": id, "key": "r", "payload": text64(id)}).encode() for id in inside]
    )
    time.sleep(0.2)
    stop = now()
    time.sleep(0.2)
    w.publish(METRICS, b"x", {"hub-key": "r"})
    begin = ends(w, TOKENS)
    status, replay = w.hub.call(
        "POST",
        "/v1/replays",
        {"id": w.new("replay"), "topic": METRICS, "from_time": start, "to_time": stop, "target_topic": TOKENS},
    )
    same("accepted", status, 202)
    done = until(
        "the replay to end",
        lambda: (lambda r: r if r["status"] in ("completed", "failed") else None)(
            w.hub.call("GET", f"/v1/replays/{replay['id']}")[1]
        ),
    )
    same("counts", (done["status"], done["replayed"], done["failed"]), ("completed", 20, 0))
    same("bodies in order", [r.value.decode() for r in read(w, begin, TOKENS)], inside)


def now():
    at = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03}Z"


@check("a dry run counts and publishes nothing")
def _(w):
    begin = ends(w, TOKENS)
    out = w.command("replay", "start", METRICS, "--target", TOKENS, "--dry-run", "--follow", "--json")
    last = json.loads(out.strip().splitlines()[-1])
    want(last["status"] == "completed" and last["total"] > 0, f"{last}")
    same("what kafka-python reads", len(read(w, begin, TOKENS)), 0)


@check("a dead letter by hand is listed, reprocessed and read again")
def _(w):
    # What a hub writes there, by kafka-python: a foreign processor may do so.
    begin, id = ends(w, AUDIT), w.new()
    put(
        w,
        DEAD,
        [
            (
                b"k",
                b"again please",
                [
                    ("hub-id", id.encode()),
                    ("hub-wire", b"1"),
                    ("hub-topic", AUDIT.encode()),
                    ("hub-failure-reason", b"handler_error"),
                    ("hub-failure-details", b"by hand"),
                    ("hub-first-failure", str(int(time.time() * 1000)).encode()),
                    ("hub-last-failure", str(int(time.time() * 1000)).encode()),
                    ("hub-original-topic", AUDIT.encode()),
                ],
            )
        ],
    )
    letter = w.letter_of(id)
    same("why", letter["failure_details"], "by hand")
    status, answer = w.hub.call(
        "POST", f"/v1/dead-letters/{letter['id']}/edit", {"patch": {"topic": AUDIT, "payload": text64("mended")}}
    )
    want(status == 200, f"HTTP {status} {answer}")
    same("what kafka-python reads", [r.value for r in read(w, begin, AUDIT)], [b"mended"])


@check("a scheduled event waits for its time")
def _(w):
    begin, id = ends(w, AUDIT), w.new()
    began = time.monotonic()
    w.publish(AUDIT, b"x", {"hub-id": id, "hub-scheduled-at": "3s"}, status=202)
    listed = w.hub.call("GET", "/v1/scheduled")[1]["scheduled"]
    same("listed", [s["id"] for s in listed], [id])
    same("before its time", len(read(w, begin, AUDIT)), 0)
    until("it", lambda: ids(read(w, begin, AUDIT)) == [id], 30, 0.3)
    want(time.monotonic() - began >= 3, "it came too early")


# --- what operators see ---


@check("published events are counted")
def _(w):
    before = w.metric("messaging_messages_published_total")
    w.publish(AUDIT, b"x")
    same("counted", w.metric("messaging_messages_published_total") - before, 1)


# --- when things die ---


@check("the broker is killed: publishes go on, are spooled durably, and arrive in the order of their keys")
def _(w):
    begin = ends(w, METRICS)
    sent = [(w.new(), f"k{n % 5}") for n in range(300)]
    with w.brokers["kafka"].killed():
        until("the hub to notice", lambda: w.state("event")[0] == "degraded" or noticed(w), 40)
        lines = [json.dumps({"id": id, "key": key}).encode() for id, key in sent]
        answers = w.hub.publish_lines(METRICS, lines)
        same("outcomes", {(a.get("outcome"), a.get("durable")) for a in answers}, {("spooled", True)})
        want(w.state("event")[1] == 300, f"spooled: {w.state('event')}")
    until("the spool to drain by itself", lambda: w.is_well("event"), 120)
    by_key, seen = {}, set()
    for r in read(w, begin, METRICS):
        id = value(r, "hub-id")
        if id not in seen and not id.startswith("notice"):
            by_key.setdefault(r.key.decode(), []).append(id)
        seen.add(id)
    for key in {k for _, k in sent}:
        same(f"order of {key}", by_key.get(key), [id for id, k in sent if k == key])


def noticed(w):
    """A lane that is not open notices with the first publish."""
    w.hub.call("POST", f"/v1/topics/{TOKENS}/messages", b"x", "text/plain", {"hub-id": w.new("notice")})
    return w.state("event")[0] == "degraded"


@check("a reader outlives the broker's death and gets what was spooled meanwhile")
def _(w):
    group = w.new("g")
    wanted = [w.new() for _ in range(30)]
    with Listener(w, AUDIT, group, "latest") as one:
        w.publish(AUDIT, b"x", {"hub-id": wanted[0], "hub-key": "o"})
        one.wait(1)
        with w.brokers["kafka"].killed():
            until("the hub to notice", lambda: noticed(w), 40)
            w.hub.publish_lines(AUDIT, [json.dumps({"id": id, "key": "o"}).encode() for id in wanted[1:]])
        until("everything", lambda: set(wanted) <= set(one.ids()), 120)
        until("the hub to be well", lambda: w.is_well("event"), 60)
        time.sleep(1)
        same("each once, in order", one.ids(), wanted)


@check("the hub is killed with a spool, and its successor moves it", slow=True)
def _(w):
    begin = ends(w, METRICS)
    wanted = [w.new() for _ in range(100)]
    with w.brokers["kafka"].killed():
        until("the hub to notice", lambda: noticed(w), 40)
        answers = w.hub.publish_lines(METRICS, [json.dumps({"id": id, "key": "z"}).encode() for id in wanted])
        same("durable", {a.get("durable") for a in answers}, {True})
        w.restart_hub(kill=True)
        want(w.state("event")[1] >= 100, f"taken up: {w.state('event')}")
    until("the spool to drain", lambda: w.is_well("event"), 120)
    got = [i for i in ids(read(w, begin, METRICS)) if not i.startswith("notice")]
    same("each, in order", list(dict.fromkeys(got)), wanted)


@check("a hub that is paused for a while loses nothing")
def _(w):
    import signal

    begin, wanted = ends(w, METRICS), [w.new() for _ in range(200)]
    lines = [json.dumps({"id": id, "key": "p"}).encode() for id in wanted]
    process = w.hub.process
    answers = w.hub.publish_lines(METRICS, lines[:100])
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    answers += w.hub.publish_lines(METRICS, lines[100:])
    same("accepted", sum("outcome" in a for a in answers), 200)
    until("the hub to be well", lambda: w.is_well("event"), 60)
    same("each, in order", list(dict.fromkeys(ids(read(w, begin, METRICS)))), wanted)


@check("it starts while Kafka is away, takes publishes, and joins it later", slow=True)
def _(w):
    begin = ends(w, METRICS)
    id = w.new()
    w.hub.stop()
    with w.brokers["kafka"].killed():
        w.hub = w.start()
        answer = w.publish(METRICS, b"x", {"hub-id": id, "hub-key": "q"}, status=202)
        same("durable", answer["durable"], True)
    until("the hub to be well", lambda: w.is_well("event"), 120)
    same("what kafka-python reads", ids(read(w, begin, METRICS)), [id])


@check("it leaves with status 0")
def _(w):
    same("exit status", w.hub.stop(), 0)
    w.hub = w.start()


if __name__ == "__main__":
    sys.exit(main(["kafka"], __doc__))
