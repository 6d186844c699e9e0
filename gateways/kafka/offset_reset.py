"""Setting the committed offsets of a group anew, and refusing to where that does harm or nothing."""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import attrs

from gateways.kafka.command_arguments import EXIT_FAILURE, table
from gateways.kafka.groups import GroupState, node_of
from gateways.kafka.node_watch import LISTEN, ConsumerLike, hears_from
from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import TopicState
from mqtt_trio.errors import GatewayError

if TYPE_CHECKING:
    from mqtt_trio.gateway import Console

Partition: TypeAlias = tuple[str, int]
TOPIC: Final = re.compile(r"([a-zA-Z0-9._-]{1,249})(?::([0-9]+(?:,[0-9]+)*))?")


class Administrator(Protocol):
    """What is needed of `admin.Admin`."""

    def describe(self, names: Sequence[str]) -> Mapping[str, TopicState | None]: ...
    def group_names(self) -> list[str]: ...
    def group(self, name: str) -> GroupState | None: ...
    def committed(self, group: str) -> dict[Partition, int]: ...
    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, tuple[int, int]]: ...
    def offsets_at(self, partitions: Sequence[Partition], timestamp_ms: int) -> dict[Partition, int]: ...
    def commit(self, group: str, offsets: Mapping[Partition, int]) -> dict[Partition, str]: ...


@attrs.frozen
class Target:
    """Where `--to` points."""

    text: str
    offset: int | None = None
    timestamp_ms: int | None = None


def target(text: str) -> Target:
    """Read `--to`."""
    if text in ("earliest", "latest"):
        return Target(text)
    if text.isascii() and text.isdigit():
        return Target(text, offset=int(text))
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected earliest, latest, an offset or a time such as 2026-11-30T12:00:00Z, got {text!r}"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return Target(text, timestamp_ms=max(0, int(moment.timestamp() * 1000)))  # below 0 Kafka reads commands


def topic_partitions(text: str) -> tuple[str, tuple[int, ...]]:
    """Read `TOPIC` or `TOPIC:0,2`."""
    if (match := TOPIC.fullmatch(text)) is None:
        raise argparse.ArgumentTypeError(f"expected TOPIC or TOPIC:PARTITION,PARTITION, got {text!r}")
    numbers = match[2].split(",") if match[2] else []
    return match[1], tuple(dict.fromkeys(map(int, numbers)))


def existing(admin: Administrator, topics: Sequence[str]) -> list[Partition]:
    """Return all partitions of those of the topics that exist."""
    states = admin.describe(topics)
    return [(topic, n) for topic in topics if (state := states.get(topic)) is not None for n in range(state.partitions)]


@contextmanager
def open_consumer(options: KafkaOptions) -> Iterator[ConsumerLike]:
    """Make a consumer without a group; tests put a fake in the place of this."""
    from gateways.kafka import workers

    consumer = workers.Consumer(options, "offsets")
    try:
        yield consumer
    finally:
        consumer.close()


@attrs.frozen(kw_only=True)
class Order:
    """What `reset` is asked for."""

    group: str
    topic: str
    numbers: Sequence[int]
    """Partitions; none: all of them."""
    to: Target


class RefusedError(GatewayError):
    """This reset would do harm, or nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text, retriable=False)


class Resetter:
    """Checks, shows and does a reset."""

    def __init__(self, admin: Administrator, options: KafkaOptions, console: Console) -> None:
        self._admin = admin
        self._options = options
        self._console = console

    def run(self, order: Order, *, execute: bool, as_json: bool = False) -> int:
        """Show what is done, do it if told to; return the exit code.

        Raises:
          RefusedError: with what stands against it.
        """
        partitions = self._partitions(order)
        self._check_group(order.group)
        committed = self._admin.committed(order.group)
        offsets = self._offsets(order, partitions)
        self._check_node(order.group)
        if as_json:
            for (topic, number), offset in offsets.items():
                row = {"group": order.group, "topic": topic, "partition": number}
                self._console.show(json.dumps({**row, "committed": committed.get((topic, number)), "new": offset}))
        else:
            rows = [
                (order.group, topic, str(number), str(committed.get((topic, number), "-")), str(offset))
                for (topic, number), offset in offsets.items()
            ]
            titles = ("GROUP", "TOPIC", "PARTITION", "CURRENT-OFFSET", "NEW-OFFSET")
            self._console.show("\n".join(table([titles, *rows], frozenset((2, 3, 4)))))
        if not execute:
            self._console.say("Nothing was changed: --execute does it.")
            return 0
        return self._commit(order.group, offsets)

    def _commit(self, group: str, offsets: Mapping[Partition, int]) -> int:
        failed = self._admin.commit(group, offsets)
        for (topic, number), error in failed.items():
            hint = " (the group has members now: stop them)" if error == "UnknownMemberIdError" else ""
            self._console.say(f"{topic}-{number}: {error}{hint}")
        if failed:
            self._console.say(f"{len(failed)} of {len(offsets)} partitions were not reset.")
        return EXIT_FAILURE if failed else 0

    # --- what stands against it

    def _partitions(self, order: Order) -> list[Partition]:
        found = existing(self._admin, [order.topic])
        if not found:
            raise RefusedError(f"there is no topic {order.topic}, or this user may not see it")
        known = {number for _, number in found}
        if missing := [number for number in order.numbers if number not in known]:
            numbers = ", ".join(map(str, missing))
            raise RefusedError(f"topic {order.topic} has partitions 0 to {max(known)}; there is no {numbers}")
        return [(order.topic, number) for number in order.numbers] or found

    def _check_group(self, name: str) -> None:
        group = self._admin.group(name)
        if group is None:
            if name == self._options.messages_group:  # its first members begin there
                return
            near = difflib.get_close_matches(name, self._admin.group_names(), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RefusedError(f"there is no group {name}, so nobody would read from there{hint}")
        if group.is_active:
            who = f": {', '.join(group.members)}" if group.members else ""
            raise RefusedError(
                f"group {name} is {group.state}: its members would commit their own offsets over it; stop them{who}"
            )

    def _check_node(self, group: str) -> None:
        """Refuse to move the checkpoint of a node that is alive: it reads on where it is and overwrites this one."""
        if (node_id := node_of(group)) is None:
            return
        topic = self._options.bus_topic
        with (
            open_consumer(self._options) as consumer,
            self._console.progress(f"listening for node {node_id}", int(LISTEN), "s") as passed,
        ):
            heard = hears_from(consumer, topic, node_id, passed, LISTEN)
        if heard:
            raise RefusedError(
                f"node {node_id} is alive, it writes to the bus topic {topic}: it goes on where it is, and commits its "
                "own checkpoint over this one. Stop it first"
            )
        if heard is None:
            raise RefusedError(
                f"whether node {node_id} is alive cannot be told: more is written to the bus topic {topic} than can be "
                "read here. Try again when there is less traffic"
            )

    # --- where to

    def _offsets(self, order: Order, partitions: Sequence[Partition]) -> dict[Partition, int]:
        bounds = self._admin.bounds(partitions)
        to = order.to
        if to.timestamp_ms is not None:
            found = self._admin.offsets_at(partitions, to.timestamp_ms)
            return {p: found[p] if found[p] >= 0 else bounds[p][1] for p in partitions}
        if to.offset is None:
            return {p: bounds[p][0 if to.text == "earliest" else 1] for p in partitions}
        outside = [p for p in partitions if not bounds[p][0] <= to.offset <= bounds[p][1]]
        if outside:
            told = ", ".join(f"{number} has {bounds[t, number][0]} to {bounds[t, number][1]}" for t, number in outside)
            some = f"; choose partitions with --topic {order.topic}:N" if len(partitions) > 1 else ""
            raise RefusedError(f"offset {to.offset} is not in every partition of {order.topic}: {told}{some}")
        return dict.fromkeys(partitions, to.offset)
