"""Who has members of which share group: this node and the others, and which of them a message goes to [K23]."""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping
from typing import Final

import attrs

from gateways.kafka.bus_choices import NOBODY, PAIR, GroupNews, check_group, hash_of
from gateways.kafka.bus_errors import BusRecordError
from mqtt_trio.gateway import Router, SubscriptionOptions, split_shared

log = logging.getLogger("gateways.kafka.bus")

MAX_PLACES: Final = 100_000
"""Pairs of a group and a node. Outcome: see MAX_NAMES."""
MAX_NAMES: Final = 32 * 1024 * 1024
"""Bytes of the names of groups, each `/` counted as LEVEL. Outcome, counted: what another node says of one more group
is left out, so this node does not choose that node for it; an own one is not told and stays a group of this node."""
LEVEL: Final = 256
"""Bytes that a level of a filter may take in the tree of filters."""
PATIENCE: Final = 4
"""Words of a new instance of a node after which what the one before it had told is void."""
NOTES: Final = "kafka.share/"
"""Marks of groups that nodes keep: one that starts while others are away, or Kafka is, knows of theirs, and where in
the log its own were told first."""
NOTE: Final = struct.Struct(">B16sQH")
NOTE_VERSION: Final = 1
NO_INSTANCE: Final = bytes(16)
"""In the notes of this node's own groups."""
MAX_NOTES: Final = 20_000
"""Marks in the store. Outcome: more are not noted."""


@attrs.define(eq=False)
class Place:
    """What one node has of one group."""

    ready: int = 0
    """Members that are connected."""
    waits: bool = False
    """None is, and messages at QoS 1 and 2 wait for them."""
    kept: bool = False
    """The node's store has it."""
    since: int | None = None
    """Offset at which it was told first in the log; None: not known, only of this node's own."""


@attrs.define(eq=False)
class OwnPlace(Place):
    """What this node has of a group."""

    members: bool = True
    """False: it has none any more, and has not read back yet that it told so."""
    resumed: bool = False
    """It was there when this process started: what came while the node was away is for it."""
    told: int = 0
    """Sequence of the last announcement."""
    told_first: int = 0
    """Sequence of the one that its `since` comes from; 0: none yet."""


@attrs.define(eq=False)
class Turn:
    """A node in the round of a group."""

    weight: int
    node: int
    pair: bytes
    credit: int = 0


@attrs.define(eq=False)
class Group:
    """One group of the cluster."""

    name: str
    hash: int
    own: OwnPlace | None = None
    places: dict[str, Place] = attrs.Factory(dict)
    """Of other nodes, by `Node.Id`."""
    turns: list[Turn] | None = None
    """Who takes part in the choice; None: to be found out."""
    elsewhere: list[Turn] | None = None
    """The same without this node."""


@attrs.define(eq=False)
class Life:
    """What one instance of another node has told."""

    instance_id: bytes
    live: bool = True
    replaced: int = 0
    """Announcements of the next instance that came without a word about groups."""
    names: set[str] = attrs.Factory(set)


class GroupTable:
    """All share groups of the cluster, as this node knows them. Trio thread only.

    Attributes:
      version: grows with every change that a choice may depend on.
      topology: grows when a group comes or goes: topics may have other routes then.
    """

    def __init__(self, node_id: str, marks: Mapping[str, bytes] | None = None) -> None:
        """`marks`: what the node's store held, None without one."""
        self.node_id = node_id
        self.node = hash_of(node_id)
        self.groups: dict[str, Group] = {}
        self.by_hash: dict[int, Group] = {}
        self.router: Router[Group] = Router()
        self.version = self.topology = 0
        self.left_out = 0
        self._lives: dict[str, Life] = {}
        self._places = 0
        self._names_size = 0
        self._notes: set[str] | None = None if marks is None else set()
        self._notes_changed: dict[str, bytes | None] = {}
        self._recalled: dict[str, int] = {}
        """Where own groups were told first, until they are known to be there still."""
        for name, mark in (marks or {}).items():
            if name.startswith(NOTES):
                self._read_note(name, mark)

    # --- notes

    def _read_note(self, name: str, mark: bytes) -> None:
        assert self._notes is not None
        self._notes.add(name)
        try:
            version, instance_id, since, size = NOTE.unpack_from(mark)
            node_id = mark[NOTE.size : NOTE.size + size].decode()
            group_name = mark[NOTE.size + size :].decode()
            check_group(group_name)
        except (struct.error, UnicodeDecodeError, BusRecordError):
            version = 0
        if version != NOTE_VERSION:
            self._unnote(name)
            return
        if node_id == self.node_id:
            self._recalled[group_name] = since
            return
        self.told(node_id, instance_id, [GroupNews(group_name, kept=True, since=since)], 0, whole=False)
        self._lives[node_id].live = False  # until it is heard

    def _note(self, group: Group, node_id: str, instance_id: bytes, place: Place) -> None:
        """Have the store know that a node keeps a group, or does so no more."""
        name = _note_name(group.name, node_id)
        if not place.kept or place.since is None:
            self._unnote(name)
        elif self._notes is not None and name not in self._notes and len(self._notes) < MAX_NOTES:
            node = node_id.encode()
            head = NOTE.pack(NOTE_VERSION, instance_id, place.since, len(node))
            self._notes.add(name)
            self._notes_changed[name] = head + node + group.name.encode()

    def _unnote(self, name: str) -> None:
        if self._notes is not None and name in self._notes:
            self._notes.discard(name)
            self._notes_changed[name] = None

    @property
    def has_news(self) -> bool:
        """Something is to be noted."""
        return bool(self._notes_changed)

    def marks(self) -> dict[str, bytes | None]:
        """Return what is new, for the store (`GatewayHost.note`)."""
        changed, self._notes_changed = self._notes_changed, {}
        return changed

    # --- this node

    def own_changed(self, name: str, ready: int, *, waits: bool, kept: bool) -> bool:
        """This node has members of a group. False: there is no room to have others know."""
        group = self._group(name)
        if group is None:
            return False
        own = group.own
        if own is None:
            own = group.own = OwnPlace(since=self._recalled.pop(name, None))
            self._places += 1
        own.members, own.ready, own.waits, own.kept = True, ready, waits, kept
        self._note(group, self.node_id, NO_INSTANCE, own)
        self._forget_turns(group)
        return True

    def own_placed(self, group: Group, since: int) -> None:
        """This node's own word about a group lies there in the log."""
        assert group.own is not None
        group.own.since = since
        self._note(group, self.node_id, NO_INSTANCE, group.own)

    def all_recalled(self) -> None:
        """Own groups that were not told by now are gone."""
        for name in self._recalled:
            self._unnote(_note_name(name, self.node_id))
        self._recalled.clear()

    def own_ended(self, group: Group) -> None:
        """This node has none any more; until the others must know, it stays in the table."""
        own = group.own
        assert own is not None
        own.members, own.ready, own.waits, own.kept, own.resumed = False, 0, False, False, False
        self._unnote(_note_name(group.name, self.node_id))
        self._forget_turns(group)

    def own_gone(self, group: Group) -> None:
        """The others know by now, or will before anything that is told from here on."""
        if group.own is not None:
            group.own = None
            self._places -= 1
            self._tidy(group)

    # --- other nodes

    def told(self, node_id: str, instance_id: bytes, news: list[GroupNews], offset: int, *, whole: bool) -> None:
        """Another node told of its groups, at `offset` of the log."""
        life = self._lives.get(node_id)
        if life is None or life.instance_id != instance_id:
            self.forget(node_id)
            life = self._lives[node_id] = Life(instance_id)
        gone = life.names - {each.name for each in news} if whole else set()
        for name in gone:
            self._leave(life, node_id, name)
        for each in news:
            if not each.members:
                self._leave(life, node_id, each.name)
                continue
            group = self._group(each.name)
            if group is None:
                self.left_out += 1
                continue
            place = group.places.get(node_id)
            since = offset if each.since is None else each.since
            if place is None:
                place = group.places[node_id] = Place(since=since)
                self._places += 1
                life.names.add(each.name)
            place.ready, place.waits, place.kept = each.ready, each.waits, each.kept
            place.since = min(place.since or 0, since)
            self._note(group, node_id, instance_id, place)
            self._forget_turns(group)

    def forget(self, node_id: str) -> None:
        """A node has no groups."""
        life = self._lives.get(node_id)
        if life is not None:
            for name in list(life.names):
                self._leave(life, node_id, name)
            del self._lives[node_id]

    def seen(self, node_id: str, instance_id: bytes, *, live: bool) -> None:
        """An instance is live, or silent. What the one before it kept waits for its word about groups; one that says
        nothing about them has none."""
        life = self._lives.get(node_id)
        if life is None:
            return
        if life.instance_id != instance_id:
            if not live:
                return
            life.replaced += 1
            live = False
            if life.replaced > PATIENCE:
                self.forget(node_id)
                return
        if life.live != live:
            life.live = live
            for name in life.names:
                self._forget_turns(self.groups[name])

    def _leave(self, life: Life, node_id: str, name: str) -> None:
        life.names.discard(name)
        group = self.groups.get(name)
        if group is not None and group.places.pop(node_id, None) is not None:
            self._places -= 1
            self._unnote(_note_name(name, node_id))
            self._tidy(group)

    # --- the table

    def _group(self, name: str) -> Group | None:
        """Find or make a group; None: there is no room for one more, or for one more place of it."""
        group = self.groups.get(name)
        if self._places >= MAX_PLACES and (group is None or group.own is None):
            return None
        if group is None:
            size = _size(name)
            if self._names_size + size > MAX_NAMES:
                return None
            self._names_size += size
            group = self.groups[name] = self.by_hash[hash_of(name)] = Group(name, hash_of(name))
            topic_filter = split_shared(name)[1]
            self.router.subscribe(topic_filter, group, SubscriptionOptions(topic_filter))
            self.topology += 1
        return group

    def _tidy(self, group: Group) -> None:
        self._forget_turns(group)
        if group.own is None and not group.places:
            del self.groups[group.name]
            self.by_hash.pop(group.hash, None)
            self._names_size -= _size(group.name)
            self.router.unsubscribe(split_shared(group.name)[1], group)
            self.topology += 1

    def _forget_turns(self, group: Group) -> None:
        group.turns = group.elsewhere = None
        self.version += 1

    # --- the choice

    def turns(self, group: Group, *, away: bool = False) -> list[Turn]:
        """Who takes part in the choice: all with connected members; where nobody has any, one node for whose members
        messages wait: this one, else the first of those that are live, else of those that are away and keep theirs;
        else nobody. `away`: the others cannot be reached now, so it is this node if it can."""
        own = group.own
        if away and own is not None and (own.ready or own.waits):
            return [self._turn(group, 1, self.node)]
        if group.turns is None:
            others = self.elsewhere(group)
            if own is not None and (own.ready or (own.waits and not _any_ready(others))):
                mine = [self._turn(group, max(own.ready, 1), self.node)]
                group.turns = mine + others if _any_ready(others) else mine
            else:
                group.turns = others or [self._turn(group, 0, NOBODY)]
        return group.turns

    def elsewhere(self, group: Group) -> list[Turn]:
        """Who but this node takes part; empty: nobody."""
        if group.elsewhere is None:
            ready: list[Turn] = []
            waiting: list[tuple[bool, int, str]] = []
            for node_id, place in group.places.items():
                live = self._lives[node_id].live
                if live and place.ready:
                    ready.append(self._turn(group, place.ready, hash_of(node_id)))
                elif place.waits if live else place.kept:
                    waiting.append((not live, place.since or 0, node_id))
            if not ready and waiting:
                ready = [self._turn(group, 0, hash_of(min(waiting)[2]))]
            group.elsewhere = ready
        return group.elsewhere

    def ready_elsewhere(self, group: Group) -> bool:
        """Whether another node has connected members."""
        return _any_ready(self.elsewhere(group))

    @staticmethod
    def _turn(group: Group, weight: int, node: int) -> Turn:
        return Turn(weight, node, PAIR.pack(group.hash, node))

    def is_first(self, group: Group, writer: str) -> bool | None:
        """Whether this node serves what nobody was chosen for: the first in the log that told of members, `writer`
        apart, which does not, and those that are away and keep none. None: it is not known yet where this node's own
        word lies."""
        own = group.own
        if own is None or not own.members:
            return False
        if own.since is None:
            return None
        return all(
            node_id == writer or not (place.kept or self._lives[node_id].live) or (place.since or 0) > own.since
            for node_id, place in group.places.items()
        )


def next_turn(turns: list[Turn]) -> Turn:
    """Whose turn it is: each as often as its weight says, as evenly as that goes."""
    if len(turns) == 1:
        return turns[0]
    best, total = turns[0], 0
    for turn in turns:
        total += turn.weight
        turn.credit += turn.weight
        if turn.credit > best.credit:
            best = turn
    best.credit -= total
    return best


def _note_name(name: str, node_id: str) -> str:
    return f"{NOTES}{hash_of(name):016x}/{hash_of(node_id):016x}"


def _any_ready(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0].weight > 0


def _size(name: str) -> int:
    return len(name) + LEVEL * (name.count("/") + 1)
