"""Retained messages by Topic Name, and which of them a Topic Filter matches.

The messages live in a dict, so that replacing one costs a look-up; a trie of levels finds the names that a filter
with wildcards matches. A search visits each node at most once and never recurses.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from mqtt_trio.broker.message import Message


class _Node:
    """One level of the trie of Topic Names."""

    __slots__ = ("children", "topic_name")

    def __init__(self) -> None:
        self.children: dict[str, _Node] | None = None
        self.topic_name: str | None = None
        """The name that ends here, when it has a retained message."""


class RetainedMessages:
    """At most `maximum` retained messages of `maximum_size` bytes in all, one per Topic Name."""

    def __init__(self, maximum: int, maximum_size: float = float("inf")) -> None:
        self.maximum = maximum
        self.maximum_size = maximum_size
        self.size = 0
        """Bytes of all of them, as `Message.size` counts."""
        self.visited = 0
        """Nodes that searches have looked at since the start: what they cost."""
        self.expired: Callable[[str], None] = lambda topic_name: None
        """Told when a message is dropped because it expired."""
        self._messages: dict[str, Message] = {}
        self._root = _Node()
        self._expiries: list[tuple[float, str]] = []  # heap; entries of replaced messages stay until they come up

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Message]:
        """Iterate over a snapshot, in no particular order."""
        return iter(list(self._messages.values()))

    def set(self, message: Message) -> bool:
        """Replace the retained message of the message's topic [MQTT5-3.3.1-5]; an empty payload removes it and is not
        kept itself [MQTT5-3.3.1-6], [MQTT5-3.3.1-7].

        Returns:
          False when there is no room for it. A message that it was to replace is gone then: nobody gets an old one
          for a new one.
        """
        topic_name = message.topic_name
        if not message.payload:
            self.remove(topic_name)
            return True
        old = self._messages.get(topic_name)
        if self.size - (old.size if old is not None else 0) + message.size > self.maximum_size:
            self.remove(topic_name)
            return False
        if old is not None:
            self.size -= old.size
        elif len(self._messages) >= self.maximum:
            return False
        else:
            self._insert(topic_name)
        self._messages[topic_name] = message
        self.size += message.size
        if (expires_at := message.expires_at) is not None:
            self._note_expiry(expires_at, topic_name)
        return True

    def get(self, topic_name: str) -> Message | None:
        """Return the retained message of one topic; it may have expired."""
        return self._messages.get(topic_name)

    def remove(self, topic_name: str) -> bool:
        """Remove the retained message of one topic; returns whether there was one."""
        if (removed := self._messages.pop(topic_name, None)) is None:
            return False
        self.size -= removed.size
        levels = topic_name.split("/")
        path = [self._root]
        for level in levels:
            children = path[-1].children
            assert children is not None, "every retained topic has its nodes"
            path.append(children[level])
        path[-1].topic_name = None
        for depth in range(len(path) - 1, 0, -1):
            node, parent = path[depth], path[depth - 1]
            if node.topic_name is not None or node.children or parent.children is None:
                break
            del parent.children[levels[depth - 1]]
        return True

    def match(self, topic_filter: str, utc: float) -> list[Message]:
        """Return the messages that `topic_filter` (a valid one, without share name) matches.

        Those that expired before `utc` (seconds since the epoch) are left out and dropped [MQTT5-3.3.2-5].
        """
        if "+" in topic_filter or "#" in topic_filter:
            topic_names = self._search(topic_filter.split("/"))
        else:
            self.visited += 1
            topic_names = [topic_filter] if topic_filter in self._messages else []
        messages = []
        for topic_name in topic_names:
            message = self._messages[topic_name]
            if (expires_at := message.expires_at) is not None and expires_at <= utc:
                self.remove(topic_name)
                self.expired(topic_name)
            else:
                messages.append(message)
        return messages

    def drop_expired(self, utc: float) -> int:
        """Drop what has expired by `utc` (seconds since the epoch); returns how many messages that were."""
        dropped = 0
        while self._expiries and self._expiries[0][0] <= utc:
            _, topic_name = heapq.heappop(self._expiries)
            message = self._messages.get(topic_name)
            if message is not None and (expires_at := message.expires_at) is not None and expires_at <= utc:
                self.remove(topic_name)
                self.expired(topic_name)
                dropped += 1
        return dropped

    def _note_expiry(self, expires_at: float, topic_name: str) -> None:
        heapq.heappush(self._expiries, (expires_at, topic_name))
        if len(self._expiries) > 2 * len(self._messages) + 64:  # topics that are replaced often would fill the heap
            self._expiries = [(at, name) for name, m in self._messages.items() if (at := m.expires_at) is not None]
            heapq.heapify(self._expiries)

    def _insert(self, topic_name: str) -> None:
        node = self._root
        for level in topic_name.split("/"):
            if node.children is None:
                node.children = {}
            if (child := node.children.get(level)) is None:
                child = node.children[level] = _Node()
            node = child
        node.topic_name = topic_name

    def _search(self, levels: list[str]) -> list[str]:
        """Return the retained Topic Names that a filter matches."""
        nodes = [self._root]
        for depth, level in enumerate(levels):
            if level == "#":
                found = _subtree(nodes, hide_system=depth == 0)
                self.visited += len(found)
                return found
            following: list[_Node] = []
            for node in nodes:
                if node.children is None:
                    continue
                if level == "+":
                    following += _visible_children(node.children, hide_system=depth == 0)
                elif (child := node.children.get(level)) is not None:
                    following.append(child)
            nodes = following
            self.visited += 1 + len(nodes)
        return [node.topic_name for node in nodes if node.topic_name is not None]


def _visible_children(children: dict[str, _Node], *, hide_system: bool) -> Iterator[_Node]:
    """Children that a wildcard matches: at the first level not those that start with `$` [MQTT5-4.7.2-1]."""
    if not hide_system:
        return iter(children.values())
    return (child for level, child in children.items() if not level.startswith("$"))


def _subtree(nodes: list[_Node], *, hide_system: bool) -> list[str]:
    """Return the names at and below `nodes` (`#` includes the parent level)."""
    topic_names: list[str] = []
    while nodes:
        following: list[_Node] = []
        for node in nodes:
            if node.topic_name is not None:
                topic_names.append(node.topic_name)
            if node.children is not None:
                following += _visible_children(node.children, hide_system=hide_system)
        hide_system = False
        nodes = following
    return topic_names
