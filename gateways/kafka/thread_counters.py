"""Counters of the threads of kafka-python's clients, under the names of the parts that own them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

OF_THREADS: Final = frozenset(("records_resent", "rebuilds", "threads_left", "threads_hung"))
"""Counters of the bridges that their owners do not keep themselves."""


def thread_counters(part: str, counters: Mapping[str, int]) -> dict[str, int]:
    """Return those of `counters`, a bridge's, that tell of its threads, as `part` names them."""
    return {f"{part}_{name}": number for name, number in counters.items() if name in OF_THREADS}
