"""Messages with every field in every combination that a wire must carry, and
what the wire mapping makes of each. No I/O."""

import base64
import json
import random
import time
from datetime import datetime, timezone

PRIORITIES = {"low": 1, "normal": 5, "high": 8, "critical": 10}


class Sent:
    """An envelope as it was sent, with the answer that came for it."""

    def __init__(self, topic, full, publisher, seq, fields, payload, key, at):
        self.topic, self.full, self.publisher, self.seq = topic, full, publisher, seq
        self.fields, self.payload, self.key, self.at = fields, payload, key, at
        self.id = fields.get("id")
        self.answer = None
        # Where a foreign client found it.
        self.place = None

    def line(self):
        return json.dumps(self.fields, ensure_ascii=self.seq % 2 == 0).encode()

    @property
    def priority(self):
        value = self.fields.get("priority", 5)
        return PRIORITIES.get(value, value)

    @property
    def order(self):
        """What order is kept among."""
        return (self.full, self.publisher, self.key, self.priority)

    def user_headers(self):
        return {name.lower(): value for name, value in self.fields.get("headers", {}).items()}

    def common_headers(self):
        """Headers that are the same on both brokers, as texts."""
        f = self.fields
        out = {"hub-wire": "1", "hub-max-retries": str(f.get("max_retries", 3))}
        if f.get("retry_count"):
            out["hub-attempt"] = str(f["retry_count"])
        if "expiration" in f:
            out["hub-expires"] = str(f["expiration"])
        if "error" in f:
            out["hub-error"] = f["error"]
        trace = f.get("trace_id")
        if trace and len(trace) == 32:
            out["traceparent"] = f"00-{trace}-{trace[16:]}-01"
        elif trace:
            out["traceparent"] = out["hub-trace-id"] = trace
        task = f.get("task")
        if task is not None:
            out["hub-task-version"] = "1"
            for field, name in (("deadline", "deadline"), ("worker_id", "worker-id"), ("parent_task_id", "parent-id")):
                if field in task:
                    out[f"hub-task-{name}"] = str(task[field])
            for name, value in task.get("metadata", {}).items():
                out[f"hub-task-meta-{name}"] = value
        return out | self.user_headers()

    def event_attributes(self, millis):
        """CloudEvents attributes by name; empty when it is not an event."""
        event = self.fields.get("event")
        if event is None:
            return {}
        out = {
            "specversion": "1.0",
            "id": self.id,
            "type": self.fields.get("type", ""),
            "source": event["source"],
            "time": rfc3339(millis),
        }
        if "subject" in event:
            out["subject"] = event["subject"]
        if "data_schema" in event:
            out["dataschema"] = event["data_schema"]
        return out | event.get("extensions", {})


def make(topic, full, publisher, count, seed, run, keyed=0.6, keys=40, event=False):
    """`count` envelopes for one request, a share of them with one of `keys`."""
    rng = random.Random(f"{seed}/{publisher}")
    return [one(rng, topic, full, publisher, seq, run, keyed, keys, event) for seq in range(count)]


def one(rng, topic, full, publisher, seq, run, keyed, keys, event):
    now = time.time_ns() // 1_000_000
    payload = rng.randbytes(size(rng, seq))
    fields = {"payload": base64.b64encode(payload).decode()}
    at = None

    def maybe(chance, name, value):
        if rng.random() < chance:
            fields[name] = value()

    maybe(0.5, "id", lambda: f"{run}/{publisher}:{seq} ~!")
    maybe(0.9, "type", lambda: rng.choice(["task.created", "llm.request.started", "größe", "a" * 200]))
    maybe(0.9, "priority", lambda: rng.choice([*range(1, 11), *PRIORITIES]))
    maybe(0.4, "correlation_id", lambda: f"corr-{seq}")
    maybe(0.2, "reply_to", lambda: f"helixagent.tasks.replies-{seq % 7}")
    maybe(0.5, "content_type", lambda: rng.choice(["application/octet-stream", "text/plain; charset=utf-8"]))
    maybe(0.1, "content_encoding", lambda: "identity")
    maybe(0.2, "delivery_mode", lambda: rng.choice(["transient", "persistent"]))
    maybe(0.3, "max_retries", lambda: rng.randrange(0, 20))
    maybe(0.1, "retry_count", lambda: rng.randrange(0, 5))
    maybe(0.1, "error", lambda: "Zeitüberschreitung: no answer")
    maybe(0.2, "expiration", lambda: now + rng.randrange(3_600_000, 86_400_000))
    maybe(0.3, "trace_id", lambda: trace(rng))
    maybe(0.7, "headers", lambda: headers(rng, seq))
    if rng.random() < 0.5:
        at = now - rng.randrange(0, 60_000)
        fields["timestamp"] = at if rng.random() < 0.5 else rfc3339(at)
    if event:
        maybe(0.6, "event", lambda: attributes(rng, seq))
    else:
        maybe(0.3, "task", lambda: task(rng, seq, now))
    key = None
    if rng.random() < keyed:
        number = rng.randrange(keys)
        # Every fourth key is no text.
        key = b"\xff\xfe" + number.to_bytes(2, "big") if number % 4 == 0 else f"schlüssel-{number}".encode()
        fields["key"] = {"base64": base64.b64encode(key).decode()} if number % 4 == 0 else key.decode()
    return Sent(topic, full, publisher, seq, fields, payload, key, at)


def size(rng, seq):
    if seq == 7:
        return 1 << 20
    if rng.random() < 0.02:
        return rng.randrange(20_000, 200_000)
    return rng.choice([0, 1, 31, 128, 600])


def headers(rng, seq):
    out = {"x-seq": str(seq), "X-Mixed-Case": "Kept", "x-empty": "", "x-text": 'ümläut "quoted" 日本'}
    if rng.random() < 0.1:
        out["x-long"] = "v" * 5000
    return out


def trace(rng):
    number = f"{rng.getrandbits(128) | 1:032x}"
    return number if rng.random() < 0.7 else f"00-{number}-{rng.getrandbits(64) | 1:016x}-01"


def task(rng, seq, now):
    out = {"deadline": now + 3_600_000 + seq, "metadata": {"stage": "draft", "näme": str(seq)}}
    if rng.random() < 0.5:
        out |= {"worker_id": f"worker-{seq % 5}", "parent_task_id": f"parent-{seq // 10}"}
    return out


def attributes(rng, seq):
    out = {"source": "/agents/debate", "subject": f"debate-{seq % 9}"}
    if rng.random() < 0.5:
        out |= {"data_schema": "https://example.org/schema/1", "extensions": {"partitionkey": "p", "sampledrate": "3"}}
    return out


def rfc3339(millis):
    at = datetime.fromtimestamp(millis // 1000, timezone.utc)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{millis % 1000:03d}Z"


def check_answers(check, sent, answers, via):
    """Every line has one answer, in order, and was accepted; how many had to
    be spooled."""
    spooled = 0
    check.equal("answers", len(answers), len(sent))
    for number, (one, answer) in enumerate(zip(sent, answers), 1):
        where = f"{one.publisher} line {number}"
        check.equal(f"{where}: line", answer.get("line"), number)
        outcome = answer.get("outcome")
        if not check.expect(outcome in ("delivered", "spooled"), lambda: f"{where}: {answer}"):
            continue
        if outcome == "spooled":
            spooled += 1
            check.equal(f"{where}: durable", answer.get("durable"), False)
        else:
            check.equal(f"{where}: via", answer.get("via"), via)
        if one.id is None:
            one.id = answer.get("id")
            # A UUIDv7: version digit 7, variant 8 to b.
            ok = isinstance(one.id, str) and len(one.id) == 36 and one.id[14] == "7" and one.id[19] in "89ab"
            check.expect(ok, f"{where}: made id {one.id!r} is no UUIDv7")
        else:
            check.equal(f"{where}: id", answer.get("id"), one.id)
        one.answer = answer
    return spooled


def check_order(check, read):
    """`read` in the order of reading: (place, Sent). Within a place, what one
    publisher sent with one key and priority comes in its order."""
    last = {}
    for place, one in read:
        known = last.get((place, one.order), -1)
        check.expect(known < one.seq, lambda: f"{place}: {one.publisher} key {one.key!r}: {one.seq} came after {known}")
        last[(place, one.order)] = one.seq
