"""Shared subscriptions that span nodes: one delivery for each group of the cluster [K23].

The node that a message is published on chooses which node serves each group, by how many connected members each has,
and writes that into the record (`bus_choices`); everybody obeys it, so there is one chooser for each message. Nodes
tell each other of their groups in the partition where they speak of themselves, which all read in one order. A message
for which nobody was chosen, because its node did not know of the group yet, is served by the node that told of the
group first in the log; a node whose own word has not come back yet keeps it until it has.

A node that was chosen and has no connected member any more passes the message on to one that has, and so it does with
what waits for such a group, in one commit of its store with taking it out there. The record says that it is for these
groups alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

import attrs
import trio

from gateways.kafka import bus_choices
from gateways.kafka.bus_choices import NOBODY, WHOLE, Chosen, GroupNews, encode_choices, encode_news
from gateways.kafka.bus_errors import BusRecordError
from gateways.kafka.bus_groups import Group, GroupTable, OwnPlace, next_turn
from gateways.kafka.bus_outbox import BusOutbox
from gateways.kafka.bus_records import Decoded, Header, Kind
from gateways.kafka.bus_share_route import ShareRoute
from gateways.kafka.bus_slots import Slot
from mqtt_trio.gateway import FrameRun, GatewayHost, LocalClient, Message, TapRoute, read_run

log = logging.getLogger("gateways.kafka.bus")

MAX_HOPS: Final = 8
"""Times that a message is passed on. Outcome: it waits where it is, or has nobody and is counted."""
MAX_UNDECIDED: Final = 10_000
UNDECIDED_SIZE: Final = 16 * 1024 * 1024
"""Messages, and bytes of them, that wait for this node's own word about a group to come back. Outcome: more are served
at once."""
WHOLE_INTERVAL: Final = 0.5
"""Seconds between two times that all groups are told, however many nodes ask for that."""
RECORD_SIZE: Final = 64 * 1024
"""Bytes of one record about groups, about."""
MAX_ROUTES: Final = 10_000
"""Sets of groups with routes of their own. Outcome: they are made anew."""

Tell = Callable[[Kind, bytes, Callable[[Exception | None], None]], int]
"""Writes a record to the other nodes, returns its sequence."""
NOTHING_CHOSEN: Final = Chosen({})


@attrs.frozen
class Setting:
    """What is being delivered: an item that came over the bus."""

    writer: str
    """`Node.Id`."""
    chosen: Chosen = NOTHING_CHOSEN
    missed: bool = False
    """It was published while this node was away."""
    passed_on: Collection[int] = ()
    """Groups that another node serves after all."""


class BusShares:
    """Chooses, obeys, announces and passes on. A `Spread`. Trio thread only."""

    def __init__(
        self,
        host: GatewayHost,
        local: LocalClient,
        outbox: BusOutbox,
        slot_of: Callable[[str], Slot],
        tell: Tell,
        arm: Callable[[], None],
    ) -> None:
        """`slot_of` gives where messages of a topic wait; `arm` has `ship` called soon."""
        self.table = GroupTable(host.node_id, host.marks)
        self.outbox = outbox
        self.here: Collection[int] | None = None
        """Groups that this node serves of the message that one of its clients has published; None: all of its own."""
        self.joined = False
        """This node may tell the others."""
        self.passed_on = self.homeless = self.undecided = self.decided_early = 0
        self._host = host
        self._local = local
        self._slot_of = slot_of
        self._tell = tell
        self._arm = arm
        self._own_word = False
        """What is recovered at the start is told by now: groups that come from here on are new."""
        self._setting: Setting | None = None
        self._dirty: dict[str, None] = {}
        self._whole = False
        self._look_again: dict[str, None] = {}
        """Groups for which something may wait that members elsewhere can have."""
        self._undecided: dict[str, list[tuple[Message, str]]] = {}
        self._undecided_size = 0
        self._told_all_at = -WHOLE_INTERVAL
        self._untold: dict[str, None] = {}
        """Groups of records that Kafka refused."""
        self._routes: dict[tuple[int, ...], ShareRoute] = {}
        self._topology = 0
        host.spread_groups(self)
        self.table.all_recalled()
        self._own_word = True

    # --- what the broker says and asks: a Spread

    def changed(self, name: str, ready: int, *, waits: bool, kept: bool) -> None:
        """Members of a group came or went here."""
        known = self.table.groups.get(name)
        if known is None or known.own is None:
            try:
                bus_choices.check_group(name)
            except BusRecordError:
                return  # below $SYS: each node's own
            if not self.table.own_changed(name, ready, waits=waits, kept=kept):
                self.table.left_out += 1
                return
            own = self._own(name)
            own.resumed = not self._own_word
        else:
            own = known.own
            if own.members and (own.ready, own.waits, own.kept) == (ready, waits, kept):
                return
            self.table.own_changed(name, ready, waits=waits, kept=kept)
        if not ready:
            self._look_again[name] = None
        self._changed(name)

    def ended(self, name: str) -> None:
        """The last member here has left; members elsewhere get what waits."""
        group = self.table.groups.get(name)
        if group is None or group.own is None:
            return
        self.table.own_ended(group)
        self._forget_undecided(name)
        if self.table.elsewhere(group):
            self._pass_queue_on(group, ends=True)
        self._changed(name)

    def set_aside(self) -> object:
        """Another message is published in the middle of a delivery."""
        state = self.here, self._setting
        self._setting = None
        return state

    def go_back(self, state: object) -> None:
        """The delivery that was set aside goes on."""
        assert isinstance(state, tuple)
        self.here, self._setting = state

    def serves(self, name: str, message: Message) -> bool:
        """Say whether the members here get the message that is being delivered."""
        group = self.table.groups.get(name)
        if group is None or group.own is None:
            return True  # it is not told to others
        setting = self._setting
        if setting is None:
            return self.here is None or group.hash in self.here
        target = setting.chosen.choices.get(group.hash, NOBODY)
        if target != NOBODY:
            return target == self.table.node and group.hash not in setting.passed_on
        first = self.table.is_first(group, setting.writer)
        if first is None:
            return setting.missed or not self._keep_undecided(name, message, setting.writer)
        return first

    def _own(self, name: str) -> OwnPlace:
        own = self.table.groups[name].own
        assert own is not None
        return own

    def _changed(self, name: str) -> None:
        self._dirty[name] = None
        self._reroute()
        self._arm()

    def _learned(self) -> None:
        """The log told something: note it soon, ask for routes anew."""
        if self.table.has_news:
            self._host.commit()
        self._reroute()

    def _reroute(self) -> None:
        if self._topology != self.table.topology:
            self._topology = self.table.topology
            self._routes.clear()
            self._host.reroute()

    # --- out

    def route(self, topic_name: str, slot: Slot) -> TapRoute:
        """Where messages of a topic go that may be for groups."""
        if not self.table.router.count:
            return slot
        groups = [group for group, _ in self.table.router.match(topic_name)]
        if not groups:
            return slot
        groups = groups[: bus_choices.MAX_CHOICES]
        key = (slot.number, *sorted(group.hash for group in groups))
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            route = self._routes[key] = ShareRoute(self, slot, groups)
        return route

    def ship(self) -> None:
        """Tell what is new, and pass on what members elsewhere can have."""
        if not self.joined:
            return
        self._announce()
        if self._look_again and not self.outbox.away:
            names, self._look_again = self._look_again, {}
            for name in names:
                self._relieve(name)
        self.outbox.ship_handed()

    def look_again(self) -> None:
        """See whether something waits that members elsewhere can have. Called now and then."""
        self._dirty.update(self._untold)
        self._untold.clear()
        for group in self.table.groups.values():
            if group.own is not None and group.own.waits:
                self._look_again[group.name] = None
        if self._look_again or self._dirty or self._whole:
            self._arm()

    def _announce(self) -> None:
        now = trio.current_time()
        whole = self._whole and now - self._told_all_at >= WHOLE_INTERVAL  # a flood is not answered with a flood
        if whole:
            self._whole, self._told_all_at = False, now
            self._dirty = {name: None for name, group in self.table.groups.items() if group.own is not None}
        while self._dirty:
            entries: list[bytes] = [bytes((WHOLE * whole,))]
            names: list[str] = []
            size = 0
            while self._dirty and size < RECORD_SIZE:
                name = next(iter(self._dirty))
                del self._dirty[name]
                group = self.table.groups.get(name)
                if group is None or group.own is None:
                    continue
                own = group.own
                entries.append(encode_news(GroupNews(name, own.ready, own.waits, own.kept, own.members, own.since)))
                size += len(entries[-1])
                names.append(name)
            if names:
                self._announced(names, self._tell(Kind.GROUPS, b"".join(entries), self._done(names)))
                whole = False

    def _announced(self, names: Iterable[str], sequence: int) -> None:
        for name in names:
            own = self._own(name)
            own.told = sequence
            if not own.members:
                own.since, own.told_first = None, 0  # if it begins again, it is new
            elif not own.told_first:
                own.told_first = sequence

    def _done(self, names: list[str]) -> Callable[[Exception | None], None]:
        def done(failure: Exception | None) -> None:
            if failure is not None:  # told again, but not in a hurry
                self._untold.update(dict.fromkeys(names))

        return done

    # --- in

    def read_back(self, sequence: int, body: bytes, offset: int) -> None:
        """An announcement of this very instance came back: it has its place in the log."""
        for news in bus_choices.decode_news(body)[1]:
            group = self.table.groups.get(news.name)
            own = group.own if group is not None else None
            if group is None or own is None:
                continue
            if not own.members and own.told <= sequence:
                self.table.own_gone(group)
            elif own.members and own.since is None and own.told_first and own.told_first <= sequence:
                self.table.own_placed(group, offset if news.since is None else news.since)
                self._decide(group)
        self._learned()

    def heard(self, header: Header, body: bytes, offset: int) -> None:
        """Another node told of its groups.

        Raises:
          BusRecordError: it cannot be read; nothing happened.
        """
        whole, news = bus_choices.decode_news(body)
        if header.node_id == self.table.node_id:
            return  # one of the two will have to end
        self.table.told(header.node_id, header.instance_id, news, offset, whole=whole)
        for each in news:
            group = self.table.groups.get(each.name) if each.ready else None
            if group is not None and group.own is not None and group.own.waits:
                self._look_again[each.name] = None
                self._arm()
        self._learned()

    def node_spoke(self, header: Header) -> None:
        """Another node told of itself."""
        if header.node_id == self.table.node_id:
            return
        self.table.seen(header.node_id, header.instance_id, live=header.kind is not Kind.GOODBYE)
        if header.kind is Kind.HELLO:
            self.tell_all()
        self._learned()

    def tell_all(self) -> None:
        """Tell all groups of this node: somebody has not heard of them."""
        self._whole = True
        self._arm()

    def node_changed(self, node_id: str, instance_id: bytes, live: bool) -> None:
        """Another node is live, or silent."""
        self.table.seen(node_id, instance_id, live=live)

    # --- messages that come over the bus

    def begin(self, header: Header, *, missed: bool = False) -> None:
        """What is delivered until `end` was written there, and nobody was chosen for it."""
        self._setting = Setting(header.node_id, missed=missed)

    def end(self) -> None:
        """What is delivered from here on was published on this node."""
        self._setting = None

    def deliver(self, header: Header, items: Iterable[Chosen], *, missed: bool = False) -> None:
        """Deliver items with choices, as few calls as their kinds allow: each call flushes. `begin` has been called."""
        waiting: list[tuple[Setting, Decoded]] = []
        for chosen in items:
            if missed and not chosen.qos:
                continue
            setting = self._set(header, chosen, missed)
            if chosen.only:
                self._publish(waiting, missed)
                self._publish_only(setting)
            else:
                waiting += [(setting, item) for item in chosen.items]
        self._publish(waiting, missed)

    def _set(self, header: Header, chosen: Chosen, missed: bool) -> Setting:
        """Find out for which groups this node was chosen, and pass on what it cannot serve."""
        node, gone = self.table.node, []
        for number, target in chosen.choices.items():
            if target == node and self._cannot_serve(number, chosen, missed):
                gone.append(number)
        return Setting(header.node_id, chosen, missed, gone)

    def _cannot_serve(self, number: int, chosen: Chosen, missed: bool) -> bool:
        group = self.table.by_hash.get(number)
        own = group.own if group is not None else None
        if own is not None and own.members and (own.resumed or not missed):
            assert group is not None
            if own.ready or chosen.hops >= MAX_HOPS or self.outbox.away or not self.table.ready_elsewhere(group):
                return False
        if group is None or chosen.hops >= MAX_HOPS or not self.table.elsewhere(group):
            self.homeless += len(chosen.items)
            return True
        for item in chosen.items:
            for message in [item] if isinstance(item, Message) else read_run(item):
                self._pass_on(group, message, chosen.hops + 1)
        return True

    def _publish_only(self, setting: Setting) -> None:
        chosen, groups = setting.chosen, self.table.by_hash
        names = [
            groups[number].name
            for number, target in chosen.choices.items()
            if target == self.table.node and number in groups and number not in setting.passed_on
        ]
        for item in chosen.items:
            if names:
                self._local.publish_to_groups([item] if isinstance(item, Message) else read_run(item), names)

    def _publish(self, waiting: list[tuple[Setting, Decoded]], missed: bool) -> None:
        """Deliver and forget what waits."""
        start, end, local = 0, len(waiting), self._local
        while start < end:
            stop, runs = start, isinstance(waiting[start][1], FrameRun)
            while stop < end and isinstance(waiting[stop][1], FrameRun) == runs:
                stop += 1
            part = waiting[start:stop]
            if missed:
                local.publish_missed(self._each_message(part))
            elif runs:
                local.publish_runs(self._each_run(part))
            else:
                local.publish(self._each_message(part))
            start = stop
        waiting.clear()

    def _each_run(self, part: list[tuple[Setting, Decoded]]) -> Iterator[FrameRun]:
        for self._setting, item in part:
            assert isinstance(item, FrameRun)
            yield item

    def _each_message(self, part: list[tuple[Setting, Decoded]]) -> Iterator[Message]:
        for self._setting, item in part:
            yield item if isinstance(item, Message) else read_run(item)[0]

    # --- undecided

    def _keep_undecided(self, name: str, message: Message, writer: str) -> bool:
        if self.undecided >= MAX_UNDECIDED or self._undecided_size + message.size > UNDECIDED_SIZE:
            self.decided_early += 1
            return False
        self.undecided += 1
        self._undecided_size += message.size
        self._undecided.setdefault(name, []).append((message, writer))
        return True

    def _forget_undecided(self, name: str) -> list[tuple[Message, str]]:
        waiting = self._undecided.pop(name, [])
        self.undecided -= len(waiting)
        self._undecided_size -= sum(message.size for message, _ in waiting)
        return waiting

    def _decide(self, group: Group) -> None:
        waiting = self._forget_undecided(group.name)
        ours = [message for message, writer in waiting if self.table.is_first(group, writer)]
        if ours:
            self._local.publish_to_groups(ours, [group.name])

    # --- passing on

    def _relieve(self, name: str) -> None:
        """Members elsewhere get what waits here for a group that has none connected."""
        group = self.table.groups.get(name)
        if group is None or group.own is None or group.own.ready or not self.table.ready_elsewhere(group):
            return
        self._pass_queue_on(group)

    def _pass_queue_on(self, group: Group, *, ends: bool = False) -> None:
        for message in self._host.take_waiting(group.name, ends=ends):
            self._pass_on(group, message, 1)

    def _pass_on(self, group: Group, message: Message, hops: int) -> None:
        """Write a message again, for one group alone, which another node serves. One that no record can hold is a dead
        letter."""
        slot = self._slot_of(message.topic_name)
        packed = slot.encoded(message)
        if packed is None:
            return
        turn = next_turn(self.table.elsewhere(group))
        item = encode_choices([turn.pair], only=True, hops=hops) + packed
        self.passed_on += 1
        if message.qos:
            self.outbox.hand_over(slot.number, item)
            self._arm()
        else:
            slot.take_packed(item, 1, 0)

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "bus_groups": len(self.table.groups),
            "bus_groups_left_out": self.table.left_out,
            "bus_groups_undecided": self.undecided,
            "bus_groups_decided_early": self.decided_early,
            "bus_groups_passed_on": self.passed_on,
            "bus_groups_homeless": self.homeless,
        }
