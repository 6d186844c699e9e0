"""What the ledger knows beyond the judges of the simulation: Wills, and retained messages that a subscriber found.

Pure functions of what the clients saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import attrs

from tests.simulation import oracle
from tests.simulation.groups import judge_groups
from tests.simulation.history import NEVER, Delivery, History, Message
from tests.simulation.oracle import Violation


@attrs.define
class Legacy:
    """A Will and what has to become of it."""

    topic_name: str
    payload: bytes
    delay: int
    """Will Delay Interval, seconds."""
    promised: bool = False
    """The broker acknowledged something that came behind the CONNECT, so it has the Will on disk."""
    died: bool = False
    """Its client lost the connection and never came back."""
    revoked: bool = False
    """Its client came back in time, without a Will."""


@attrs.define
class Case:
    """All that is to be judged."""

    history: History
    """Ordinary publishers and subscribers."""
    group: History = attrs.Factory(lambda: History([]))
    """Members of a share group, and what was published to them."""
    legacies: list[Legacy] = attrs.Factory(list)
    will_deliveries: list[Delivery] = attrs.Factory(list)
    retained_messages: list[Message] = attrs.Factory(list)
    """Of each topic in the order of publishing, which one client did."""
    retained_found: Mapping[str, bytes] | None = None
    """By topic, what a new subscription was sent at the end; None: nobody asked."""


def judge_all(case: Case) -> list[Violation]:
    """Return every violation. Everybody is connected, nothing is under way any more."""
    found = oracle.judge(attrs.evolve(case.history))  # a copy: it remembers what it was asked
    found += oracle.judge(attrs.evolve(case.group)) + judge_groups(case.group)
    found += judge_wills(case.legacies, case.will_deliveries)
    if case.retained_found is not None:
        found += judge_retained(case.retained_messages, case.retained_found)
    return found


def judge_wills(legacies: Iterable[Legacy], deliveries: Iterable[Delivery]) -> Iterator[Violation]:
    """A Will comes exactly once when its client died, never when the client came back in time."""
    count = Counter(delivery.payload for delivery in deliveries)
    for legacy in legacies:
        times = count.pop(legacy.payload, 0)
        name = f"the Will {legacy.payload!r}"
        if times > 1:
            yield Violation("duplicate", "wills", f"got {name} {times} times")
        if times and legacy.promised and legacy.revoked:
            yield Violation("unwanted", "wills", f"got {name}, whose client had come back")
        if not times and legacy.promised and legacy.died and not legacy.revoked:
            yield Violation("lost", "wills", f"never got {name}")
    for payload in count:
        yield Violation("forged", "wills", f"got {payload!r}, which is nobody's Will")


def judge_retained(messages: list[Message], found: Mapping[str, bytes]) -> Iterator[Violation]:
    """A topic has its last retained message, as everything is acknowledged."""
    for message in messages:
        if message.taken_at == NEVER:
            yield Violation("unacknowledged", message.publisher, str(message), message.flow)
    yield from oracle.judge_retained(messages, found)
    for topic_name in found.keys() - {message.topic_name for message in messages}:
        yield Violation("forged", "retained", f"{topic_name} has {found[topic_name]!r}, nobody retained anything there")


def repeated(deliveries: Iterable[Delivery], qos: int) -> int:
    """Count the deliveries at a QoS beyond the first of each message."""
    count = Counter(delivery.payload for delivery in deliveries if delivery.qos == qos)
    return count.total() - len(count)
