"""The blocking half of the data path: producers and consumers of kafka-python (the admin client is in `admin`).

Nothing here runs on the Trio thread. What kafka-python does and does not do stands in docs/kafka-errors.md; the shape
of this module follows from it: clients never create topics, failed constructors leak nothing, a producer can be
broken off.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

import attrs
import kafka.errors as kafka_errors
from kafka import KafkaConsumer, KafkaProducer, TopicPartition, codec
from kafka.net.compat import KafkaNetClient
from kafka.net.inet import KafkaNetSocket
from kafka.structs import OffsetAndMetadata

from gateways.kafka import batches
from gateways.kafka.batches import Unreadable
from gateways.kafka.client_metrics import ClientFigures, ClientMetrics, FetchWatch
from gateways.kafka.client_settings import common_settings, consumer_settings, producer_settings, values
from gateways.kafka.client_settings import normal_keys as normal_keys
from gateways.kafka.client_settings import problems_of as problems_of_settings
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import ConsumedRecord, Reason, Record
from gateways.kafka.security import security_of
from mqtt_trio.errors import ConfigError

OFFSETS_TIMEOUT_MS: Final = 5000
ENDS_TIMEOUT_MS: Final = 1000
NEVER_MS: Final = 24 * 3600 * 1000
"""kafka-python shall not expire batches one by one: a later batch could overtake. `Feeder` gives up on a producer as a
whole instead, after `KafkaOptions.delivery_timeout`."""

LEADERLESS_PAUSE: Final = 0.01
"""Seconds between two rounds of kafka-python's thread while a partition has no leader: a busy loop else."""
ENCODERS: Final[Mapping[str | None, Callable[[bytes], bytes]]] = {
    "gzip": codec.gzip_encode,
    "lz4": codec.lz4_encode,
    "snappy": codec.snappy_encode,
    "zstd": codec.zstd_encode,
}

FAULT_OF_ONE_RECORD: Final = (
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.RecordListTooLargeError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
)
TOO_LARGE: Final = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
RETRIABLE: Final = (kafka_errors.RetriableError, kafka_errors.KafkaTimeoutError)
OWNED: Final = frozenset(
    {
        "bootstrap_servers", "kafka_client", "key_serializer", "value_serializer", "key_deserializer",
        "value_deserializer", "transactional_id", "partitioner", "group_id",
        "allow_auto_create_topics", "selector", "partition_assignment_strategy", "default_offset_commit_callback",
        "consumer_timeout_ms", "metric_reporters", "metric_group_prefix", "socket_options", "client_id",
    }
)  # fmt: skip
"""Client options that the gateway sets, or that would break what it promises."""
INSTEAD: Final[Mapping[str, str]] = {
    "bootstrap_servers": "; the key is Kafka.Servers",
    "group_id": "; Kafka.Topics.Messages.Group names the group of the stream",
}
"""What stands for some of them."""
SECURITY_OPTIONS: Final = ("security_", "ssl_", "sasl_")
"""How options begin that belong to the whole gateway."""


async def connect_or_close(
    self: KafkaNetSocket, net: Any, sock: socket.socket, sockaddr: Any, timeout_at: float | None = None
) -> socket.socket:
    """Do what `KafkaNetSocket.sock_connect` does, but do not leave a socket that could not connect to the garbage
    collector: an outage has thousands of them, and the collector runs rarely."""
    try:
        connected: socket.socket = await sock_connect(self, net, sock, sockaddr, timeout_at=timeout_at)
    except BaseException:
        sock.close()
        raise
    return connected


sock_connect = KafkaNetSocket.sock_connect
KafkaNetSocket.sock_connect = connect_or_close


def quiet_loggers() -> None:
    """Keep kafka-python's own loggers silent unless somebody set their level: they log each retry, and the gateway says
    what matters once."""
    logger = logging.getLogger("kafka")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def is_fault_of_record(error: BaseException) -> bool:
    """Tell whether Kafka refused one record for what it is, so that no repetition can help."""
    return isinstance(error, FAULT_OF_ONE_RECORD)


def is_denial(error: BaseException) -> bool:
    """Tell whether this node may not write to the topic."""
    return isinstance(error, kafka_errors.TopicAuthorizationFailedError)


def reason_for(error: BaseException) -> Reason:
    """Return what a dead letter says of a record that met `error`."""
    return Reason.TOO_LARGE if isinstance(error, TOO_LARGE) else Reason.REFUSED


def is_retriable(error: BaseException) -> bool:
    """Tell whether the same call may succeed later."""
    return isinstance(error, RETRIABLE)


def check_client_options(options: KafkaOptions) -> None:
    """Compare [Kafka.Producer] and [Kafka.Consumer] with what kafka-python knows.

    Raises:
      ConfigError: with one line for each option that is unknown or not free to set.
    """
    problems = []
    for section, table, known in (
        ("Producer", options.producer, KafkaProducer.DEFAULT_CONFIG),
        ("Consumer", options.consumer, KafkaConsumer.DEFAULT_CONFIG),
    ):
        for name, value in normal_keys(table).items():
            if name.startswith(SECURITY_OPTIONS):
                problems.append(f"Kafka.{section}.{name}: belongs to [Kafka.Security] and [Kafka.SSL], for all clients")
            elif name in OWNED:
                problems.append(f"Kafka.{section}.{name}: set by the gateway itself{INSTEAD.get(name, '')}")
            elif name not in known:
                problems.append(f"Kafka.{section}.{name}: kafka-python has no such option")
            elif (expected := unlike(value, known[name])) is not None:
                problems.append(f"Kafka.{section}.{name}: expected {expected}, got {value!r}")
    problems = problems or problems_of_settings(options)
    if problems:
        raise ConfigError(problems)


def unlike(value: object, default: object) -> str | None:
    """Return what `value` should have been when it is not of the kind of kafka-python's `default`, which tells no more
    than that: the clients do not check, and fail later with a TypeError, or not at all."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        return "a number" if wrong and not (default == -1 and value == "all") else None  # acks
    if isinstance(default, str):
        return None if isinstance(value, str) else "text"
    return None


@contextmanager
def leak_safe() -> Iterator[Callable[..., KafkaNetClient]]:
    """Give out a `kafka_client` factory whose clients never create topics; they are closed when the body fails, because
    the constructors of KafkaConsumer and KafkaAdminClient leave a thread and four descriptors behind then."""
    made: list[KafkaNetClient] = []

    def make(**config: Any) -> KafkaNetClient:
        client = KafkaNetClient(**config)
        client.cluster.config["allow_auto_create_topics"] = False  # the constructor's option of that name does nothing
        made.append(client)
        return client

    try:
        yield make
    except BaseException:
        for client in made:
            with suppress(Exception):
                client.close()
        raise


def slow_down_without_leader(accumulator: Any) -> None:
    """Keep kafka-python's thread from spinning while a partition that it ever wrote to has no leader, or is gone: it
    asks for metadata and looks again at once then, for as long as that lasts."""
    ready = accumulator.ready

    def ready_in_peace(cluster: Any, now: float | None = None) -> Any:
        found = ready(cluster, now=now)
        if found[2]:  # unknown leaders exist
            time.sleep(LEADERLESS_PAUSE)
        return found

    accumulator.ready = ready_in_peace


def is_connected(client: Any) -> bool:
    """Tell whether a client has a connection to any broker. Any thread."""
    return any(connection.connected for connection in tuple(client._manager._conns.values()))


def common_config(options: KafkaOptions, name: str) -> dict[str, Any]:
    """Return what all clients share; `name` ends the client id.

    Raises:
      ConfigError: a store or key that the security options name cannot be used.
    """
    return {
        "bootstrap_servers": options.server_names,
        "client_id": f"mqtt-trio-{name}",
        **values(common_settings()),
        **security_of(options).client_config(),
    }


class Producer:
    """A KafkaProducer as the feeder uses it."""

    def __init__(self, options: KafkaOptions, name: str, compression: str | None, linger_ms: int) -> None:
        """Connect. Blocks for three seconds at most.

        Raises:
          kafka.errors.KafkaError: no broker answers, or does not let us in.
        """
        config = common_config(options, name) | {"linger_ms": linger_ms, "compression_type": compression}
        config |= values(producer_settings(options, name))
        config["delivery_timeout_ms"] = NEVER_MS
        with leak_safe() as make_client:
            self._producer = KafkaProducer(kafka_client=make_client, **config)
        slow_down_without_leader(self._producer._accumulator)
        self._append = self._producer._accumulator.append
        self._leader_of = self._producer._metadata.leader_for_partition
        self._metrics = ClientMetrics(self._producer, "producer")
        self._compression = config["compression_type"]
        self._max_request_size: int = config["max_request_size"]

    def send(
        self, record: Record, partition: int, done: Callable[[Record, Any], None], failed: Callable[[Record, Any], None]
    ) -> None:
        """Hand `record` over; `done(record, _)` or `failed(record, exception)` follow in kafka-python's thread.

        What KafkaProducer.send does beside appending (it looks at all headers twice, adds up sizes that are known, and
        makes texts for a log that is off) takes a quarter of the time of a record. It is left to it where it may say
        no: where the partition is not known to it, and where the record may be too large.
        """
        producer, partition_key = self._producer, TopicPartition(record.topic, partition)
        headers = record.headers
        if type(headers) is not list:
            headers = list(headers)
        if record.size > self._max_request_size or self._leader_of(partition_key) is None:
            future = producer.send(record.topic, record.value, record.key, headers, partition, record.timestamp_ms)
        else:
            future, is_full, is_new, _ = self._append(
                partition_key, record.timestamp_ms, record.key, record.value, headers
            )
            if is_full or is_new:
                producer._sender.wakeup()
        future._add_cb_eb(partial(done, record), partial(failed, record))

    def too_large(self, record: Record, limit: int) -> bool:
        """Tell whether `record` alone makes a batch of more than `limit` bytes once it is compressed."""
        if record.size > self._max_request_size:
            return True
        if record.size <= limit:
            return False
        encode = ENCODERS.get(self._compression)
        if encode is None:
            return True
        body = (record.key or b"") + (record.value or b"")
        return len(encode(body)) + record.size - len(body) > limit

    def vanished(self) -> set[tuple[str, int]]:
        """Return partitions that this producer wrote to and that Kafka no longer names."""
        leader_of = self._producer._metadata.leader_for_partition  # -1: no leader at the moment; None: no partition
        written = list(self._producer._accumulator._batches)
        return {(p.topic, p.partition) for p in written if leader_of(p) is None}

    def figures(self) -> ClientFigures:
        """Return what the client says about itself."""
        return self._metrics.read()

    @property
    def is_alive(self) -> bool:
        """kafka-python's thread runs."""
        return bool(self._producer._sender.is_alive())

    def break_off(self) -> None:
        """Let nothing more leave; whatever is not confirmed fails. Any thread, kafka-python's too; does not block."""
        self._producer._sender.force_close()

    def close(self, wait: float) -> bool:
        """End the producer by force; blocks for `wait` seconds at most. Return whether its thread ended: all outcomes
        are known then."""
        self.break_off()
        self._producer._sender.join(wait)
        with suppress(Exception):
            self._producer.close(0)  # takes back its atexit hook; its thread is gone already
        return not self._producer._sender.is_alive()


def release_parked(consumer: Any) -> None:
    """Let a KafkaConsumer give out what it has parked of partitions that were paused for a time: it only looks for that
    where nothing is in line, and takes what is used up for something. Before each poll of a consumer that pauses."""
    fetcher = consumer._fetcher
    if not fetcher._next_partition_records:
        fetcher._next_partition_records = None


def consumed(record: Any) -> ConsumedRecord:
    """Return a record of kafka-python as one of ours."""
    value, headers = record.value, record.headers
    if headers:  # a header may be null
        headers = [(name, content or b"") for name, content in headers]
    found = ConsumedRecord(record.topic, record.partition, record.offset, record.key, value, headers, record.timestamp)
    if type(value) is Unreadable:
        found.value, found.defect = bytes(value), value.reason
    return found


class Consumer:
    """A KafkaConsumer as the poller uses it; it joins no group."""

    _pauses = False

    def __init__(self, options: KafkaOptions, name: str, group: str | None = None) -> None:
        """Connect. Blocks for three seconds at most. `group` is where `commit` stores offsets.

        Raises:
          kafka.errors.KafkaError: no broker answers, or does not let us in.
        """
        # "earliest" is only used when the log was cut off above our own position.
        config = common_config(options, name) | values(consumer_settings(options))
        batches.install()
        with leak_safe() as make_client:
            self._consumer = KafkaConsumer(
                kafka_client=make_client,
                group_id=group,
                **config,
            )
        self._metrics = ClientMetrics(self._consumer, "consumer")
        self._fetches = FetchWatch(self._consumer._fetcher, kafka_errors.Cancelled)

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions of `topic` as the client knows them; none when there is no such topic."""
        return sorted(self._consumer.partitions_for_topic(topic))

    def identity(self, topic: str) -> str | None:
        """Return what tells `topic` from an earlier one of its name; None: the client does not know."""
        found = self._consumer._client.cluster.topic_id(topic)
        return None if found is None else str(found)

    def first_offsets(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Return the offset of the oldest record of each partition."""
        found = self._consumer.beginning_offsets([TopicPartition(*p) for p in partitions], OFFSETS_TIMEOUT_MS)
        return {(p.topic, p.partition): offset for p, offset in found.items()}

    def end_offsets(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Return the offset of the next record of each partition."""
        found = self._consumer.end_offsets([TopicPartition(*p) for p in partitions], OFFSETS_TIMEOUT_MS)
        return {(p.topic, p.partition): offset for p, offset in found.items()}

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read these partitions, and no others, from these offsets."""
        partitions = {TopicPartition(*p): offset for p, offset in offsets.items()}
        self._consumer.assign(list(partitions))
        for p, offset in partitions.items():
            self._consumer.seek(p, offset)

    def pause(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Bring no records of these until `resume`."""
        self._pauses = True
        self._consumer.pause(*(TopicPartition(*p) for p in partitions))

    def resume(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Undo `pause`."""
        self._consumer.resume(*(TopicPartition(*p) for p in partitions))

    def poll(self, timeout: float) -> list[ConsumedRecord]:
        """Return what has come, in order per partition; waits for at most `timeout` seconds."""
        if self._pauses:
            release_parked(self._consumer)
        return [
            consumed(record)
            for records in self._consumer.poll(timeout_ms=int(timeout * 1000)).values()
            for record in records
        ]

    def position(self, partition: tuple[str, int]) -> int:
        """Return the offset of the next record to be polled; above the last record's where markers follow it."""
        return int(self._consumer.position(TopicPartition(*partition), OFFSETS_TIMEOUT_MS) or 0)

    def highwater(self, partition: tuple[str, int]) -> int | None:
        """Return the end of the partition as of the last fetch."""
        found: int | None = self._consumer.highwater(TopicPartition(*partition))
        return found

    def latest_ends(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Do what `end_offsets` does, between two attempts to hand records over: it gives up soon."""
        found = self._consumer.end_offsets([TopicPartition(*p) for p in partitions], ENDS_TIMEOUT_MS)
        return {(p.topic, p.partition): offset for p, offset in found.items()}

    def figures(self) -> ClientFigures:
        """Return what the client says about itself, and how its fetches fared."""
        watch = self._fetches
        return attrs.evolve(self._metrics.read(), failed_fetches=watch.failed, answered_at=watch.answered_at)

    def committed(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[int, str]]:
        """Return offset and note of the partitions for which the group has one; none without a group."""
        found: dict[tuple[str, int], tuple[int, str]] = {}
        if self._consumer.config["group_id"] is None:
            return found
        for partition in partitions:
            stored = self._consumer.committed(TopicPartition(*partition), metadata=True, timeout_ms=OFFSETS_TIMEOUT_MS)
            if stored is not None:
                found[partition] = (stored.offset, stored.metadata or "")
        return found

    def commit(self, offsets: Mapping[tuple[str, int], tuple[int, str]]) -> None:
        """Store offsets, each with a note, in the group; does not wait for Kafka's answer."""
        if self._consumer.config["group_id"] is not None:
            stored = {TopicPartition(*p): OffsetAndMetadata(offset, note, -1) for p, (offset, note) in offsets.items()}
            self._consumer.commit_async(stored)

    @property
    def connected(self) -> bool:
        """A connection to some broker stands."""
        return is_connected(self._consumer._client)

    def close(self) -> None:
        """Close; blocks for two seconds at most."""
        with suppress(Exception):
            self._consumer.close(autocommit=False, timeout_ms=2000)
