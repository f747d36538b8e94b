"""Tasks that pika publishes, with plain AMQP properties, leased through the
hub's HTTP interface."""

import base64
import json
import random
import time

import pika

import tasks

QUEUE = "helixagent.tasks.background"
DEAD_LETTERS = "helixagent.dlq"
TO_NACK = 10
WITHIN = 90.0


def publish(url, count, seed, run):
    """What was published: a list of (properties, body), confirmed."""
    rng = random.Random(f"{seed}/foreign-tasks")
    connection = tasks.connect(url)
    channel = connection.channel()
    channel.confirm_delivery()
    sent = []
    for number in range(count):
        body = number.to_bytes(4, "big") + rng.randbytes(rng.choice([0, 1, 100, 3000]))
        properties = foreign_properties(rng, number, run)
        channel.basic_publish("helixagent.tasks", "background", body, properties, mandatory=True)
        sent.append((properties, body))
    connection.close()
    return sent


def foreign_properties(rng, number, run):
    p = pika.BasicProperties()
    maybe = lambda chance: rng.random() < chance
    if number % 2 == 0:
        p.message_id = f"pika-{run}-{number}"
    elif number % 51 == 0:
        # Too long to be an id of the hub's.
        p.message_id = f"pika-{run}-{number}-" + "x" * 150
    if maybe(0.5):
        p.content_type = "text/plain"
    if maybe(0.2):
        p.content_encoding = "gzip"
    if maybe(0.5):
        p.correlation_id = f"c-{number}"
    if maybe(0.3):
        p.reply_to = "amq.gen-answers"
    if maybe(0.5):
        p.type = "invoice.created"
    if maybe(0.7):
        p.priority = rng.randrange(0, 12)
    if maybe(0.8):
        p.delivery_mode = rng.choice([1, 2])
    if maybe(0.5):
        p.timestamp = int(time.time()) - rng.randrange(0, 1000)
    if maybe(0.2):
        p.expiration = "3600000"
    if maybe(0.2):
        p.app_id, p.cluster_id = "billing", "c"
    if maybe(0.7):
        p.headers = {
            "x-text": "größe",
            "X-Upper": "kept",
            "x-int": 42 + number,
            "x-big": -(1 << 40),
            "x-bool": True,
            "x-none": None,
            "x-bytes": b"plain",
            "x-binary": b"\xff\x00\xfe",
            "x-list": [1, "two", False],
            "x-table": {"a": 1, "b": {"c": "d"}},
        }
    return p


def headers_as_text(properties):
    """What the mapping, `headers, as strings`, makes of foreign types."""
    out = {}
    for name, value in (properties.headers or {}).items():
        name = name.lower()
        if isinstance(value, bool):
            out[name] = "true" if value else "false"
        elif value is None:
            out[name] = ""
        elif isinstance(value, bytes):
            try:
                out[name] = value.decode()
            except UnicodeDecodeError:
                out[f"{name}-bin"] = base64.b64encode(value).decode()
        elif isinstance(value, (list, dict)):
            out[name] = json.loads(json.dumps(value))
        else:
            out[name] = str(value)
    return out


def lease(hub, most, wait_ms):
    status, answer = hub.call(
        "POST", f"/v1/queues/{QUEUE}/lease", {"max": most, "wait_ms": wait_ms, "lease_ms": 60_000}
    )
    if status != 200:
        raise RuntimeError(f"lease: HTTP {status}: {answer}")
    return answer["deliveries"]


def ack(hub, tokens):
    status, answer = hub.call("POST", "/v1/deliveries/ack", {"tokens": tokens})
    if status != 204:
        raise RuntimeError(f"ack of {len(tokens)}: HTTP {status}: {answer}")


def check(report, hub, url, count, seed, run):
    pairs, nacked, again, dead, sent = [], [], [], [], []
    with report.check("foreign tasks: pika publishes them, confirmed") as c:
        sent = publish(url, count, seed, run)
        c.detail = str(len(sent))
    with report.check("foreign tasks: the hub leases each exactly once") as c:
        numbers, until = {}, time.monotonic() + WITHIN
        while len(pairs) < count and time.monotonic() < until:
            acked = []
            for delivery in lease(hub, 200, 2000):
                message = delivery["message"]
                body = base64.b64decode(message["payload"])
                number = int.from_bytes(body[:4], "big")
                if len(body) < 4 or number >= count:
                    c.wrong(f"an unexpected message: {message['id']}")
                    continue
                numbers[number] = numbers.get(number, 0) + 1
                pairs.append((number, message))
                # The last ones are handed back in two ways.
                if number >= count - 2 * TO_NACK:
                    nacked.append((number, delivery["token"]))
                else:
                    acked.append(delivery["token"])
            if acked:
                ack(hub, acked)
        for number, times in numbers.items():
            c.expect(times == 1, f"message {number} was leased {times} times")
        for number in range(count):
            c.expect(number in numbers, f"message {number} was not leased")
        c.detail = f"{len(pairs)} leased"
    with report.check("foreign tasks: bytes, ids, properties and headers") as c:
        made = set()
        for number, message in pairs:
            check_message(c, f"message {number}", sent[number], message, made)
    with report.check("foreign tasks: nack now hands it out again, nack never dead-letters it") as c:
        now, never = set(), set()
        for number, token in nacked:
            retry = "now" if number % 2 == 0 else "never"
            (now if retry == "now" else never).add(number)
            status, answer = hub.call(
                "POST", f"/v1/deliveries/{token}/nack", {"retry": retry, "reason": "not today"}
            )
            c.equal(f"nack {retry} of {number}", (status, answer), (204, None))
        until = time.monotonic() + 30
        while len(again) < len(now) and time.monotonic() < until:
            for delivery in lease(hub, 100, 1000):
                body = base64.b64decode(delivery["message"]["payload"])
                again.append(int.from_bytes(body[:4], "big"))
                c.expect(delivery["message"]["redelivered"], f"{again[-1]} is not marked redelivered")
                ack(hub, [delivery["token"]])
        c.equal("handed out again", sorted(again), sorted(now))
        connection = tasks.connect(url)
        for method, properties, body in tasks.read(connection, DEAD_LETTERS, len(never)):
            number = int.from_bytes(body[:4], "big")
            dead.append(number)
            if number not in never:
                continue
            headers = properties.headers or {}
            c.equal(f"dead letter {number}: body", body, sent[number][1])
            c.equal(f"dead letter {number}: hub-failure-details", headers.get("hub-failure-details"), "not today")
            for name in ("hub-failure-reason", "hub-first-failure", "hub-last-failure"):
                c.expect(headers.get(name), f"dead letter {number}: header {name} is missing")
            if number % 2 == 0:
                c.equal(f"dead letter {number}: message_id", properties.message_id, sent[number][0].message_id)
        connection.close()
        c.equal("dead letters", sorted(dead), sorted(never))


def check_message(c, where, pair, message, made):
    p, body = pair
    c.equal(f"{where}: payload", base64.b64decode(message["payload"]), body)
    c.equal(f"{where}: topic", message.get("topic"), QUEUE)
    if p.message_id is not None and len(p.message_id) <= 128:
        c.equal(f"{where}: id", message["id"], p.message_id)
    else:
        c.expect(message["id"] and message["id"] not in made, f"{where}: id {message['id']!r} is not its own")
        made.add(message["id"])
    c.equal(f"{where}: type", message.get("type", ""), p.type or "")
    c.equal(f"{where}: content_type", message.get("content_type"), p.content_type)
    c.equal(f"{where}: content_encoding", message.get("content_encoding"), p.content_encoding)
    c.equal(f"{where}: correlation_id", message.get("correlation_id"), p.correlation_id)
    c.equal(f"{where}: reply_to", message.get("reply_to"), p.reply_to)
    c.equal(f"{where}: priority", message["priority"], 5 if p.priority is None else min(p.priority, 10))
    c.equal(f"{where}: delivery_mode", message["delivery_mode"], "persistent" if p.delivery_mode == 2 else "transient")
    if p.timestamp is not None:
        c.equal(f"{where}: timestamp", message["timestamp"], tasks.envelopes.rfc3339(p.timestamp * 1000))
    c.equal(f"{where}: has an expiration", "expiration" in message, p.expiration is not None)
    got, wanted = dict(message["headers"]), headers_as_text(p)
    # An id that cannot be the hub's is kept for its owner.
    kept = [name for name, value in got.items() if value == p.message_id] if p.message_id else []
    if p.message_id and len(p.message_id) > 128:
        c.expect(kept, f"{where}: its long message_id is lost")
    for name in kept:
        got.pop(name)
    for name, value in wanted.items():
        if isinstance(value, (list, dict)) and name in got:
            got[name] = json.loads(got[name])
    c.equal(f"{where}: headers", got, wanted)


def check_empty(report, url):
    """After the hub has gone: nothing is left, unacked ones included."""
    with report.check("foreign tasks: nothing is left in the queues") as c:
        connection = tasks.connect(url)
        channel = connection.channel()
        for queue in [*map(tasks.full, tasks.QUEUES), DEAD_LETTERS, "helixagent.retry"]:
            c.equal(queue, tasks.depth(channel, queue), 0)
        connection.close()
