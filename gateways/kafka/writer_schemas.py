"""Schemas that AVRO records were written with, by their ids in a registry [K8]. Any id may stand in a record, so what a
registry does not have is remembered, too: garbage asks for it once in a while, not once a record."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs

from gateways.kafka.avro import AvroError, parse_writer
from mqtt_trio.errors import GatewayError

if TYPE_CHECKING:
    from gateways.kafka.reading import Find

MOST_SCHEMAS: Final = 1000
"""Schemas that are remembered. Outcome: all are forgotten, and asked for again."""
MOST_MISSES: Final = 1000
"""Ids that are remembered for not leading to a schema. Outcome: the oldest is forgotten, and asked for again."""
MISS_TIME: Final = 10.0
"""Seconds for which such an id is not asked for again. Registries have a schema before the first record names it, but
their copies may learn of it a moment later."""


@attrs.frozen
class Miss:
    """Why there is no schema of an id, for now."""

    text: str
    until: float
    """By the clock of `WriterSchemas`."""
    is_foreign: bool
    """The registry has something that no record of ours can be read with."""


class WriterSchemas:
    """The schemas of one registry for one reader. One thread at a time; blocks where `find` is asked.

    Attributes:
      asked: how often `find` was asked.
    """

    def __init__(self, find: Find, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds that never fall."""
        self.asked = 0
        self._find = find
        self._clock = clock
        self._known: dict[int, Any] = {}
        self._misses: dict[int, Miss] = {}
        """In the order in which they were met, which is that of their ends."""

    def __getitem__(self, schema_id: int) -> Any:
        """Return what `avro.decode_datum` takes for a writer.

        Raises:
          AvroError: no record of ours can be read with the schema.
          GatewayError: the registry does not have it, or does not answer (`retriable`; that is not remembered).
        """
        if schema_id < 0:  # some registries call that a bad request, which looks as if it could be mended
            raise GatewayError(f"no schema registry has an id like {schema_id}", retriable=False)
        if (known := self._known.get(schema_id)) is not None:
            return known
        miss = self._misses.get(schema_id)
        if miss is None or self._clock() >= miss.until:
            miss = self._ask(schema_id)
        if miss is None:
            return self._known[schema_id]
        raise AvroError(miss.text) if miss.is_foreign else GatewayError(miss.text, retriable=False)

    def _ask(self, schema_id: int) -> Miss | None:
        """Ask the registry, and remember what it said; None: the schema is known now."""
        self._misses.pop(schema_id, None)
        self.asked += 1
        try:
            writer = parse_writer(self._find(schema_id))
        except GatewayError as exc:
            if exc.retriable:
                raise
            return self._missed(schema_id, str(exc), is_foreign=False)
        except AvroError as exc:
            return self._missed(schema_id, str(exc), is_foreign=True)
        if len(self._known) >= MOST_SCHEMAS:
            self._known.clear()
        self._known[schema_id] = writer
        return None

    def _missed(self, schema_id: int, text: str, *, is_foreign: bool) -> Miss:
        while len(self._misses) >= MOST_MISSES:
            del self._misses[next(iter(self._misses))]
        miss = self._misses[schema_id] = Miss(text, self._clock() + MISS_TIME, is_foreign)
        return miss
