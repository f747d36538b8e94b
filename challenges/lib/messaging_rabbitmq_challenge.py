"""The checks of the RabbitMQ challenge; pika is the judge."""

import json
import os
import sys
import threading
import time

import pika
import challenge
from challenge import Skip, check, from64, main, same, text64, until, want

LLM = "helixagent.tasks.llm"
BACKGROUND = "helixagent.tasks.background"
DEBATE = "helixagent.tasks.debate"
DLQ = "helixagent.dlq"
RETRY = "helixagent.retry"


def connect(w):
    parameters = pika.URLParameters(w.brokers["rabbitmq"].address)
    parameters.heartbeat = 0
    return pika.BlockingConnection(parameters)


def channel(w):
    """A channel on a connection of its own; closed with the process."""
    if hasattr(w, "amqp"):
        try:
            return w.amqp.channel()
        except pika.exceptions.AMQPError:
            # The broker was killed meanwhile.
            pass
    w.amqp = connect(w)
    return w.amqp.channel()


def get(w, queue, within=20.0):
    """The next message, acked."""
    one = channel(w)
    method, properties, body = until(
        f"a message in {queue}", lambda: (lambda m: m if m[0] else None)(one.basic_get(queue, auto_ack=True)), within
    )
    one.close()
    return method, properties, body


def drain(w, queue, silence=1.5):
    """Everything that is there: silence, and a queue that says that it is empty."""
    one, got, end = channel(w), [], time.monotonic() + 60
    for method, properties, body in one.consume(queue, auto_ack=True, inactivity_timeout=silence):
        if method is not None:
            got.append((properties, body))
        elif depth(w, queue) == 0 or time.monotonic() > end:
            break
    one.cancel()
    one.close()
    return got


def depth(w, queue):
    one = channel(w)
    count = one.queue_declare(queue, passive=True).method.message_count
    one.close()
    return count


def put(w, queue, bodies, **properties):
    """Published by pika, confirmed."""
    one = channel(w)
    one.confirm_delivery()
    for n, body in enumerate(bodies):
        one.basic_publish(
            "", queue, body, pika.BasicProperties(delivery_mode=2, message_id=f"{w.new('p')}-{n}", **properties)
        )
    one.close()


def clean(w):
    """Empty queues, and no lane that somebody paused."""
    w.hub.call("POST", "/v1/spool/resume", {"pattern": "#"})
    for queue in (LLM, BACKGROUND, DEBATE, DLQ, RETRY):
        try:
            one = channel(w)
            one.queue_purge(queue)
            one.close()
        except pika.exceptions.AMQPError:
            # Not there, or not now: the check will say so.
            pass


challenge.CLEANERS.append(clean)


# --- what is there ---


@check("the hub is connected and names the server's version")
def _(w):
    _, state = w.hub.call("GET", "/v1/state")
    seen = next(b for b in state["brokers"] if b["type"] == "rabbitmq")
    want(seen["connected"], f"not connected: {seen}")
    one = connect(w)
    version = one._impl.server_properties["version"]
    version = version.decode() if isinstance(version, bytes) else version
    one.close()
    same("version", seen["server_version"], version)
    return version


@check("the five exchanges are there with their types")
def _(w):
    wanted = {
        "helixagent.tasks": "direct",
        "helixagent.events": "topic",
        "helixagent.notifications": "fanout",
        "helixagent.dlx": "direct",
        "helixagent.retry": "topic",
    }
    for name, kind in wanted.items():
        one = channel(w)
        # Declared, it would be there in any case.
        one.exchange_declare(name, passive=True)
        # The same type is a repeat, another one is refused.
        one.exchange_declare(name, exchange_type=kind, durable=True)
        one.close()
    report = json.loads(w.command("topology", "check", "--json"))
    same("what the hub misses, and finds otherwise", (report["missing"], report["drift"]), ([], []))


@check("the task queues are there with their arguments")
def _(w):
    for name in ("background", "debate", "verification", "notifications"):
        one = channel(w)
        one.queue_declare(f"helixagent.tasks.{name}", passive=True)
        one.queue_declare(
            f"helixagent.tasks.{name}",
            durable=True,
            arguments={
                "x-queue-type": "quorum",
                "x-dead-letter-exchange": "helixagent.dlx",
                "x-dead-letter-routing-key": "dlq",
            }
            | extra(w, f"helixagent.tasks.{name}"),
        )
        one.close()


def extra(w, queue):
    """Arguments that the hub adds of its own, as it says itself."""
    _, wanted = w.hub.call("GET", "/v1/topology/wanted")
    found = next((q for q in wanted.get("queues", []) if q["name"] == queue), {})
    known = ("x-queue-type", "x-dead-letter-exchange", "x-dead-letter-routing-key")
    return {k: v for k, v in (found.get("arguments") or {}).items() if k not in known}


@check("what pika sends through the exchange reaches the queue of its key")
def _(w):
    one = channel(w)
    one.confirm_delivery()
    id = w.new()
    for key, queue in (("background", BACKGROUND), ("llm", LLM), ("debate", DEBATE)):
        one.basic_publish(
            "helixagent.tasks", key, key.encode(), pika.BasicProperties(message_id=f"{id}-{key}"), mandatory=True
        )
        got = w.lease_all(queue, 1)
        same("queue", from64(got[0]["payload"]).decode(), key)
    one.close()


@check("a queue that was declared otherwise is reported as drift, by argument")
def _(w):
    one = channel(w)
    one.queue_delete("helixagent.tasks.notifications")
    one.queue_declare(
        "helixagent.tasks.notifications",
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "helixagent.dlx",
            "x-dead-letter-routing-key": "dlq",
            "x-message-ttl": 123456,
        }
        | extra(w, "helixagent.tasks.notifications"),
    )
    one.close()
    try:
        out = w.command("topology", "check", "--json", status=1)
        want("x-message-ttl" in out and "123456" in out, f"no word of it: {out[:400]}")
    finally:
        one = channel(w)
        one.queue_delete("helixagent.tasks.notifications")
        one.close()


@check("what is missing is made by topology apply")
def _(w):
    w.command("topology", "apply")
    one = channel(w)
    one.queue_declare("helixagent.tasks.notifications", passive=True)
    one.close()
    w.command("topology", "check")


# --- publishing ---


@check("a plain body is read by pika as it was sent")
def _(w):
    id = w.new()
    answer = w.publish(
        BACKGROUND,
        "hello, wörld".encode(),
        {
            "content-type": "text/plain; charset=utf-8",
            "hub-id": id,
            "hub-type": "greet",
            "hub-correlation-id": "c1",
            "hub-reply-to": "answers",
        },
    )
    same("outcome", (answer["outcome"], answer["via"], answer["id"]), ("delivered", "rabbitmq", id))
    _, p, body = get(w, BACKGROUND)
    same("body", body.decode(), "hello, wörld")
    same(
        "properties",
        (p.message_id, p.type, p.content_type, p.correlation_id, p.reply_to, p.delivery_mode),
        (id, "greet", "text/plain; charset=utf-8", "c1", "answers", 2),
    )


@check("headers, key and trace reach pika under their names")
def _(w):
    id = w.new()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    w.publish(
        BACKGROUND,
        b"x",
        {"hub-id": id, "hub-key": "k 1", "hub-header-tenant": "blue", "traceparent": parent, "hub-max-retries": "7"},
    )
    _, p, _ = get(w, BACKGROUND)
    same("id", p.message_id, id)
    want(p.headers.get("tenant") == "blue", f"headers: {p.headers}")
    same("key", p.headers.get("hub-key"), "k 1")
    same("trace", p.headers.get("traceparent"), parent)
    same("retries", p.headers.get("hub-max-retries"), "7")
    same("wire", (p.headers.get("hub-wire"), p.headers.get("hub-topic")), ("1", BACKGROUND))


@check("an envelope is read by pika as it was sent")
def _(w):
    id = w.new()
    payload = bytes(range(256))
    w.publish(
        BACKGROUND, id=id, type="bin", payload=text64(payload), content_type="application/octet-stream", priority=9
    )
    _, p, body = get(w, BACKGROUND)
    same("message", (p.message_id, p.type, body, p.priority), (id, "bin", payload, 9))


@check("a CloudEvent keeps its attributes")
def _(w):
    id = w.new()
    status, answer = w.hub.call(
        "POST",
        f"/v1/topics/{BACKGROUND}/messages",
        {"specversion": "1.0", "id": id, "type": "t.y", "source": "/here", "subject": "s", "data": {"a": 1}},
        "application/cloudevents+json",
    )
    same("status", status, 200)
    _, p, body = get(w, BACKGROUND)
    same("body", json.loads(body), {"a": 1})
    attributes = {k.split(":")[-1]: v for k, v in p.headers.items() if k.startswith("cloudEvents:")}
    want(attributes.get("source") == "/here" and attributes.get("subject") == "s", f"headers: {p.headers}")
    same("id and type", (p.message_id, p.type), (id, "t.y"))


@check("an array is answered one by one, a refused one among them")
def _(w):
    ids = [w.new() for _ in range(3)]
    status, answer = w.hub.call(
        "POST",
        f"/v1/topics/{BACKGROUND}/messages",
        [{"id": ids[0]}, {"id": ids[1], "priority": 77}, {"id": ids[2]}],
        "application/vnd.messaging-hub+json",
    )
    same("answers", (status, len(answer)), (200, 3))
    want(answer[0].get("outcome") == "delivered" and answer[2].get("outcome") == "delivered", f"{answer}")
    want("error" in answer[1] or "code" in answer[1], f"the second is wrong: {answer[1]}")
    same("what pika reads", [p.message_id for p, _ in drain(w, BACKGROUND)], [ids[0], ids[2]])


@check("1,000 lines of NDJSON arrive once each, in order")
def _(w):
    ids = [w.new() for _ in range(1000)]
    lines = [json.dumps({"id": id, "payload": text64(id)}).encode() for id in ids]
    answers = w.hub.publish_lines(BACKGROUND, lines)
    same("answers", sum(a.get("outcome") in ("delivered", "spooled") for a in answers), 1000)
    until("the spool to be empty", lambda: w.is_well("task"))
    got = drain(w, BACKGROUND)
    same("ids in order", [p.message_id for p, _ in got], ids)
    same("bodies", [body.decode() for _, body in got], ids)


@check("a malformed line leaves the lines beside it alone")
def _(w):
    ids = [w.new(), w.new()]
    good = [json.dumps({"id": id}).encode() for id in ids]
    answers = w.hub.publish_lines(BACKGROUND, [good[0], b'{"id": ', good[1]])
    same("lines", [a["line"] for a in answers], [1, 2, 3])
    want("error" in answers[1] and answers[1]["error"].get("detail"), f"no error: {answers[1]}")
    same("what pika reads", [p.message_id for p, _ in drain(w, BACKGROUND)], ids)


@check("a repeated id is accepted once, and answered as before")
def _(w):
    id = w.new()
    first = w.publish(BACKGROUND, b"one", {"hub-id": id})
    second = w.publish(BACKGROUND, b"two", {"hub-id": id})
    same("answers", second, first)
    same("what pika reads", [(p.message_id, b) for p, b in drain(w, BACKGROUND)], [(id, b"one")])


@check("twenty publishers at once lose nothing")
def _(w):
    ids, trouble = [w.new() for _ in range(400)], []

    def work(part):
        for id in part:
            try:
                w.publish(DEBATE, b"x", {"hub-id": id})
            except Exception as e:  # told below
                trouble.append(e)

    threads = [threading.Thread(target=work, args=(ids[n::20],)) for n in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    want(not trouble, lambda: f"{len(trouble)} failed, first: {trouble[0]}")
    same("what pika reads", sorted(p.message_id for p, _ in drain(w, DEBATE)), sorted(ids))


@check("an unknown queue is refused and nothing is spooled")
def _(w):
    status, answer = w.hub.call("POST", "/v1/topics/tasks.nobody.made/messages", b"x", "text/plain")
    want(status in (404, 422) and answer.get("assume") == "rejected", f"HTTP {status} {answer}")
    same("spooled", w.state("task")[1], 0)


@check("a message over the limit is refused with 413")
def _(w):
    status, answer = w.hub.call(
        "POST", f"/v1/topics/{BACKGROUND}/messages", b"x" * (10 * 1024 * 1024 + 1), "application/octet-stream"
    )
    same("status and code", (status, (answer or {}).get("code")), (413, "MESSAGE_TOO_LARGE"))
    same("left", depth(w, BACKGROUND), 0)


@check("an expired message is not handed out but dead-lettered")
def _(w):
    id = w.new()
    w.publish(BACKGROUND, b"x", {"hub-id": id, "hub-expiration": "1s"})
    until("it to leave the queue", lambda: depth(w, BACKGROUND) == 0, 20)
    letter = w.letter_of(id)
    same("reason", letter["failure_reason"], "expired")
    drain(w, DLQ)


@check("urgent work overtakes on the queue with priorities")
def _(w):
    ids = {}
    for priority in (1, 5, 10, 8):
        ids[priority] = w.new()
        w.publish(LLM, b"x", {"hub-id": ids[priority], "hub-priority": str(priority)})
    got = [p.message_id for p, _ in drain(w, LLM)]
    same("order", got, [ids[p] for p in (10, 8, 5, 1)])


@check("the command line publishes and subscribes")
def _(w):
    id = w.new()
    out = w.command("publish", BACKGROUND, "--payload", "by hand", "--id", id, "--type", "t")
    want(id in out and "delivered" in out, out)
    out = w.command("subscribe", BACKGROUND, "--count", "1")
    want("by hand" in out, out)
    w.quiet(BACKGROUND, 500)


# --- working ---


@check("what pika publishes is leased once each and acked away")
def _(w):
    put(w, DEBATE, [b"%d" % n for n in range(100)])
    got = w.lease_all(DEBATE, 100)
    same("bodies", sorted(int(from64(m["payload"])) for m in got), list(range(100)))
    until("an empty queue", lambda: depth(w, DEBATE) == 0)
    w.quiet(DEBATE)


@check("two workers share a queue, and neither gets what the other has")
def _(w):
    put(w, DEBATE, [b"%d" % n for n in range(20)])
    first, second = w.lease(DEBATE, 10), w.lease(DEBATE, 10)
    ids = [d["message"]["id"] for d in first + second]
    same("distinct", (len(ids), len(set(ids))), (20, 20))
    for d in first + second:
        w.settle(d)
    until("an empty queue", lambda: depth(w, DEBATE) == 0)


@check("a lease that is not kept ends, and the task is handed out again")
def _(w):
    put(w, DEBATE, [b"again"])
    first = w.lease(DEBATE, 1, lease=1000)
    same("leased", len(first), 1)
    again = until("it to come again", lambda: w.lease(DEBATE, 1, 1000), 20)
    same("the same", again[0]["message"]["id"], first[0]["message"]["id"])
    status, _ = w.hub.call("POST", f"/v1/deliveries/{first[0]['token']}/ack")
    same("the old token", status, 410)
    w.settle(again[0])
    w.quiet(DEBATE)


@check("an extended lease lasts")
def _(w):
    put(w, DEBATE, [b"long"])
    one = w.lease(DEBATE, 1, lease=2000)[0]
    for _ in range(3):
        time.sleep(1)
        w.settle(one, "extend", lease_ms=2000)
        want(not w.lease(DEBATE, 1, 100), "it was handed out to another")
    w.settle(one)
    until("an empty queue", lambda: depth(w, DEBATE) == 0)


@check("nack now hands out again at once, marked as redelivered")
def _(w):
    put(w, DEBATE, [b"x"])
    one = w.lease(DEBATE, 1)[0]
    w.settle(one, "nack", retry="now")
    again = w.lease(DEBATE, 1)[0]
    same("the same, redelivered", (again["message"]["id"], again["message"]["redelivered"]), (one["message"]["id"], True))
    w.settle(again)


@check("nack later rests in the retry queue, counted, under the name of its queue")
def _(w):
    id = w.new()
    w.publish(DEBATE, b"x", {"hub-id": id})
    w.settle(w.lease(DEBATE, 1)[0], "nack", retry="later", reason="not now")
    method, p, _ = get(w, RETRY)
    same("routing key", method.routing_key, DEBATE)
    same("id and attempt", (p.message_id, p.headers.get("hub-attempt")), (id, "1"))
    same("details", p.headers.get("hub-failure-details"), "not now")


@check("after the retry tier the task comes back to its queue", slow=True)
def _(w):
    id = w.new()
    w.publish(DEBATE, b"x", {"hub-id": id})
    began = time.monotonic()
    w.settle(w.lease(DEBATE, 1)[0], "nack")
    back = until("it to come back", lambda: w.lease(DEBATE, 1, 5000), 100)
    took = time.monotonic() - began
    want(55 < took < 90, f"it came back after {took:.1f} s, the tier is 60 s")
    same("attempt", (back[0]["message"]["id"], back[0]["message"]["retry_count"]), (id, 1))
    w.settle(back[0])
    return f"{took:.1f} s"


@check("the last attempt ends among the dead letters, with all that is known")
def _(w):
    id = w.new()
    w.publish(DEBATE, b"poison", {"hub-id": id, "hub-max-retries": "0", "hub-header-tenant": "blue"})
    w.settle(w.lease(DEBATE, 1)[0], "nack", reason="it never works")
    letter = w.letter_of(id)
    same("where and why", (letter["original_queue"], letter["failure_details"]), (DEBATE, "it never works"))
    _, p, body = get(w, DLQ)
    same("what pika reads", (p.message_id, body, p.headers.get("tenant")), (id, b"poison", "blue"))
    for name in ("hub-failure-reason", "hub-failure-details", "hub-first-failure", "hub-last-failure"):
        want(p.headers.get(name), f"no {name}: {p.headers}")


@check("a dead letter is edited, reprocessed and handled once")
def _(w):
    id = w.new()
    w.publish(DEBATE, b"bad", {"hub-id": id})
    w.settle(w.lease(DEBATE, 1)[0], "nack", retry="never", reason="bad")
    letter = w.letter_of(id)
    status, answer = w.hub.call(
        "POST", f"/v1/dead-letters/{letter['id']}/edit", {"patch": {"payload": text64("good")}}
    )
    same("status", status, 200)
    got = w.lease_all(DEBATE, 1)
    same("handled", (got[0]["id"], from64(got[0]["payload"])), (id, b"good"))
    # Twice does nothing twice.
    w.hub.call("POST", f"/v1/dead-letters/{letter['id']}/reprocess", {})
    w.quiet(DEBATE)
    want(not [l for l in w.letters(status="pending", limit=1000) if l["message_id"] == id], "it is still open")


@check("a discarded letter is gone once it is purged")
def _(w):
    id = w.new()
    w.publish(DEBATE, b"x", {"hub-id": id})
    w.settle(w.lease(DEBATE, 1)[0], "nack", retry="never")
    letter = w.letter_of(id)
    w.command("dlq", "discard", letter["id"], "--reason", "no use")
    w.command("dlq", "purge")
    want(not [l for l in w.letters(limit=1000) if l["message_id"] == id], "it is still listed")
    same("what pika reads", [p.message_id for p, _ in drain(w, DLQ)], [])


# --- time ---


@check("a scheduled task waits for its time, can be called off, and outlives the hub")
def _(w):
    soon, off = w.new(), w.new()
    began = time.monotonic()
    w.publish(DEBATE, b"x", {"hub-id": soon, "hub-scheduled-at": "5s"}, status=202)
    w.publish(DEBATE, b"x", {"hub-id": off, "hub-scheduled-at": "6s"}, status=202)
    status, _ = w.hub.call("DELETE", f"/v1/scheduled/{DEBATE}/{off}")
    same("called off", status, 200)
    w.restart_hub(kill=True)
    w.hub.wait_connected(["rabbitmq"])
    same("at the broker before its time", depth(w, DEBATE), 0)
    _, p, _ = get(w, DEBATE, 30)
    took = time.monotonic() - began
    same("id", p.message_id, soon)
    want(took >= 5, f"it came after {took:.1f} s")
    time.sleep(1.5)
    same("the one that was called off", depth(w, DEBATE), 0)
    return f"{took:.1f} s"


# --- what operators see ---


@check("the depth that is measured is the depth that is there")
def _(w):
    put(w, DEBATE, [b"x"] * 7)
    name = f'messaging_queue_depth{{queue="{DEBATE}"}}'
    until("the metric to say 7", lambda: w.metric(name) == 7, 20)
    same("pika's count", depth(w, DEBATE), 7)
    drain(w, DEBATE)


@check("published and consumed are counted")
def _(w):
    before = [w.metric(f"messaging_messages_{n}_total") for n in ("published", "consumed")]
    w.publish(DEBATE, b"x")
    w.lease_all(DEBATE, 1)
    after = [w.metric(f"messaging_messages_{n}_total") for n in ("published", "consumed")]
    same("counted", [a - b for a, b in zip(after, before)], [1, 1])


# --- when things die ---


@check("the broker is killed: publishes go on, are spooled durably, and all arrive in order")
def _(w):
    ids = [w.new() for _ in range(300)]
    with w.brokers["rabbitmq"].killed():
        until("the hub to notice", lambda: w.state("task")[0] == "degraded", 30)
        answers = w.hub.publish_lines(BACKGROUND, [json.dumps({"id": id, "key": "k"}).encode() for id in ids])
        outcomes = {(a.get("outcome"), a.get("durable")) for a in answers}
        same("outcomes", outcomes, {("spooled", True)})
        same("spooled", w.state("task"), ("degraded", 300))
        status, _ = w.hub.call("GET", "/ready")
        same("ready all the same", status, 200)
    until("the spool to drain by itself", lambda: w.is_well("task"), 90)
    got = [p.message_id for p, _ in drain(w, BACKGROUND)]
    firsts = list(dict.fromkeys(got))
    same("each, in order", firsts, ids)
    return f"{len(got) - len(firsts)} repeats"


@check("while the broker is dead local workers get what is published")
def _(w):
    id = w.new()
    with w.brokers["rabbitmq"].killed():
        until("the hub to notice", lambda: w.state("task")[0] == "degraded", 30)
        w.publish(DEBATE, b"now", {"hub-id": id}, status=202)
        got = w.lease_all(DEBATE, 1)
        same("leased", got[0]["id"], id)
    until("the hub to be well", lambda: w.is_well("task"), 90)
    time.sleep(1)
    same("what was settled is not moved to the broker", depth(w, DEBATE), 0)


@check("the hub is killed with a spool, and its successor moves it")
def _(w):
    ids = [w.new() for _ in range(200)]
    with w.brokers["rabbitmq"].killed():
        until("the hub to notice", lambda: w.state("task")[0] == "degraded", 30)
        answers = w.hub.publish_lines(BACKGROUND, [json.dumps({"id": id, "key": "k"}).encode() for id in ids])
        same("durable", {a.get("durable") for a in answers}, {True})
        w.restart_hub(kill=True)
        same("taken up", w.state("task")[1], 200)
    until("the spool to drain", lambda: w.is_well("task"), 90)
    got = [p.message_id for p, _ in drain(w, BACKGROUND)]
    same("each, in order", list(dict.fromkeys(got)), ids)


@check("an operator pauses the drain, looks at the spool, and lets it go on")
def _(w):
    ids = [w.new() for _ in range(20)]
    w.command("spool", "pause", BACKGROUND, "--degrade")
    w.hub.publish_lines(BACKGROUND, [json.dumps({"id": id, "payload": text64(id)}).encode() for id in ids])
    same("at the broker", depth(w, BACKGROUND), 0)
    exported = [json.loads(line) for line in w.command("spool", "export", BACKGROUND).splitlines()]
    same("exported", [m["id"] for m in exported], ids)
    w.command("spool", "resume", BACKGROUND)
    until("the spool to drain", lambda: w.is_well("task"), 30)
    same("what pika reads", [p.message_id for p, _ in drain(w, BACKGROUND)], ids)


@check("a connection that an operator closes is made again, and consumers go on")
def _(w):
    w.publish(DEBATE, b"before")
    w.lease_all(DEBATE, 1)
    broker = w.brokers["rabbitmq"]
    if not broker.node:
        raise Skip("the broker is not ours")
    import subprocess

    done = subprocess.run(
        [broker.script, "ctl", broker.node, "close_all_connections", "challenge"], capture_output=True, text=True
    )
    same("rabbitmqctl", (done.returncode, done.stderr.strip()[-200:]), (0, ""))
    id = w.new()
    status, answer = w.hub.call("POST", f"/v1/topics/{DEBATE}/messages", b"after", "text/plain", {"hub-id": id})
    want(status in (200, 202), f"HTTP {status} {answer}")
    until("the hub to be well", lambda: w.is_well("task"), 60)
    same("leased", w.lease_all(DEBATE, 1)[0]["id"], id)


@check("a wrong password ends the start with status 1, and is not shown")
def _(w):
    import re
    import subprocess

    import hub as hubs

    url = re.sub(r"://[^@]*@", "://guest:not-the-password@", w.brokers["rabbitmq"].address)
    done = subprocess.run(
        [
            w.arguments.binary,
            "serve",
            "--http",
            "127.0.0.1:0",
            "--data",
            os.path.join(w.arguments.work, "other"),
            *w.serve_words(),
        ],
        capture_output=True,
        text=True,
        env=hubs.clean({"RABBITMQ_URL": url}),
        timeout=20,
    )
    same("exit status", done.returncode, 1)
    want("AUTHENTICATION_FAILED" in done.stderr, done.stderr[-400:])
    want("not-the-password" not in done.stderr + done.stdout, "the password is shown")


@check("it leaves with status 0 and its port is free")
def _(w):
    port = w.hub.port
    same("exit status", w.hub.stop(), 0)
    import socket

    with socket.socket() as one:
        want(one.connect_ex(("127.0.0.1", port)) != 0, "somebody still listens")
    w.hub = w.start()


if __name__ == "__main__":
    sys.exit(main(["rabbitmq"], __doc__))
