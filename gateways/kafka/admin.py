"""The blocking half of administration: every call of kafka-python's admin client is here.

Nothing here runs on the Trio thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import attrs
import kafka.errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from gateways.kafka.options import KafkaOptions
from gateways.kafka.workers import common_config, leak_safe

ADMIN_TIMEOUT_MS: Final = 10_000


@attrs.frozen(kw_only=True)
class TopicState:
    """A topic as it stands in the cluster."""

    partitions: int
    replication_factor: int
    leaders: bool
    """Each partition has a leader."""
    config: Mapping[str, str]
    """Effective properties; empty when we may not see them."""


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

    def describe(self, names: Sequence[str]) -> dict[str, TopicState]:
        """Return those of the topics that exist and that we may see."""
        found = {}
        for topic in self._admin.describe_topics(list(names)):
            if topic["error_code"] == 0 and topic["partitions"]:
                found[topic["name"]] = topic["partitions"]
        config = self._config_of(list(found))
        return {
            name: TopicState(
                partitions=len(partitions),
                replication_factor=len(partitions[0]["replica_nodes"]),
                leaders=all(p["leader_id"] >= 0 for p in partitions),
                config=config.get(name, {}),
            )
            for name, partitions in found.items()
        }

    def _config_of(self, names: list[str]) -> dict[str, dict[str, str]]:
        if not names:
            return {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        answer = self._admin.describe_configs(resources, config_filter="all").get("topic", {})
        return {name: {key: str(facts["value"]) for key, facts in table.items()} for name, table in answer.items()}

    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None:
        """Create a topic; one that exists is fine.

        Returns:
          None; or why not: `denied`, or the broker's words.
        """
        facts = {"num_partitions": partitions, "replication_factor": replication_factor, "configs": dict(config)}
        answer = self._admin.create_topics({name: facts}, timeout_ms=ADMIN_TIMEOUT_MS, raise_errors=False)
        error: type[kafka_errors.KafkaError] = kafka_errors.for_code(answer["topics"][0]["error_code"])
        if error in (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError):
            return None
        if error in (kafka_errors.TopicAuthorizationFailedError, kafka_errors.ClusterAuthorizationFailedError):
            return "denied"
        text = answer["topics"][0].get("error_message")
        return f"{error.__name__}: {text}" if text else error.__name__

    def close(self) -> None:
        """Close the client and its thread."""
        with suppress(Exception):
            self._admin.close()
