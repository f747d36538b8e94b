"""Ways to break the subject on purpose. Between the challenge and the hub stands a
proxy that does to requests and answers what a broken hub would do; or the hub runs
with a setting that voids a promise. A check that passes all of them checks nothing.
"""

import http.client
import http.server
import json
import re
import socketserver
import threading

KINDS = {}


class Sabotage:
    """Passes everything on as it is."""

    env = {}
    # Words of the command that starts it.
    more = ()
    # The hub begins anew at each start.
    forgets = False

    def wrap(self, hub):
        return Behind(hub, self)

    def request(self, method, path, headers, body):
        """What reaches the hub instead; an answer (status, body) ends it here."""
        return method, path, headers, body

    def answer(self, method, path, status, body):
        return status, body


def kind(name):
    def mark(cls):
        KINDS[name] = cls
        return cls

    return mark


def find(name):
    if name not in KINDS:
        raise SystemExit(f"no such sabotage: {name}; --sabotage help lists them")
    return KINDS[name]()


def tell():
    for name, cls in KINDS.items():
        print(f"{name:16} {' '.join((cls.__doc__ or '').split())}")


def is_publish(method, path):
    return method == "POST" and path.startswith("/v1/topics/")


@kind("lose")
class Lose(Sabotage):
    """Answers publishes as delivered, and loses them."""

    def request(self, method, path, headers, body):
        if is_publish(method, path):
            return 200, fake(headers, body)
        return method, path, headers, body


@kind("corrupt")
class Corrupt(Sabotage):
    """Changes a byte of what is published, and of what is read."""

    def request(self, method, path, headers, body):
        if is_publish(method, path) and "json" not in headers.get("content-type", ""):
            body = body[:-1] + b"#" if body else body
        elif is_publish(method, path):
            body = re.sub(rb'("payload": ?")([A-Za-z0-9+/]{4})', rb"\1eHh4", body)
        return method, path, headers, body

    def answer(self, method, path, status, body):
        return status, re.sub(rb'("payload": ?")([A-Za-z0-9+/]{4})', rb"\1eHh4", body)


@kind("strip")
class Strip(Sabotage):
    """Drops everything of a message but its payload."""

    def request(self, method, path, headers, body):
        if is_publish(method, path):
            headers = {k: v for k, v in headers.items() if not k.startswith(("hub-", "ce-"))}
            lines = body.split(b"\n") if "ndjson" in headers.get("content-type", "") else [body]
            body = b"\n".join(map(bare, lines))
        return method, path, headers, body


@kind("duplicate")
class Duplicate(Sabotage):
    """Publishes everything twice, under new ids."""

    def request(self, method, path, headers, body):
        if is_publish(method, path):
            headers = {k: v for k, v in headers.items() if k != "hub-id"}
            self.again(method, path, headers, bare(body, only=("id",)))
            body = bare(body, only=("id",))
        return method, path, headers, body


@kind("deaf")
class Deaf(Sabotage):
    """Answers every settlement with 204, and does nothing."""

    def request(self, method, path, headers, body):
        if method == "POST" and path.startswith("/v1/deliveries/"):
            return 204, b""
        return method, path, headers, body


@kind("blind")
class Blind(Sabotage):
    """Leases, streams and lists are empty."""

    def answer(self, method, path, status, body):
        if "/lease" in path:
            return 200, b'{"deliveries":[]}'
        if path.startswith(("/v1/dead-letters", "/v1/scheduled", "/v1/spool", "/v1/replays")):
            return 200, b'{"letters":[],"total":0,"scheduled":[],"lanes":[],"messages":[],"replays":[],"complete":true}'
        if path.startswith("/metrics"):
            return 200, b""
        return status, body

    def request(self, method, path, headers, body):
        if path.startswith("/v1/stream?"):
            return 200, b"retry: 1000\n\n"
        return method, path, headers, body


@kind("yes")
class Yes(Sabotage):
    """Accepts everything, also what it has to refuse."""

    def answer(self, method, path, status, body):
        if status >= 400:
            return (200, fake({}, b"")) if is_publish(method, path) else (200, b"{}")
        return status, body


@kind("liar")
class Liar(Sabotage):
    """Says that all is well: every state primary, no spool, nothing amiss."""

    def answer(self, method, path, status, body):
        if path.startswith("/v1/state"):
            body = re.sub(rb'"state":"\w+"', b'"state":"primary"', body)
            body = re.sub(rb'"messages":\d+', b'"messages":0', body)
            body = re.sub(rb'"connected":\w+', b'"connected":true', body)
            body = re.sub(rb'"server_version":"[^"]*"', b'"server_version":"9.9.9"', body)
        if path.startswith("/v1/topology"):
            body = b'{"missing":[],"drift":[],"not_checked":[],"present":[]}'
        if path.startswith(("/ready", "/healthz", "/v1/health")):
            return 200, b'{"status":"ready","state":"primary"}'
        return status, body


@kind("shuffle")
class Shuffle(Sabotage):
    """Turns the order of what is published, and of what is read, round."""

    def request(self, method, path, headers, body):
        kind = headers.get("content-type", "")
        if is_publish(method, path) and "ndjson" in kind:
            body = b"\n".join(reversed(body.strip().split(b"\n"))) + b"\n"
        return method, path, headers, body

    def answer(self, method, path, status, body):
        if "/lease" in path and status == 200:
            answer = json.loads(body)
            answer["deliveries"].reverse()
            body = json.dumps(answer).encode()
        return status, body


@kind("no-fallback")
class NoFallback(Sabotage):
    """The hub runs without its fallback: an outage is the caller's."""

    env = {"MESSAGING_FALLBACK_ENABLED": "false"}


@kind("untouched")
class Untouched(Sabotage):
    """Nothing is made on the brokers, whatever the topology says."""

    env = {"MESSAGING_TOPOLOGY_MODE": "ignore"}

    def request(self, method, path, headers, body):
        if path == "/v1/topology/apply":
            return 200, b'{"created":[],"missing":[],"drift":[],"not_checked":[]}'
        return method, path, headers, body


@kind("lenient")
class Lenient(Sabotage):
    """Starts although a broker refuses the login."""

    more = ("--start-degraded",)


@kind("amnesia")
class Amnesia(Sabotage):
    """The data folder is a new one at each start, and ids are not remembered."""

    forgets = True

    def request(self, method, path, headers, body):
        if is_publish(method, path):
            headers = {k: v for k, v in headers.items() if k != "hub-id"}
            body = bare(body, only=("id",))
        return method, path, headers, body


@kind("hasty")
class Hasty(Sabotage):
    """Nothing waits: schedules, delays and expirations are taken off."""

    def request(self, method, path, headers, body):
        if is_publish(method, path):
            off = ("hub-scheduled-at", "hub-expiration", "hub-deadline")
            headers = {k: v for k, v in headers.items() if k not in off}
            body = bare(body, only=("scheduled_at", "expiration", "task"))
        return method, path, headers, body


@kind("stuck")
class Stuck(Sabotage):
    """Operators' words are answered, and nothing is done."""

    def request(self, method, path, headers, body):
        operators = ("/v1/spool/", "/v1/dead-letters/", "/v1/replays", "/v1/topology/apply", "/v1/stream/commit")
        if method != "GET" and path.startswith(operators):
            return 200, b'{"id":"r","status":"completed","result":"done","pattern":"#","lanes":0,"pending":0}'
        if method == "DELETE":
            return 200, b"{}"
        return method, path, headers, body


def bare(body, only=None):
    """A message's JSON with its payload alone, or without some fields."""
    try:
        one = json.loads(body)
    except ValueError:
        return body
    if isinstance(one, list):
        return json.dumps([json.loads(bare(json.dumps(m).encode(), only)) for m in one]).encode()
    if not isinstance(one, dict):
        return body
    kept = {k: v for k, v in one.items() if (k == "payload" if only is None else k not in only)}
    return json.dumps(kept).encode()


def fake(headers, body):
    answer = {"id": "lost", "outcome": "delivered", "via": "rabbitmq", "position": None}
    if "ndjson" in headers.get("content-type", ""):
        lines = body.strip().split(b"\n")
        return b"\n".join(json.dumps({"line": n + 1, **answer}).encode() for n in range(len(lines))) + b"\n"
    if body.lstrip().startswith(b"["):
        return json.dumps([answer] * len(json.loads(body))).encode()
    return json.dumps(answer).encode()


class Behind:
    """A hub as it is seen through what breaks it."""

    def __init__(self, hub, how):
        self.real = hub
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_one(self):
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length)
                headers = {k.lower(): v for k, v in self.headers.items() if k.lower() != "host"}
                step = how.request(self.command, self.path, headers, body)
                if len(step) == 2:
                    return self.send(*step)
                method, path, headers, body = step
                if path.startswith("/v1/stream?"):
                    return self.stream(how, method, path, headers)
                status, answer, kind = ask(hub.port, method, path, headers, body)
                status, answer = how.answer(method, path, status, answer)
                self.send(status, answer, kind)

            def send(self, status, body, kind="application/json"):
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def stream(self, how, method, path, headers):
                connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=120)
                connection.request(method, path, headers=headers)
                got = connection.getresponse()
                self.send_response(got.status)
                self.send_header("content-type", got.getheader("content-type"))
                self.send_header("connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    for line in got:
                        self.wfile.write(how.answer(method, path, got.status, line)[1])
                        self.wfile.flush()
                except OSError:
                    pass
                finally:
                    connection.close()

            do_GET = do_POST = do_DELETE = do_PUT = handle_one

        class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

        how.again = lambda method, path, headers, body: ask(hub.port, method, path, headers, body)
        proxy.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=proxy.server.serve_forever, daemon=True).start()
        self.seen = type(hub)(hub.process, hub.log, proxy.server.server_port, hub.said)

    def __getattr__(self, name):
        return getattr(self.seen, name)

    @property
    def port(self):
        return self.seen.port

    def stop(self):
        self.close()
        return self.real.stop()

    def kill(self):
        self.close()
        self.real.kill()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def ask(port, method, path, headers, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {k: v for k, v in headers.items() if k not in ("content-length", "transfer-encoding")}
    connection.request(method, path, body=body, headers=headers)
    got = connection.getresponse()
    data = got.read()
    connection.close()
    return got.status, data, got.getheader("content-type") or "application/json"
