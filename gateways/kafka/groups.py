"""Names of the consumer groups in which this deployment keeps offsets."""

from __future__ import annotations

from typing import Final

import attrs

MESSAGES_GROUP: Final = "monstermq-cluster"
"""The nodes share the work on mqtt.messages in it [K11]."""
COMPAT_MESSAGES_GROUP: Final = "Monster"
"""The same with `Profile = "compat"` [K16]."""
BUS_GROUP_PREFIX: Final = "mqtt-trio-bus-"
"""A node keeps its checkpoint of the bus topic in a group of its own [K5]: it reads all partitions and is no member."""


def bus_group(node_id: str) -> str:
    """Return the group of a node's checkpoint."""
    return BUS_GROUP_PREFIX + node_id


def node_of(group: str) -> str | None:
    """Return the `Node.Id` whose checkpoint a group is, None for any other group."""
    return group.removeprefix(BUS_GROUP_PREFIX) if group.startswith(BUS_GROUP_PREFIX) else None


@attrs.frozen(kw_only=True)
class GroupState:
    """A group as Kafka knows it."""

    name: str
    state: str
    """In Kafka's words: Stable, Empty, Dead, PreparingRebalance, ..."""
    members: tuple[str, ...] = ()
    """`client id at host`; consumers that assign partitions to themselves are no members."""

    @property
    def is_active(self) -> bool:
        """It has members, or is about to: their commits would undo a reset, and Kafka refuses one."""
        return bool(self.members) or self.state not in ("Empty", "Dead")
