"""What tests of the Kafka gateway share."""

from __future__ import annotations

from collections.abc import Callable

import trio

from gateways.kafka.cluster import Cluster

LIMIT = 60.0
"""Seconds after which a test that waits has failed."""


async def told(cluster: Cluster, condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, which some change of `cluster` brings about."""
    token, event = trio.lowlevel.current_trio_token(), trio.Event()

    def look() -> None:
        if condition():
            token.run_sync_soon(event.set)

    cluster.listen(look)
    look()
    with trio.fail_after(LIMIT):
        await event.wait()
    cluster.unlisten(look)
