"""How a topic's records get the id of their schema: before the first one, while messages wait or go to the spool [K8].

A registry that is away, or refuses, is an outage of the groups that need it, by their `OnOutage`, and nothing else.
Once an id is known, the registry is not needed any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

import trio

from gateways.kafka.avro import RECORD_NAME, AvroMapper, schema_text
from mqtt_trio.errors import ConfigError, GatewayError

log = logging.getLogger("gateways.kafka")

FIRST_BACKOFF: Final = 0.5
LONGEST_BACKOFF: Final = 30.0
PATIENCE: Final = 2.0
"""Seconds that an attempt may take beyond its own timeout: a name service may hang, a server may trickle."""


class RegistryOptions(Protocol):
    """What is used of `options.SchemaRegistryOptions`."""

    @property
    def timeout(self) -> float: ...


class Registry(Protocol):
    """What is used of `schema_registry.SchemaRegistry`."""

    @property
    def url(self) -> str: ...
    @property
    def options(self) -> RegistryOptions: ...

    def subject(self, topic: str, record_name: str) -> str: ...
    def id_of(self, subject: str, schema: str) -> int: ...


class SchemaIds:
    """The registry as the stores of one gateway share it: one request at a time, each in a worker thread. Trio thread
    only.

    Attributes:
      failures: attempts that brought no id.
    """

    def __init__(self, registry: Registry) -> None:
        self.failures = 0
        self._registry = registry
        self._limiter = trio.CapacityLimiter(1)

    @property
    def url(self) -> str:
        """Where the registry is."""
        return self._registry.url

    async def fetch(self, topic: str) -> int:
        """Return the id of our schema for values of `topic`. Cancelled, a request is left to its thread; the next one
        waits until that has ended.

        Raises:
          GatewayError, ConfigError: there is none at present.
        """
        registry, limit = self._registry, self._registry.options.timeout + PATIENCE
        subject = registry.subject(topic, RECORD_NAME)
        with trio.move_on_after(limit):
            return await trio.to_thread.run_sync(
                registry.id_of, subject, schema_text(), abandon_on_cancel=True, limiter=self._limiter
            )
        raise GatewayError(f"schema registry {registry.url}: no answer in {limit:g} seconds", retriable=True)


class SchemaId:
    """The id for one mapper.

    Attributes:
      trouble: why there is none, while an attempt has failed and none has succeeded.
    """

    def __init__(self, ids: SchemaIds, mapper: AvroMapper) -> None:
        self.trouble: str | None = None
        self._ids = ids
        self._mapper = mapper

    @property
    def url(self) -> str:
        """Where the registry is."""
        return self._ids.url

    async def run(self, changed: Callable[[], None]) -> None:
        """Try until the mapper has its id; `changed` is called after each attempt. Cancellation ends it."""
        mapper, backoff = self._mapper, FIRST_BACKOFF
        while not mapper.is_ready:
            try:
                mapper.use_id(await self._ids.fetch(mapper.topic))
            except (GatewayError, ConfigError) as exc:
                self._ids.failures += 1
                if (text := str(exc)) != self.trouble:
                    log.warning("%s. Records for Kafka topic %s need it; trying until it answers", text, mapper.topic)
                self.trouble = text
            else:
                if self.trouble is not None:
                    log.warning("schema registry %s: Kafka topic %s has its schema now", self._ids.url, mapper.topic)
                self.trouble = None
            changed()
            if not mapper.is_ready:
                await trio.sleep(backoff)
                backoff = min(backoff * 2, LONGEST_BACKOFF)
