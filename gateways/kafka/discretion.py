"""Keeps secrets out of the log, whoever writes there: kafka-python's DEBUG lines show its options and what it sends."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

HIDDEN: Final = "********"


class Discretion(logging.Filter):
    """Replaces secrets in what loggers are given. Any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._secrets: tuple[str, ...] = ()

    def learn(self, secrets: Iterable[str]) -> None:
        """Hide these from now on, also as `repr` writes them, as text or as bytes."""
        shapes = set(self._secrets)
        for secret in secrets:
            shapes |= {secret, repr(secret)[1:-1], repr(secret.encode("utf-8", "surrogatepass"))[2:-1]}
        self._secrets = tuple(sorted(shapes, key=len, reverse=True))  # what contains another one goes first

    def hide(self, text: str) -> str:
        """Return `text` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, without secrets."""
        if isinstance(record.args, tuple):
            record.args = tuple(type(each).__name__ if _logs_in(each) else each for each in record.args)
        if self._secrets:
            try:
                text = record.getMessage()
            except Exception:  # the handler says what is wrong with a record
                return True
            if (hidden := self.hide(text)) != text:
                record.msg, record.args = hidden, ()
        return True


def _logs_in(argument: object) -> bool:
    """Tell whether something is a request or an answer of a login, which holds passwords and tokens."""
    return type(argument).__name__.startswith("Sasl")


_discretion: Final = Discretion()


def keep_secret(*secrets: str | None) -> None:
    """Hide these in whatever kafka-python logs from now on."""
    _discretion.learn(secret for secret in secrets if secret)
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "kafka"]
    for name in ("kafka", *names):  # a filter of a logger does not see what its children log
        logging.getLogger(name).addFilter(_discretion)


def hide(text: str) -> str:
    """Return `text`, which a server may have made, without secrets."""
    return _discretion.hide(text)
