"""Judges what new subscriptions got of the retained messages. Each topic has one publisher and one QoS, and each client
one filter for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tests.simulation.history import NEVER, Delivery, History, Interest, Message, Span
from tests.simulation.oracle import Violation, effective_qos, matches


def judge_keepsakes(history: History) -> list[Violation]:
    """Return every violation."""
    topics: dict[str, list[Message]] = {}
    for message in history.messages:
        if message.retain:
            topics.setdefault(message.topic_name, []).append(message)
    found: list[Violation] = []
    for client, interest in history.interests.items():
        for topic_name, flow in topics.items():
            filters = [one for one in interest.filters if matches(one, topic_name)]
            if not filters:
                continue
            (topic_filter,) = filters
            came = [delivery for delivery in interest.deliveries if delivery.topic_name == topic_name]
            history.counts["keepsakes"] += sum(delivery.retained for delivery in came)
            texts = [
                *_stale(interest, topic_filter, flow, came),
                *_missing(interest, topic_filter, flow, came, history),
            ]
            texts += [*_too_often(interest, topic_filter, came), *_overtaken(flow, came)]
            found += [Violation("keepsake", client, text, flow[0].flow) for text in texts]
    return found


def _stale(interest: Interest, topic_filter: str, flow: list[Message], came: list[Delivery]) -> Iterator[str]:
    """What was retained no more when the subscription was asked for [MQTT5-3.3.1-9]."""
    spans = interest.spans[topic_filter]
    for delivery in came:
        if not delivery.retained:
            continue
        if not delivery.payload:
            yield "got an empty retained message"
            continue
        # What a session that lasts gets may be for its first subscription: it comes when there is room.
        asked = [span.may_from for span in spans if span.may_from <= delivery.at]
        at = asked[0] if interest.lasts else asked[-1]
        number, last = _place(flow, delivery), _last_taken(flow, at)
        if number < last or (number == last and flow[last].removes):
            yield f"got {flow[number]} as retained, {flow[last]} was there before it asked"


def _missing(
    interest: Interest, topic_filter: str, flow: list[Message], came: list[Delivery], history: History
) -> Iterator[str]:
    """What was retained when a subscription was asked for, and did not come [MQTT5-3.3.1-9]. A broker that ends takes
    with it what it has not yet sent of these."""
    for span in interest.spans[topic_filter]:
        if span.may_from <= history.last_life_at or span.must_from == NEVER or span.must_until < NEVER:
            continue
        last = _last_taken(flow, span.may_from)
        if last < 0 or flow[last].removes or _is_unsure(flow[last + 1 :], span):
            continue
        history.counts["keepsakes owed"] += 1
        wanted = flow[last]
        # A newer one may take its place before its turn has come.
        if effective_qos(wanted, interest) and not any(
            delivery.at >= span.may_from and (not delivery.payload or _place(flow, delivery) >= last)
            for delivery in came
        ):
            yield f"asked at {span.may_from:.4f} and did not get {wanted}, which was retained"


def _is_unsure(later: list[Message], span: Span) -> bool:
    """Whether one of these may have been retained when the broker saw the SUBSCRIBE."""
    return any(message.sent_at <= span.must_from for message in later)


def _too_often(interest: Interest, topic_filter: str, came: list[Delivery]) -> Iterator[str]:
    """A retained message comes once for each SUBSCRIBE; at QoS 2 that is exact."""
    times = Counter(delivery.payload for delivery in came if delivery.retained and delivery.qos == 2)
    for payload, count in times.items():
        if count > interest.asked[topic_filter]:
            yield f"got {payload!r} as retained {count} times, and asked {interest.asked[topic_filter]} times"


def _overtaken(flow: list[Message], came: list[Delivery]) -> Iterator[str]:
    """A retained message that comes behind a newer one, which was accepted at once, so that the newer one had taken its
    place. At QoS 1 it may come again."""
    seen: set[int] = set()
    newest = -1
    for delivery in came:
        if not delivery.payload:
            continue
        number = _place(flow, delivery)
        if delivery.retained and number < newest and (delivery.qos == 2 or number not in seen):
            yield f"got {flow[number]} as retained behind {flow[newest]}"
        seen.add(number)
        if flow[number].attempts == 1 and flow[number].refused_at == NEVER:
            newest = max(newest, number)


def _place(flow: list[Message], delivery: Delivery) -> int:
    return next((at for at, message in enumerate(flow) if message.payload == delivery.payload), len(flow))


def _last_taken(flow: list[Message], at: float) -> int:
    """Return which message was the last one to be acknowledged by then, -1 when none was."""
    return max((number for number, message in enumerate(flow) if message.taken_at <= at), default=-1)
