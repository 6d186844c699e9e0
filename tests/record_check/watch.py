"""Puts the check where records leave: into `workers.Producer`, through which all records of the gateway and of the
commands go to kafka-python, and into the fakes that stand for it in tests.

Nothing of the gateway knows of it. `watch` has a process check itself once it imports `workers`, and
`hook/sitecustomize.py` calls it in each Python that a test starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gateways.kafka.records import Record
    from tests.record_check.book import Book

WORKERS: Final = "gateways.kafka.workers"
FOLDER: Final = "MQTT_TRIO_RECORD_CHECK"
"""As `book.FOLDER`; this module imports nothing of ours before there is a producer."""


@cache
def book_of(folder: str, source: str) -> Book:
    """Return the book of this process."""
    from tests.record_check.book import Book
    from tests.record_check.rules import warm_up

    warm_up()
    return Book(Path(folder), source)


class Finder(importlib.abc.MetaPathFinder):
    """Finds `workers` as others do, and has it patched behind its import."""

    def __init__(self, source: str) -> None:
        self.source = source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `MetaPathFinder`."""
        if fullname != WORKERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load, source = spec.loader.exec_module, self.source

            def exec_module(module: ModuleType) -> None:
                load(module)
                patch(module, source)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch(source: str) -> Finder:
    """Check what this process writes to Kafka from now on; `source` stands in the summary."""
    finder = Finder(source)
    if WORKERS in sys.modules:
        patch(sys.modules[WORKERS], source)
    else:
        sys.meta_path.insert(0, finder)
    return finder


def patch(module: Any, source: str) -> None:
    """Have each producer of `workers` show its records before it takes them."""
    producer = module.Producer
    if hasattr(producer, "checked_as"):
        return
    init, send = producer.__init__, producer.send

    def __init__(self: Any, options: Any, name: str, *arguments: Any, **others: Any) -> None:  # noqa: N807
        self.checked_as = (name, options)
        init(self, options, name, *arguments, **others)

    def checked_send(self: Any, record: Record, partition: int, *callbacks: Any) -> None:
        name, options = self.checked_as
        check(name, record, partition, options, source=source)
        send(self, record, partition, *callbacks)

    producer.__init__, producer.send, producer.checked_as = __init__, checked_send, ("", None)


def check(producer: str, record: Record, partition: int | None, options: Any = None, source: str = "memory") -> None:
    """Validate what the producer called `producer` is to write. Never raises. For fakes: say what they stand for."""
    if (folder := os.environ.get(FOLDER)) is None:
        return
    from tests.record_check.kinds import UnknownRecordError, kind_of

    book = book_of(folder, source)
    try:
        kind = kind_of(producer, record, options)
        if kind is not None:
            book.check(kind, record, partition or 0)
    except UnknownRecordError as exc:
        book.violation("unknown", record, [str(exc)])
    except Exception as exc:  # ours: the program is not to notice, the run is
        with suppress(OSError):
            book.violation("unchecked", record, [f"{type(exc).__name__}: {exc}"])
