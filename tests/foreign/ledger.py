"""Judges what a reader found against what was published. No I/O."""

from dataclasses import dataclass, field


@dataclass
class Read:
    """One message as a foreign client read it, in its order."""

    id: str
    key: str
    payload: bytes
    number: str
    marked: bool


@dataclass
class Verdict:
    lost: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)
    corrupted: list = field(default_factory=list)
    reordered: list = field(default_factory=list)
    # Copies beyond the first, and those of them that were not announced.
    repeats: int = 0
    unmarked: list = field(default_factory=list)
    read: int = 0

    def __str__(self):
        return (
            f"{self.read} read, {len(self.lost)} lost, {self.repeats} duplicated, {len(self.corrupted)} corrupted, "
            f"{len(self.reordered)} reordered per key, {len(self.unexpected)} unexpected"
        )


def judge(topic, streams):
    """`topic` says what was accepted; `streams` are what was read of it, a list
    of reads for each place that keeps an order of its own (a queue, a partition)."""
    accepted = {topic.id(n): n for n, outcome in enumerate(topic.outcomes) if outcome}
    verdict, seen, last = Verdict(), {}, {}
    for place, reads in streams.items():
        for one in reads:
            verdict.read += 1
            n = accepted.get(one.id)
            if n is None:
                verdict.unexpected.append(one.id)
                continue
            wanted = (topic.key(n), topic.payload(n), str(n))
            if (one.key, one.payload, one.number) != wanted:
                verdict.corrupted.append(one.id)
            if one.id in seen:
                verdict.repeats += 1
                # Either copy may be the one that was written again.
                if not (one.marked or seen[one.id]):
                    verdict.unmarked.append(one.id)
                continue
            seen[one.id] = one.marked
            before = last.get((place, one.key), -1)
            if n < before:
                verdict.reordered.append(f"{one.id} after {before}")
            last[place, one.key] = max(n, before)
    verdict.lost = sorted(accepted.keys() - seen.keys())
    return verdict
