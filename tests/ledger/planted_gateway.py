"""`mqtt-trio` whose way to Kafka has faults, for the test that the ledger finds them:

python tests/ledger/planted_gateway.py FAULT[,FAULT...] serve ...
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, Final

import attrs

from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.records import Record
from mqtt_trio.__main__ import main
from mqtt_trio.archive.groups import ArchiveGroup
from mqtt_trio.archive.options import ArchiveGroupOptions

EVERY: Final = 100
"""Records of an archive between two faults."""


def plant(fault: Callable[[list[Record]], Iterable[Record]]) -> None:
    """Have an archive offer what `fault` makes of the records that it offers at once."""
    offer_all = ProducerBridge.offer_all

    def planted(self: ProducerBridge, records: Sequence[Record], size: int) -> None:
        offer_all(self, list(fault(list(records))), size)

    ProducerBridge.offer_all = planted  # type: ignore[method-assign]


def lose() -> None:
    """Now and then a record is said to be in Kafka and never is."""
    numbers = count(1)

    def fault(records: list[Record]) -> Iterable[Record]:
        for record in records:
            if next(numbers) % EVERY:
                yield record
            else:
                record.settle(None)

    plant(fault)


def double() -> None:
    """Now and then a record is written twice."""
    numbers = count(1)

    def fault(records: list[Record]) -> Iterable[Record]:
        for record in records:
            if not next(numbers) % EVERY:
                yield copy.copy(record)
            yield record

    plant(fault)


def swap() -> None:
    """Now and then a record overtakes one in front of it. Both are offered at once: nobody waits for it."""
    numbers, owed = count(1), 0

    def fault(records: list[Record]) -> Iterable[Record]:
        nonlocal owed
        last: dict[str | None, int] = {}
        for place, record in enumerate(list(records)):
            owed += not next(numbers) % EVERY
            topic = topic_of(record)
            if owed and topic in last:
                records[last[topic]], records[place] = record, records[last[topic]]
                owed -= 1
            last[topic] = place
        return records

    plant(fault)


def topic_of(record: Record) -> str | None:
    """Its MQTT topic: the record has no key before it is sent."""
    return record.message.topic_name if record.message is not None else None


def acknowledge_early() -> None:
    """Acknowledgements do not wait for Kafka or the spool, whatever the options say."""
    make = ArchiveGroup.__init__

    def planted(self: ArchiveGroup, options: ArchiveGroupOptions, *arguments: Any, **more: Any) -> None:
        make(self, attrs.evolve(options, ack="none"), *arguments, **more)

    ArchiveGroup.__init__ = planted  # type: ignore[method-assign]


FAULTS = {"lose": lose, "double": double, "swap": swap, "acknowledge-early": acknowledge_early}

if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        FAULTS[name]()
    sys.exit(main(sys.argv[2:]))
