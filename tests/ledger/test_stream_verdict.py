"""The judge of Kafka topics: a planted loss, duplicate and swap are each reported, and nothing else is."""

from __future__ import annotations

import random

import pytest

from tests.ledger.stream_verdict import Duplicates, Found, Numbered, judge_group, judge_stream
from tests.simulation.history import NEVER, Delivery, History, Interest


def sent(
    number: int, *, topic: str = "t/0", qos: int = 1, publisher: str = "p", lives: tuple[int, ...] = (1,)
) -> Numbered:
    payload = f"{publisher}|{topic}|{number}".encode()
    message = Numbered(publisher, topic, number, qos, payload, sent_at=number, taken_at=number + 0.5)
    message.lives = set(lives)
    return message


def record(message: Numbered, partition: int = 0) -> Found:
    return Found(partition, message.topic_name, message.qos, message.payload, message.publisher)


def kinds(messages: list[Numbered], found: list[Found], last_life: int | None = None) -> list[str]:
    return [violation.kind for violation in judge_stream(messages, found, last_life=last_life)[0]]


@pytest.fixture
def messages() -> list[Numbered]:
    """Three publishers, two topics each, both QoS."""
    return [
        sent(number, topic=f"t/{number % 2}", qos=number // 2 % 2 + 1, publisher=publisher)
        for number in range(40)
        for publisher in ("p", "q", "r")
    ]


@pytest.fixture
def found(messages: list[Numbered]) -> list[Found]:
    """Each topic of a publisher has a partition of its own; these are mixed."""
    partitions = {flow: n for n, flow in enumerate(sorted({m.flow for m in messages}))}
    records = [record(message, partitions[message.flow]) for message in messages]
    order = [r.partition for r in records]
    random.Random(3).shuffle(order)
    queues = {n: [r for r in records if r.partition == n] for n in partitions.values()}
    return [queues[n].pop(0) for n in order]


def test_a_sound_topic(messages: list[Numbered], found: list[Found]) -> None:
    assert judge_stream(messages, found) == ([], Duplicates())
    assert judge_stream(messages, found, last_life=9) == ([], Duplicates())


@pytest.mark.parametrize("at", [0, 17, 119])
def test_a_planted_loss(messages: list[Numbered], found: list[Found], at: int) -> None:
    gone = found.pop(at)
    ((violation,), duplicates) = judge_stream(messages, found)
    assert (violation.kind, violation.client) == ("lost", gone.client_id)
    assert f"to {gone.topic_name} at QoS {gone.qos}" in violation.text
    assert duplicates == Duplicates()


@pytest.mark.parametrize("at", [0, 17, 119])
def test_a_planted_duplicate(messages: list[Numbered], found: list[Found], at: int) -> None:
    again = found[at]
    found.append(again)
    violations, duplicates = judge_stream(messages, found)
    assert [v.kind for v in violations] == (["duplicate"] if again.qos == 2 else [])
    assert duplicates == Duplicates(qos1=int(again.qos == 1))


@pytest.mark.parametrize("at", [0, 17, 60])
def test_a_planted_swap(messages: list[Numbered], found: list[Found], at: int) -> None:
    partition = found[at].partition
    other = next(n for n in range(at + 1, len(found)) if found[n].partition == partition)
    found[at], found[other] = found[other], found[at]
    assert kinds(messages, found) == ["order"]


def test_what_was_not_acknowledged_may_be_missing() -> None:
    message = sent(1)
    message.taken_at, message.refused_at = NEVER, 2.0
    assert kinds([message], []) == []
    assert kinds([message], [record(message)]) == []
    message.refused_at = NEVER
    assert kinds([message], []) == ["unacknowledged"]


def test_what_comes_again_does_not_count_for_the_order() -> None:
    first, second = sent(1), sent(2)
    assert kinds([first, second], [record(m) for m in (first, second, first, second)]) == []


def test_a_swap_across_qos_is_one() -> None:
    first, second = sent(1, qos=2), sent(2, qos=1)
    assert kinds([first, second], [record(second), record(first)]) == ["order"]


def test_a_topic_stays_in_its_partition() -> None:
    first, second = sent(1), sent(2)
    assert kinds([first, second], [record(first, 0), record(second, 1)]) == ["order"]


def test_each_life_of_the_broker_may_write_a_qos_2_message_once() -> None:
    message = sent(1, qos=2, lives=(3, 4))
    copies = [record(message)] * 5
    assert judge_stream([message], copies[:2]) == ([], Duplicates(qos2=1))
    assert kinds([message], copies[:3]) == ["duplicate"]


def test_what_a_life_had_spooled_later_ones_may_write_beside_what_its_publisher_sends_again() -> None:
    message = sent(1, qos=2, lives=(3, 4))
    copies = [record(message)] * 5
    assert kinds([message], copies[:4], last_life=5) == []
    assert kinds([message], copies, last_life=5) == ["duplicate"]
    message = sent(1, qos=2, lives=(5,))
    assert kinds([message], copies[:2], last_life=5) == ["duplicate"]


def test_what_was_given_back_may_come_again() -> None:
    message = sent(1, qos=2)
    message.given_back = 1
    copies = [record(message)] * 3
    assert judge_stream([message], copies[:2]) == ([], Duplicates(qos2=1))
    assert kinds([message], copies) == ["duplicate"]


def test_foreign_and_altered_records() -> None:
    message = sent(1)
    alien = Found(0, "t/0", 1, b"what?", "p")
    assert kinds([message], [record(message), alien]) == ["forged"]
    for changed in (
        Found(0, "t/1", 1, message.payload, "p"),
        Found(0, "t/0", 2, message.payload, "p"),
        Found(0, "t/0", 1, message.payload, "q"),
    ):
        assert kinds([message], [changed]) == ["altered"]


@pytest.mark.parametrize(
    "at_one, at_two, found",
    [
        ([0, 2, 4], [1, 3], []),
        ([0, 2, 4], [1], ["lost"]),
        ([0, 1, 2, 4], [1, 3], []),  # at QoS 1
        ([0, 2, 3, 4], [1, 3], ["duplicate"]),
        ([0, 2, 4, 4], [1, 3], []),
    ],
)
def test_a_group_over_two_nodes(at_one: list[int], at_two: list[int], found: list[str]) -> None:
    messages = [sent(number, qos=2 if number == 3 else 1) for number in range(5)]
    history = History(list(messages))
    for name, numbers in (("one", at_one), ("two", at_two)):
        interest = history.interests[name] = Interest({"$share/g/t/#": 2}, v5=True)
        interest.deliveries += [Delivery("t/0", messages[n].payload, messages[n].qos, b"", 9.0) for n in numbers]
    history.interests["plain"] = Interest({"t/#": 2}, v5=True)
    assert [violation.kind for violation in judge_group(history)] == found
    del history.interests["one"], history.interests["two"]
    assert list(judge_group(history)) == []
