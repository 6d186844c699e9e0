"""What a configuration is better off without, as far as it tells by itself [K20]. Pure.

`mqtt-trio check` and `doctor` say it; nothing here keeps a node from starting.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from gateways.kafka.client_settings import ALL, ARCHIVE, BUS, producer_settings
from gateways.kafka.options import REPORTERS, KafkaOptions
from gateways.kafka.topic_plan import (
    DAY_MS,
    DEFAULTS,
    LARGEST_REPLICATION,
    MIN_ISR,
    TopicPlan,
    least_in_sync,
    plan_for,
    plan_topics,
)

OPEN: Final = ("PLAINTEXT", "SASL_PLAINTEXT")
READ_BY_OTHERS: Final = ("messages", "archive", "dlq")
"""Topics that programs read which may be down for a while."""
LEAST_DAYS: Final = 1
"""Days that such a topic should bridge."""
ALONE: Final = 'what Kafka acknowledged may be on one broker alone, and lost with it: Ack = "store" says little then'
"""Of too small a `min.insync.replicas`."""
UNCOMPRESSED: Final = "uncompressed"
JAVA: Final = "Kafka.Metrics"
"""What advice is about that a node gives at its start."""


@attrs.frozen
class Advice:
    """One thing that could be better."""

    about: str
    """The key, or keys."""
    text: str
    mend: str


def advice(options: KafkaOptions, acknowledging: Sequence[str] = ()) -> list[Advice]:
    """Return all there is to say, in the order of the configuration; `acknowledging`: the archive groups in Kafka with
    `Ack = "store"`."""
    return [
        *_open_ways(options),
        *_lax_acknowledgements(options, acknowledging),
        *_few_copies(options),
        *_short_retention(options),
        *_no_compression(options),
        *_java(options),
    ]


def _open_ways(options: KafkaOptions) -> Iterator[Advice]:
    protocol = options.security.protocol
    remote = [name for name in options.server_names if not is_loopback(name)]
    if protocol in OPEN and remote:
        text = f"{protocol} to {', '.join(remote)}: whoever is on the way reads and changes messages"
        yield Advice("Kafka.Security.Protocol", text, f"use {'SASL_SSL' if 'SASL' in protocol else 'SSL'}")


def is_loopback(server: str) -> bool:
    """Tell whether a `host:port` is on this machine for certain."""
    bare = server.count(":") > 1 and not server.startswith("[")
    host = server if bare or ":" not in server or server.endswith("]") else server.rpartition(":")[0]
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _lax_acknowledgements(options: KafkaOptions, acknowledging: Sequence[str]) -> Iterator[Advice]:
    """PUBACK is said to come when the store has the message [K9]; fewer acks than all make little of that [K16]."""
    waits = {ARCHIVE: [f"ArchiveGroups {name}: Ack" for name in acknowledging], BUS: list[str]()}
    if options.bus.enabled and options.bus.ack == "store":
        waits[BUS] = ["Kafka.Bus.Ack"]
    for producer, keys in waits.items():
        acks, origin = producer_settings(options, producer)["acks"]
        if acks not in ALL:
            has = "nobody need have" if acks == 0 else "one broker has, and may lose"
            text = f"PUBACK waits for Kafka, which confirms what {has} (acks = {acks!r}, {origin})"
            for key in keys:
                yield Advice(key, text, '[Kafka.Producer] acks = "all"')


def _few_copies(options: KafkaOptions) -> Iterator[Advice]:
    """What is asked for in so many words; `doctor` compares it with the number of brokers."""
    servers = len(options.server_names)
    for plan in plan_topics(options, [None]):
        factor = plan.replication_factor
        if factor is not None and factor < min(LARGEST_REPLICATION, servers):
            yield Advice(factor_key(plan), few_copies_text(plan.name, factor), str(min(LARGEST_REPLICATION, servers)))
        replicas = factor or LARGEST_REPLICATION
        least = plan.config.get(MIN_ISR, "")
        if least.isdigit() and int(least) > replicas:
            yield Advice(in_sync_key(plan), f"{plan.name}: {never_in_sync_text(least)}", least_in_sync(replicas))
        elif least.isdigit() and int(least) < int(least_in_sync(factor or servers)):
            yield Advice(in_sync_key(plan), f"{plan.name}: {ALONE}", least_in_sync(replicas))


def factor_key(plan: TopicPlan) -> str:
    """Return the key that says how many replicas a topic has."""
    return f"{plan.section}.ReplicationFactor"


def in_sync_key(plan: TopicPlan) -> str:
    """Return the key that says how many of them acknowledge."""
    return f"{plan.section}.Config.{MIN_ISR}"


def few_copies_text(name: str, factor: int) -> str:
    """Say what a small replication factor costs."""
    brokers = "the loss of its broker" if factor == 1 else f"the loss of {factor} brokers"
    return f"{brokers} takes what {name} holds, and there could be more replicas"


def never_in_sync_text(least: str) -> str:
    """Say what too large a `min.insync.replicas` does."""
    return f"Kafka refuses every write, since there are never {least} replicas"


def _short_retention(options: KafkaOptions) -> Iterator[Advice]:
    for purpose in READ_BY_OTHERS:
        plan = plan_for(purpose, getattr(options.topics, purpose))
        kept = retention_ms(plan)
        if kept is not None and kept < LEAST_DAYS * DAY_MS:
            text = f"{plan.name} keeps records for {hours(kept)}: who reads it misses some when it is down for longer"
            yield Advice(f"{plan.section}.Config.retention.ms", text, "a day or more")
    bus = plan_for("bus", options.topics.bus, options.bus_topic)
    kept = retention_ms(bus)
    if options.bus.enabled and kept is not None and kept < options.bus.checkpoint_age * 1000:
        age = hours(options.bus.checkpoint_age * 1000)
        text = f"{bus.name} keeps records for {hours(kept)}, CheckpointAge is {age}: a node that was away misses some"
        yield Advice(f"{bus.section}.Config.retention.ms", text, "CheckpointAge or more")


def retention_ms(plan: TopicPlan) -> int | None:
    """Return for how many milliseconds a topic keeps its records; None: for ever, or nobody can tell."""
    text = plan.config.get("retention.ms", "")
    return int(text) if text.isascii() and text.isdigit() else None


def hours(milliseconds: float) -> str:
    """Return a time as people say it."""
    number = milliseconds / 3_600_000
    return f"{number:g} h" if number >= 1 else f"{milliseconds / 60_000:g} min"


def _no_compression(options: KafkaOptions) -> Iterator[Advice]:
    for purpose in ("archive", "messages", "bus"):
        plan = plan_for(purpose, getattr(options.topics, purpose))
        if plan.config.get("compression.type") == UNCOMPRESSED:
            text = f"{plan.name} is kept without compression: it takes several times the disk"
            codec = DEFAULTS[purpose].config["compression.type"]
            yield Advice(f"{plan.section}.Config.compression.type", text, codec)


def _java(options: KafkaOptions) -> Iterator[Advice]:
    """One word about what only a JVM knows."""
    metrics = options.metrics
    found: Sequence[str] = ["JmxEnabled"] if metrics.jmx_enabled else []
    found = [*found, *(name for name in metrics.reporters if name not in REPORTERS)]
    if found:
        text = f"{', '.join(found)}: there is no JVM here, so nothing comes of it"
        mend = '/metrics of [Http] has the figures, and Reporters = ["log"] puts them into the log (docs/monitoring.md)'
        yield Advice(JAVA, text, mend)
