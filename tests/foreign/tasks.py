"""Tasks that the hub published, read back from RabbitMQ by pika."""

import base64
import time

import pika

import envelopes

QUEUES = ("background", "llm", "debate", "verification", "notifications")
PRIORITY_QUEUE = "llm"
PREFETCH = 500
SILENCE = 10.0


def full(queue):
    return f"helixagent.tasks.{queue}"


def connect(url):
    parameters = pika.URLParameters(url)
    parameters.heartbeat = 0
    return pika.BlockingConnection(parameters)


def depth(channel, queue):
    return channel.queue_declare(queue, passive=True).method.message_count


def make(total, seed, run):
    """One request for each queue, and one more through llm's short name."""
    each = total // len(QUEUES)
    batches = []
    for queue in QUEUES:
        if queue == PRIORITY_QUEUE:
            half = each // 2
            batches.append(envelopes.make(full(queue), full(queue), f"{queue}-full", half, seed, run))
            batches.append(envelopes.make(queue, full(queue), f"{queue}-short", each - half, seed, run))
        else:
            batches.append(envelopes.make(full(queue), full(queue), queue, each, seed, run))
    return batches


def read(connection, queue, count):
    """What is in the queue, at most `count` and what comes beyond it."""
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)
    got = []
    for method, properties, body in channel.consume(queue, inactivity_timeout=SILENCE):
        if method is None:
            break
        got.append((method, properties, body))
        if len(got) % 100 == 0 or len(got) >= count:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if len(got) >= count and depth(connection.channel(), queue) == 0:
            break
    channel.cancel()
    channel.close()
    return got


def check(report, url, batches, began):
    connection = connect(url)
    by_queue = {}
    for batch in batches:
        for one in batch:
            by_queue.setdefault(one.full, []).append(one)
    everything = {}
    with report.check("tasks: pika reads each exactly once") as c:
        for queue, sent in by_queue.items():
            wanted = {one.id: one for one in sent if one.answer}
            got = read(connection, queue, len(wanted))
            seen = []
            for method, properties, body in got:
                one = wanted.get(properties.message_id)
                if one is None:
                    c.wrong(f"{queue}: unexpected message_id {properties.message_id!r}")
                else:
                    seen.append((one, method, properties, body))
            counted = {}
            for one, *_ in seen:
                counted[one.id] = counted.get(one.id, 0) + 1
            for number, id in ((n, i) for i, n in counted.items() if n > 1):
                c.wrong(f"{queue}: {id} came {number} times")
            for id in wanted.keys() - counted.keys():
                c.wrong(f"{queue}: {id} is missing")
            everything[queue] = seen
        c.detail = ", ".join(f"{queue.rsplit('.', 1)[1]} {len(seen)}" for queue, seen in everything.items())
    with report.check("tasks: bodies byte for byte") as c:
        for queue, seen in everything.items():
            for one, _, _, body in seen:
                c.equal(f"{queue} {one.id}", body, one.payload)
    with report.check("tasks: AMQP properties") as c:
        for queue, seen in everything.items():
            for one, _, properties, _ in seen:
                check_properties(c, f"{queue} {one.id}", one, properties, began)
    with report.check("tasks: headers, and no others") as c:
        for queue, seen in everything.items():
            for one, _, properties, _ in seen:
                check_headers(c, f"{queue} {one.id}", one, properties, began)
    with report.check("tasks: routing") as c:
        for queue, seen in everything.items():
            for one, method, *_ in seen:
                c.equal(f"{one.id}: exchange", method.exchange, "helixagent.tasks")
                c.equal(f"{one.id}: routing key", method.routing_key, queue.rsplit(".", 1)[1])
                c.expect(not method.redelivered, f"{one.id}: redelivered")
    with report.check("tasks: order by publisher, key and priority") as c:
        for queue, seen in everything.items():
            envelopes.check_order(c, [(queue, one) for one, *_ in seen])
    with report.check("tasks: llm is read by priority") as c:
        read_priorities = [p.priority for _, _, p, _ in everything[full(PRIORITY_QUEUE)]]
        c.expect(len(set(read_priorities)) == 10, f"priorities {sorted(set(read_priorities))}")
        falls = [n for n, (a, b) in enumerate(zip(read_priorities, read_priorities[1:])) if b > a]
        c.expect(not falls, f"priority rises at positions {falls[:20]}")
    connection.close()
    return sum(len(seen) for seen in everything.values())


def check_properties(c, where, one, properties, began):
    f = one.fields
    c.equal(f"{where}: type", properties.type or "", f.get("type", ""))
    c.equal(f"{where}: content_type", properties.content_type, f.get("content_type", "application/json"))
    c.equal(f"{where}: content_encoding", properties.content_encoding, f.get("content_encoding"))
    c.equal(f"{where}: correlation_id", properties.correlation_id, f.get("correlation_id"))
    c.equal(f"{where}: reply_to", properties.reply_to, f.get("reply_to"))
    c.equal(f"{where}: priority", properties.priority, one.priority)
    c.equal(f"{where}: delivery_mode", properties.delivery_mode, 1 if f.get("delivery_mode") == "transient" else 2)
    if "expiration" in f:
        # It was written between the start of the check and now.
        longest = f["expiration"] - int(began * 1000)
        shortest = f["expiration"] - int(time.time() * 1000)
        left = int(properties.expiration or -1)
        c.expect(shortest <= left <= longest, f"{where}: expiration {left}, expected {shortest} to {longest}")
    else:
        c.equal(f"{where}: expiration", properties.expiration, None)


def check_headers(c, where, one, properties, began):
    headers = dict(properties.headers or {})
    millis = headers.get("hub-time", "")
    if c.expect(isinstance(millis, str) and millis.isdigit(), f"{where}: hub-time {millis!r}"):
        millis = int(millis)
        if one.at is None:
            now = time.time() * 1000
            c.expect(began * 1000 <= millis <= now, f"{where}: hub-time {millis} is not of this run")
        else:
            c.equal(f"{where}: hub-time", millis, one.at)
        c.equal(f"{where}: timestamp", properties.timestamp, millis // 1000)
    else:
        millis = 0
    wanted = one.common_headers() | {"hub-topic": one.full, "hub-time": str(millis)}
    if one.key is not None:
        try:
            wanted["hub-key"] = one.key.decode()
        except UnicodeDecodeError:
            wanted["hub-key-bin"] = base64.b64encode(one.key).decode()
    for name, value in one.event_attributes(millis).items():
        wanted[f"cloudEvents:{name}"] = value
    compare(c, where, headers, wanted)


def compare(c, where, got, wanted):
    for name in wanted.keys() - got.keys():
        c.wrong(f"{where}: header {name} is missing")
    for name in got.keys() - wanted.keys():
        c.wrong(f"{where}: header {name} = {got[name]!r} was not sent")
    for name in wanted.keys() & got.keys():
        c.equal(f"{where}: header {name}", got[name], wanted[name])
