"""Options of one archive group, section [[ArchiveGroups]] of the configuration, and what may be merged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from mqtt_trio.errors import ConfigError, RemoteProtocolError
from mqtt_trio.protocol.topics import validate_topic_filter

STORES: Final = ("SQLITE", "KAFKA", "MEMORY", "NONE")
FORMATS: Final = ("JSON", "AVRO", "RAW")
TIMESTAMP_FORMATS: Final = ("iso", "epoch_ms")
ACKS: Final = ("none", "store")
OUTAGE_POLICIES: Final = ("spool", "reject", "drop")

MINIMUM_MAX_SIZE: Final = 1024 * 1024
"""Bytes: a smaller SQLite file could not keep its own indexes and write-ahead log within the bound."""
NAME_LENGTH: Final = 100

_KAFKA_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")


def _as_filters(value: object) -> object:
    """One filter stands for a list of one; anything that is no list of anything is left for the validator."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


@attrs.frozen(kw_only=True)
class ArchiveGroupOptions:
    """One archive group.

    Raises:
      ConfigError: at construction; `problems` names every mistake, each beginning with the key as the file has it.
    """

    name: str
    """Distinct among the groups; names the SQLite file, stands in logs."""
    filter: tuple[str, ...] = attrs.field(default=("#",), converter=_as_filters)
    """Topic Filters; a message that matches any of them is kept once. One filter may be given as a plain string."""
    enabled: bool = True
    store: str = attrs.field(default="SQLITE", converter=_upper)
    """SQLITE, KAFKA, MEMORY or NONE."""
    retention: float | None = None
    """Seconds that a message is kept, None: no bound. For SQLITE and MEMORY; a Kafka topic has `retention.ms`."""
    max_size: int | None = None
    """Bytes that the store may take, its write-ahead log included; the oldest messages go first. None: SQLITE has
    no bound, MEMORY 64 MiB."""
    kafka_topic: str | None = None
    """Where a KAFKA group writes; None: the Archive topic of [Kafka.Topics]."""
    ack: str = "none"
    """none: PUBACK and PUBREC do not wait for the store; store: they do (refused by the configuration until built)."""
    on_outage: str | None = None
    """spool, reject or drop while the store is away; None: what the store does by itself."""
    format: str = attrs.field(default="JSON", converter=_upper)
    timestamp_format: str = "iso"
    window_messages: int = 100_000
    """Messages taken and not yet stored. Outcome: QoS 0 is dropped and counted; a QoS 1 or 2 message is taken and
    its acknowledgement waits until it is inside the window."""
    window_bytes: int = 64 * 1024 * 1024
    """Bytes of the same messages, same outcome; at twice as many no QoS 1 or 2 PUBLISH is handled any more."""

    def __attrs_post_init__(self) -> None:
        problems = [*_identity_problems(self), *_filter_problems(self.filter), *_choice_problems(self)]
        problems += [*_bound_problems(self), *_kafka_problems(self)]
        if problems:
            raise ConfigError(problems)


def _identity_problems(options: ArchiveGroupOptions) -> Iterable[str]:
    name: object = options.name
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_LENGTH:
        yield f"Name: expected 1 to {NAME_LENGTH} characters, found {name!r}"
    elif not name.isprintable():
        yield f"Name: expected printable characters, found {name!r}"
    if not isinstance(options.enabled, bool):
        yield f"Enabled: expected true or false, found {options.enabled!r}"


def _filter_problems(filters: object) -> Iterable[str]:
    if not isinstance(filters, tuple) or not filters:
        yield f"Filter: expected a Topic Filter or a list of at least one, found {filters!r}"
        return
    items: tuple[object, ...] = filters
    for index, topic_filter in enumerate(items):
        key = "Filter" if len(filters) == 1 else f"Filter[{index}]"
        if not isinstance(topic_filter, str):
            yield f"{key}: expected a Topic Filter, found {topic_filter!r}"
            continue
        try:
            validate_topic_filter(topic_filter)
        except RemoteProtocolError as exc:
            yield f"{key}: {topic_filter!r} is not a Topic Filter: {exc}"
            continue
        if topic_filter.startswith("$share/"):
            yield f"{key}: {topic_filter!r}: an archive group cannot share a subscription, give the filter alone"
        elif topic_filter == "$SYS" or topic_filter.startswith("$SYS/"):
            yield f"{key}: {topic_filter!r}: $SYS topics are never archived"


def _choice_problems(options: ArchiveGroupOptions) -> Iterable[str]:
    choices: tuple[tuple[str, object, Sequence[str]], ...] = (
        ("Store", options.store, STORES),
        ("Ack", options.ack, ACKS),
        ("OnOutage", "spool" if options.on_outage is None else options.on_outage, OUTAGE_POLICIES),
        ("Format", options.format, FORMATS),
        ("TimestampFormat", options.timestamp_format, TIMESTAMP_FORMATS),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            yield f"{key}: expected one of {', '.join(allowed)}, found {value!r}"


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _bound_problems(options: ArchiveGroupOptions) -> Iterable[str]:
    retention, max_size = options.retention, options.max_size
    if retention is not None and not (_is_number(retention, (int, float)) and retention > 0):
        yield f"Retention: expected seconds above 0, found {retention!r}"
    if max_size is not None and not (_is_number(max_size, (int,)) and max_size >= MINIMUM_MAX_SIZE):
        yield f"MaxSize: expected bytes, at least {MINIMUM_MAX_SIZE} (1 MiB), found {max_size!r}"
    bounds = (("WindowMessages", options.window_messages, 1), ("WindowBytes", options.window_bytes, 65_536))
    for key, value, least in bounds:
        if not (_is_number(value, (int,)) and value >= least):
            yield f"{key}: expected a whole number of at least {least}, found {value!r}"


def _kafka_problems(options: ArchiveGroupOptions) -> Iterable[str]:
    topic: object = options.kafka_topic
    if options.store == "KAFKA":
        if options.retention is not None:
            yield "Retention: a KAFKA group keeps as long as its topic does, set retention.ms in the topic's Config"
        if options.max_size is not None:
            yield "MaxSize: a KAFKA group keeps as much as its topic does, set retention.bytes in the topic's Config"
    elif topic is not None and options.store in STORES:
        yield f'KafkaTopic: has no meaning with Store {options.store}; set Store = "KAFKA" or leave it out'
    if topic is not None and (not isinstance(topic, str) or not _KAFKA_TOPIC.fullmatch(topic) or topic in (".", "..")):
        yield f"KafkaTopic: expected 1 to 249 of the characters a-z A-Z 0-9 . _ -, found {topic!r}"


def merge_groups(
    options: Sequence[ArchiveGroupOptions], *, default_kafka_topic: str = "mqtt.archive"
) -> list[ArchiveGroupOptions]:
    """Return one group for each distinct target of the enabled groups, so that it gets a message once [K7].

    KAFKA groups share a target when they write to the same topic; SQLITE and MEMORY groups have one each; NONE has
    none. A merged group is named `A+B` and has the filters of all.

    Raises:
      ConfigError: two groups have one name, or groups that share a topic disagree on how it is written.
    """
    problems: list[str] = []
    merged: dict[tuple[str, str], ArchiveGroupOptions] = {}
    names: set[str] = set()
    for index, group in enumerate(options):
        if group.name in names:
            problems.append(f"ArchiveGroups[{index}].Name: another group is called {group.name!r}")
        names.add(group.name)
        if not group.enabled or group.store == "NONE":
            continue
        target = group.kafka_topic or default_kafka_topic if group.store == "KAFKA" else group.name
        first = merged.setdefault((group.store, target), group)
        if first is not group:
            problems += _disagreements(index, first, group, target)
            merged[group.store, target] = _joined(first, group)
    if problems:
        raise ConfigError(problems)
    return list(merged.values())


def _disagreements(index: int, first: ArchiveGroupOptions, group: ArchiveGroupOptions, target: str) -> Iterable[str]:
    keys = (("Format", "format"), ("TimestampFormat", "timestamp_format"), ("Ack", "ack"), ("OnOutage", "on_outage"))
    for key, name in keys:
        ours, theirs = getattr(group, name), getattr(first, name)
        if ours != theirs:
            yield (
                f"ArchiveGroups[{index}].{key}: {ours!r}, but group {first.name!r} writes to the same Kafka topic "
                f"{target!r} with {theirs!r}"
            )


def _joined(first: ArchiveGroupOptions, group: ArchiveGroupOptions) -> ArchiveGroupOptions:
    return attrs.evolve(
        first,
        name=f"{first.name}+{group.name}"[:NAME_LENGTH],
        filter=tuple(dict.fromkeys((*first.filter, *group.filter))),
        window_messages=max(first.window_messages, group.window_messages),
        window_bytes=max(first.window_bytes, group.window_bytes),
    )
