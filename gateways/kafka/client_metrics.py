"""What kafka-python says about a client of its own, as plain numbers (docs/monitoring.md). In the client's thread.

Its metrics have traps: without tags the figure of one topic replaces that of the client, `network-io-rate` counts
operations, maxima without a sample are minus infinity, times are milliseconds, and failed fetches are not counted.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import attrs

Kind = Literal["producer", "consumer"]

OF_CLIENT: Final = {"client-id"}
"""The tag of figures that are about the whole client."""
RECORDS_GROUP: Final[Mapping[Kind, str]] = {
    "producer": "producer-metrics",
    "consumer": "consumer-fetch-manager-metrics",
}


@attrs.frozen(kw_only=True)
class ClientFigures:
    """Of one client of kafka-python, as of a moment. Averages and rates are those of its window, about half a minute;
    0 where nothing happened in that."""

    records_per_request: float = 0.0
    """Average of records in a request (producer) or in the answer to one (consumer)."""
    throttle: float = 0.0
    """Longest time, in seconds, for which Kafka has asked the client to wait because of a quota."""
    network: float = 0.0
    """Bytes per second, to and from Kafka."""
    failed_fetches: int = 0
    """Fetches that Kafka did not answer, or not for all partitions, since the client was made."""
    answered_at: float = 0.0
    """`time.monotonic()` of the last answer to a fetch."""


NO_FIGURES: Final = ClientFigures()
RATE_WINDOW: Final = 300.0
"""Seconds that `FetchFailures.rate` looks back."""
MOST_NOTES: Final = 600
"""Moments with failures that are remembered; older ones no longer count for the rate."""


class ClientMetrics:
    """Reads the few figures that are wanted of the sixty that a client has."""

    def __init__(self, client: Any, kind: Kind) -> None:
        group = f"{kind}-metrics"
        self._client = client
        self._found: dict[tuple[str, str], Any] = {}
        self._wanted = {
            "records": (RECORDS_GROUP[kind], "records-per-request-avg"),
            "throttle": (group, "throttle-time-max"),
            "incoming": (group, "incoming-byte-rate"),
            "outgoing": (group, "outgoing-byte-rate"),
        }

    def read(self) -> ClientFigures:
        """Return what the client says now; microseconds."""
        if len(self._found) < len(self._wanted):  # some are made with the first connection
            self._look()
        value = {name: self._value(key) for name, key in self._wanted.items()}
        return ClientFigures(
            records_per_request=value["records"],
            throttle=value["throttle"] / 1000,
            network=value["incoming"] + value["outgoing"],
        )

    def _look(self) -> None:
        wanted = set(self._wanted.values())
        for name, metric in (self._client.metrics(raw=True) or {}).items():  # None: `metrics_enabled` is off
            if (name.group, name.name) in wanted and OF_CLIENT.issuperset(name.tags):
                self._found[name.group, name.name] = metric

    def _value(self, key: tuple[str, str]) -> float:
        metric = self._found.get(key)
        value = float(metric.value()) if metric is not None else 0.0
        return value if math.isfinite(value) and value > 0 else 0.0


class FetchWatch:
    """Counts the fetches of one consumer that failed, for which kafka-python has no figure.

    A fetch has failed when no answer came, or one with an error for some partition: no leader, no right, no such
    offset. Its two handlers run in kafka-python's thread.
    """

    def __init__(self, fetcher: Any, ignored: type[Exception]) -> None:
        """`ignored`: how a fetch ends whose consumer is closed."""
        self.failed = 0
        self.answered_at = time.monotonic()
        self._ignored = ignored
        self._on_response: Callable[..., object] = fetcher._handle_fetch_response
        self._on_error: Callable[..., object] = fetcher._handle_fetch_error
        fetcher._handle_fetch_response = self.answered
        fetcher._handle_fetch_error = self.not_answered

    def answered(self, node_id: Any, fetch_offsets: Any, send_time: float, response: Any) -> None:
        """Note an answer, then do with it what kafka-python does."""
        self.answered_at = time.monotonic()
        if any(partition.error_code for topic in response.responses for partition in topic.partitions):
            self.failed += 1
        self._on_response(node_id, fetch_offsets, send_time, response)

    def not_answered(self, node_id: Any, exception: Exception) -> None:
        """Note that no answer will come, then do what kafka-python does."""
        if not isinstance(exception, self._ignored):
            self.failed += 1
        self._on_error(node_id, exception)


class FetchFailures:
    """Failed fetches of a reader over all its consumers, and how many of them there were lately. Kept by the thread
    that reads; anybody may ask.

    Attributes:
      total: since the start.
    """

    def __init__(self) -> None:
        self.total = 0
        self._lately: deque[tuple[float, int]] = deque(maxlen=MOST_NOTES)

    def note(self, count: int, now: float) -> None:
        """So many more have failed."""
        if count > 0:
            self.total += count
            self._lately.append((now, count))

    def rate(self, now: float) -> float:
        """Return failed fetches per second over RATE_WINDOW."""
        return sum(count for at, count in tuple(self._lately) if now - at <= RATE_WINDOW) / RATE_WINDOW
