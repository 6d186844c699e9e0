"""Judges share groups [MQTT5-4.8.2]: each message to one of the members, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Iterator

from tests.simulation.history import NEVER, History, Interest, Message
from tests.simulation.oracle import Violation, effective_qos, matches


def judge_groups(history: History) -> list[Violation]:
    """Return every violation; the clients are members of one group at most."""
    groups: dict[str, dict[str, Interest]] = {}
    for client, interest in history.interests.items():
        for topic_filter in interest.filters if interest.shared else ():
            groups.setdefault(topic_filter, {})[client] = interest
    return [found for name, members in groups.items() for found in _judge_group(name, members, history)]


def _judge_group(name: str, members: dict[str, Interest], history: History) -> Iterator[Violation]:
    got: dict[bytes, list[tuple[str, int]]] = {}
    for client, interest in members.items():
        for delivery in interest.deliveries:
            got.setdefault(delivery.payload, []).append((client, delivery.qos))
    history.counts["came twice"] += sum(len(came) > 1 for came in got.values())
    for message in history.messages:
        if not message.qos or not matches(name, message.topic_name):
            continue
        came = got.get(message.payload, [])
        once = [client for client, qos in came if qos == 2]
        if len(once) > 1:
            yield Violation("duplicate", name, f"{message} came at QoS 2 to {', '.join(once)}", message.flow)
        if message.qos == 1 and message.attempts == 1 and len({client for client, _ in came}) > 1:
            yield from _shared_out(name, members, message, came, history)
        if not came and message.refused_at == NEVER and _owed(name, members, message):
            text = f"nobody got {message}, acknowledged at {message.taken_at:.4f}"
            yield Violation("lost", name, text, message.flow)


def _shared_out(
    name: str, members: dict[str, Interest], message: Message, came: list[tuple[str, int]], history: History
) -> Iterator[Violation]:
    """Several members got one message: another one may have it only when the connection of the one before has ended."""
    unbroken = [client for client, _ in came if history.connections[client] == 1]
    if len(unbroken) > 1 and not history.restless:
        text = f"{message} came to {', '.join(unbroken)}, whose connections never ended"
        yield Violation("twice", name, text, message.flow)


def _owed(name: str, members: dict[str, Interest], message: Message) -> bool:
    """Whether a message must have come: the group had a member from its first PUBLISH on, without a gap, and it went to
    nobody who gave it up."""
    spans = [span for interest in members.values() for span in interest.spans[name]]
    at = message.sent_at
    while at < NEVER:
        until = max((span.must_until for span in spans if span.must_from <= at < span.must_until), default=at)
        if until == at:
            return False
        at = until
    return not any(_gave_up(interest, message) for interest in members.values())


def _gave_up(interest: Interest, message: Message) -> bool:
    """Whether a delivery may have ended with its member's session: at QoS 2 once it has begun [MQTT5-4.8.2-5], at QoS 1
    when the member had left the group before."""
    if not interest.sessions_ended or not interest.first_sent[message.payload]:
        return False
    return effective_qos(message, interest) == 2 or interest.left
