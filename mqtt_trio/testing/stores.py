"""For stores of your own: what every Store must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import attrs

from mqtt_trio.broker.store import Batch, DeliveryRow, MemoryStore, Store, StoredState
from mqtt_trio.errors import StoreError
from mqtt_trio.testing.store_faults import Fault as Fault
from mqtt_trio.testing.store_faults import FaultyStore as FaultyStore
from mqtt_trio.testing.store_faults import Interruption, dying

Reopen: TypeAlias = Callable[[], Store]
"""The store at one place, in a life of its own: loaded and closed before the next one begins."""
MakePlace: TypeAlias = Callable[[], Reopen]
"""Make a new, empty place."""

NEVER: Final = 0xFFFFFFFF
ODD_TEXTS: Final = ("", "a", "a\0b", "\0", "ü/\u65e5\u672c/\U0001f600", "'\"; DROP TABLE sessions; --", "x" * 65_535)
FRAMES: Final = (b"", b"\0", b"\x30\x03\0\x01a", bytes(range(256)), b"\xff" * (2 * 1024 * 1024))


def check_store(make: MakePlace) -> None:
    """Run the whole suite: every kind of row, whole batches, batches that come again, numbers that are not used again,
    commits that end by an exception at any of their rows.

    `make` is called once for each check and makes a new, empty place; what it returns is called for each life of the
    store there. For a store that keeps files: `lambda: partial(MyStore, new_path())`.

    Raises:
      AssertionError: the store does something else, or whatever it raises itself; a note names the check.
    """
    for check in _CHECKS:
        try:
            check(make())
        except Exception as exc:
            exc.add_note(f"in {check.__name__}")
            raise


def apply(reopen: Reopen, *batches: Batch) -> StoredState:
    """Commit `batches` in one life and return what the next one loads."""
    store = reopen()
    store.load()
    for batch in batches:
        store.commit(batch)
    store.close()
    return reload(reopen)


def reload(reopen: Reopen) -> StoredState:
    """Return what the next life loads."""
    store = reopen()
    try:
        return store.load()
    finally:
        store.close()


def rows_of(state: StoredState) -> dict[str, Any]:
    """Return the rows of `state` so that equal states are equal: only deliveries have an order."""
    return {
        "sessions": sorted(state.sessions),
        "groups": sorted(state.groups),
        "subscriptions": sorted(state.subscriptions),
        "deliveries": list(state.deliveries),
        "contents": dict(state.contents),
        "received": sorted(state.received),
        "retained": sorted(state.retained),
        "marks": dict(state.marks),
    }


def delivery(number: int, owner: int, packet_id: int = 0, **changes: Any) -> DeliveryRow:
    """Return a delivery at QoS 1 with a frame that tells its number."""
    values: dict[str, Any] = {
        "flags": 1,
        "identifiers": None,
        "protocol_version": 5,
        "published_at": 1_700_000_000.125,
        "content": 0,
        "frame": b"frame %d" % number,
        **changes,
    }
    return (number, owner, packet_id, *values.values())


def session(number: int, client_id: str | None = None) -> Batch:
    """Return a batch that begins a session."""
    name = f"client {number}" if client_id is None else client_id
    return Batch(sessions={number: (number, name, None, NEVER, None, None, None)})


def _begins_empty(reopen: Reopen) -> None:
    assert reopen().describe()
    for state in (apply(reopen), apply(reopen, Batch())):
        assert rows_of(state) == rows_of(StoredState())
        assert (state.last_owner, state.last_number) == (0, 0)
    store = reopen()
    store.load()
    store.close()
    store.close()


def everything() -> Batch:
    """Return a batch with every kind of row, and every value that is easily lost."""
    batch = Batch()
    for number, text in enumerate(ODD_TEXTS, 1):
        user_name = None if number == 1 else text
        batch.sessions[number] = (number, text, user_name, NEVER, 1_800_000_000.0625, b"will", 0.0)
        batch.subscriptions[number, text] = (number, text, 0x2E, 268_435_455)
        batch.subscriptions[1, text] = (1, text, 0, None)
        batch.groups[100 + number] = f"$share/{text}"
        batch.retained[text] = (text, FRAMES[number % len(FRAMES)], text, 1_700_000_000.1)
        batch.received[number, 65_535] = batch.received[number, 1] = batch.received[number, -2] = True
        batch.marks[text] = FRAMES[number % len(FRAMES)]
    batch.sessions[50] = (50, "connected", None, 0, None, None, None)
    for number, frame in enumerate(FRAMES, 1000):
        batch.contents[number] = frame
        batch.deliveries[number] = delivery(number, 1, frame=frame, identifiers=b"\x01\xff\x7f", protocol_version=4)
        batch.deliveries[number + 100] = delivery(number + 100, 101, content=number, frame=None, flags=14)
    batch.deliveries[2_000_000_000_000] = delivery(2_000_000_000_000, 50, 65_535, published_at=1_700_000_000)
    return batch


def _keeps_every_kind_of_row(reopen: Reopen) -> None:
    batch = everything()
    state = apply(reopen, batch)
    assert rows_of(state) == {
        "sessions": sorted(row for row in batch.sessions.values() if row),
        "groups": sorted(batch.groups.items()),
        "subscriptions": sorted(row for row in batch.subscriptions.values() if row),
        "deliveries": [batch.deliveries[number] for number in sorted(batch.deliveries)],
        "contents": batch.contents,
        "received": sorted(batch.received),
        "retained": sorted(row for row in batch.retained.values() if row),
        "marks": batch.marks,
    }
    assert state.last_owner >= 100 + len(ODD_TEXTS)
    assert state.last_number >= 2_000_000_000_000
    assert all(type(row[6]) is float for row in state.deliveries[:1])


def _replaces(reopen: Reopen) -> None:
    apply(reopen, everything())
    again = Batch(
        sessions={2: (2, "other", "user", 1, None, None, None)},
        groups={101: "$share/other"},
        subscriptions={(1, "a"): (1, "a", 2, 7)},
        retained={"a": ("a", b"new", "publisher", 1.5)},
        received={(1, 1): True},
        marks={"a": b"new", "ü": None, "gone": None},
    )
    rows = rows_of(apply(reopen, again))
    assert again.sessions[2] in rows["sessions"]
    assert (101, "$share/other") in rows["groups"]
    assert [row for row in rows["subscriptions"] if row[:2] == (1, "a")] == [(1, "a", 2, 7)]
    assert [row for row in rows["retained"] if row[0] == "a"] == [("a", b"new", "publisher", 1.5)]
    assert rows["received"].count((1, 1)) == 1
    assert rows["marks"] == {
        name: value for name, value in (everything().marks | again.marks).items() if value is not None
    }


def _removes_single_rows(reopen: Reopen) -> None:
    batch = everything()
    before = rows_of(apply(reopen, batch))
    gone = Batch(
        subscriptions={(1, text): None for text in ODD_TEXTS},
        retained=dict.fromkeys(ODD_TEXTS),
        received={(1, 1): False, (7, 9): False},
        done=[1000, 1100, 5],
        contents_done=[1000, 77],
        marks=dict.fromkeys(ODD_TEXTS),
    )
    rows = rows_of(apply(reopen, gone))
    assert rows["subscriptions"] == [row for row in before["subscriptions"] if row[0] != 1]
    assert rows["retained"] == []
    assert rows["marks"] == {}
    assert rows["received"] == [entry for entry in before["received"] if entry != (1, 1)]
    assert rows["deliveries"] == [row for row in before["deliveries"] if row[0] not in (1000, 1100)]
    assert sorted(rows["contents"]) == sorted(before["contents"])[1:]
    assert rows["sessions"] == before["sessions"]


def _removes_owners_with_what_is_theirs(reopen: Reopen) -> None:
    batch = Batch(groups={3: "$share/g/a", 4: "$share/g/b"})
    for owner in (1, 2):
        batch.sessions[owner] = (owner, str(owner), None, 1, None, None, None)
        batch.subscriptions[owner, "a"] = (owner, "a", 1, None)
        batch.received[owner, 65_535] = batch.received[owner, 1] = True
        batch.received[owner, -65_535] = batch.received[owner, -1] = True
    for number in range(1, 41):  # waiting ones and some on their way
        batch.deliveries[number] = delivery(number, number % 4 + 1, number if number % 8 < 4 else 0)
    state = apply(reopen, batch, Batch(sessions={1: None}, groups={4: None}))
    rows = rows_of(state)
    assert [row[0] for row in rows["sessions"]] == [2]
    assert [row[0] for row in rows["groups"]] == [3]
    assert rows["subscriptions"] == [(2, "a", 1, None)]
    assert rows["received"] == [(2, -65_535), (2, -1), (2, 1), (2, 65_535)]
    assert rows["deliveries"] == [row for row in batch.deliveries.values() if row[1] in (2, 3)]
    # The next life knows as well what is whose.
    rows = rows_of(apply(reopen, Batch(sessions={2: None}, groups={3: None}, done=[1, 2])))
    assert {name: len(found) for name, found in rows.items()} == dict.fromkeys(rows, 0)


def _moves_come_before_removals(reopen: Reopen) -> None:
    batch = Batch(sessions={n: (n, str(n), None, 1, None, None, None) for n in (1, 2)}, groups={3: "$share/g/a"})
    batch.deliveries = {n: delivery(n, n % 2 + 1, n % 3) for n in range(1, 13)}
    moves = {1: (3, 0, 1), 3: (1, 7, 2), 5: (2, 0, 1), 2: (1, 9, 9), 4: (3, 65_535, 13), 6: (2, 0, 2)}
    rows = rows_of(apply(reopen, batch, Batch(moves=moves, sessions={2: None})))
    expected = []
    for number, row in batch.deliveries.items():
        owner, packet_id, flags = moves.get(number, row[1:4])
        if owner != 2:
            expected.append((number, owner, packet_id, flags, *row[4:]))
    assert rows["deliveries"] == expected
    assert apply(reopen, Batch(moves={99: (1, 1, 1)})).deliveries == expected, "a move of what is gone"


def _takes_a_batch_again(reopen: Reopen) -> None:
    batch = everything()
    batch.moves = {1101: (1, 5, 9)}
    batch.done = [1102]
    store = reopen()
    store.load()
    store.commit(everything())
    for _ in range(2):
        store.commit(Batch(moves=batch.moves, done=batch.done))
    larger = attrs.evolve(everything(), moves={}, done=[1104])
    larger.deliveries = {3_000_000_000_000: delivery(3_000_000_000_000, 1)}
    for _ in range(2):
        store.commit(larger)
    store.close()
    numbers = [row[0] for row in reload(reopen).deliveries]
    assert 1102 not in numbers
    assert 1104 not in numbers
    assert numbers[-1] == 3_000_000_000_000
    assert [row[1:4] for row in reload(reopen).deliveries if row[0] == 1101] == [(1, 5, 9)]


def _keeps_deliveries_in_order(reopen: Reopen) -> None:
    numbers = [9, 10, 99, 100, 2**31, 2**32, 2**40]
    batches = [Batch(deliveries={n: delivery(n, 1)}) for n in numbers]
    assert [row[0] for row in apply(reopen, session(1), *batches).deliveries] == numbers


def _numbers_are_never_used_again(reopen: Reopen) -> None:
    batch = session(500)
    batch.deliveries = {7_000: delivery(7_000, 500)}
    batch.contents = {7_001: b"shared"}
    gone = Batch(sessions={500: None}, done=[7_000], contents_done=[7_001])
    state = apply(reopen, batch, gone)
    for _ in range(3):
        assert state.last_owner == 500
        assert state.last_number >= 7_001
        before, state = state, apply(reopen, Batch(retained={"a": ("a", b"", "", 0.0)}))
        assert state.last_number >= before.last_number
    state = apply(reopen, Batch(groups={501: None}))
    assert state.last_owner == 501, "even of an owner that was never seen"


def _takes_big_batches(reopen: Reopen) -> None:
    count = 5_003
    batch = session(1)
    batch.deliveries = {n: delivery(n, 1, n % 2 * n) for n in range(1, count)}
    batch.received = {(1, n): True for n in range(1, count)}
    batch.contents = {n: b"%d" % n for n in range(count, 2 * count)}
    batch.retained = {f"t/{n}": (f"t/{n}", b"", "c", 0.5) for n in range(count)}
    batch.subscriptions = {(1, f"t/{n}"): (1, f"t/{n}", 1, None) for n in range(count)}
    batch.groups = {n: f"$share/g/{n}" for n in range(10, count)}
    batch.marks = {f"m/{n}": b"%d" % n for n in range(count)}
    gone = Batch(
        done=[n for n in range(1, count) if n % 100 < 60 or n % 3 == 0] * 2,
        contents_done=list(range(count, 2 * count, 2)),
        received={(1, n): False for n in range(1, count) if n % 7},
        retained=dict.fromkeys([f"t/{n}" for n in range(0, count, 2)]),
        subscriptions=dict.fromkeys([(1, f"t/{n}") for n in range(0, count, 2)]),
        groups=dict.fromkeys(range(11, count)),
        marks=dict.fromkeys([f"m/{n}" for n in range(1, count)]),
    )
    rows = rows_of(apply(reopen, batch, gone))
    kept = set(batch.deliveries) - set(gone.done)
    assert [row[0] for row in rows["deliveries"]] == sorted(kept)
    assert sorted(rows["contents"]) == list(range(count + 1, 2 * count, 2))
    assert rows["received"] == [(1, n) for n in range(7, count, 7)]
    assert len(rows["retained"]) == len(rows["subscriptions"]) == count // 2
    assert rows["groups"] == [(10, "$share/g/10")]
    assert rows["marks"] == {"m/0": b"0"}


def _two_batches(first: int) -> tuple[Batch, Batch]:
    """Return two batches on owners and deliveries from `first` on; the second one changes what the first one wrote."""
    one, two = first + 1, first + 2
    batch = Batch(groups={first: f"$share/g/{first}"})
    for owner in (one, two):
        batch.sessions[owner] = (owner, f"c{owner}", None, NEVER, None, None, None)
        batch.subscriptions[owner, "a"] = (owner, "a", 1, None)
        batch.received[owner, 7] = True
        batch.contents[owner] = b"shared"
        batch.retained[f"t/{owner}"] = (f"t/{owner}", b"old", "", 0.5)
        batch.marks[f"m/{owner}"] = b"old"
    batch.deliveries = {n: delivery(n, (first, one, two)[n % 3], n % 2) for n in range(first + 10, first + 22)}
    change = Batch(
        sessions={one: (one, "other", None, 1, 2.5, None, None), two: None}, groups={first + 3: "$share/h/a"}
    )
    change.subscriptions = {(one, "a"): None, (one, "b"): (one, "b", 2, 5)}
    change.received = {(one, 7): False, (one, 8): True}
    change.retained = {f"t/{one}": None, f"t/{two}": (f"t/{two}", b"new", "", 1.5)}
    change.marks = {f"m/{one}": None, f"m/{two}": b"new"}
    owned = {n: (row[1], n) for n, row in batch.deliveries.items()}
    change.moves = {n: (one, n % 5 + 1, 2) for n, (owner, _) in owned.items() if owner == first}
    change.done = [n for n, (owner, _) in owned.items() if owner == one]
    change.deliveries = {n: delivery(n, one, n % 2 * n) for n in range(first + 30, first + 34)}
    change.contents = {first + 40: b"also shared"}
    change.contents_done = [one]
    return batch, change


def _survives_a_commit_that_dies(reopen: Reopen) -> None:
    """Whatever ends a commit, at any of its rows: it is there as a whole or not at all, the life in which that happened
    goes on, and the batch may come again."""
    model, store = MemoryStore(), reopen()
    store.load()
    first = rows = 0
    died = True
    while died:
        for goes_on in (False, True):
            first += 100
            before, after = _two_batches(first)
            model.commit(before)
            store.commit(before)
            nothing = rows_of(model.load())
            model.commit(after)
            whole = rows_of(model.load())
            died = not _commits(store, dying(after, rows))
            if not goes_on:
                store.close()
                found = rows_of(reload(reopen))
                assert found == whole or (died and found == nothing), f"a commit that dies at row {rows} leaves a part"
                store = reopen()
                store.load()
            store.commit(after)
            gone = Batch(sessions={first + 1: None}, groups={first: None, first + 3: None}, contents_done=[first + 2])
            gone.contents_done.append(first + 40)
            gone.retained, gone.marks = {f"t/{first + 2}": None}, {f"m/{first + 2}": None}
            model.commit(gone)
            store.commit(gone)
        rows += 1
    store.close()
    assert rows > 1, "nobody read the batch"
    assert rows_of(reload(reopen)) == rows_of(model.load())


def _commits(store: Store, batch: Batch) -> bool:
    try:
        store.commit(batch)
    except (Interruption, StoreError):
        return False
    return True


_CHECKS: Final = (
    _begins_empty,
    _keeps_every_kind_of_row,
    _replaces,
    _removes_single_rows,
    _removes_owners_with_what_is_theirs,
    _moves_come_before_removals,
    _takes_a_batch_again,
    _keeps_deliveries_in_order,
    _numbers_are_never_used_again,
    _takes_big_batches,
    _survives_a_commit_that_dies,
)
