"""What all bridges of a gateway know together: whether Kafka answers, and facts about its topics."""

from __future__ import annotations

import logging
import threading

import attrs

log = logging.getLogger("gateways.kafka")


@attrs.frozen(kw_only=True)
class TopicFacts:
    """What the cluster says about a topic."""

    partitions: int
    max_message_bytes: int = 1_048_588
    """Topic property max.message.bytes: the largest batch of records after compression."""


class Cluster:
    """Shared by the threads of one gateway: says once that Kafka went away and once that it is back.

    Each part of the gateway reports by its own name; Kafka counts as away while any of them says so.
    """

    def __init__(self, servers: str) -> None:
        """`servers` stands in the messages."""
        self._servers = servers
        self._lock = threading.Lock()
        self._away: dict[str, str] = {}
        self._topics: dict[str, TopicFacts] = {}
        self.outages = 0

    @property
    def is_away(self) -> bool:
        """Some part of the gateway cannot work with Kafka at the moment."""
        return bool(self._away)

    def away(self, part: str, reason: str) -> None:
        """`part` cannot reach Kafka. Any thread; repeated calls log nothing."""
        with self._lock:
            first = not self._away
            self._away[part] = reason
            self.outages += first
        if first:
            log.warning("Kafka at %s is away (%s: %s); MQTT goes on, retrying until it is back", self._servers, part, reason)

    def back(self, part: str) -> None:
        """`part` reached Kafka. Any thread; cheap when it was never away."""
        if part not in self._away:
            return
        with self._lock:
            last = self._away.pop(part, None) is not None and not self._away
        if last:
            log.info("Kafka at %s is back", self._servers)

    def know(self, topic: str, facts: TopicFacts) -> None:
        """Remember what the cluster says about `topic`. Any thread."""
        self._topics[topic] = facts

    def facts(self, topic: str) -> TopicFacts | None:
        """Return what is known about `topic`, None before Kafka was asked (it may be away). Any thread."""
        return self._topics.get(topic)
