"""Share groups that span nodes, as the broker sees them [K23]: a gateway knows which node serves a message."""

from __future__ import annotations

from typing import Protocol

from mqtt_trio.broker.message import Message


class Spread(Protocol):
    """What knows of the members of share groups on other nodes. Groups go by their whole name, `$share/NAME/FILTER`.

    Called inside the hot stretch: it must be quick, and must not raise. A message that its publisher sent to this node
    is shown to the taps before it is delivered.
    """

    def changed(self, name: str, ready: int, *, waits: bool, kept: bool) -> None:
        """A group has begun, or members came, went, connected or disconnected: `ready` are connected; `waits`: none
        is, and messages at QoS 1 and 2 wait for them; `kept`: the store has it."""

    def ended(self, name: str) -> None:
        """A group has lost its last member here; what waits for it is dropped unless it is taken now."""

    def set_aside(self) -> object:
        """Another message is published in the middle of a delivery: the Will of a client that it ended. Give what
        `go_back` needs to go on with the first one."""

    def go_back(self, state: object) -> None:
        """The delivery that was set aside goes on."""

    def serves(self, name: str, message: Message) -> bool:
        """Say whether the message that is being delivered is for the members here."""
