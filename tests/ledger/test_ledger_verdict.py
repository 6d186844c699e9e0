"""That the ledger bites: losses, duplicates, swaps and forgeries planted in what the clients saw."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from tests.ledger.verdict import Case, Legacy, judge_all, judge_retained, judge_wills, repeated
from tests.simulation.history import Delivery, History, Interest, Message, Span


def sent(number: int, qos: int, topic_name: str = "t/0") -> Message:
    """A message that was acknowledged."""
    payload = f"{topic_name}|{number}".encode()
    return Message("p", topic_name, number, qos, payload, sent_at=number, taken_at=number + 0.5, attempts=1)


def got(message: Message, at: float = 1000.0) -> Delivery:
    return Delivery(message.topic_name, message.payload, message.qos, b"", at)


def sound(qos: int) -> Case:
    """Ten messages of one publisher that one subscriber got, over a crash."""
    messages = [sent(number, qos) for number in range(10)]
    interest = Interest({"t/#": 2}, v5=True, deliveries=[got(message) for message in messages])
    interest.spans["t/#"].append(Span(-2.0, -1.0))
    return Case(History(messages, {"s": interest}, kills=1, restless=True))


def plant(case: Case, change: Callable[[list[Delivery]], None]) -> list[str]:
    change(case.history.interests["s"].deliveries)
    return [violation.kind for violation in judge_all(case)]


def lose(deliveries: list[Delivery]) -> None:
    del deliveries[4]


def double(deliveries: list[Delivery]) -> None:
    deliveries.append(deliveries[4])


def swap(deliveries: list[Delivery]) -> None:
    deliveries[4], deliveries[5] = deliveries[5], deliveries[4]


def alter(deliveries: list[Delivery]) -> None:
    deliveries[4] = attrs.evolve(deliveries[4], payload=deliveries[4].payload + b"?")


@pytest.mark.parametrize("qos", [1, 2])
def test_a_sound_history_is_sound(qos: int) -> None:
    assert plant(sound(qos), lambda deliveries: None) == []


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize(
    "change, kinds",
    [(lose, ["lost"]), (swap, ["order"]), (alter, ["forged", "lost"])],
    ids=["loss", "swap", "wrong payload"],
)
def test_what_is_planted_is_reported(qos: int, change: Callable[[list[Delivery]], None], kinds: list[str]) -> None:
    assert plant(sound(qos), change) == kinds


def test_a_duplicate_is_one_at_qos_2_and_counted_at_qos_1() -> None:
    assert plant(sound(2), double) == ["duplicate"]
    case = sound(1)
    assert plant(case, double) == []
    assert repeated(case.history.interests["s"].deliveries, 1) == 1


def test_a_message_without_an_answer_is_reported() -> None:
    case = sound(2)
    case.history.messages[9].taken_at = float("inf")
    assert [violation.kind for violation in judge_all(case)] == ["unacknowledged"]


def test_what_clients_saw_on_the_wire_is_reported() -> None:
    case = sound(1)
    case.history.complaints.append(("s", "the session is gone"))
    assert [violation.kind for violation in judge_all(case)] == ["wire"]


def test_share_groups() -> None:
    messages = [sent(number, qos, "g/0") for qos in (1, 2) for number in (qos * 10, qos * 10 + 1)]
    deliveries = [got(message) for message in messages]

    def kinds(*found: Delivery) -> list[str]:
        group = History(messages, kills=1, restless=True)
        for number in range(2):
            member = Interest({"$share/crew/g/#": 2}, v5=True, deliveries=list(found[number::2]))
            member.spans["$share/crew/g/#"].append(Span(-2.0, -1.0))
            group.interests[f"m{number}"] = member
        return [violation.kind for violation in judge_all(Case(History([]), group))]

    assert kinds(*reversed(deliveries)) == []
    assert kinds(*deliveries, deliveries[1]) == []
    assert kinds(*deliveries, deliveries[3]) == ["duplicate"]
    assert kinds(*deliveries[1:]) == kinds(*deliveries[:3]) == ["lost"]
    assert kinds(*deliveries, attrs.evolve(deliveries[0], payload=b"?")) == ["forged"]


@pytest.mark.parametrize(
    "promised, died, revoked, times, kind",
    [
        (True, True, False, 1, None),
        (True, True, False, 0, "lost"),
        (True, True, False, 2, "duplicate"),
        (True, False, True, 0, None),
        (True, False, True, 1, "unwanted"),
        (False, True, False, 0, None),
        (False, True, False, 1, None),
    ],
)
def test_wills(promised: bool, died: bool, revoked: bool, times: int, kind: str | None) -> None:
    legacy = Legacy("w/1", b"will", 1, promised, died, revoked)
    deliveries = [Delivery("w/1", b"will", 2, b"", 5.0)] * times
    assert [violation.kind for violation in judge_wills([legacy], deliveries)] == ([] if kind is None else [kind])


def test_a_will_of_nobody_is_forged() -> None:
    assert [v.kind for v in judge_wills([], [Delivery("w/1", b"?", 2, b"", 5.0)])] == ["forged"]


def test_retained_messages() -> None:
    first, second, gone = sent(1, 1, "r/0"), sent(2, 1, "r/0"), sent(3, 2, "r/1")
    first.retain = second.retain = gone.retain = gone.removes = True

    def kinds(found: dict[str, bytes]) -> list[str]:
        return [violation.kind for violation in judge_retained([first, second, gone], found)]

    assert kinds({"r/0": second.payload}) == []
    assert kinds({"r/0": first.payload}) == ["retained"]
    assert kinds({}) == ["retained"]
    assert kinds({"r/0": second.payload, "r/1": b"old"}) == ["retained"]
    assert kinds({"r/0": second.payload, "r/2": b"?"}) == ["forged"]
