"""Kafka's administration in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import attrs

from gateways.kafka.topic_plan import TopicState


class FakeAdmin:
    """A cluster in memory, as `gateways.kafka.admin.Admin` shows it.

    `refusal` answers every attempt to change something; `hidden` topics may not be seen.
    """

    def __init__(self, brokers: int = 1, refusal: str | None = None) -> None:
        self.brokers = brokers
        self.refusal = refusal
        self.topics: dict[str, TopicState] = {}
        self.hidden: set[str] = set()
        self.created: list[str] = []
        self.failures: list[Exception] = []
        self.closed = 0

    def broker_count(self) -> int:
        return self.brokers

    def describe(self, names: Sequence[str]) -> Mapping[str, TopicState | None]:
        if self.failures:
            raise self.failures.pop()
        hidden = dict.fromkeys(self.hidden.intersection(names))
        return {name: self.topics[name] for name in names if name in self.topics} | hidden

    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None:
        if self.refusal is None:
            self.created.append(name)
            self.topics[name] = TopicState(
                partitions=partitions, replication_factor=replication_factor, leaders=True, config=dict(config)
            )
        return self.refusal

    def grow(self, name: str, partitions: int) -> str | None:
        if self.refusal is None:
            self.change(name, partitions=partitions)
        return self.refusal

    def configure(self, name: str, config: Mapping[str, str]) -> str | None:
        if self.refusal is None:
            self.change(name, config=config)
        return self.refusal

    def change(self, name: str, partitions: int | None = None, config: Mapping[str, str] | None = None) -> None:
        """Change a topic behind everybody's back."""
        state = self.topics[name]
        self.topics[name] = attrs.evolve(
            state, partitions=partitions or state.partitions, config={**state.config, **(config or {})}
        )

    def close(self) -> None:
        self.closed += 1

    @contextlib.contextmanager
    def opened(self, _options: object) -> Iterator[FakeAdmin]:
        """Stand in for `open_admin` of the commands."""
        yield self
