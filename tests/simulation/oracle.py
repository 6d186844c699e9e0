"""Judges a history by the specification: nothing lost, doubled, forged or out of order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache

import attrs

from tests.simulation.history import NEVER, Delivery, Flow, History, Interest, Message


@attrs.frozen
class Violation:
    """Something that must not have happened."""

    kind: str
    """lost, duplicate, twice, order, forged, altered, unwanted, repeated, refused, retained, unacknowledged, wire."""
    client: str
    text: str
    flow: Flow | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.client}: {self.text}"


def judge(history: History) -> list[Violation]:
    """Return every violation. The simulation is over: everybody is connected, nothing is under way."""
    found = [Violation("wire", client, text) for client, text in history.complaints]
    found += [
        Violation("unacknowledged", message.publisher, str(message), message.flow)
        for message in history.messages
        if message.qos and message.taken_at == message.refused_at == NEVER
    ]
    for client, interest in history.interests.items():
        if not interest.spans and not interest.deliveries:
            continue  # most clients only publish
        found += _judge_deliveries(client, interest, history)
        found += _judge_debts(client, interest, history)
    return found


def _judge_deliveries(client: str, interest: Interest, history: History) -> Iterator[Violation]:
    """Judge what came: once, in order, unchanged, and wanted."""
    count: Counter[tuple[bytes, int]] = Counter()
    last: dict[tuple[Flow, int], int] = {}
    for delivery in interest.deliveries:
        if not delivery.payload:
            continue  # a retained message was removed; who by, nobody can see
        message = history.by_payload.get(delivery.payload)
        if message is None or message.sent_at > delivery.at:
            yield Violation("forged", client, f"got {delivery.payload!r}, which nobody had sent")
            continue
        flow = message.flow
        if wrong := _difference(delivery, message, interest):
            yield Violation("altered", client, f"got {message} with {wrong}", flow)
        if interest.shared or delivery.retained:
            wanted = any(span.may_from <= delivery.at for spans in interest.spans.values() for span in spans)
        else:
            wanted = _wanted(message, interest, must=False)
        if not wanted:
            yield Violation("unwanted", client, f"got {message} without a subscription", flow)
        if delivery.retained:
            continue  # `keepsakes` judges the rest
        if delivery.qos == 2 and message.refused_at < NEVER:
            yield Violation("refused", client, f"got {message}, which its publisher was told is not kept", flow)
        life = 0 if interest.lasts or _is_kept(message, history) else delivery.life
        count[delivery.payload, life] += 1
        if count[delivery.payload, life] > 1:
            if delivery.qos == 2:
                yield Violation("duplicate", client, f"got {message} again", flow)
            continue
        if interest.shared:
            continue  # the order is that of each member, and what another one left may come late
        if message.attempts > 1 and not (delivery.qos and _wanted(message, interest, must=True)):
            continue  # its first PUBLISH may have met no subscription or, at QoS 0, no room
        before = last.get((flow, delivery.qos), -1)
        if message.number < before:
            yield Violation("order", client, f"got {message} behind number {before}", flow)
        last[flow, delivery.qos] = max(before, message.number)
    for payload, times in interest.first_sent.items():
        sent = history.by_payload.get(payload)
        if sent is not None and times > _most_as_new(sent, interest, history):
            text = f"{sent} was sent {times} times without DUP; it came {sent.attempts} times from its publisher"
            yield Violation("repeated", client, text, sent.flow)


def _is_kept(message: Message, history: History) -> bool:
    """Whether the store must have had a message for some session before anybody got it at QoS 2. Otherwise nobody knows
    of it any more when the broker ends, and all sessions that it came to end with it: it may come to the next ones."""
    return any(
        interest.lasts
        and not interest.shared
        and effective_qos(message, interest)
        and _wanted(message, interest, must=True)
        for interest in history.interests.values()
    )


def _most_as_new(message: Message, interest: Interest, history: History) -> float:
    """How often a message may be sent without DUP. A broker that was killed may not know that it sent one at QoS 1, nor
    that it received one that it did not have to keep yet; at QoS 2 it sends nothing that it does not know for good."""
    if effective_qos(message, interest) == 2:
        return 1 if interest.lasts or _is_kept(message, history) else 1 + history.lives
    if interest.shared:
        return NEVER  # each member has it anew
    if message.qos == 2 and not history.restless:
        return 1
    return message.attempts * (1 + history.kills)


def _difference(delivery: Delivery, message: Message, interest: Interest) -> str:
    """Say what a delivery has otherwise than its message, or nothing."""
    if delivery.topic_name != message.topic_name:
        return f"the Topic Name {delivery.topic_name}"
    expected = effective_qos(message, interest)
    if expected is not None and delivery.qos != expected:
        return f"QoS {delivery.qos}, {expected} was granted"
    if interest.v5 and delivery.user_properties != message.user_properties:
        return f"the User Properties {delivery.user_properties!r}"
    return ""


def _judge_debts(client: str, interest: Interest, history: History) -> Iterator[Violation]:
    """Look for what should have come and did not."""
    got = {delivery.payload for delivery in interest.deliveries if not delivery.retained}
    for message in history.messages:
        if interest.shared or message.removes or message.payload in got or not effective_qos(message, interest):
            continue
        if message.refused_at < NEVER:
            continue
        if _wanted(message, interest, must=True):
            text = f"never got {message}, acknowledged at {message.taken_at:.4f}"
            yield Violation("lost", client, text, message.flow)


def judge_retained(messages: list[Message], retained: Mapping[str, bytes]) -> Iterator[Violation]:
    """Look at what is retained in the end: of each topic, which has one publisher and one QoS, the last message that
    was acknowledged, or one behind it without an answer. One that was refused may be there when it was sent before: its
    first copy may have been accepted."""
    for topic_name in sorted({message.topic_name for message in messages if message.retain}):
        flow = [message for message in messages if message.topic_name == topic_name]
        acknowledged = [number for number, message in enumerate(flow) if message.taken_at < NEVER]
        last = acknowledged[-1] if acknowledged else 0
        behind = [m for m in flow[last:] if m.taken_at < NEVER or m.refused_at == NEVER or m.attempts > 1]
        allowed: set[bytes | None] = {None if message.removes else message.payload for message in behind}
        if not acknowledged:
            allowed.add(None)
        if retained.get(topic_name) not in allowed:
            text = f"{retained.get(topic_name)!r} is retained, the last one was {flow[last]}"
            yield Violation("retained", flow[last].publisher, text, flow[last].flow)


def effective_qos(message: Message, interest: Interest) -> int | None:
    """Return the QoS at which a client gets a message, None where no filter matches."""
    granted = [qos for topic_filter, qos in interest.filters.items() if matches(topic_filter, message.topic_name)]
    return min(message.qos, max(granted)) if granted else None


def _wanted(message: Message, interest: Interest, *, must: bool) -> bool:
    """Whether a message must be delivered: the client was subscribed from its first PUBLISH to its acknowledgement;
    or whether it may be: the client was perhaps subscribed at some instant in between."""
    for topic_filter, spans in interest.spans.items():
        if not matches(topic_filter, message.topic_name):
            continue
        for span in spans:
            if must:
                if span.must_from <= message.sent_at and message.taken_at <= span.must_until:
                    return True
            elif span.may_from <= message.taken_at and message.sent_at <= span.may_until:
                return True
    return False


@cache
def matches(topic_filter: str, topic_name: str) -> bool:
    """Whether a filter matches a name [MQTT5-4.7.1]; of a Shared Subscription, what is behind its share name."""
    if topic_filter.startswith("$share/"):
        topic_filter = topic_filter.split("/", 2)[2]
    if topic_name.startswith("$") and topic_filter[0] in "+#":
        return False  # [MQTT5-4.7.2-1]
    levels = topic_name.split("/")
    parts = topic_filter.split("/")
    for at, part in enumerate(parts):
        if part == "#":
            return True
        if at >= len(levels) or part not in ("+", levels[at]):
            return False
    return len(parts) == len(levels)
