"""Events that the hub published, read back from Kafka by kafka-python."""

import time

from kafka import KafkaConsumer, TopicPartition

import envelopes

# The ten topics with their partitions.
TOPICS = {
    "helixagent.events.llm.responses": 6,
    "helixagent.events.debate.rounds": 6,
    "helixagent.events.verification.results": 3,
    "helixagent.events.provider.health": 3,
    "helixagent.events.audit": 6,
    "helixagent.events.metrics": 3,
    "helixagent.events.errors": 3,
    "helixagent.stream.tokens": 12,
    "helixagent.stream.sse": 6,
    "helixagent.stream.websocket": 6,
}
READ_TIMEOUT = 120.0
# With so many records for each partition none should be without.
SPREAD = 20


def make(total, seed, run):
    each = total // len(TOPICS)
    return [
        envelopes.make(topic, topic, topic.removeprefix("helixagent."), each, seed, run, keyed=1.0, keys=400, event=True)
        for topic in TOPICS
    ]


def consumer(servers):
    return KafkaConsumer(
        bootstrap_servers=servers.split(","),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_bytes=64 << 20,
        max_partition_fetch_bytes=16 << 20,
    )


def partitions(reader, topics=TOPICS):
    out = []
    for topic in topics:
        found = reader.partitions_for_topic(topic)
        if not found:
            raise RuntimeError(f"topic {topic} does not exist")
        out += [TopicPartition(topic, p) for p in sorted(found)]
    return out


def ends(servers, topics=TOPICS):
    reader = consumer(servers)
    try:
        return dict(reader.end_offsets(partitions(reader, topics)))
    finally:
        reader.close()


def read(servers, begin, topics=TOPICS):
    """Everything between `begin` and the ends as they are now."""
    reader = consumer(servers)
    try:
        all_parts = partitions(reader, topics)
        end = dict(reader.end_offsets(all_parts))
        reader.assign(all_parts)
        for part in all_parts:
            reader.seek(part, begin.get(part, 0))
        records, until = [], time.monotonic() + READ_TIMEOUT
        while any(reader.position(part) < end[part] for part in all_parts):
            if time.monotonic() > until:
                raise RuntimeError(f"only {len(records)} records came within {READ_TIMEOUT} s")
            for batch in reader.poll(timeout_ms=500).values():
                records += batch
        return records
    finally:
        reader.close()


def header(record, name):
    found = [value for key, value in record.headers if key == name]
    return found[0] if len(found) == 1 else None


def check(report, servers, begin, batches, began):
    wanted = {}
    for batch in batches:
        for one in batch:
            if one.answer:
                wanted[(one.full, one.id)] = one
    seen = []
    with report.check("events: kafka-python reads each exactly once") as c:
        counted = {}
        for record in read(servers, begin):
            id = (header(record, "hub-id") or b"").decode()
            one = wanted.get((record.topic, id))
            if one is None:
                c.wrong(f"{record.topic}/{record.partition}@{record.offset}: unexpected hub-id {id!r}")
                continue
            counted[one.full, one.id] = counted.get((one.full, one.id), 0) + 1
            one.place = (record.topic, record.partition, record.offset)
            seen.append((one, record))
        for (topic, id), number in counted.items():
            c.expect(number == 1, f"{topic} {id} came {number} times")
        for topic, id in wanted.keys() - counted.keys():
            c.wrong(f"{topic} {id} is missing")
        topics = {topic: 0 for topic in TOPICS}
        for one, _ in seen:
            topics[one.full] += 1
        c.detail = ", ".join(f"{topic.removeprefix('helixagent.')} {n}" for topic, n in topics.items())
    with report.check("events: keys and values byte for byte") as c:
        for one, record in seen:
            c.equal(f"{one.full} {one.id}: key", record.key, one.key)
            c.equal(f"{one.full} {one.id}: value", record.value, one.payload)
    with report.check("events: headers, and no others") as c:
        for one, record in seen:
            check_headers(c, one, record)
    with report.check("events: create time") as c:
        for one, record in seen:
            where = f"{one.full} {one.id}"
            c.equal(f"{where}: timestamp type", record.timestamp_type, 0)
            if one.at is None:
                now = time.time() * 1000
                c.expect(began * 1000 <= record.timestamp <= now, f"{where}: {record.timestamp} is not of this run")
            else:
                c.equal(f"{where}: timestamp", record.timestamp, one.at)
    with report.check("events: positions in the answers are those in Kafka") as c:
        for one, record in seen:
            if one.answer["outcome"] == "spooled":
                continue
            position = {"partition": record.partition, "offset": record.offset}
            c.equal(f"{one.full} {one.id}", one.answer.get("position"), position)
    with report.check("events: one partition for a key, and the topic's partitions are used") as c:
        homes, used = {}, {}
        for one, record in seen:
            home = homes.setdefault((one.full, one.key), record.partition)
            c.equal(f"{one.full} key {one.key!r}: partition", record.partition, home)
            used.setdefault(one.full, set()).add(record.partition)
        for topic, count in TOPICS.items():
            known = used.get(topic, set())
            enough = sum(one.full == topic for one, _ in seen) >= SPREAD * count
            c.expect(len(known) == count or not enough, f"{topic}: {len(known)} of {count} partitions used")
    with report.check("events: order by publisher, key and priority") as c:
        read_order = sorted(seen, key=lambda pair: (pair[1].topic, pair[1].partition, pair[1].offset))
        envelopes.check_order(c, [(f"{r.topic}/{r.partition}", one) for one, r in read_order])
    return len(seen)


def check_headers(c, one, record):
    where, f = f"{one.full} {one.id}", one.fields
    got = dict(record.headers)
    c.equal(f"{where}: header names are distinct", len(got), len(record.headers))
    wanted = one.common_headers() | {
        "hub-id": one.id,
        "hub-type": f.get("type", ""),
        "hub-priority": str(one.priority),
        "content-type": f.get("content_type", "application/json"),
    }
    for field, name in (
        ("correlation_id", "hub-correlation-id"),
        ("reply_to", "hub-reply-to"),
        ("content_encoding", "content-encoding"),
    ):
        if field in f:
            wanted[name] = f[field]
    if f.get("delivery_mode") == "transient":
        wanted["hub-delivery-mode"] = "transient"
    for name, value in one.event_attributes(record.timestamp).items():
        wanted[f"ce_{name}"] = value
    # As bytes: what is compared is what travelled.
    for name in wanted.keys() - got.keys():
        c.wrong(f"{where}: header {name} is missing")
    for name in got.keys() - wanted.keys():
        c.wrong(f"{where}: header {name} = {got[name]!r} was not sent")
    for name in wanted.keys() & got.keys():
        c.equal(f"{where}: header {name}", got[name], wanted[name].encode())
