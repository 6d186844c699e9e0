"""What is judged in a Kafka topic that messages of MQTT publishers were archived to.

Pure functions of what the publishers saw and of what lies in the topic. What was acknowledged is in the topic, what is
in the topic was sent, and the first record of each message stands in the order of its publisher and MQTT topic.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import attrs

from tests.simulation.history import NEVER, Flow, History, Message
from tests.simulation.oracle import Violation, effective_qos


@attrs.define(eq=False)
class Numbered(Message):
    """A message, and which lives of the broker it was given to."""

    lives: set[int] = attrs.Factory(set)
    """Numbers of the broker processes that a PUBLISH of it was written to."""
    given_back: int = 0
    """How often it was on its way when the broker ended a 3.x connection, as it does instead of a refusal: the broker
    does not count as having it then, although it may store it, and has it anew when it comes again [K9]."""


@attrs.frozen
class Found:
    """One record of the topic; a partition's records stand in the order of their offsets."""

    partition: int
    topic_name: str
    qos: int
    payload: bytes
    client_id: str


@attrs.define
class Duplicates:
    """Records beyond the first of a message, by QoS."""

    qos1: int = 0
    qos2: int = 0
    """Those that the lives of the broker explain; the others are violations."""


def judge_stream(
    messages: Iterable[Numbered], found: Iterable[Found], *, last_life: int | None = None
) -> tuple[list[Violation], Duplicates]:
    """Return every violation, and how often messages came again.

    A QoS 2 message may come again once for each further life of the broker that wrote it: those that it was sent to;
    or, where the broker keeps on disk what it has yet to write, all from the first one to `last_life`. Each time that
    it was given back counts as a life.
    """
    by_payload = {message.payload: message for message in messages}
    duplicates = Duplicates()
    violations = list(_judge_promises(by_payload.values(), {record.payload for record in found}))
    records = defaultdict[bytes, list[Found]](list)
    places: dict[Flow, int] = {}
    last: dict[Flow, int] = {}
    for record in found:
        message = by_payload.get(record.payload)
        if message is None:
            violations.append(Violation("forged", "topic", f"holds {record.payload[:60]!r}, which nobody had sent"))
            continue
        flow = message.flow
        if wrong := _difference(record, message):
            violations.append(Violation("altered", message.publisher, f"{message} is there with {wrong}", flow))
        if places.setdefault(flow, record.partition) != record.partition:
            text = f"{message} is in partition {record.partition}, earlier ones in {places[flow]}"
            violations.append(Violation("order", message.publisher, text, flow))
        records[record.payload].append(record)
        if len(records[record.payload]) == 1:
            before = last.get(flow, -1)
            if message.number < before:
                text = f"{message} is first found behind number {before}"
                violations.append(Violation("order", message.publisher, text, flow))
            last[flow] = max(before, message.number)
    violations += _judge_repeats(by_payload, records, duplicates, last_life)
    return violations, duplicates


def _judge_promises(messages: Iterable[Numbered], payloads: set[bytes]) -> Iterator[Violation]:
    for message in messages:
        if message.taken_at == message.refused_at == NEVER:
            yield Violation("unacknowledged", message.publisher, str(message), message.flow)
        if message.taken_at < NEVER and message.payload not in payloads:
            text = f"{message}, acknowledged at {message.taken_at:.3f}, is not there"
            yield Violation("lost", message.publisher, text, message.flow)


def _judge_repeats(
    messages: dict[bytes, Numbered],
    records: dict[bytes, list[Found]],
    duplicates: Duplicates,
    last_life: int | None,
) -> Iterator[Violation]:
    for payload, copies in records.items():
        message, again = messages[payload], len(copies) - 1
        if not again:
            continue
        if message.qos == 1:
            duplicates.qos1 += again
            continue
        lives = len(message.lives)
        writings = lives + message.given_back
        if last_life is not None and message.lives:  # what a life had spooled, those behind it may write as well
            writings += last_life - min(message.lives)
        duplicates.qos2 += min(again, writings - 1)
        if again >= writings:
            plural = "life" if lives == 1 else "lives"
            text = f"{message} is there {again + 1} times, at most {writings} are explained; {lives} {plural} had it"
            yield Violation("duplicate", message.publisher, text, message.flow)


def _difference(record: Found, message: Numbered) -> str:
    """Say what a record has otherwise than its message, or nothing."""
    if record.topic_name != message.topic_name:
        return f"the topic {record.topic_name}"
    if record.qos != message.qos:
        return f"QoS {record.qos}"
    if record.client_id != message.publisher:
        return f"the client {record.client_id}"
    return ""


def judge_group(history: History) -> Iterator[Violation]:
    """Judge what came to the members of a share group over all nodes together: everything, and at QoS 2 once. The
    oracle looks at each member alone."""
    members = [interest for interest in history.interests.values() if interest.shared]
    if not members:
        return
    count = Counter(delivery.payload for member in members for delivery in member.deliveries)
    for message in history.messages:
        if not any(effective_qos(message, member) for member in members):
            continue
        if message.taken_at < NEVER and not count[message.payload]:
            text = f"never got {message}, acknowledged at {message.taken_at:.3f}"
            yield Violation("lost", "share group", text, message.flow)
        if message.qos == 2 and count[message.payload] > 1:
            yield Violation("duplicate", "share group", f"got {message} {count[message.payload]} times", message.flow)


def count_acknowledged(messages: Sequence[Numbered]) -> int:
    """Count what was promised."""
    return sum(message.taken_at < NEVER for message in messages)


def count_kinds(violations: Iterable[Violation]) -> Counter[str]:
    """Count violations by kind."""
    return Counter(violation.kind for violation in violations)
