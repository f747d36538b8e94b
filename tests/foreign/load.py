"""A steady load over HTTP: one endless NDJSON request for each topic, written at
a fixed rate whatever the answers do, and every answer timed.

One thread and no waiting for answers: a hub that is late makes latencies long,
never the load small."""

import base64
import json
import selectors
import socket
import threading
import time
from urllib.parse import quote

TICK = 0.005
ANSWER_TIMEOUT = 120.0


class Topic:
    """What was sent to one topic, and what came of each message."""

    def __init__(self, name, keys):
        self.name, self.keys = name, keys
        self.sent, self.took, self.outcomes = [], [], []
        self.errors = []

    def id(self, n):
        return f"{self.name}-{n}"

    def key(self, n):
        return f"key-{n % self.keys}"

    def payload(self, n):
        return f"message {n} of {self.name} {'x' * (n % 100)}".encode()

    def line(self, n):
        return json.dumps(
            {
                "id": self.id(n),
                "type": "failover",
                "key": self.key(n),
                "payload": base64.b64encode(self.payload(n)).decode(),
                "headers": {"n": str(n)},
            }
        ).encode()

    def answered(self, answer, now):
        n = answer["line"] - 1
        if n != len(self.took):
            raise RuntimeError(f"{self.name}: line {answer['line']} was answered after line {len(self.took)}")
        self.took.append(now - self.sent[n])
        self.outcomes.append(answer.get("outcome"))
        if "error" in answer:
            self.errors.append((n, answer["error"].get("code"), answer["error"].get("detail")))


class Load(threading.Thread):
    """Publishes to the topics by turns until it is told to stop."""

    def __init__(self, port, topics, rate, keys):
        super().__init__(daemon=True)
        self.topics = [Topic(name, keys) for name in topics]
        self.rate = rate
        self.began = self.ended = None
        self.trouble = None
        self.stopping = threading.Event()
        self.selector = selectors.DefaultSelector()
        self.requests = [Request(port, topic) for topic in self.topics]
        for request in self.requests:
            self.selector.register(request.socket, selectors.EVENT_READ, request)

    def answered(self):
        return sum(len(topic.took) for topic in self.topics)

    def stop(self):
        """Ends the requests, and waits for every answer."""
        self.stopping.set()
        self.join()
        if self.trouble:
            raise self.trouble

    def run(self):
        try:
            self.publish()
            self.finish()
        except Exception as e:  # told to whoever stops it
            self.trouble = e
        finally:
            for request in self.requests:
                request.socket.close()

    def publish(self):
        self.began = time.monotonic()
        count = 0
        while not self.stopping.is_set():
            due = int((time.monotonic() - self.began) * self.rate)
            now = time.monotonic()
            while count < due:
                self.requests[count % len(self.requests)].add(now)
                count += 1
            self.turn(TICK)
        self.ended = time.monotonic()

    def finish(self):
        for request in self.requests:
            request.end()
        until = time.monotonic() + ANSWER_TIMEOUT
        while not all(request.done for request in self.requests):
            if time.monotonic() > until:
                missing = {r.topic.name: len(r.topic.sent) - len(r.topic.took) for r in self.requests}
                raise RuntimeError(f"not answered within {ANSWER_TIMEOUT} s: {missing}")
            self.turn(TICK)

    def turn(self, wait):
        for request in self.requests:
            request.write()
        for key, _ in self.selector.select(wait):
            request = key.data
            if request.read():
                self.selector.unregister(request.socket)


class Request:
    """One NDJSON request whose body and answer both go on."""

    def __init__(self, port, topic):
        self.topic = topic
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.out = bytearray(
            f"POST /v1/topics/{quote(topic.name)}/messages HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        self.raw, self.body = bytearray(), bytearray()
        self.headed = self.done = False

    def add(self, now):
        line = self.topic.line(len(self.topic.sent)) + b"\n"
        self.topic.sent.append(now)
        self.out += b"%x\r\n%b\r\n" % (len(line), line)

    def end(self):
        self.out += b"0\r\n\r\n"

    def write(self):
        while self.out:
            try:
                del self.out[: self.socket.send(self.out)]
            except BlockingIOError:
                return

    def read(self):
        """Takes what has come; True at the end of the answer."""
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return False
        now = time.monotonic()
        self.raw += data
        if not self.headed:
            self.head()
        while self.headed and self.chunk():
            pass
        *lines, rest = self.body.split(b"\n")
        self.body = bytearray(rest)
        for line in lines:
            if line.strip():
                self.topic.answered(json.loads(line), now)
        if not data and not self.done:
            raise RuntimeError(f"{self.topic.name}: the hub closed the connection: {bytes(self.raw[:500])!r}")
        return self.done

    def head(self):
        end = self.raw.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.raw[:end]).decode().lower()
        if head.split()[1] != "200" or "transfer-encoding: chunked" not in head:
            raise RuntimeError(f"{self.topic.name}: {bytes(self.raw[:500])!r}")
        del self.raw[: end + 4]
        self.headed = True

    def chunk(self):
        end = self.raw.find(b"\r\n")
        if end < 0:
            return False
        size = int(bytes(self.raw[:end]).split(b";")[0], 16)
        if len(self.raw) < end + 2 + size + 2:
            return False
        self.body += self.raw[end + 2 : end + 2 + size]
        del self.raw[: end + 4 + size]
        self.done = size == 0
        return not self.done
