"""`mqtt-trio` with faults that only a crash shows, for the test that the ledger finds them:

python tests/ledger/planted_broker.py FAULT[,FAULT...] serve ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import attrs
import trio

from mqtt_trio.__main__ import main
from mqtt_trio.broker.keeper import Keeper
from mqtt_trio.server.sqlite_store import SqliteStore
from mqtt_trio.server.storage import Storage

SLOW: Final = 0.05
"""Seconds that a commit takes longer, so that most kills meet one."""


def acknowledge_early() -> None:
    """Everything that waits for the store goes as soon as the store is asked."""
    commit = Storage._commit

    async def early(self: Storage) -> bool:
        journal = self.broker.journal
        journal.number += 1
        self.broker.keeper.committed(trio.current_time())
        journal.number -= 1
        self.broker.flush()
        await trio.sleep(SLOW)
        return await commit(self)

    Storage._commit = early  # type: ignore[method-assign]


def forget_received() -> None:
    """The store is not told which QoS 2 messages of publishers it has."""

    def received(self: Keeper, session: Any, packet_id: int, *, gated: bool = False) -> None:
        self.journal.dirty = True

    ask = Storage._ask

    async def ask_slowly(self: Storage, function: Callable[[], Any]) -> Any:
        answer = await ask(self, function)
        await trio.sleep(SLOW)  # it is on disk and nobody knows: PUBRECs are lost by a kill
        return answer

    Storage._ask = ask_slowly  # type: ignore[method-assign]
    Keeper.received = received  # type: ignore[method-assign]


def load_backwards() -> None:
    """What waits in the store comes in the wrong order."""
    load = SqliteStore.load

    def backwards(self: SqliteStore) -> Any:
        state = load(self)
        return attrs.evolve(state, deliveries=state.deliveries[::-1])

    SqliteStore.load = backwards  # type: ignore[method-assign]


def forget_retained() -> None:
    """The store is not told of retained messages."""
    Keeper.retained = lambda self, message: None  # type: ignore[method-assign]


FAULTS = {
    "acknowledge-early": acknowledge_early,
    "forget-received": forget_received,
    "load-backwards": load_backwards,
    "forget-retained": forget_retained,
}

if __name__ == "__main__":
    for fault in sys.argv[1].split(","):
        FAULTS[fault]()
    sys.exit(main(sys.argv[2:]))
