"""A node's care for its Kafka topics: creating what is missing, telling what differs [K3].

Existing topics are never changed here. Several nodes may do this at once: whoever comes second finds that the topic
exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Final, Protocol

import attrs
import trio

from gateways.kafka.cluster import DEFAULT_MAX_MESSAGE_BYTES, Cluster, TopicFacts, one_line
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Reason
from gateways.kafka.topic_plan import DENIED, KafkaTools, TopicPlan, TopicState, differences

log = logging.getLogger("gateways.kafka")

FIRST_RETRY: Final = 0.1
LONGEST_RETRY: Final = 5.0
PATIENCE: Final = 30.0
"""Seconds between two looks for a topic that is missing and cannot be created."""


class AdminLike(Protocol):
    """What is needed of `admin.Admin`."""

    def broker_count(self) -> int: ...
    def describe(self, names: Sequence[str]) -> Mapping[str, TopicState | None]: ...
    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None: ...
    def close(self) -> None: ...


@attrs.frozen
class Survey:
    """What one look at the cluster brought."""

    states: Mapping[str, TopicState]
    hidden: Set[str]
    """Topics that this user may not see: whether they exist is not known."""
    refused: Mapping[str, str]
    """Topic -> why it could not be created."""
    created: Set[str]
    """Topics that were missing, and are no longer: made here, or by another node at the same time."""
    brokers: int


def survey(open_admin: Callable[[], AdminLike], plans: Sequence[TopicPlan]) -> Survey:
    """Create what is missing and describe all of it. Blocks; not on the Trio thread."""
    admin = open_admin()  # a new one each time: it remembers a controller that may be gone
    try:
        brokers = admin.broker_count()
        states = dict(admin.describe([plan.name for plan in plans]))
        refused: dict[str, str] = {}
        missing = [plan for plan in plans if states.get(plan.name) is None]
        if missing:
            for plan in missing:
                factor = plan.factor(brokers)
                if (reason := admin.create(plan.name, plan.partitions, factor, plan.properties(factor))) is not None:
                    refused[plan.name] = reason
            states.update(admin.describe([plan.name for plan in missing]))
        seen = {name: state for name, state in states.items() if state is not None}
        created = {plan.name for plan in missing} - refused.keys()
        return Survey(seen, states.keys() - seen.keys(), refused, created, brokers)
    finally:
        admin.close()


def denied_text(plan: TopicPlan, tools: KafkaTools, brokers: int, *, hidden: bool) -> str:
    """Say that a topic is not there for us and that we may not create it, with the commands for somebody who may."""
    create = tools.create(plan, brokers)
    if not hidden:
        text = f"Kafka topic {plan.name} is missing and this node may not create it; somebody who may: {create}"
        return text + plan.spare
    allow = tools.allow(plan.name, "Describe", "DescribeConfigs", "Read", "Write")
    return (
        f"Kafka topic {plan.name} may be neither seen nor created by this node's user; somebody who may, if there is "
        f"such a topic: {allow}; if not, also: {create}{plan.spare}"
    )


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
        self._tools = KafkaTools.of(options, cluster.servers)
        self._said: set[str] = set()
        self._found: set[str] = set()
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
                ask = partial(survey, self._open_admin, plans)
                found = await trio.to_thread.run_sync(
                    self._cluster.when_let_in, ask, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
                )
            except Exception as exc:
                reason = await trio.to_thread.run_sync(self._cluster.probe, abandon_on_cancel=True)
                self._cluster.away("topics", reason or one_line(exc))
            else:
                self._cluster.back("topics")
                self._learn(plans, found)
                missing = [plan for plan in plans if self._cluster.facts(plan.name) is None]
                if missing and all(self._cluster.trouble(plan.name) is not None for plan in missing):
                    delay = PATIENCE
            self.looked.set()
            if any(self._cluster.facts(plan.name) is None for plan in plans):
                await trio.sleep(delay)
                delay = max(delay, min(delay * 2, LONGEST_RETRY))

    def _learn(self, plans: Sequence[TopicPlan], found: Survey) -> None:
        for name in sorted(found.created & self._found):
            log.warning("Kafka topic %s was deleted, with what was in it; it is made again", name)
        self._found.difference_update(found.created)  # until it is found again: brokers hear of it one by one
        for plan in plans:
            state = found.states.get(plan.name)
            if state is None:
                self._report_missing(plan, found)
            elif plan.written and not state.writable:
                text = f"this node may not write to Kafka topic {plan.name}"
                self._cluster.cannot(plan.name, Reason.DENIED, text)
                mend = self._tools.allow(plan.name, "Write") + plan.spare
                self._say(logging.ERROR, f"{text}; somebody who may: {mend}")
            elif state.leaders:  # else it is being made or its brokers are down: look again
                limit = state.config.get("max.message.bytes", "")
                size = int(limit) if limit.isdigit() else DEFAULT_MAX_MESSAGE_BYTES
                facts = TopicFacts(partitions=state.partitions, max_message_bytes=size, is_compacted=state.is_compacted)
                self._cluster.know(plan.name, facts)
                self._found.add(plan.name)
                self._report_differences(plan, state, found.brokers)

    def _report_differences(self, plan: TopicPlan, state: TopicState, brokers: int) -> None:
        if found := differences(plan, state, brokers):
            text = ", ".join(f"{one} ({one.note})" if one.note else str(one) for one in found)
            name = plan.name
            self._say(logging.WARNING, f"Kafka topic {name} has {text}; it is used as it is (mqtt-trio topics plan)")

    def _report_missing(self, plan: TopicPlan, found: Survey) -> None:
        reason = found.refused.get(plan.name)
        if reason == DENIED or plan.name in found.hidden:
            text = denied_text(plan, self._tools, found.brokers, hidden=plan.name in found.hidden)
        elif reason is not None:
            text = f"Kafka topic {plan.name} cannot be created: {reason}"
        else:
            return  # created just now, not yet known to all brokers
        kind = Reason.DENIED if plan.name in found.hidden else Reason.NO_TOPIC
        self._cluster.cannot(plan.name, kind, text)
        self._say(logging.ERROR, text)

    def _say(self, level: int, text: str) -> None:
        """Log what was not logged before."""
        if text not in self._said:
            self._said.add(text)
            log.log(level, "%s", text)
