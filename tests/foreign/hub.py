"""The hub as any client sees it: its process and its HTTP interface."""

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from urllib.parse import quote, urlencode

START_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0
ANSWER_TIMEOUT = 120.0


class Hub:
    """A running `messaging-hub serve`."""

    def __init__(self, process, log, port, said):
        self.process, self.log, self.port, self.said = process, log, port, said

    @classmethod
    def start(cls, binary, log, config=None, env=None, http_address="127.0.0.1:0", more=()):
        """Starts it and waits until it listens."""
        process = launch(binary, log, config, env, http_address, more)
        port, said = None, []
        watchdog = threading.Timer(START_TIMEOUT, process.kill)
        watchdog.start()
        for line in process.stdout:
            said.append(line.rstrip())
            if line.startswith("listening http://"):
                port = int(line.strip().rsplit(":", 1)[1])
                break
        watchdog.cancel()
        if port is None:
            process.wait()
            raise RuntimeError(
                f"the hub ended with status {process.returncode} before it listened: "
                + " | ".join(said + tail(log))
            )
        # Its pipe must not fill up while it serves.
        threading.Thread(target=lambda: said.extend(l.rstrip() for l in process.stdout), daemon=True).start()
        return cls(process, log, port, said)

    def connection(self, timeout=ANSWER_TIMEOUT):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def call(self, method, path, body=None, content_type="application/json", headers=None):
        """One request; (status, parsed JSON or None)."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        connection = self.connection()
        try:
            sent = {"content-type": content_type, **(headers or {})}
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            data = answer.read()
            try:
                parsed = json.loads(data) if data else None
            except ValueError:
                parsed = data.decode(errors="replace")
            return answer.status, parsed
        finally:
            connection.close()

    def publish_lines(self, topic, lines):
        """Sends NDJSON lines in one request; the answers, parsed, in order.

        Answers are read while lines are still being written, as a client of
        an endless stream would do."""
        connection = self.connection()
        body = b"".join(line + b"\n" for line in lines)
        connection.putrequest("POST", f"/v1/topics/{quote(topic)}/messages")
        connection.putheader("content-type", "application/x-ndjson")
        connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        trouble = []

        def write():
            try:
                for at in range(0, len(body), 65536):
                    connection.sock.sendall(body[at : at + 65536])
            except OSError as e:
                trouble.append(e)

        # The socket moves to the response object once that is there.
        writer = threading.Thread(target=write)
        writer.start()
        try:
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"{topic}: HTTP {answer.status}: {answer.read()[:500]!r}")
            answers = [json.loads(line) for line in answer if line.strip()]
        finally:
            writer.join()
            connection.close()
        if trouble:
            raise RuntimeError(f"{topic}: writing the lines failed: {trouble[0]}")
        return answers

    def events(self, pattern, group=None, start=None, timeout=ANSWER_TIMEOUT):
        """An SSE stream that is live."""
        query = {"pattern": pattern}
        if group:
            query["group"] = group
        if start:
            query["from"] = start
        connection = self.connection(timeout)
        connection.request("GET", "/v1/stream?" + urlencode(query), headers={"accept": "text/event-stream"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{pattern}: HTTP {answer.status}: {answer.read()[:500]!r}")
        return Stream(connection, answer)

    def wait_connected(self, types, within=60.0):
        """Until these brokers are connected, every route is primary and no spool
        holds anything."""
        until = time.monotonic() + within
        while True:
            status, state = self.call("GET", "/v1/state")
            connected = {b["type"] for b in state["brokers"] if b["connected"]}
            waiting = [r["pattern"] for r in state["routes"] if r["state"] != "primary" or r["spool"]["messages"]]
            if set(types) <= connected and not waiting:
                return state
            if time.monotonic() > until:
                raise RuntimeError(f"not connected within {within} s: connected {connected}, not primary {waiting}")
            time.sleep(0.1)

    def stop(self):
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Stream:
    """Server-Sent Events, one parsed message at a time."""

    def __init__(self, connection, answer):
        self.connection, self.answer = connection, answer

    def __iter__(self):
        name, cursor, data = "message", None, []
        for raw in self.answer:
            line = raw.decode().rstrip("\r\n")
            if not line:
                if data:
                    yield name, cursor, json.loads("\n".join(data))
                name, data = "message", []
                continue
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "id":
                cursor = value
            elif field == "data":
                data.append(value)

    def close(self):
        self.answer.close()
        self.connection.close()


def launch(binary, log, config=None, env=None, http_address="127.0.0.1:0", more=()):
    """Starts the binary with nothing of the caller's own settings."""
    command = [binary, "serve", "--http", http_address, *more]
    if config:
        command += ["--config", config]
    with open(log, "ab") as errors:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, env=clean(env)
        )


def clean(env=None):
    """The environment without variables that the hub reads."""
    names = ("MESSAGING_", "RABBITMQ_", "KAFKA_", "TCP_", "HTTP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return {**kept, **(env or {})}


def tail(path, lines=5):
    try:
        with open(path, errors="replace") as file:
            return [line.rstrip() for line in file.readlines()[-lines:]]
    except OSError:
        return []
