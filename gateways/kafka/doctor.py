"""What `mqtt-trio doctor` says about Kafka: each server step by step, then the topics and what this user may do there.

Nothing is changed in Kafka. Blocking.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from gateways.kafka.advice import ALONE, advice, factor_key, few_copies_text, in_sync_key, never_in_sync_text
from gateways.kafka.options import KafkaOptions
from gateways.kafka.precheck import Step, precheck
from gateways.kafka.topic_plan import (
    DENIED,
    LARGEST_REPLICATION,
    MIN_ISR,
    Difference,
    KafkaTools,
    Remedy,
    TopicPlan,
    TopicState,
    differences,
    least_in_sync,
    plan_topics,
)
from gateways.kafka.topics import AdminLike, denied_text
from mqtt_trio.errors import ConfigError, GatewayError
from mqtt_trio.gateway import Finding, Verdict

TITLES: Final[Mapping[str, str]] = {
    "options": "our own keys",
    "name": "name",
    "tcp": "connection",
    "tls": "TLS",
    "kafka": "protocol",
    "mechanism": "mechanism",
    "login": "login",
    "brokers": "brokers",
}
"""Step of a connection -> what people call it."""

SKEW_RECORDS: Final = 1000
"""Records per partition, on average, below which nothing is said about their spread."""
MOST_SKEW: Final = 3.0
"""Records of the fullest partition, in multiples of the average, beyond which it is worth a word."""


class Examiner(AdminLike, Protocol):
    """What is needed of `admin.Admin`."""

    def bounds(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], tuple[int, int]]: ...
    def may_create(self, name: str, partitions: int, replication_factor: int) -> str | None: ...


def examine(
    options: KafkaOptions, archive_topics: Sequence[str | None], acknowledging: Sequence[str] = ()
) -> Iterator[Finding]:
    """Yield what is found as it is found; never raises for what is wrong with Kafka."""
    told = advice(options, acknowledging)
    for one in told:
        yield Finding(Verdict.NOTE, one.about, one.text, one.mend)
    reached = False
    for server in options.server_names:
        reached = (yield from _server(options, server)) or reached
    if options.schema_registry.url is not None:
        yield _registry(options)
    if not reached:
        yield Finding(Verdict.NOTE, "Kafka topics", "not looked at: no server lets us in")
        return
    try:
        with open_admin(options) as admin:
            yield from _topics(admin, options, plan_topics(options, archive_topics), {one.about for one in told})
    except GatewayError as exc:
        yield Finding(Verdict.PROBLEM, "Kafka topics", str(exc))


def open_admin(options: KafkaOptions) -> AbstractContextManager[Examiner]:
    """Connect; tests put a fake in the place of this."""
    from gateways.kafka.admin import administration

    return administration(options)


def _server(options: KafkaOptions, server: str) -> Generator[Finding, None, bool]:
    """Yield each step of a connection; return whether the server lets us in."""
    steps: Sequence[Step] = precheck(options, server)
    for step in steps:
        verdict = Verdict.OK if step.fault is None else Verdict.PROBLEM
        yield Finding(verdict, f"Kafka {server} {TITLES[step.name]}", step.text, step.mend)
    return steps[-1].fault is None


def _registry(options: KafkaOptions) -> Finding:
    from gateways.kafka.schema_registry import SchemaRegistry

    registry = SchemaRegistry(options)
    try:
        registry.look()
    except (GatewayError, ConfigError) as exc:
        return Finding(Verdict.PROBLEM, "schema registry", str(exc))
    return Finding(Verdict.OK, "schema registry", f"{registry.url} answers, and knows Avro")


def _topics(
    admin: Examiner, options: KafkaOptions, plans: Sequence[TopicPlan], told: Collection[str]
) -> Iterator[Finding]:
    """`told`: keys of which advice has spoken already."""
    brokers = admin.broker_count()
    yield Finding(Verdict.OK, "Kafka cluster", "1 broker serves" if brokers == 1 else f"{brokers} brokers serve")
    states = admin.describe([plan.name for plan in plans])
    tools = KafkaTools(options.server_names, secured=options.security.protocol != "PLAINTEXT")
    for plan in plans:
        state = states.get(plan.name)
        if state is not None:
            yield from _topic(plan, state, brokers, tools)
            yield from (one for key, one in _copies(plan, state, brokers) if key not in told)
            if state.leaders and state.readable:
                yield from _spread(admin, plan.name, state.partitions)
        else:
            yield _absent(plan, admin.may_create(plan.name, plan.partitions, plan.factor(brokers)), brokers, tools,
                          hidden=plan.name in states)  # fmt: skip


def _absent(plan: TopicPlan, refusal: str | None, brokers: int, tools: KafkaTools, *, hidden: bool) -> Finding:
    about = f"Kafka topic {plan.name}"
    if refusal is None:
        return Finding(Verdict.NOTE, about, "is not there yet; the broker will create it")
    if refusal == DENIED:
        return Finding(Verdict.PROBLEM, about, denied_text(plan, tools, brokers, hidden=hidden))
    return Finding(Verdict.PROBLEM, about, f"is missing, and cannot be created: {refusal}")


def _topic(plan: TopicPlan, state: TopicState, brokers: int, tools: KafkaTools) -> Iterator[Finding]:
    about = f"Kafka topic {plan.name}"
    found = list(_rights(about, plan, state, tools))
    if not state.leaders:
        found.append(
            Finding(Verdict.PROBLEM, about, "has partitions without a leader", "start the brokers that are down")
        )
    if state.out_of_sync:
        text = f"{state.out_of_sync} of {state.partitions} partitions are under-replicated"
        mend = "start the brokers that are down, or wait until they have caught up"
        found.append(Finding(Verdict.PROBLEM, about, text, mend))
    found += [_difference(about, one) for one in differences(plan, state, brokers)]
    if all(one.verdict is not Verdict.PROBLEM for one in found):
        text = f"{state.partitions} partitions, replication factor {state.replication_factor}"
        yield Finding(Verdict.OK, about, text)
    yield from found


def _copies(plan: TopicPlan, state: TopicState, brokers: int) -> Iterator[tuple[str, Finding]]:
    """See whether what the configuration asks for in so many words is safe [K20]; yield the key with each."""
    about, most = f"Kafka topic {plan.name}", min(LARGEST_REPLICATION, brokers)
    replicas = state.replication_factor
    if plan.replication_factor == replicas < most:
        mend = f"{factor_key(plan)} = {most}, and kafka-reassign-partitions.sh for the topic that is there"
        yield factor_key(plan), Finding(Verdict.NOTE, about, few_copies_text(plan.name, replicas), mend)
    least = state.config.get(MIN_ISR, "")
    if MIN_ISR not in plan.config or not least.isdigit():
        return  # without a word about it, it is compared with the plan
    mend = f"{in_sync_key(plan)} = {least_in_sync(replicas)}, then `mqtt-trio topics apply --configs`"
    if int(least) > replicas:
        yield in_sync_key(plan), Finding(Verdict.PROBLEM, about, never_in_sync_text(least), mend)
    elif int(least) < int(least_in_sync(replicas)):
        yield in_sync_key(plan), Finding(Verdict.NOTE, about, f"{MIN_ISR} {least}: {ALONE}", mend)


def _spread(admin: Examiner, topic: str, partitions: int) -> Iterator[Finding]:
    """See whether one partition has much more than the others."""
    try:
        bounds = admin.bounds([(topic, number) for number in range(partitions)])
    except GatewayError:  # a partition went while it was asked for: the next look says it
        return
    sizes = {number: end - first for (_, number), (first, end) in bounds.items()}
    total = sum(sizes.values())
    if total < SKEW_RECORDS * partitions:
        return
    fullest = max(sizes, key=lambda number: sizes[number])
    skew = sizes[fullest] * partitions / total
    if skew > MOST_SKEW:
        text = f"partition {fullest} holds {sizes[fullest]} of {total} records, {skew:.1f} times the average"
        mend = "a topic that few MQTT topics fill cannot be even; else see which of them is that busy"
        yield Finding(Verdict.NOTE, f"Kafka topic {topic}", text, mend)


def _rights(about: str, plan: TopicPlan, state: TopicState, tools: KafkaTools) -> Iterator[Finding]:
    needs = (
        (plan.written and not state.writable, "Write", "write to"),
        (plan.read and not state.readable, "Read", "read"),
    )
    for lacks, operation, verb in needs:
        if lacks:
            mend = f"somebody who may: {tools.allow(plan.name, operation)}{plan.spare}"
            yield Finding(Verdict.PROBLEM, about, f"this user may not {verb} it", mend)
    if not state.config:
        mend = f"somebody who may: {tools.allow(plan.name, 'DescribeConfigs')}"
        yield Finding(Verdict.NOTE, about, "this user may not see its properties, so they are not compared", mend)


def _difference(about: str, difference: Difference) -> Finding:
    mend = difference.note
    if difference.remedy is not Remedy.NONE:
        command = "mqtt-trio topics apply" + (" --configs" if difference.remedy is Remedy.CONFIG else "")
        mend = f"{mend + '; ' if mend else ''}`{command}`"
    verdict = Verdict.PROBLEM if difference.is_harmful else Verdict.NOTE
    return Finding(verdict, about, str(difference), mend)
