"""Whether Kafka is there, for whoever only writes to it: a producer without records notices nothing."""

from __future__ import annotations

from typing import Final

import trio

from gateways.kafka.cluster import Cluster

INTERVAL: Final = 5.0
"""Seconds between two looks."""
CONFIRMATION: Final = 1.0
"""Seconds until the second look at servers that seem to be away: one that was made while Kafka came back counts not."""
PART: Final = "this node"


async def watch_presence(cluster: Cluster) -> None:
    """See every INTERVAL whether any server speaks Kafka with us, until cancelled; a look that hangs is left behind."""
    limiter = trio.CapacityLimiter(1)
    while True:
        reason = await trio.to_thread.run_sync(cluster.glance, abandon_on_cancel=True, limiter=limiter)
        if reason is not None and not cluster.is_away:
            await trio.sleep(CONFIRMATION)
            reason = await trio.to_thread.run_sync(cluster.glance, abandon_on_cancel=True, limiter=limiter)
        if reason is not None:
            cluster.away(PART, reason)
        else:
            cluster.back(PART)
        await trio.sleep(INTERVAL)
