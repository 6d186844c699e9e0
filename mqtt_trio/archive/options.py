"""Options of one archive group, section [[ArchiveGroups]] of the configuration, and which groups are one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import quote

import attrs
from attrs.validators import ge, gt, in_, le, optional

from mqtt_trio.errors import ConfigError, RemoteProtocolError
from mqtt_trio.protocol.topics import SHARE_PREFIX, validate_topic_filter

STORES: Final = ("SQLITE", "KAFKA", "MEMORY", "NONE")
FORMATS: Final = ("JSON", "AVRO", "RAW")
TIMESTAMP_FORMATS: Final = ("iso", "epoch_ms")
ACKS: Final = ("none", "store")
OUTAGE_POLICIES: Final = ("spool", "reject", "drop")

MINIMUM_MAX_SIZE: Final = 1024 * 1024
"""Bytes: a smaller SQLite file could not keep its own indexes and write-ahead log within the bound."""
MINIMUM_SPOOL_BYTES: Final = 1024 * 1024
NAME_LENGTH: Final = 100
KAFKAS_OWN: Final = ("__consumer_offsets", "__share_group_state", "__transaction_state")

_KAFKA_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")


def file_name(name: str) -> str:
    """Return a group's name as part of a file name: other characters than A-Z a-z 0-9 _ . - ~ are written as %XX."""
    safe = quote(name, safe="")
    if len(safe) > 150:  # file names end at 255 bytes
        safe = f"{safe[:120]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return safe


def _as_filters(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """One filter stands for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value)


def _upper(value: str) -> str:
    return value.upper()


def _check_name(_instance: object, _attribute: attrs.Attribute[Any], name: str) -> None:
    if not 1 <= len(name) <= NAME_LENGTH or not name.isprintable():
        raise ValueError(f"expected 1 to {NAME_LENGTH} printable characters, got {name!r}")


def _check_filters(_instance: object, _attribute: attrs.Attribute[Any], filters: tuple[str, ...]) -> None:
    if not filters:
        raise ValueError("expected a Topic Filter or a list of them, got an empty list")
    if problems := [problem for topic_filter in filters if (problem := _filter_problem(topic_filter))]:
        raise ValueError("; ".join(problems))


def _filter_problem(topic_filter: str) -> str | None:
    try:
        validate_topic_filter(topic_filter)
    except RemoteProtocolError as exc:
        return f"{topic_filter!r} is not a Topic Filter: {exc}"
    if topic_filter.startswith(SHARE_PREFIX):
        return f"{topic_filter!r}: an archive group shares with nobody, give the filter without $share"
    if topic_filter == "$SYS" or topic_filter.startswith("$SYS/"):
        return f"{topic_filter!r}: $SYS topics are never archived"
    return None


def _check_kafka_topic(_instance: object, _attribute: attrs.Attribute[Any], topic: str | None) -> None:
    if topic is not None and (not _KAFKA_TOPIC.fullmatch(topic) or topic in (".", "..")):
        raise ValueError(f"expected 1 to 249 of the characters a-z A-Z 0-9 . _ -, got {topic!r}")
    if topic in KAFKAS_OWN:
        raise ValueError(f"{topic} is a topic that Kafka keeps for itself; give the group one of its own")


@attrs.frozen(kw_only=True)
class ArchiveGroupOptions:
    """One archive group.

    Raises:
      ValueError: at construction, from the validator of one attribute or because attributes do not fit together.
    """

    name: str = attrs.field(validator=_check_name)
    """Distinct among the groups; names the SQLite file, stands in logs."""
    filter: tuple[str, ...] = attrs.field(default=("#",), converter=_as_filters, validator=_check_filters)
    """Topic Filters; a message that matches any of them is kept once. One filter may be given as a plain string."""
    enabled: bool = True
    store: str = attrs.field(default="SQLITE", converter=_upper, validator=in_(STORES))
    """SQLITE, KAFKA, MEMORY or NONE."""
    retention: float | None = attrs.field(default=None, validator=optional(gt(0)), metadata={"unit": "seconds"})
    """Seconds that a message is kept, None: no bound. For SQLITE and MEMORY; a Kafka topic has `retention.ms`."""
    max_size: int | None = attrs.field(
        default=None, validator=optional(ge(MINIMUM_MAX_SIZE)), metadata={"unit": "bytes"}
    )
    """Bytes that the store may take, its write-ahead log included; the oldest messages go first. None: SQLITE has
    no bound, MEMORY 64 MiB. SQLITE does not keep a message of more than a quarter of it, and counts it as failed."""
    kafka_topic: str | None = attrs.field(default=None, validator=_check_kafka_topic)
    """Where a KAFKA group writes; None: the Archive topic of [Kafka.Topics]."""
    ack: str = attrs.field(default="none", validator=in_(ACKS))
    """none: PUBACK and PUBREC do not wait for the store; store: they go out when the store has confirmed the message or
    the spool has it on disk [K9]."""
    ack_timeout: float = attrs.field(default=30.0, validator=[gt(0), le(3600)], metadata={"unit": "seconds"})
    """Seconds that an acknowledgement waits for the store (`ack = "store"`). Outcome: the messages that wait go to the
    spool; without one, or where it takes nothing, a 5.0 client gets reason code 0x83 and a 3.x client is disconnected.
    The message may be stored nevertheless."""
    on_outage: str | None = attrs.field(default=None, validator=optional(in_(OUTAGE_POLICIES)))
    """What happens to messages while the store is away [K10]. spool: they are kept on disk; reject: QoS 1 and 2 are
    refused with 0x97 (a 3.x client is disconnected), QoS 0 dropped; drop: they are acknowledged and dropped. Both
    answer at once what waits for the store when it goes away, and what is on its way is stored when it is back. None:
    spool for KAFKA; for the others the window fills, and its outcome follows."""
    spool_bytes: int = attrs.field(
        default=1024 * 1024 * 1024, validator=ge(MINIMUM_SPOOL_BYTES), metadata={"unit": "bytes"}
    )
    """Bytes that the spool takes on disk at most. Outcome, of a full disk as well: what comes fills the window, and its
    outcome follows."""
    format: str = attrs.field(default="JSON", converter=_upper, validator=in_(FORMATS))
    """How a KAFKA group writes its records: JSON, AVRO, or RAW, which is the payload alone [K8]."""
    timestamp_format: str = attrs.field(default="iso", validator=in_(TIMESTAMP_FORMATS))
    """How JSON records give the publish time."""
    window_messages: int = attrs.field(default=100_000, validator=ge(1))
    """Messages taken and not yet stored. Outcome: QoS 0 is dropped and counted; a QoS 1 or 2 message is taken and
    its acknowledgement waits until it is inside the window."""
    window_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=ge(65_536), metadata={"unit": "bytes"})
    """Bytes of the same messages, same outcome; beyond twice as many no QoS 1 or 2 PUBLISH is handled any more."""

    def __attrs_post_init__(self) -> None:
        if problems := list(_misfits(self)):
            raise ValueError("; ".join(problems))

    @property
    def outage_policy(self) -> str | None:
        """`on_outage` with its default; None: nothing but the window."""
        return self.on_outage or ("spool" if self.store == "KAFKA" else None)

    def target(self, default_kafka_topic: str = "mqtt.archive") -> str:
        """Return what tells one destination of messages from another: two groups with one target are one."""
        topic = self.kafka_topic or default_kafka_topic
        return f"{self.store}-{topic if self.store == 'KAFKA' else self.name}"


def _misfits(options: ArchiveGroupOptions) -> Iterable[str]:
    if options.store == "KAFKA":
        if options.retention is not None:
            yield "Retention: a KAFKA group keeps as long as its topic does, set retention.ms in the topic's Config"
        if options.max_size is not None:
            yield "MaxSize: a KAFKA group keeps as much as its topic does, set retention.bytes in the topic's Config"
    else:
        for key, is_set in (("KafkaTopic", options.kafka_topic is not None), ("Format", options.format != "JSON")):
            if is_set:
                yield f'{key}: has no meaning with Store = "{options.store}"; set Store = "KAFKA" or leave it out'
    if options.timestamp_format != "iso" and options.format != "JSON":
        yield f'TimestampFormat: {options.format} records give milliseconds since the epoch, it is for Format = "JSON"'


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
    merged: dict[str, ArchiveGroupOptions] = {}
    names: set[str] = set()
    for index, group in enumerate(options):
        if group.name in names:
            problems.append(f"ArchiveGroups[{index}].Name: another group is called {group.name!r}")
        names.add(group.name)
        if not group.enabled or group.store == "NONE":
            continue
        target = group.target(default_kafka_topic)
        first = merged.setdefault(target, group)
        if first is not group:
            problems += _disagreements(index, first, group, group.kafka_topic or default_kafka_topic)
            merged[target] = _joined(first, group)
    if problems:
        raise ConfigError(problems)
    return list(merged.values())


def acknowledging(options: Iterable[ArchiveGroupOptions], store: str) -> list[str]:
    """Return the names of the enabled groups in `store` that PUBACK and PUBREC wait for [K9]."""
    return [group.name for group in options if group.enabled and group.store == store and group.ack == "store"]


def _disagreements(index: int, first: ArchiveGroupOptions, group: ArchiveGroupOptions, target: str) -> Iterable[str]:
    keys = {"Format": "format", "TimestampFormat": "timestamp_format", "Ack": "ack", "OnOutage": "outage_policy"}
    for key, name in keys.items():
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
        ack_timeout=min(first.ack_timeout, group.ack_timeout),
        spool_bytes=max(first.spool_bytes, group.spool_bytes),
    )
