"""What a part of the gateway that writes to a topic must know of the cluster, on the Trio thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.cluster import Cluster

TOPICS: Final = "topics"
"""The part of the gateway that looks after topics."""


async def follow(cluster: Cluster, look: Callable[[], None]) -> None:
    """Call `look` now and behind each change of what is known of the cluster, until cancelled."""
    token = trio.lowlevel.current_trio_token()

    def look_soon() -> None:  # any thread
        try:
            token.run_sync_soon(look, idempotent=True)
        except trio.RunFinishedError:
            pass

    cluster.listen(look_soon)
    try:
        look()
        await trio.sleep_forever()
    finally:
        cluster.unlisten(look_soon)


def trouble_of(cluster: Cluster, part: str, topic: str) -> str | None:
    """Return why `part` cannot write to `topic` at present; None: it can, as far as is known. Others may be away for
    reasons of their own."""
    trouble = cluster.away_for(part)
    if trouble is None and cluster.facts(topic) is None:
        found = cluster.trouble(topic)
        trouble = found.text if found is not None else cluster.away_for(TOPICS)
    return trouble


async def stop_unless_away(cluster: Cluster, producer: ProducerBridge) -> None:
    """Close a producer, once Kafka has what it holds; while Kafka is away nobody waits for that. Bounded by the
    caller's cancel scope."""
    with trio.CancelScope() as scope:
        if cluster.is_away:
            scope.cancel()
        await producer.stop()
