"""What the processes of one test run found out about the records that they wrote, in a folder that they share.

Counts are in memory that is mapped to a file and violations are written at once, so that the end of a process by
SIGKILL takes nothing away.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import threading
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from gateways.kafka.dlq import ID_HEADER
from gateways.kafka.records import Record
from tests.record_check.rules import AROUND, Kind, Parts, problems_of

FOLDER: Final = "MQTT_TRIO_RECORD_CHECK"
"""Environment variable with the folder. Without it nothing is checked."""
KINDS: Final = tuple(Kind)
MOST_ALIKE: Final = 3
"""Violations of one kind, topic and problem that a process writes down; the others say nothing new."""
MOST_VIOLATIONS: Final = 1000
"""Of one process that are written down."""
SHOWN: Final = 400
"""Bytes of a value that are shown."""
COUNT: Final = struct.Struct("<Q")
TEST: Final = "PYTEST_CURRENT_TEST"
"""Where pytest says which test runs; a process has that of its start."""


@attrs.frozen
class Violation:
    """A record that does not validate."""

    kind: str
    topic: str
    test: str
    problems: tuple[str, ...]
    record: str

    def __str__(self) -> str:
        told = "\n".join(f"    {problem}" for problem in self.problems)
        return f"{self.kind} in topic {self.topic}, written by {self.test}:\n{told}\n    record: {self.record}"


class Book:
    """The folder, as one process uses it. Any thread."""

    def __init__(self, folder: Path, source: str) -> None:
        """`source` stands in the summary: where the records came from."""
        self.folder = folder
        self._source = source
        self._lock = threading.Lock()
        self._counts: mmap.mmap | None = None
        self._parts = Parts()
        self._topics: set[tuple[str, Kind]] = set()
        self._noted: Counter[tuple[str, ...]] = Counter()

    def check(self, kind: Kind, record: Record, partition: int) -> None:
        """Validate a record that is about to be written, and count it. Never raises for what is in it."""
        with self._lock:
            self._count(kind)
            if problems := problems_of(kind, record, partition, self._parts):
                self._note(kind, record, problems)
            elif kind is Kind.REDRIVEN:
                self._append("redriven", _packed(record, partition))
            elif AROUND[kind] in ("archive", "messages") and (record.topic, kind) not in self._topics:
                self._topics.add((record.topic, kind))
                self._append("topics", {"topic": record.topic, "kind": kind})

    def count(self, kind: Kind) -> None:
        """Count a record that was validated elsewhere."""
        with self._lock:
            self._count(kind)

    def violation(self, kind: str, record: Record, problems: Iterable[str]) -> None:
        """Note that a record is none that may be written."""
        with self._lock:
            self._note(kind, record, problems)

    def _count(self, kind: Kind) -> None:
        counts = self._counts = self._counts or self._open()
        at = KINDS.index(kind) * COUNT.size
        COUNT.pack_into(counts, at, COUNT.unpack_from(counts, at)[0] + 1)

    def _open(self) -> mmap.mmap:
        path = self.folder / f"{self._source}.{os.getpid()}.{os.urandom(4).hex()}.counts"
        with path.open("w+b") as file:
            file.truncate(len(KINDS) * COUNT.size)
            return mmap.mmap(file.fileno(), len(KINDS) * COUNT.size)

    def _note(self, kind: str, record: Record, problems: Iterable[str]) -> None:
        problems = tuple(problems)
        if self._noted.total() < MOST_VIOLATIONS and self._noted[kind, record.topic, *problems] < MOST_ALIKE:
            self._noted[kind, record.topic, *problems] += 1
            self._append("violations", _told(kind, record, problems))

    def _append(self, name: str, line: Mapping[str, object]) -> None:
        text = json.dumps(line).encode() + b"\n"
        number = os.open(self.folder / f"{name}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(number, text)
        finally:
            os.close(number)


def _told(kind: str, record: Record, problems: Iterable[str]) -> dict[str, object]:
    process = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200] if sys.argv else ""
    shown = {"key": record.key, "timestamp": record.timestamp_ms, "headers": record.headers}
    value = record.value
    shown["value"] = value if value is None or len(value) <= SHOWN else value[:SHOWN] + b"..."
    return {
        "kind": kind,
        "topic": record.topic,
        "test": os.environ.get(TEST) or f"{process!r} outside of a test",
        "problems": list(problems),
        "record": repr(shown)[: 6 * SHOWN],
    }


def _packed(record: Record, partition: int) -> dict[str, object]:
    def packed(raw: bytes | None) -> str | None:
        return None if raw is None else b64encode(raw).decode()

    headers = [(name, packed(raw)) for name, raw in record.headers]
    return {
        "topic": record.topic,
        "partition": partition,
        "key": packed(record.key),
        "value": packed(record.value),
        "headers": headers,
        "timestamp": record.timestamp_ms,
        "test": os.environ.get(TEST, ""),
    }


# --- what a run found


@attrs.frozen
class Findings:
    """All of it."""

    counts: Mapping[str, Counter[Kind]]
    """By source."""
    violations: tuple[Violation, ...]

    @property
    def seen(self) -> Counter[Kind]:
        """Records that were checked, by kind, wherever they came from."""
        return sum(self.counts.values(), Counter[Kind]())

    @property
    def missing(self) -> list[Kind]:
        """Kinds that nobody wrote."""
        return [kind for kind in KINDS if not self.seen[kind]]


def findings(folder: Path) -> Findings:
    """Read what was found until now."""
    counts: dict[str, Counter[Kind]] = {}
    for path in sorted(folder.glob("*.counts")):
        numbers = struct.unpack(f"<{len(KINDS)}Q", path.read_bytes())
        found = counts.setdefault(path.name.partition(".")[0], Counter())
        found.update({kind: number for kind, number in zip(KINDS, numbers, strict=True) if number})
    violations = [Violation(**(line | {"problems": tuple(line["problems"])})) for line in _lines(folder, "violations")]
    return Findings(counts, (*violations, *_redriven_wrongly(folder)))


def _redriven_wrongly(folder: Path) -> Iterator[Violation]:
    """Look at records that were written again: what a node made of a message has to be what others in its topic are.
    Which kind that is, may have been said later than the record was written, and by another process."""
    kinds: dict[str, set[Kind]] = {}
    for line in _lines(folder, "topics"):
        kinds.setdefault(line["topic"], set()).add(Kind(line["kind"]))
    for line in _lines(folder, "redriven"):
        record = _unpacked(line)
        if not any(name == "mqtt.brokerId" for name, _ in record.headers):
            continue  # somebody else wrote it, and somebody mended it
        tried = [problems_of(kind, record, line["partition"]) for kind in kinds.get(line["topic"], ())]
        if tried and all(tried):
            told = _told(Kind.REDRIVEN, record, tried[0]) | {"test": line["test"]}
            yield Violation(**(told | {"problems": tuple(tried[0])}))  # type: ignore[arg-type]


def _unpacked(line: Mapping[str, Any]) -> Record:
    def raw(text: str | None) -> bytes | None:
        return None if text is None else b64decode(text)

    headers = [(name, raw(text) or b"") for name, text in line["headers"] if name != ID_HEADER]
    return Record(line["topic"], None, raw(line["key"]), raw(line["value"]), headers, line["timestamp"])


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
