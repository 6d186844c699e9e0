"""Where messages wait whose topics match share groups: a slot, with the choice in front of each item [K23]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateways.kafka.bus_choices import encode_choices
from gateways.kafka.bus_groups import Group, next_turn
from gateways.kafka.bus_records import encode_run
from gateways.kafka.bus_slots import Slot
from mqtt_trio.gateway import Answer, FrameRun, Message, Refused

if TYPE_CHECKING:
    from gateways.kafka.bus_shares import BusShares


class ShareRoute:
    """The TapRoute of topics of one slot that match the same groups. It decides before the broker delivers."""

    __slots__ = ("_away", "_groups", "_head", "_here", "_shares", "_slot", "_version", "keeps")

    def __init__(self, shares: BusShares, slot: Slot, groups: Sequence[Group]) -> None:
        self.keeps = slot.keeps
        self._shares = shares
        self._slot = slot
        self._groups = groups
        self._version = -1
        self._away = False
        self._head = b""
        """The choice, while each group has one node to choose from; else empty."""
        self._here: frozenset[int] = frozenset()

    def take_run(self, run: FrameRun) -> Answer:
        """Take a run of frames from the fast lane."""
        if not self._slot.will_take(run.qos):
            self._shares.here = None
            return self._slot.take_run(run)
        return self._told(self._slot.take_packed(self._choose() + encode_run(run), run.count, run.qos))

    def take(self, message: Message) -> Answer:
        """Take one message from the full path."""
        slot, shares = self._slot, self._shares
        if not slot.will_take(message.qos):
            shares.here = None
            return slot.take(message)
        head = self._choose()
        item = slot.encoded(message)
        if item is None:
            shares.here = None  # no other node will have it
            return None
        return self._told(slot.put(message, head + item))

    def _told(self, answer: Answer) -> Answer:
        """What is refused reaches no other node, and this one's members where its publisher cannot be told (a Will)."""
        if isinstance(answer, Refused):
            self._shares.here = None
        return answer

    def _choose(self) -> bytes:
        """Choose for each group, and say which of them this node serves."""
        shares = self._shares
        table, away = shares.table, shares.outbox.away
        if self._version != table.version or self._away != away:
            self._version, self._away = table.version, away
            self._head = b""
            turns = [table.turns(group, away=away) for group in self._groups]
            if all(len(each) == 1 for each in turns):
                self._head = encode_choices(each[0].pair for each in turns)
                self._here = frozenset(
                    group.hash for group, each in zip(self._groups, turns, strict=True) if each[0].node == table.node
                )
        if self._head:
            shares.here = self._here
            return self._head
        chosen = [next_turn(table.turns(group, away=away)) for group in self._groups]
        shares.here = {group.hash for group, turn in zip(self._groups, chosen, strict=True) if turn.node == table.node}
        return encode_choices([turn.pair for turn in chosen])
