"""What there is to say about one reader of topics: how far it is behind, and how its fetches fare [K17].

Kept by the thread that reads; anybody may ask. It outlives the single consumers of that reader.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from gateways.kafka.client_metrics import NO_FIGURES, ClientFigures, FetchFailures
from gateways.kafka.exposed import ClientReport
from gateways.kafka.lag import Behind, Lag, Partition

log = logging.getLogger("gateways.kafka")

FRESH: Final = 2.0
"""Seconds for which an answer to a fetch says what there is."""
LOOK_INTERVAL: Final = 1.0
BLIND_INTERVAL: Final = 5.0
"""Seconds to the next question for the ends of partitions when nobody answered the last one."""


class Measured(Protocol):
    """What is needed of `workers.Consumer`."""

    def latest_ends(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]: ...
    def figures(self) -> ClientFigures: ...


class ReaderFigures:
    """Figures of one reader.

    Attributes:
      lag: how far it is behind, as of the last look.
      client: what its present client says about itself; replaced as a whole.
      failures: fetches that failed.
    """

    def __init__(self, name: str) -> None:
        """`name` stands in logs."""
        self.lag = Lag()
        self.client = NO_FIGURES
        self.failures = FetchFailures()
        self._name = name
        self._counted = 0
        """Failed fetches of the present client that are in `failures`."""

    def look(
        self, consumer: Measured, positions: Mapping[Partition, int], ends: Mapping[Partition, int | None]
    ) -> None:
        """Note where reading is, and where partitions end as far as the client knows from its fetches."""
        self._read(consumer)
        self.lag.look(positions, ends, fresh=time.monotonic() - self.client.answered_at < FRESH)

    def look_ahead(self, consumer: Measured, positions: Mapping[Partition, int]) -> float:
        """Do the same while nobody takes what was read: kafka-python fetches only where it is polled, and knows the
        ends of partitions from that alone, so Kafka is asked. Return after how many seconds to do it again.

        It blocks for a second at most, and raises nothing.
        """
        pause, ends = LOOK_INTERVAL, {}
        try:
            self._read(consumer)
            ends = dict(consumer.latest_ends(list(positions)))
        except Exception as exc:
            log.debug("Kafka consumer %s: the ends of partitions are not known: %s", self._name, exc)
            pause = BLIND_INTERVAL
        self.lag.look(positions, ends, fresh=False)
        return pause

    def failed(self, consumer: Measured) -> None:
        """Something went wrong with the client: that is a failed fetch, unless it has counted one itself."""
        try:
            self._read(consumer)
        except Exception as exc:
            log.debug("Kafka consumer %s: no figures: %s", self._name, exc)
        if not self._counted:
            self.failures.note(1, time.monotonic())

    def closed(self) -> None:
        """The client is no more."""
        self.client, self._counted = NO_FIGURES, 0

    def report(self, lag: Mapping[Partition, Behind]) -> ClientReport:
        """Say how the reader fares; `lag` is how far behind it is. Anybody."""
        return ClientReport(
            kind="consumer",
            figures=self.client,
            lag=lag,
            skew=self.lag.skew,
            failed_fetches=self.failures.total,
            failed_fetch_rate=self.failures.rate(time.monotonic()),
        )

    def _read(self, consumer: Measured) -> None:
        self.client = client = consumer.figures()
        self.failures.note(client.failed_fetches - self._counted, time.monotonic())
        self._counted = client.failed_fetches
