"""Outbound Topic Aliases of one network connection [MQTT5-3.3.2.3.4]."""

from __future__ import annotations


class OutboundAliases:
    """Gives the first `maximum` Topic Names an alias each; they keep it as long as the connection lives.

    An alias counts from the moment its first frame is on its way: `propose` says how a frame is to be written, `sent`
    says that it was put into the outbox. A frame that was dropped in between has told the client nothing.
    """

    __slots__ = ("_aliases", "_proposed", "maximum")

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        """The lower of the client's Topic Alias Maximum and ours [MQTT5-3.1.2-26]."""
        self._aliases: dict[str, int] = {}
        self._proposed: str | None = None

    def propose(self, topic_name: str) -> tuple[int, bool]:
        """Return the alias for the next frame and whether the client knows it (then the Topic Name stays empty);
        (0, False) without an alias."""
        self._proposed = None
        alias = self._aliases.get(topic_name)
        if alias is not None:
            return alias, True
        if len(self._aliases) >= self.maximum:
            return 0, False
        self._proposed = topic_name
        return len(self._aliases) + 1, False

    def withdraw(self) -> None:
        """The frame goes without the proposed alias."""
        self._proposed = None

    def sent(self) -> None:
        """The frame that was proposed last is in the outbox."""
        if self._proposed is not None:
            self._aliases[self._proposed] = len(self._aliases) + 1
            self._proposed = None
