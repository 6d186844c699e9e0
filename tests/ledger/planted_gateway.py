"""`mqtt-trio` whose way to Kafka has faults, for the test that the ledger finds them:

python tests/ledger/planted_gateway.py FAULT[,FAULT...] serve ...
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs

from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.records import Record
from mqtt_trio.__main__ import main
from mqtt_trio.archive.groups import ArchiveGroup
from mqtt_trio.archive.options import ArchiveGroupOptions

EVERY: Final = 300
"""Records of an archive between two faults."""


def plant(fault: Callable[[Record, Callable[[Record], None]], None]) -> None:
    """Have `fault` deal with each record that an archive offers; what it calls last offers one."""
    offer_all = ProducerBridge.offer_all

    def planted(self: ProducerBridge, records: Sequence[Record], size: int) -> None:
        offered: list[Record] = []
        for record in records:
            fault(record, offered.append)
        offer_all(self, offered, size)

    ProducerBridge.offer_all = planted  # type: ignore[method-assign]


def lose() -> None:
    """Now and then a record is said to be in Kafka and never is."""
    offered = 0

    def fault(record: Record, go_on: Callable[[Record], None]) -> None:
        nonlocal offered
        offered += 1
        if offered % EVERY:
            go_on(record)
        else:
            record.settle(None)

    plant(fault)


def double() -> None:
    """Now and then a record is written twice."""
    offered = 0

    def fault(record: Record, go_on: Callable[[Record], None]) -> None:
        nonlocal offered
        offered += 1
        if not offered % EVERY:
            go_on(copy.copy(record))
        go_on(record)

    plant(fault)


def swap() -> None:
    """Now and then a record overtakes the one in front of it."""
    offered = 0
    held: list[Record] = []

    def fault(record: Record, go_on: Callable[[Record], None]) -> None:
        nonlocal offered
        offered += 1
        if not offered % EVERY and not held:
            held.append(record)
            return
        go_on(record)
        if held and topic_of(held[0]) == topic_of(record):
            go_on(held.pop())

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
