"""Retained messages that changed and that the store does not have yet, so that a change can be taken back.

A publisher may be told that its message is not kept. What it had retained, or removed, must not hold then, however many
others changed the same topic meanwhile: the newest change that was not refused does, or what was there before.
"""

from __future__ import annotations

import attrs

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Number


@attrs.define
class _Topic:
    before: Message | None
    """What the store has, or what nobody takes back."""
    changes: dict[Number, Message | None] = attrs.Factory(dict)
    """In their order; None: removed."""


class RetainedChanges:
    """Changes of one node by number, until their batch is committed. As many as the journal counts bytes for."""

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}
        self._numbers: dict[Number, str] = {}

    def note(self, number: Number, topic_name: str, before: Message | None, after: Message | None) -> None:
        """A publisher that waits for the store changed the retained message of a topic; `after` None: to none."""
        topic = self._topics.get(topic_name)
        if topic is None:
            topic = self._topics[topic_name] = _Topic(before)
        topic.changes[number] = after
        self._numbers[number] = topic_name

    def settle(self, topic_name: str) -> None:
        """What the topic has now stays, whatever is refused: somebody changed it who waits for nothing."""
        self._topics.pop(topic_name, None)

    def committed(self, last: Number) -> None:
        """The store has all changes up to this number."""
        for number in list(self._numbers):
            if number > last:
                break
            topic_name = self._numbers.pop(number)
            topic = self._topics.get(topic_name)
            if topic is None or number not in topic.changes:
                continue
            topic.before = topic.changes.pop(number)
            if not topic.changes:
                del self._topics[topic_name]

    def withdraw(self, number: Number) -> tuple[str, Message | None] | None:
        """Forget a change. Returns the topic and what it has now (None: nothing), or None when nothing follows."""
        topic_name = self._numbers.pop(number, None)
        topic = self._topics.get(topic_name) if topic_name is not None else None
        if topic_name is None or topic is None or number not in topic.changes:
            return None
        was_last = next(reversed(topic.changes)) == number
        del topic.changes[number]
        if not topic.changes:
            del self._topics[topic_name]
            return topic_name, topic.before
        return (topic_name, topic.changes[next(reversed(topic.changes))]) if was_last else None
