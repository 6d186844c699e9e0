"""The blocking half of administration: every call of kafka-python's admin client is here.

Nothing here runs on the Trio thread.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias, TypeVar

import kafka.errors as kafka_errors
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, OffsetSpec, OffsetTimestamp
from kafka.structs import OffsetAndMetadata

from gateways.kafka.cluster import one_line
from gateways.kafka.discretion import hide
from gateways.kafka.groups import GroupState
from gateways.kafka.options import KafkaOptions
from gateways.kafka.precheck import probe
from gateways.kafka.topic_plan import DENIED, TopicState
from gateways.kafka.workers import common_config, leak_safe, normal_keys, quiet_loggers
from mqtt_trio.errors import GatewayError

ADMIN_TIMEOUT_MS: Final = 10_000
COORDINATOR_TIMEOUT: Final = 15.0
"""The same for calls about groups, also of nodes: in a new cluster the first one has the topic of offsets made."""
INTERVAL: Final = 0.2
SESSION_TIMEOUT_MS: Final = 10_000
"""How long the place of a `sole_member` that died is kept."""
PLACE_TIMEOUT: Final = 12.0
"""Seconds to wait for the place: longer than that."""
LONGEST_HOLD_MS: Final = 24 * 3600 * 1000
"""How long `sole_member` holds its place without polling."""
PATIENCE: Final = 20.0
"""Seconds that a command goes on asking while brokers come and go: longer than Kafka takes to notice that one died."""
PASSING: Final = (kafka_errors.RetriableError, kafka_errors.KafkaTimeoutError, kafka_errors.UnknownBrokerIdError)
"""What another attempt, by a new client, may not meet."""
LASTING: Final = (kafka_errors.UnknownTopicOrPartitionError,)
"""Not so these, though kafka-python says so."""
DENIALS: Final = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
)


Partition: TypeAlias = tuple[str, int]
"""Topic and number."""
T = TypeVar("T")


@contextmanager
def administration(options: KafkaOptions) -> Iterator[Admin]:
    """Connect for one command, and say in words what goes wrong. Blocks for five seconds at most.

    Raises:
      GatewayError: Kafka is not there, or refuses what the body asks of it.
    """
    quiet_loggers()
    servers = ", ".join(options.server_names)
    reason = probe(options, certain=True)(options.server_names)
    admin = None
    try:
        if reason is None:
            admin = Admin(options, PATIENCE)
    except kafka_errors.KafkaError as exc:
        reason = probe(options)(options.server_names) or words_of(exc)
    if admin is None:
        raise GatewayError(f"Kafka at {servers} cannot be asked: {reason}", retriable=True)
    try:
        yield admin
    except kafka_errors.KafkaError as exc:
        denied = isinstance(exc, DENIALS)
        text = f"Kafka at {servers} {'denies it' if denied else 'failed'}: {words_of(exc)}"
        raise GatewayError(text, retriable=not denied) from None
    finally:
        admin.close()


@contextmanager
def sole_member(options: KafkaOptions, group: str, topic: str) -> Iterator[None]:
    """Be the only member of `group` while the body runs: whoever else tries is refused. The member subscribes to
    `topic`, reads nothing and commits nothing; should the process die, its place is free after a while, which the next
    one waits for.

    Raises:
      GatewayError: there is another member, or Kafka does not let this one in.
    """
    with administration(options) as admin:
        until = time.monotonic() + PLACE_TIMEOUT
        while (found := admin.group(group)) is not None and found.is_active:
            if time.monotonic() > until:
                raise _taken(found)
            time.sleep(INTERVAL)
        own = {
            "session_timeout_ms": SESSION_TIMEOUT_MS, "max_poll_interval_ms": LONGEST_HOLD_MS, "max_poll_records": 1,
            "enable_auto_commit": False,
        }  # fmt: skip
        config = common_config(options, f"{socket.gethostname()}-{os.getpid()}") | normal_keys(options.consumer) | own
        with leak_safe() as make_client:
            consumer = KafkaConsumer(kafka_client=make_client, group_id=group, **config)
        try:
            until = time.monotonic() + COORDINATOR_TIMEOUT
            # Who joins before it has heard of the topic gets no share, and stays without one.
            while not consumer.partitions_for_topic(topic) and time.monotonic() < until:
                time.sleep(INTERVAL)
            consumer.subscribe([topic])
            while not consumer.assignment() and time.monotonic() < until:
                consumer.poll(timeout_ms=100)
            consumer.pause(*consumer.assignment())
            found = admin.group(group)
            if found is not None and len(found.members) > 1:
                raise _taken(found)
            if not consumer.assignment() or found is None:
                text = f"Kafka did not let this process into group {group} within {COORDINATOR_TIMEOUT:g} s; try again"
                raise GatewayError(text, retriable=True)
            yield
        finally:
            with suppress(Exception):
                consumer.close(autocommit=False, timeout_ms=2000)


def _taken(group: GroupState) -> GatewayError:
    return GatewayError(f"another one is at it ({', '.join(group.members)}); try again when it is done", retriable=True)


def words_of(exc: BaseException) -> str:
    """Return what an exception of kafka-python says, on one line and without secrets."""
    return hide(one_line(exc).removesuffix(":"))


class Admin:
    """A KafkaAdminClient as the topic manager uses it."""

    def __init__(self, options: KafkaOptions, patience: float = 0.0) -> None:
        """Connect. Blocks for three seconds at most. Calls are made anew for `patience` seconds while they fail for
        reasons that pass.

        Raises:
          kafka.errors.KafkaError: no broker answers, or does not let us in.
        """
        self._options = options
        self._patience = patience
        self._client: Any = None
        self._client = self._connect()

    def _connect(self) -> Any:
        with leak_safe() as make_client:
            return KafkaAdminClient(kafka_client=make_client, **common_config(self._options, "admin"))

    def _ask(self, call: Callable[[Any], T], patience: float = 0.0) -> T:
        """Make a call, which must be one that may be made twice."""
        until = time.monotonic() + max(patience, self._patience)
        while True:
            try:
                if self._client is None:
                    self._client = self._connect()
                return call(self._client)
            except PASSING as exc:
                if isinstance(exc, LASTING) or time.monotonic() > until:
                    raise
            self.close()  # it remembers brokers that are gone
            self._client = None
            time.sleep(INTERVAL)

    def broker_count(self) -> int:
        """Return how many brokers are alive."""
        return len(self._ask(lambda client: client.describe_cluster())["brokers"])

    def describe(self, names: Sequence[str]) -> dict[str, TopicState | None]:
        """Return the topics that exist; None for one that this user may not see, whether it exists or not."""
        found: dict[str, Any] = {}
        hidden: dict[str, None] = {}
        rights: dict[str, Sequence[str]] = {}
        for topic in self._ask(lambda client: client.describe_topics(list(names))):
            if topic["error_code"] == kafka_errors.TopicAuthorizationFailedError.errno:
                hidden[topic["name"]] = None
            elif topic["error_code"] == 0 and topic["partitions"]:
                found[topic["name"]] = topic["partitions"]
                if (operations := topic.get("authorized_operations")) is not None:
                    rights[topic["name"]] = operations
        config = self._config_of(list(found))
        states = {
            name: TopicState(
                partitions=len(partitions),
                replication_factor=len(partitions[0]["replica_nodes"]),
                leaders=all(p["leader_id"] >= 0 for p in partitions),
                out_of_sync=sum(len(p["isr_nodes"]) < len(p["replica_nodes"]) for p in partitions),
                config=config.get(name, {}),
                writable="WRITE" in rights.get(name, ("WRITE",)),
                readable="READ" in rights.get(name, ("READ",)),
            )
            for name, partitions in found.items()
        }
        return {**states, **hidden}

    def _config_of(self, names: list[str]) -> dict[str, dict[str, str]]:
        if not names:
            return {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        found = self._ask(lambda client: client.describe_configs(resources, config_filter="all"))
        return {  # without DESCRIBE_CONFIGS the answer is an empty table, as for a topic that does not exist
            name: {key: "" if facts["value"] is None else str(facts["value"]) for key, facts in table.items()}
            for name, table in found.get("topic", {}).items()
        }

    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None:
        """Create a topic; one that exists is fine.

        Returns:
          None; or why not: DENIED, or the broker's words.
        """
        facts = {"num_partitions": partitions, "replication_factor": replication_factor, "configs": dict(config)}
        answer = self._ask(
            lambda client: client.create_topics({name: facts}, timeout_ms=ADMIN_TIMEOUT_MS, raise_errors=False)
        )
        return _outcome(answer["topics"][0], kafka_errors.TopicAlreadyExistsError)

    def may_create(self, name: str, partitions: int, replication_factor: int) -> str | None:
        """Have Kafka say whether `create` would succeed, and create nothing; return as `create`."""
        facts = {"num_partitions": partitions, "replication_factor": replication_factor}
        answer = self._ask(
            lambda client: client.create_topics(
                {name: facts}, timeout_ms=ADMIN_TIMEOUT_MS, validate_only=True, raise_errors=False
            )
        )
        return _outcome(answer["topics"][0], kafka_errors.TopicAlreadyExistsError)

    def grow(self, name: str, partitions: int) -> str | None:
        """Give a topic more partitions; return as `create`."""
        answer = self._ask(
            lambda client: client.create_partitions({name: partitions}, timeout_ms=ADMIN_TIMEOUT_MS, raise_errors=False)
        )
        return _outcome(answer.results[0].to_dict())

    def configure(self, name: str, config: Mapping[str, str]) -> str | None:
        """Set properties of a topic, leave its others alone; return as `create`."""
        resource = ConfigResource(ConfigResourceType.TOPIC, name, configs=dict(config))
        # What is unknown is told by the broker, in the answer: the client's own check cannot tell it from a topic that
        # is gone or whose properties may not be seen.
        answer = self._ask(lambda client: client.alter_configs([resource], raise_on_unknown=False, incremental=True))
        text: str = answer["topic"][name]
        if text == "OK":
            return None
        return DENIED if any(error.__name__ in text for error in DENIALS) else text

    # --- offsets of groups

    def _ask_coordinator(self, call: Callable[[Any], T]) -> T:
        return self._ask(call, COORDINATOR_TIMEOUT)

    def group_names(self) -> list[str]:
        """Return the groups that this user may see."""
        return sorted(group["group_id"] for group in self._ask_coordinator(lambda client: client.list_groups()))

    def group(self, name: str) -> GroupState | None:
        """Return a group's state; None when there is none of that name.

        Raises:
          GatewayError: this user may not see it.
        """
        listed = {group["group_id"]: group for group in self._ask_coordinator(lambda client: client.list_groups())}
        try:
            facts = self._ask_coordinator(lambda client: client.describe_groups([name]))[name]
        except kafka_errors.GroupAuthorizationFailedError:
            raise _hidden(name) from None
        members = tuple(f"{member['client_id']} at {member['client_host'].lstrip('/')}" for member in facts["members"])
        if (known := listed.get(name)) is not None:  # other types than "classic" are only known to the list
            return GroupState(name=name, state=known["group_state"] or facts["group_state"], members=members)
        if facts["error"] is not None:
            if any(error.__name__ in facts["error"] for error in DENIALS):
                raise _hidden(name)
            return None
        if facts["group_state"] == "Dead" and not members:
            return None
        return GroupState(name=name, state=facts["group_state"], members=members)

    def committed(self, group: str) -> dict[Partition, int]:
        """Return the committed offsets of a group; none for a group that does not exist.

        Raises:
          GatewayError: this user may not see it.
        """
        try:
            found = self._ask_coordinator(lambda client: client.list_group_offsets(group))[group]
        except kafka_errors.GroupAuthorizationFailedError:
            raise _hidden(group) from None
        return {(p.topic, p.partition): facts.offset for p, facts in found.items() if facts.offset >= 0}

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, tuple[int, int]]:
        """Return the offsets of the oldest and of the next record of each partition; all of them must exist."""
        first, end = (self._offsets(partitions, spec) for spec in (OffsetSpec.EARLIEST, OffsetSpec.LATEST))
        return {p: (first[p], end[p]) for p in partitions}

    def offsets_at(self, partitions: Sequence[Partition], timestamp_ms: int) -> dict[Partition, int]:
        """Return the offset of the first record with this timestamp or a later one; -1 where there is none."""
        return self._offsets(partitions, OffsetTimestamp(timestamp_ms))

    def _offsets(self, partitions: Sequence[Partition], spec: Any) -> dict[Partition, int]:
        found = self._ask(lambda client: client.list_partition_offsets({TopicPartition(*p): spec for p in partitions}))
        return {(p.topic, p.partition): facts.offset for p, facts in found.items()}

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> dict[Partition, str]:
        """Set offsets of a group without members, one that does not exist yet included.

        Returns:
          Kafka's error for each partition where it failed: `UnknownMemberIdError` when the group has members.
        """
        # The leader epoch of what was committed before does not belong to another offset: -1, none.
        wanted = {TopicPartition(*p): OffsetAndMetadata(offset, "", -1) for p, offset in offsets.items()}
        answer = self._ask_coordinator(lambda client: client.alter_group_offsets(group, wanted))
        return {
            (p.topic, p.partition): error.__name__ for p, error in answer.items() if error is not kafka_errors.NoError
        }

    def close(self) -> None:
        """Close the client and its thread."""
        with suppress(Exception):
            self._client.close()


def _hidden(group: str) -> GatewayError:
    return GatewayError(f"this user may not see group {group}: it lacks Describe on it", retriable=False)


def _outcome(answer: Mapping[str, Any], *fine: type[kafka_errors.KafkaError]) -> str | None:
    error: type[kafka_errors.KafkaError] = kafka_errors.for_code(answer["error_code"])
    if error in (kafka_errors.NoError, *fine):
        return None
    if error in DENIALS:
        return DENIED
    text = answer.get("error_message")
    return f"{error.__name__}: {text}" if text else error.__name__
