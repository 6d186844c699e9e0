"""Subscriptions by Topic Filter, and which of them a Topic Name matches.

Filters without wildcards live in a dict, the others in a trie of levels. Matching costs one dict look-up plus, per
level of the Topic Name, one step for each trie node that still matches: linear, without regular expressions and
without recursion, so a filter of 65,535 levels is only long. The router does not check filters: callers pass what
`protocol.topics.validate_topic_filter` accepted.

Shared Subscriptions need nothing here: a share group is itself a subscriber, under the filter behind its share name
(`shares`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import attrs

from mqtt_trio.protocol.packets import Subscription

S = TypeVar("S", bound=Hashable)


@attrs.define
class SubscriptionOptions(Subscription):
    """A subscription as the broker keeps it. Shared with route caches, so never changed: subscribe again instead."""

    subscription_identifier: int | None = None

    @classmethod
    def of(cls, subscription: Subscription, subscription_identifier: int | None = None) -> SubscriptionOptions:
        """Take one entry of a SUBSCRIBE and the packet's Subscription Identifier."""
        return cls(
            subscription.topic_filter,
            subscription.qos,
            subscription.no_local,
            subscription.retain_as_published,
            subscription.retain_handling,
            subscription_identifier,
        )


class _Node(Generic[S]):
    """One level of the trie: everything that stands behind the same levels of a filter."""

    __slots__ = ("children", "members", "plus", "rest")

    def __init__(self) -> None:
        self.children: dict[str, _Node[S]] | None = None
        """Next level by its text."""
        self.plus: _Node[S] | None = None
        """Next level `+`."""
        self.members: dict[S, SubscriptionOptions] | None = None
        """Subscriptions whose filter ends here."""
        self.rest: dict[S, SubscriptionOptions] | None = None
        """Subscriptions whose filter goes on with `#`."""

    def child(self, level: str) -> _Node[S]:
        """Return the node of the next `level` (not `#`), made where it is missing."""
        if level == "+":
            if self.plus is None:
                self.plus = _Node()
            return self.plus
        if self.children is None:
            self.children = {}
        if (node := self.children.get(level)) is None:
            node = self.children[level] = _Node()
        return node

    @property
    def empty(self) -> bool:
        return not (self.members or self.rest or self.children or self.plus)


class Router(Generic[S]):
    """All subscriptions of the node. `S` is whatever stands for a subscriber; it is compared by its own hash."""

    def __init__(self) -> None:
        self.generation = 0
        """Grows with every change that may alter a result of `match`: what was cached under an older one is void."""
        self.count = 0
        """Subscriptions: pairs of subscriber and Topic Filter."""
        self._exact: dict[str, dict[S, SubscriptionOptions]] = {}
        self._root: _Node[S] = _Node()

    def subscribe(self, topic_filter: str, subscriber: S, options: SubscriptionOptions) -> bool:
        """Add or replace the subscription of `subscriber` to `topic_filter`.

        Returns:
          True when it replaced one [MQTT5-3.8.4-3]. One that is equal in every option changes nothing, so that
          clients which subscribe again at each reconnect leave the route caches alone.
        """
        members = self._members(topic_filter)
        existing = members.get(subscriber)
        if existing is not None and existing == options:
            return True
        members[subscriber] = options
        self.generation += 1
        if existing is None:
            self.count += 1
        return existing is not None

    def unsubscribe(self, topic_filter: str, subscriber: S) -> bool:
        """Remove one subscription; the filter is compared character by character [MQTT5-3.10.4-1].

        Returns:
          Whether it existed.
        """
        if not _has_wildcard(topic_filter):
            found = self._exact.get(topic_filter)
            if found is None or found.pop(subscriber, None) is None:
                return False
            if not found:
                del self._exact[topic_filter]
        elif not self._remove(topic_filter.split("/"), subscriber):
            return False
        self.generation += 1
        self.count -= 1
        return True

    def unsubscribe_all(self, topic_filters: Iterable[str], subscriber: S) -> int:
        """Remove the subscriptions of one subscriber, whose session knows its filters; returns how many existed."""
        return sum(self.unsubscribe(topic_filter, subscriber) for topic_filter in list(topic_filters))

    def get(self, topic_filter: str, subscriber: S) -> SubscriptionOptions | None:
        """Return the options under which `subscriber` holds exactly this filter, or None."""
        if not _has_wildcard(topic_filter):
            found = self._exact.get(topic_filter)
        else:
            path = self._path(topic_filter.split("/"))
            found = None if path is None else path[-1].rest if topic_filter.endswith("#") else path[-1].members
        return None if found is None else found.get(subscriber)

    def match(self, topic_name: str) -> list[tuple[S, SubscriptionOptions]]:
        """Return every subscription that matches: one entry per filter, so a subscriber may stand there repeatedly."""
        matches: list[tuple[S, SubscriptionOptions]] = []
        if (exact := self._exact.get(topic_name)) is not None:
            matches += exact.items()
        nodes = [self._root]
        if self._root.empty:
            return matches
        hidden = topic_name.startswith("$")  # a filter that starts with a wildcard does not match it [MQTT5-4.7.2-1]
        for level in topic_name.split("/"):
            following: list[_Node[S]] = []
            for node in nodes:
                if node.rest is not None and not hidden:
                    matches += node.rest.items()
                if node.children is not None and (child := node.children.get(level)) is not None:
                    following.append(child)
                if node.plus is not None and not hidden:
                    following.append(node.plus)
            hidden = False
            nodes = following
            if not nodes:
                return matches
        for node in nodes:
            if node.members is not None:
                matches += node.members.items()
            if node.rest is not None:  # `#` includes the parent level: "sport/#" matches "sport"
                matches += node.rest.items()
        return matches

    def _members(self, topic_filter: str) -> dict[S, SubscriptionOptions]:
        """Return the subscriptions of one filter, with its place in the tables made where it is missing."""
        if not _has_wildcard(topic_filter):
            return self._exact.setdefault(topic_filter, {})
        node = self._root
        for level in topic_filter.split("/"):
            if level == "#":
                if node.rest is None:
                    node.rest = {}
                return node.rest
            node = node.child(level)
        if node.members is None:
            node.members = {}
        return node.members

    def _path(self, levels: list[str]) -> list[_Node[S]] | None:
        """Return the nodes from the root to the end of a filter (to the one before `#`), or None."""
        node: _Node[S] | None = self._root
        path = [self._root]
        for level in levels:
            if level == "#":
                break
            assert node is not None
            node = node.plus if level == "+" else node.children.get(level) if node.children is not None else None
            if node is None:
                return None
            path.append(node)
        return path

    def _remove(self, levels: list[str], subscriber: S) -> bool:
        """Remove a wildcard subscription and the nodes that only it needed."""
        if (path := self._path(levels)) is None:
            return False
        node = path[-1]
        found = node.rest if levels[-1] == "#" else node.members
        if found is None or found.pop(subscriber, None) is None:
            return False
        if not found:
            if levels[-1] == "#":
                node.rest = None
            else:
                node.members = None
        for depth in range(len(path) - 1, 0, -1):
            if not path[depth].empty:
                break
            parent, level = path[depth - 1], levels[depth - 1]
            if level == "+":
                parent.plus = None
            elif parent.children is not None:
                del parent.children[level]
                if not parent.children:
                    parent.children = None
        return True


def _has_wildcard(topic_filter: str) -> bool:
    # Valid filters hold these characters only as whole levels [MQTT5-4.7.1-1], [MQTT5-4.7.1-2].
    return "+" in topic_filter or "#" in topic_filter
