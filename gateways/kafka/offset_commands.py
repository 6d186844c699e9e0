"""`mqtt-trio offsets show|reset` [F3, K5, K11]: what this deployment has read of its topics, and setting it anew.

`reset` only shows what it would do unless it is told to do it, as kafka-consumer-groups.sh does, and refuses what would
do harm or nothing: a group with members, the checkpoint of a live node, offsets that are not there, unknown names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

import attrs

from gateways.kafka.command_arguments import EXIT_FAILURE, add_common, options_of, table
from gateways.kafka.groups import bus_group, node_of
from gateways.kafka.offset_reset import Administrator, Order, Partition, Resetter, existing, target, topic_partitions
from gateways.kafka.options import KafkaOptions
from mqtt_trio.errors import GatewayError

if TYPE_CHECKING:
    from mqtt_trio.gateway import CommandContext, Console

NUMERIC: Final = frozenset((2, 3, 4, 5))
SHOW_EPILOG: Final = """\
LAG counts records between the committed offset and the end. A node of the bus reads without a group: its checkpoint,
mqtt-trio-bus-NODE, is where it goes on after a restart.

exit codes: 0 shown, 1 failure, 2 wrong usage, 78 configuration that cannot be used"""
RESET_EPILOG: Final = """\
--to is one of
  earliest                     the oldest record that Kafka has
  latest                       behind the newest one
  1234                         this offset, in each of the chosen partitions
  2026-11-30T12:00:00Z         the first record of that time or later; without a zone it is UTC

Shows what it would do; --execute does it. Refused are groups with members, the checkpoint of a node that is alive (its
announcements on the bus are listened for, which takes a while), offsets outside of what Kafka has, and unknown groups,
topics and partitions; the group of mqtt.messages may be set before its first members come. Kafka does not know of
consumers outside the deployment that assign partitions to themselves: stop them first.

exit codes: 0 done, 1 failure or refused, 2 wrong usage, 78 configuration that cannot be used"""


class OffsetsCommand:
    """See the module."""

    def add_arguments(self, parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
        """Describe `show` and `reset`."""
        actions = parser.add_subparsers(dest="action", metavar="show|reset", required=True)
        raw = argparse.RawDescriptionHelpFormatter
        show = actions.add_parser(
            "show", parents=[shared], formatter_class=raw, epilog=SHOW_EPILOG, help="committed offsets, ends and lags"
        )
        reset = actions.add_parser(
            "reset", parents=[shared], formatter_class=raw, epilog=RESET_EPILOG, help="set committed offsets anew"
        )
        add_common(show)
        show.add_argument(
            "--group", action="append", default=[], metavar="GROUP", help="any group instead of ours; repeatable"
        )
        show.add_argument("--topic", action="append", default=[], metavar="TOPIC", help="only this one; repeatable")
        add_common(reset)
        reset.add_argument("--group", required=True, metavar="GROUP", help="`offsets show` lists those of the nodes")
        reset.add_argument(
            "--topic", required=True, type=topic_partitions, metavar="TOPIC[:0,1]", help="all or some of its partitions"
        )
        reset.add_argument("--to", required=True, type=target, metavar="WHERE", help="see below")
        how = reset.add_mutually_exclusive_group()
        how.add_argument("--dry-run", action="store_true", help="only show what would be done (the default)")
        how.add_argument("--execute", action="store_true", help="do it")

    def run(self, arguments: argparse.Namespace, context: CommandContext) -> int:
        """Run `show` or `reset`."""
        options = options_of(context.options)
        with open_admin(options) as admin:
            if arguments.action == "show":
                return Show(admin, context).run(arguments.group, arguments.topic, as_json=arguments.json)
            topic, numbers = arguments.topic
            order = Order(group=arguments.group, topic=topic, numbers=numbers, to=arguments.to)
            resetter = Resetter(admin, options, context.console)
            return resetter.run(order, execute=arguments.execute, as_json=arguments.json)


COMMAND: Final = OffsetsCommand()


def open_admin(options: KafkaOptions) -> AbstractContextManager[Administrator]:
    """Connect; tests put a fake in the place of this."""
    from gateways.kafka.admin import administration

    return administration(options)


# --- show


class Show:
    """Prints one line for each partition of each topic that a group has an offset for."""

    def __init__(self, admin: Administrator, context: CommandContext) -> None:
        self._admin = admin
        self._console: Console = context.console
        self._node_id = context.node_id
        self._messages_group = options_of(context.options).messages_group

    def run(self, groups: Sequence[str], topics: Sequence[str], *, as_json: bool) -> int:
        """Print; return the exit code."""
        names = list(groups) or self._ours()
        rows: list[Row] = []
        with self._console.progress("groups", len(names), "group") as done:
            for name in names:
                try:
                    found = self._rows(name, topics)
                except GatewayError as exc:
                    if groups:
                        raise
                    self._console.say(str(exc))
                    found = []
                if not found and groups:
                    self._console.say(f"Group {name} has no offsets{' of these topics' if topics else ''}.")
                rows += found
                done(1)
        if as_json:
            for row in rows:
                self._console.show(json.dumps(row.as_json()))
        elif rows:
            self._console.show("\n".join(table([Row.TITLES, *(row.cells() for row in rows)], NUMERIC)))
        if not rows and not groups:
            self._console.say("Nothing of this deployment has stored an offset yet.")
        return EXIT_FAILURE if groups and not rows else 0

    def _ours(self) -> list[str]:
        """Our groups: those that Kafka lists, and those that must be ours where it may not list them."""
        listed = [
            name for name in self._admin.group_names() if name == self._messages_group or node_of(name) is not None
        ]
        return sorted({*listed, self._messages_group, bus_group(self._node_id)})

    def _rows(self, group: str, topics: Sequence[str]) -> list[Row]:
        committed = self._admin.committed(group)
        names = sorted({topic for topic, _ in committed if not topics or topic in topics})
        if not names:
            return []
        state = self._admin.group(group)
        partitions = existing(self._admin, names)
        bounds = self._admin.bounds(partitions)
        gone = [p for p in committed if p[0] in names and p not in bounds]
        return [
            Row(group, state.state if state else "", p, committed.get(p), *bounds.get(p, (None, None)))
            for p in sorted({*partitions, *gone})
        ]


@attrs.frozen
class Row:
    """One partition as a group has read it."""

    TITLES = ("GROUP", "TOPIC", "PARTITION", "CURRENT-OFFSET", "LOG-END-OFFSET", "LAG", "STATE")

    group: str
    state: str
    partition: Partition
    committed: int | None
    first: int | None
    end: int | None

    @property
    def lag(self) -> int | None:
        """Records that are still to be read: those that Kafka deleted meanwhile do not count."""
        if self.committed is None or self.end is None or self.first is None:
            return None
        return self.end - max(self.committed, self.first)

    def cells(self) -> list[str]:
        numbers = (self.partition[1], self.committed, self.end, self.lag)
        shown = ["-" if number is None else str(number) for number in numbers]
        return [self.group, self.partition[0], *shown, ", ".join(self._notes())]

    def _notes(self) -> Iterator[str]:
        if self.state:
            yield self.state
        if self.end is None:
            yield "no such partition, or not to be seen"
        elif self.committed is not None and self.first is not None:
            if self.committed < self.first:
                yield f"{self.first - self.committed} records were deleted unread"
            elif self.committed > self.end:
                yield "behind the end: the topic was made anew"

    def as_json(self) -> dict[str, object]:
        return {
            "group": self.group,
            "state": self.state or None,
            "topic": self.partition[0],
            "partition": self.partition[1],
            "committed": self.committed,
            "first": self.first,
            "end": self.end,
            "lag": self.lag,
        }
