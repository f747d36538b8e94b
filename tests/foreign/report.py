"""What was checked and what came of it: one PASS or FAIL line for each name.

It judges nothing; checks hand their mismatches in.
"""

import sys

# Beyond this many mismatches of one check only their number is told.
SHOWN = 40


class Report:
    def __init__(self):
        self.failed = []
        self.passed = 0

    def check(self, name):
        return Check(self, name)

    def note(self, text):
        print(f"     {text}", flush=True)

    def exit_status(self):
        print(f"{self.passed} passed, {len(self.failed)} failed", flush=True)
        for name in self.failed:
            print(f"failed: {name}", flush=True)
        return 1 if self.failed else 0


class Check:
    """Collects the mismatches of one check; its verdict is told at the end of
    the block. An exception is a failed check, and the next one goes on."""

    def __init__(self, report, name):
        self.report = report
        self.name = name
        self.count = 0
        self.shown = []
        self.detail = ""

    def __enter__(self):
        return self

    def wrong(self, text):
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(text)

    def expect(self, ok, text):
        if not ok:
            self.wrong(text() if callable(text) else text)
        return ok

    def equal(self, where, got, wanted):
        return self.expect(got == wanted, lambda: f"{where}: {short(got)}, expected {short(wanted)}")

    def __exit__(self, kind, error, _trace):
        if kind is not None and not issubclass(kind, Exception):
            return False
        if error is not None:
            self.wrong(f"{kind.__name__}: {error}")
        for line in self.shown:
            print(f"     {self.name}: {line}", flush=True)
        if self.count > len(self.shown):
            print(f"     {self.name}: and {self.count - len(self.shown)} more", flush=True)
        if self.count:
            why = self.shown[0] if self.count == 1 else f"{self.count} mismatches, first: {self.shown[0]}"
            print(f"FAIL {self.name}: {why}", flush=True)
            self.report.failed.append(self.name)
        else:
            print(f"PASS {self.name}" + (f" ({self.detail})" if self.detail else ""), flush=True)
            self.report.passed += 1
        return True


def short(value, limit=200):
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def die(text):
    print(f"check: {text}", file=sys.stderr)
    sys.exit(2)
