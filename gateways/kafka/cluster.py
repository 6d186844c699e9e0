"""What all parts of a gateway know together: whether Kafka answers, and facts about its topics."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias, TypeVar

import attrs

from gateways.kafka.exposed import Client
from gateways.kafka.records import Reason

log = logging.getLogger("gateways.kafka")

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588
REFUSAL_MEMORY = 1.0
"""Seconds for which Kafka is not asked again after it did not let us in."""
T = TypeVar("T")
Probe: TypeAlias = Callable[[Sequence[str]], str | None]
MOST_REASONS = 8
"""Different reasons that are logged of one outage."""


@attrs.frozen(kw_only=True)
class TopicFacts:
    """What the cluster says about a topic."""

    partitions: int
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    """Topic property max.message.bytes: the largest batch of records after compression."""
    is_compacted: bool = False
    """Records without a key are refused."""


def one_line(exc: object) -> str:
    """Return what an exception says, on one line."""
    return " ".join(f"{type(exc).__name__}: {exc}".split())


class AwayError(Exception):
    """Kafka does not let us in; the text says why."""


@attrs.frozen(kw_only=True)
class Trouble:
    """Why nothing can be written to a topic although Kafka answers."""

    reason: Reason
    text: str
    """One line, with what somebody can do about it."""
    since: float
    """Monotonic seconds."""


class Cluster:
    """Shared by the threads of one gateway; everything may be called from any thread.

    It says once that Kafka went away and once that it is back, and in between each other reason that it is away for:
    each part of the gateway reports by its own name, and Kafka counts as away while any of them says so.

    Attributes:
      outages: how often Kafka went away.
      clients: whoever has a client of Kafka, by name, for metrics. Trio thread.
    """

    def __init__(
        self,
        servers: Sequence[str],
        probe: Probe | None = None,
        glance: Probe | None = None,
        gate: Probe | None = None,
    ) -> None:
        """`servers` stand in the messages; `probe` tells why none of them lets us in, None if one does; `glance` does
        the same without a login, `gate` only where a client need not even try."""
        self.servers = list(servers)
        self.outages = 0
        self.clients: dict[str, Client] = {}
        self._probe = probe
        self._glance = glance or probe
        self._gate = gate
        self._door = threading.Lock()
        self._refusal: str | None = None
        self._refused_until = 0.0
        self._lock = threading.Lock()
        self._away: dict[str, str] = {}
        self._away_since: float | None = None
        self._said: set[str] = set()
        self._topics: dict[str, TopicFacts] = {}
        self._wanted: set[str] = set()
        self._troubles: dict[str, Trouble] = {}
        self._listeners: list[Callable[[], None]] = []

    def probe(self) -> str | None:
        """Return why no server lets us in, None when one does. Blocks for two seconds: not on the Trio thread."""
        refusal = self._refusal
        if refusal is not None and time.monotonic() < self._refused_until:
            return refusal
        return self._probe(self.servers) if self._probe is not None else None

    def when_let_in(self, open_it: Callable[[], T]) -> T:
        """Return what `open_it` makes, unless Kafka would not let it in: a client that tries would knock several times
        a second with a wrong password, and say less. Parts that come within REFUSAL_MEMORY share one answer. Blocks.

        Raises:
          AwayError: Kafka would not; and whatever `open_it` raises.
        """
        if self._gate is not None:
            with self._door:
                if self._refusal is None or time.monotonic() >= self._refused_until:
                    self._refusal = self._gate(self.servers)
                    self._refused_until = time.monotonic() + REFUSAL_MEMORY
                refusal = self._refusal
            if refusal is not None:
                raise AwayError(refusal)
        return open_it()

    def refusal(self) -> str | None:
        """Return why no client needs to try, as the latest look found it that was certain; None: nobody is certain."""
        return self._refusal

    def glance(self) -> str | None:
        """Do what `probe` does as often as one likes: without a login."""
        return self._glance(self.servers) if self._glance is not None else None

    @property
    def is_away(self) -> bool:
        """Some part of the gateway cannot work with Kafka at the moment."""
        return bool(self._away)

    @property
    def away_seconds(self) -> float:
        """For how many seconds it has counted as away; 0: it does not."""
        since = self._away_since
        return time.monotonic() - since if since is not None else 0.0

    @property
    def reason(self) -> str | None:
        """Why it counts as away, as the first part of the gateway that noticed said it; None: it is not away."""
        with self._lock:
            return next(iter(self._away.values()), None)

    def reason_but_for(self, parts: Collection[str]) -> str | None:
        """Return why anything but `parts` cannot work with Kafka; None: it can."""
        with self._lock:
            return next((reason for part, reason in self._away.items() if part not in parts), None)

    def away_for(self, part: str) -> str | None:
        """Return why `part` cannot work with Kafka at the moment; None: it can, as far as is known."""
        return self._away.get(part)

    def away(self, part: str, reason: str) -> None:
        """`part` cannot work with Kafka. Repeated calls log nothing but another reason than before: that may be the one
        that somebody can mend."""
        with self._lock:
            first, again = not self._away, part in self._away
            self._away[part] = reason
            self.outages += first
            if first:
                self._away_since = time.monotonic()
            news = first or (again and reason not in self._said and len(self._said) < MOST_REASONS)
            self._said = {reason} if first else {*self._said, reason} if news else self._said
        servers = ", ".join(self.servers)
        if first:
            text = reason if reason.endswith((".", "?")) else f"{reason}."
            log.warning("Kafka at %s is away for %s: %s MQTT goes on; trying until it is back", servers, part, text)
        elif news:
            log.warning("Kafka at %s is still away for %s: %s", servers, part, reason)
        self._tell()

    def back(self, part: str) -> None:
        """`part` works with Kafka; cheap when it always did."""
        if part not in self._away:
            return
        with self._lock:
            last = self._away.pop(part, None) is not None and not self._away
            if last:
                self._away_since = None
        if last:
            log.warning("Kafka at %s is back", ", ".join(self.servers))
        self._tell()

    def know(self, topic: str, facts: TopicFacts) -> None:
        """Remember what the cluster says about `topic`."""
        with self._lock:
            self._topics[topic] = facts
            self._wanted.discard(topic)
            self._troubles.pop(topic, None)
        self._tell()

    def facts(self, topic: str) -> TopicFacts | None:
        """Return what is known about `topic`; None: Kafka could not be asked yet, or has no such topic."""
        return self._topics.get(topic)

    def cannot(self, topic: str, reason: Reason, text: str) -> None:
        """Whoever keeps topics found that nothing can be written to `topic`, and could not change that."""
        with self._lock:
            before = self._troubles.get(topic)
            since = before.since if before is not None else time.monotonic()
            self._troubles[topic] = Trouble(reason=reason, text=text, since=since)
        if before is None:
            self._tell()

    def trouble(self, topic: str) -> Trouble | None:
        """Return what is wrong with `topic`; None: nothing, or nobody knows yet."""
        return self._troubles.get(topic)

    def want(self, topic: str) -> None:
        """Somebody waits for facts about `topic`."""
        with self._lock:
            if topic in self._topics:
                return
            self._wanted.add(topic)
        self._tell()

    def forget(self, topic: str) -> None:
        """What is known about `topic` is wrong; whoever keeps topics shall look again."""
        with self._lock:
            self._topics.pop(topic, None)
            self._wanted.add(topic)
        self._tell()

    @property
    def wanted(self) -> frozenset[str]:
        """Topics that somebody waits for."""
        with self._lock:
            return frozenset(self._wanted)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change, in the thread that made it; it must not block."""
        with self._lock:
            self._listeners = [*self._listeners, listener]

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Undo `listen`."""
        with self._lock:
            self._listeners = [known for known in self._listeners if known != listener]

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
