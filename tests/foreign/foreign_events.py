"""Events that kafka-python publishes, read through the hub's SSE stream."""

import base64
import random
import time

from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

import envelopes
import events

PATTERN = "helixagent.events.#"
TOPICS = [topic for topic in events.TOPICS if topic.startswith("helixagent.events.")]
# Compacted, so every record needs a key.
COMPACTED = "helixagent.events.verification.results"
WITHIN = 120.0


class Record:
    def __init__(self, number, topic, key, value, headers, millis):
        self.number, self.topic, self.key, self.value = number, topic, key, value
        self.headers, self.millis = headers, millis
        self.place = None


def make(count, seed, run):
    rng = random.Random(f"{seed}/foreign-events")
    out, now = [], int(time.time() * 1000)
    for number in range(count):
        topic = rng.choice(TOPICS)
        key = rng.choice([None, b"", b"plain", "schlüssel".encode(), b"\xff\xfe\x00"])
        if topic == COMPACTED and not key:
            key = b"k"
        # kafka-python sends no record that has neither.
        empty = key is not None and topic != COMPACTED and rng.random() < 0.1
        value = None if empty else rng.randbytes(rng.choice([0, 1, 200, 5000]))
        headers = []
        if rng.random() < 0.6:
            headers = [("x-text", "größe".encode()), ("x-binary", b"\xff\x00\xfe"), ("x-empty", b"")]
        if rng.random() < 0.3:
            headers += [
                ("ce_specversion", b"1.0"),
                ("ce_id", f"ce-{run}-{number}".encode()),
                ("ce_type", b"com.example.happened"),
                ("ce_source", b"/elsewhere"),
                ("ce_subject", b"a subject"),
                ("ce_extra", b"extension"),
                ("content-type", b"application/json"),
            ]
        elif rng.random() < 0.2:
            headers += [("hub-id", f"fh-{run}-{number}".encode()), ("hub-type", b"from.elsewhere")]
        out.append(Record(number, topic, key, value, headers, now - rng.randrange(0, 60_000)))
    return out


def publish(servers, records):
    """Through three producers, with three compressions."""
    futures = []
    for third, compression in enumerate((None, "gzip", "lz4")):
        producer = KafkaProducer(
            bootstrap_servers=servers.split(","), acks="all", compression_type=compression, linger_ms=5
        )
        for record in records[third::3]:
            future = producer.send(
                record.topic, value=record.value, key=record.key, headers=record.headers, timestamp_ms=record.millis
            )
            futures.append((record, future))
        producer.flush()
        producer.close()
    for record, future in futures:
        meta = future.get(timeout=30)
        record.place = (meta.topic, meta.partition, meta.offset)


def read(hub, begin, wanted, group):
    """Messages of a stream from the earliest on, by place, until `wanted`
    places came and a moment more, so that repeats are seen too."""
    got, stream = [], hub.events(PATTERN, group=group, start="earliest", timeout=20)
    missing, until = set(wanted), time.monotonic() + WITHIN
    try:
        for name, cursor, message in stream:
            if name != "message":
                raise RuntimeError(f"the stream sent {name}: {message}")
            place = (message["topic"], message["partition"], message["offset"])
            # What was there before this run is not of interest.
            if place[2] >= begin.get(TopicPartition(place[0], place[1]), 0):
                got.append((place, cursor, message))
                missing.discard(place)
            if not missing:
                # The loop would wait for more, so the socket is given a second.
                hub_socket(stream).settimeout(1)
            if time.monotonic() > until:
                break
    except TimeoutError:
        pass
    finally:
        stream.close()
    return got


def hub_socket(stream):
    """The response owns the socket once the head was read."""
    return stream.answer.fp.raw._sock


def check(report, hub, servers, begin, batches, count, seed, run):
    records = make(count, seed, run)
    with report.check("foreign events: kafka-python publishes them") as c:
        publish(servers, records)
        c.detail = str(len(records))
    foreign = {record.place: record for record in records if record.place}
    own = {}
    for batch in batches:
        for one in batch:
            if one.place and one.full in TOPICS:
                own[one.place] = one
    wanted = foreign.keys() | own.keys()
    group = f"check-{run}"
    with report.check("foreign events: the hub streams each exactly once") as c:
        got = read(hub, begin, wanted, group)
        counted = {}
        for place, _, _ in got:
            counted[place] = counted.get(place, 0) + 1
        for place, number in counted.items():
            c.expect(number == 1, f"{place} came {number} times")
            c.expect(place in wanted, f"{place} is not expected")
        for place in wanted - counted.keys():
            c.wrong(f"{place} is missing")
        c.detail = f"{len(foreign)} foreign and {len(own)} of the hub's own"
    with report.check("foreign events: keys, bytes, headers, times and ids") as c:
        for place, _, message in got:
            if place in foreign:
                check_message(c, str(place), foreign[place], message)
    with report.check("foreign events: the hub's own come back as they were sent") as c:
        for place, _, message in got:
            if place in own:
                check_own(c, str(place), own[place], message)
    with report.check("foreign events: partitions are read in order") as c:
        last = {}
        for (topic, partition, offset), _, _ in got:
            c.expect(last.get((topic, partition), -1) < offset, f"{topic}/{partition}: {offset} came late")
            last[topic, partition] = offset
        cursors = [cursor for _, cursor, _ in got]
        c.expect(len(set(cursors)) == len(cursors) and all(cursors), "cursors are missing or repeat")
    with report.check("foreign events: what the stream acked is committed for others to see") as c:
        check_committed(c, servers, group, begin)
    with report.check("foreign events: a made id is the same at every reading") as c:
        ids = {place: message["id"] for place, _, message in got}
        second = read(hub, begin, wanted, None)
        c.equal("messages of a second reading", len(second), len(wanted))
        for place, _, message in second:
            c.equal(f"{place}: id", message["id"], ids.get(place))
        c.equal("distinct ids", len(set(ids.values())), len(ids))


def check_message(c, where, record, message):
    c.equal(f"{where}: payload", base64.b64decode(message["payload"]), record.value or b"")
    c.equal(f"{where}: key", key_of(message), record.key)
    c.equal(f"{where}: timestamp", message["timestamp"], envelopes.rfc3339(record.millis))
    c.equal(f"{where}: redelivered", message["redelivered"], False)
    headers = dict(record.headers)
    text = lambda name: headers[name].decode() if name in headers else None
    given = text("ce_id") or text("hub-id")
    if given:
        c.equal(f"{where}: id", message["id"], given)
    c.equal(f"{where}: type", message["type"], text("ce_type") or text("hub-type") or "")
    c.equal(f"{where}: content_type", message.get("content_type"), text("content-type"))
    event = message.get("event")
    if "ce_id" in headers:
        wanted = {"source": "/elsewhere", "subject": "a subject", "extensions": {"extra": "extension"}}
        c.equal(f"{where}: event", event, wanted)
    else:
        c.equal(f"{where}: event", event, None)
    users = {}
    if "x-text" in headers:
        users = {"x-text": "größe", "x-empty": "", "x-binary-bin": base64.b64encode(b"\xff\x00\xfe").decode()}
    c.equal(f"{where}: headers", message["headers"], users)


def check_own(c, where, one, message):
    f = one.fields
    c.equal(f"{where}: id", message["id"], one.id)
    c.equal(f"{where}: payload", base64.b64decode(message["payload"]), one.payload)
    c.equal(f"{where}: key", key_of(message), one.key)
    c.equal(f"{where}: priority", message["priority"], one.priority)
    c.equal(f"{where}: headers", message["headers"], one.user_headers())
    for name, default in (
        ("type", ""),
        ("correlation_id", None),
        ("reply_to", None),
        ("content_type", "application/json"),
        ("content_encoding", None),
        ("delivery_mode", "persistent"),
        ("max_retries", 3),
        ("retry_count", 0),
        ("error", None),
        ("trace_id", None),
        ("event", None),
    ):
        c.equal(f"{where}: {name}", message.get(name), f.get(name, default))
    if one.at is not None:
        c.equal(f"{where}: timestamp", message["timestamp"], envelopes.rfc3339(one.at))
    if "expiration" in f:
        c.equal(f"{where}: expiration", message.get("expiration"), envelopes.rfc3339(f["expiration"]))


def key_of(message):
    key = message.get("key")
    if isinstance(key, dict):
        return base64.b64decode(key["base64"])
    return None if key is None else key.encode()


def check_committed(c, servers, group, begin):
    """The positions reach the ends, which takes the hub a commit interval."""
    ends = events.ends(servers, TOPICS)
    admin = KafkaAdminClient(bootstrap_servers=servers.split(","))
    until = time.monotonic() + 20
    try:
        while True:
            committed = committed_of(admin, group)
            # A partition where nothing was read needs no position.
            behind = {p: (committed.get(p), end) for p, end in ends.items() if committed.get(p, begin.get(p, 0)) != end}
            if not behind or time.monotonic() > until:
                break
            time.sleep(0.2)
        for part, (at, end) in behind.items():
            c.wrong(f"{part.topic}/{part.partition}: committed {at}, the end is {end}")
    finally:
        admin.close()


def committed_of(admin, group):
    found = admin.list_group_offsets(group) if hasattr(admin, "list_group_offsets") else admin.list_consumer_group_offsets(group)
    if group in found:
        found = found[group]
    return {part: meta.offset for part, meta in found.items() if meta.offset >= 0}
