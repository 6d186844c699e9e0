"""The blocking half of administration: every call of kafka-python's admin client is here.

Nothing here runs on the Trio thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import kafka.errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import DENIED, TopicState
from gateways.kafka.workers import common_config, leak_safe, probe, quiet_loggers
from mqtt_trio.errors import GatewayError

ADMIN_TIMEOUT_MS: Final = 10_000
DENIALS: Final = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
)


@contextmanager
def administration(options: KafkaOptions) -> Iterator[Admin]:
    """Connect for one command, and say in words what goes wrong. Blocks for three seconds and one a server at most.

    Raises:
      GatewayError: Kafka is not there, or refuses what the body asks of it.
    """
    quiet_loggers()
    servers = ", ".join(options.server_names)
    try:
        admin = Admin(options)
    except kafka_errors.KafkaError as exc:
        reason = probe(options.server_names) or words_of(exc)
        raise GatewayError(f"Kafka at {servers} cannot be asked: {reason}", retriable=True) from None
    try:
        yield admin
    except kafka_errors.KafkaError as exc:
        denied = isinstance(exc, DENIALS)
        text = f"Kafka at {servers} {'denies it' if denied else 'failed'}: {words_of(exc)}"
        raise GatewayError(text, retriable=not denied) from None
    finally:
        admin.close()


def words_of(exc: BaseException) -> str:
    """Return what an exception of kafka-python says, on one line."""
    return " ".join(f"{type(exc).__name__}: {exc}".split()).removesuffix(":")


class Admin:
    """A KafkaAdminClient as the topic manager uses it."""

    def __init__(self, options: KafkaOptions) -> None:
        """Connect. Blocks for three seconds at most.

        Raises:
          kafka.errors.KafkaError: no broker answers, or does not let us in.
        """
        config = common_config(options, "admin")
        with leak_safe() as make_client:
            self._admin = KafkaAdminClient(kafka_client=make_client, **config)

    def broker_count(self) -> int:
        """Return how many brokers are alive."""
        return len(self._admin.describe_cluster()["brokers"])

    def describe(self, names: Sequence[str]) -> dict[str, TopicState | None]:
        """Return the topics that exist; None for one that this user may not see, whether it exists or not."""
        found: dict[str, Any] = {}
        hidden: dict[str, None] = {}
        for topic in self._admin.describe_topics(list(names)):
            if topic["error_code"] == kafka_errors.TopicAuthorizationFailedError.errno:
                hidden[topic["name"]] = None
            elif topic["error_code"] == 0 and topic["partitions"]:
                found[topic["name"]] = topic["partitions"]
        config = self._config_of(list(found))
        states = {
            name: TopicState(
                partitions=len(partitions),
                replication_factor=len(partitions[0]["replica_nodes"]),
                leaders=all(p["leader_id"] >= 0 for p in partitions),
                config=config.get(name, {}),
            )
            for name, partitions in found.items()
        }
        return {**states, **hidden}

    def _config_of(self, names: list[str]) -> dict[str, dict[str, str]]:
        if not names:
            return {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        answer = self._admin.describe_configs(resources, config_filter="all").get("topic", {})
        return {  # without DESCRIBE_CONFIGS the answer is an empty table, as for a topic that does not exist
            name: {key: "" if facts["value"] is None else str(facts["value"]) for key, facts in table.items()}
            for name, table in answer.items()
        }

    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None:
        """Create a topic; one that exists is fine.

        Returns:
          None; or why not: DENIED, or the broker's words.
        """
        facts = {"num_partitions": partitions, "replication_factor": replication_factor, "configs": dict(config)}
        answer = self._admin.create_topics({name: facts}, timeout_ms=ADMIN_TIMEOUT_MS, raise_errors=False)
        return _outcome(answer["topics"][0], kafka_errors.TopicAlreadyExistsError)

    def grow(self, name: str, partitions: int) -> str | None:
        """Give a topic more partitions; return as `create`."""
        answer = self._admin.create_partitions({name: partitions}, timeout_ms=ADMIN_TIMEOUT_MS, raise_errors=False)
        return _outcome(answer.results[0].to_dict())

    def configure(self, name: str, config: Mapping[str, str]) -> str | None:
        """Set properties of a topic, leave its others alone; return as `create`."""
        resource = ConfigResource(ConfigResourceType.TOPIC, name, configs=dict(config))
        # What is unknown is told by the broker, in the answer: the client's own check cannot tell it from a topic that
        # is gone or whose properties may not be seen.
        answer = self._admin.alter_configs([resource], raise_on_unknown=False, incremental=True)
        text: str = answer["topic"][name]
        if text == "OK":
            return None
        return DENIED if any(error.__name__ in text for error in DENIALS) else text

    def close(self) -> None:
        """Close the client and its thread."""
        with suppress(Exception):
            self._admin.close()


def _outcome(answer: Mapping[str, Any], *fine: type[kafka_errors.KafkaError]) -> str | None:
    error: type[kafka_errors.KafkaError] = kafka_errors.for_code(answer["error_code"])
    if error in (kafka_errors.NoError, *fine):
        return None
    if error in DENIALS:
        return DENIED
    text = answer.get("error_message")
    return f"{error.__name__}: {text}" if text else error.__name__
