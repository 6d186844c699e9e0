"""How the clients of kafka-python are set up, and where each value comes from [K16]. Pure.

Later ones win: the gateway's own settings, `Profile`, [Kafka.Producer] and [Kafka.Consumer].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from gateways.kafka.options import KafkaOptions

Settings: TypeAlias = dict[str, tuple[object, str]]
"""Client option -> value, and where that comes from."""

OURS: Final = "default of the gateway"
ARCHIVE: Final = "archive"
BUS: Final = "bus"
"""The producer that `Profile` leaves alone: nodes rely on it."""
AUTO_COMMIT: Final = "enable_auto_commit"
AUTO_COMMIT_INTERVAL: Final = "auto_commit_interval_ms"
BEGIN: Final = "auto_offset_reset"
"""What says when offsets of mqtt.messages are stored, and where its group begins that has none; all other readers have
reasons of their own."""

COMMON: Final[Mapping[str, object]] = {
    "bootstrap_timeout_ms": 3000,
    "reconnect_backoff_max_ms": 1000,
    "metadata_max_age_ms": 30_000,
    "request_timeout_ms": 10_000,
}
PRODUCER: Final[Mapping[str, object]] = {
    "acks": "all",
    "enable_idempotence": True,
    "batch_size": 256 * 1024,
    "max_request_size": 8 * 1024 * 1024,
    "max_block_ms": 1500,
}
CONSUMER: Final[Mapping[str, object]] = {
    "fetch_max_bytes": 64 * 1024 * 1024,
    "max_partition_fetch_bytes": 4 * 1024 * 1024,
    "max_poll_records": 1000,
    AUTO_COMMIT: False,
    BEGIN: "earliest",
}
COMPAT_PRODUCER: Final[Mapping[str, object]] = {"acks": 1, "enable_idempotence": False}
"""What `Profile = "compat"` changes: the leader alone has a record when it is confirmed."""
COMPAT_STREAM: Final[Mapping[str, object]] = {AUTO_COMMIT: True}
"""What it changes about reading mqtt.messages: an offset is stored when its record was read."""
OF_PROFILE: Final = 'Profile = "compat"'
INTERVAL_MS: Final = 5000
"""Kafka's own default."""

ALL: Final = ("all", -1)
CHOICES: Final[Mapping[str, tuple[object, ...]]] = {
    "acks": ("all", -1, 0, 1),
    "compression_type": ("gzip", "lz4", "snappy", "zstd"),
    BEGIN: ("earliest", "latest"),
    "isolation_level": ("read_uncommitted", "read_committed"),
    "client_dns_lookup": ("use_all_dns_ips", "resolve_canonical_bootstrap_servers_only"),
}
"""Options that take some values only; kafka-python says so when a client is made, over and over."""
MAY_BE_NEGATIVE: Final = frozenset({"acks", "receive_buffer_bytes", "send_buffer_bytes"})
MOST_IN_FLIGHT: Final = 5
"""Requests on their way at a time with which idempotence keeps the order."""


def normal_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return client options under kafka-python's names: `linger.ms` means `linger_ms`."""
    return {name.replace(".", "_"): value for name, value in table.items()}


def common_settings() -> Settings:
    """Return what all clients share, administration too."""
    return _from(COMMON, OURS)


def producer_settings(options: KafkaOptions, name: str) -> Settings:
    """Return the settings of the producer `name`, but for codec and linger, which each has of its own."""
    settings = common_settings() | _from(PRODUCER, OURS)
    if options.profile == "compat" and name != BUS:
        settings |= _from(COMPAT_PRODUCER, OF_PROFILE)
    given = normal_keys(options.producer)
    given.pop("delivery_timeout_ms", None)  # `KafkaOptions.effective_delivery_timeout` has it
    settings |= _from(given, "[Kafka.Producer]")
    acks, origin = settings["acks"]
    if acks not in ALL and settings["enable_idempotence"] == (True, OURS):
        settings["enable_idempotence"] = (False, f"follows from acks, {origin}")
    return settings


def consumer_settings(options: KafkaOptions) -> Settings:
    """Return the settings of consumers; when offsets are stored and where a reader begins is its own affair, see
    `stream_settings`."""
    given = {name: value for name, value in normal_keys(options.consumer).items() if name not in (AUTO_COMMIT, BEGIN)}
    return common_settings() | _from(CONSUMER, OURS) | _from(given, "[Kafka.Consumer]")


def stream_settings(options: KafkaOptions) -> Settings:
    """Return when offsets of mqtt.messages are stored [K11, K16], with automatic commits every so many milliseconds for
    what was read, else for what was delivered or is durably queued; and where its group begins that has none."""
    settings = _from({AUTO_COMMIT: False, AUTO_COMMIT_INTERVAL: INTERVAL_MS, BEGIN: "earliest"}, OURS)
    if options.profile == "compat":
        settings |= _from(COMPAT_STREAM, OF_PROFILE)
    given = normal_keys(options.consumer)
    return settings | _from({name: given[name] for name in settings if name in given}, "[Kafka.Consumer]")


def auto_commit_interval(options: KafkaOptions) -> float | None:
    """Return the seconds between two automatic commits of mqtt.messages; None: they are not automatic."""
    settings = values(stream_settings(options))
    return settings[AUTO_COMMIT_INTERVAL] / 1000 if settings[AUTO_COMMIT] else None


def values(settings: Settings) -> dict[str, Any]:
    """Return the settings without their origins."""
    return {name: value for name, (value, _) in settings.items()}


def problems_of(options: KafkaOptions) -> list[str]:
    """Return what is wrong with the values of [Kafka.Producer] and [Kafka.Consumer], a line each, as far as the kinds
    of the values do not tell."""
    problems = []
    for section, table in (("Producer", options.producer), ("Consumer", options.consumer)):
        for name, value in normal_keys(table).items():
            choices = CHOICES.get(name)
            if choices is not None and value not in choices:
                names = ", ".join(map(str, choices))
                problems.append(f"Kafka.{section}.{name}: expected one of {names}, got {value!r}")
            elif choices is None and isinstance(value, int | float) and value < 0 and name not in MAY_BE_NEGATIVE:
                problems.append(f"Kafka.{section}.{name}: expected 0 or more, got {value!r}")
    return problems or _problems_of_idempotence(options)


def _problems_of_idempotence(options: KafkaOptions) -> list[str]:
    """kafka-python refuses to make such a producer, or turns idempotence off without a word."""
    given = normal_keys(options.producer)
    settings = values(producer_settings(options, "archive"))
    if not settings["enable_idempotence"]:
        return []
    mend = "with it records may be doubled and reordered, so it also takes enable_idempotence = false"
    problems = []
    if settings["acks"] not in ALL:
        problems.append(f'Kafka.Producer.enable_idempotence: needs acks = "all", not {settings["acks"]!r}')
    if given.get("retries", 1) == 0:
        problems.append(f"Kafka.Producer.retries: {mend}")
    if given.get("max_in_flight_requests_per_connection", 1) > MOST_IN_FLIGHT:
        problems.append(f"Kafka.Producer.max_in_flight_requests_per_connection: more than {MOST_IN_FLIGHT}; {mend}")
    return problems


def begins_at_end(options: KafkaOptions) -> bool:
    """Tell whether a group without offsets of mqtt.messages begins with what is new."""
    return bool(values(stream_settings(options))[BEGIN] == "latest")


def effective(options: KafkaOptions) -> Iterator[tuple[str, tuple[object, str]]]:
    """Yield what `mqtt-trio check` shows beside the keys: names, values and origins."""
    settings = producer_settings(options, ARCHIVE)
    for name, setting in settings.items():
        yield f"Producer.{name}", setting
    for name, setting in producer_settings(options, BUS).items():
        if setting[0] != settings[name][0]:
            yield f"Producer.{name}, of the bus", setting
    given = normal_keys(options.producer)
    origin = "[Kafka.Producer]" if "delivery_timeout_ms" in given else "DeliveryTimeout"
    yield "Producer.delivery_timeout_ms", (options.effective_delivery_timeout * 1000, origin)
    for name, setting in consumer_settings(options).items():
        yield f"Consumer.{name}", setting
    for name, setting in stream_settings(options).items():
        if name != AUTO_COMMIT_INTERVAL or auto_commit_interval(options) is not None:
            yield f"Consumer.{name}, of {options.messages_topic}", setting
    origin = OURS if options.profile != "compat" else OF_PROFILE
    yield "Topics.Messages.Group", (options.messages_group, "its key" if options.topics.messages.group else origin)


def _from(table: Mapping[str, object], origin: str) -> Settings:
    return {name: (value, origin) for name, value in table.items()}
