"""Kafka topics: what there should be, creating what is missing, telling what differs [K3].

Existing topics are never changed. Several nodes may do this at once: whoever comes second finds that the topic exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import attrs
import trio

from gateways.kafka.cluster import DEFAULT_MAX_MESSAGE_BYTES, Cluster, TopicFacts
from gateways.kafka.options import KafkaOptions, TopicOptions

log = logging.getLogger("gateways.kafka")

DAY_MS: Final = 24 * 3600 * 1000
LARGEST_REPLICATION: Final = 3
LARGE_MESSAGES: Final = str(4 * 1024 * 1024)
"""max.message.bytes where MQTT payloads go: the largest packet of the default limits, in base64, fits."""
FIRST_RETRY: Final = 0.1
LONGEST_RETRY: Final = 5.0
PATIENCE: Final = 30.0
"""Seconds between two looks for a topic that is missing and cannot be created."""


@attrs.frozen(kw_only=True)
class TopicPlan:
    """A topic as it should be."""

    name: str
    partitions: int
    replication_factor: int | None = None
    """None: 3, or as many as there are brokers if these are fewer."""
    config: Mapping[str, str] = attrs.field(factory=dict)


def retained_for(days: int, compression: str | None = None, *, large: bool = False) -> dict[str, str]:
    """Return topic properties: retention, and codec and record size where they are given."""
    config = {"retention.ms": str(days * DAY_MS)}
    if compression is not None:
        config["compression.type"] = compression
    if large:
        config["max.message.bytes"] = LARGE_MESSAGES
    return config


DEFAULTS: Final[Mapping[str, TopicPlan]] = {
    "messages": TopicPlan(name="mqtt.messages", partitions=12, config=retained_for(7, "lz4", large=True)),
    "archive": TopicPlan(name="mqtt.archive", partitions=12, config=retained_for(30, "gzip", large=True)),
    "events": TopicPlan(name="mqtt.events", partitions=3, config=retained_for(7)),
    "metrics": TopicPlan(name="mqtt.metrics", partitions=3, config=retained_for(1)),
    "dlq": TopicPlan(name="mqtt.dlq", partitions=3, config=retained_for(30)),
    "bus": TopicPlan(name="monster", partitions=12, config=retained_for(1, "lz4", large=True)),
    "retained": TopicPlan(
        name="mqtt.retained",
        partitions=12,
        config={"cleanup.policy": "compact", "max.message.bytes": LARGE_MESSAGES},
    ),
}


def text_of(value: object) -> str:
    """Return a topic property as Kafka writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def plan_for(default: TopicPlan, options: TopicOptions, name: str | None = None) -> TopicPlan:
    """Return `default` with what the configuration says about it."""
    return TopicPlan(
        name=name or options.name or default.name,
        partitions=options.partitions or default.partitions,
        replication_factor=options.replication_factor,
        config={**default.config, **{key: text_of(value) for key, value in options.config.items()}},
    )


def plan_topics(options: KafkaOptions, archive_topics: Iterable[str] = ()) -> list[TopicPlan]:
    """Return all topics of a node; `archive_topics` are the archive groups' own, made like the archive topic."""
    plans: dict[str, TopicPlan] = {}
    for purpose, default in DEFAULTS.items():
        topic: TopicOptions = getattr(options.topics, purpose)
        if topic.enabled is False:
            continue
        plan = plan_for(default, topic, options.bus_topic if purpose == "bus" else None)
        plans.setdefault(plan.name, plan)
    for name in archive_topics:
        plans.setdefault(name, plan_for(DEFAULTS["archive"], options.topics.archive, name))
    return list(plans.values())


class TopicStateLike(Protocol):
    """What is read of `admin.TopicState`."""

    @property
    def partitions(self) -> int: ...
    @property
    def replication_factor(self) -> int: ...
    @property
    def leaders(self) -> bool: ...
    @property
    def config(self) -> Mapping[str, str]: ...


class AdminLike(Protocol):
    """What is needed of `admin.Admin`."""

    def broker_count(self) -> int: ...
    def describe(self, names: Sequence[str]) -> Mapping[str, TopicStateLike]: ...
    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None: ...
    def close(self) -> None: ...


def drift(plan: TopicPlan, state: TopicStateLike) -> list[str]:
    """Return in what `state` differs from `plan`, a phrase each."""
    found = []
    if state.partitions != plan.partitions:
        found.append(f"partitions {state.partitions} instead of {plan.partitions}")
    if plan.replication_factor is not None and state.replication_factor != plan.replication_factor:
        found.append(f"replication factor {state.replication_factor} instead of {plan.replication_factor}")
    for key, value in plan.config.items():
        actual = state.config.get(key)
        if actual is not None and actual != value:
            found.append(f"{key} {actual} instead of {value}")
    return found


def create_command(plan: TopicPlan, replication_factor: int, servers: Sequence[str]) -> str:
    """Return the command with which somebody who may creates the topic."""
    config = "".join(f" --config {key}={value}" for key, value in plan.config.items())
    return (
        f"kafka-topics.sh --bootstrap-server {','.join(servers)} --create --topic {plan.name}"
        f" --partitions {plan.partitions} --replication-factor {replication_factor}{config}"
    )


@attrs.frozen
class Survey:
    """What one look at the cluster brought."""

    states: Mapping[str, TopicStateLike]
    refused: Mapping[str, str]
    """Topic -> why it could not be created."""
    replication_factor: int
    """What topics get that do not say otherwise."""


def survey(open_admin: Callable[[], AdminLike], plans: Sequence[TopicPlan]) -> Survey:
    """Create what is missing and describe all of it. Blocks; not on the Trio thread."""
    names = [plan.name for plan in plans]
    admin = open_admin()  # a new one each time: it remembers a controller that may be gone
    try:
        states = dict(admin.describe(names))
        refused: dict[str, str] = {}
        replication = LARGEST_REPLICATION
        if missing := [plan for plan in plans if plan.name not in states]:
            replication = max(1, min(LARGEST_REPLICATION, admin.broker_count()))
            for plan in missing:
                factor = plan.replication_factor or replication
                if (reason := admin.create(plan.name, plan.partitions, factor, plan.config)) is not None:
                    refused[plan.name] = reason
            states.update(admin.describe([plan.name for plan in missing]))
        return Survey(states, refused, replication)
    finally:
        admin.close()


class TopicManager:
    """Keeps the topics of a node: creates them, learns about them, again whenever somebody misses one.

    Attributes:
      looked: set after the first look at the cluster, whatever came of it.
      complete: set once every planned topic was found.
    """

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        plans: Sequence[TopicPlan],
        open_admin: Callable[[], AdminLike] | None = None,
    ) -> None:
        """`open_admin` is for tests."""
        self.looked = trio.Event()
        self.complete = trio.Event()
        self._cluster = cluster
        self._plans = {plan.name: plan for plan in plans}
        self._said: set[str] = set()
        self._changed = trio.Event()
        if open_admin is None:
            from gateways.kafka.admin import Admin

            open_admin = partial(Admin, options)
        self._open_admin = open_admin

    def add(self, plans: Iterable[TopicPlan]) -> None:
        """Take more topics into care, before `run`."""
        for plan in plans:
            self._plans.setdefault(plan.name, plan)

    async def run(self) -> None:
        """Look until every topic is known, then whenever one is wanted; never ends by itself."""
        token = trio.lowlevel.current_trio_token()

        def changed() -> None:
            try:
                token.run_sync_soon(self._note_change, idempotent=True)
            except trio.RunFinishedError:
                pass

        self._cluster.listen(changed)
        try:
            while True:
                await self._look_until_known()
                while not self._cluster.wanted & self._plans.keys():
                    await self._changed.wait()
                    self._changed = trio.Event()
        finally:
            self._cluster.unlisten(changed)

    def _note_change(self) -> None:
        self._changed.set()

    async def _look_until_known(self) -> None:
        delay = FIRST_RETRY
        while True:
            plans = [plan for plan in self._plans.values() if self._cluster.facts(plan.name) is None]
            if not plans:
                self.looked.set()
                self.complete.set()
                return
            try:
                found = await trio.to_thread.run_sync(
                    survey, self._open_admin, plans, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
                )
            except Exception as exc:
                reason = await trio.to_thread.run_sync(self._cluster.probe, abandon_on_cancel=True)
                self._cluster.away("topics", reason or " ".join(f"{type(exc).__name__}: {exc}".split()))
            else:
                self._cluster.back("topics")
                self._learn(plans, found)
                if found.refused and len(found.refused) == len(plans):
                    delay = PATIENCE
            self.looked.set()
            if any(self._cluster.facts(plan.name) is None for plan in plans):
                await trio.sleep(delay)
                delay = max(delay, min(delay * 2, LONGEST_RETRY))

    def _learn(self, plans: Sequence[TopicPlan], found: Survey) -> None:
        for plan in plans:
            state = found.states.get(plan.name)
            if state is None:
                self._report_missing(plan, found)
            elif state.leaders:  # else it is being made or its brokers are down: look again
                limit = state.config.get("max.message.bytes", "")
                size = int(limit) if limit.isdigit() else DEFAULT_MAX_MESSAGE_BYTES
                self._cluster.know(plan.name, TopicFacts(partitions=state.partitions, max_message_bytes=size))
                if differences := drift(plan, state):
                    text = ", ".join(differences)
                    self._say(logging.WARNING, f"Kafka topic {plan.name} has {text}; it is used as it is")

    def _report_missing(self, plan: TopicPlan, found: Survey) -> None:
        reason = found.refused.get(plan.name)
        if reason is None:
            return  # created just now, not yet known to all brokers
        factor = plan.replication_factor or found.replication_factor
        if reason == "denied":
            command = create_command(plan, factor, self._cluster.servers)
            text = f"Kafka topic {plan.name} is missing and this node may not create it; somebody who may: {command}"
        else:
            text = f"Kafka topic {plan.name} cannot be created: {reason}"
        self._say(logging.ERROR, text)

    def _say(self, level: int, text: str) -> None:
        """Log what was not logged before."""
        if text not in self._said:
            self._said.add(text)
            log.log(level, "%s", text)
