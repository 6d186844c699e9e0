"""Events of the broker as log lines: who came, who was refused, who left and why."""

from __future__ import annotations

import logging

from mqtt_trio.broker.events import (
    ClientConnected,
    ClientDisconnected,
    ClientRefused,
    Event,
    SessionTakenOver,
)

logger = logging.getLogger("mqtt_trio.clients")


def log_event(event: Event) -> None:
    """Log comings and goings at INFO, everything else at DEBUG."""
    if isinstance(event, ClientConnected):
        if logger.isEnabledFor(logging.INFO):
            logger.info(
                "client %r (user %r) at %s connected to %s, version %d, keep alive %d s%s",
                event.client_id,
                event.user_name,
                event.peer,
                event.listener,
                event.protocol_version,
                event.keep_alive,
                ", session resumed" if event.session_present else "",
            )
    elif isinstance(event, ClientDisconnected):
        if logger.isEnabledFor(logging.INFO):
            logger.info("client %r at %s left: %s", event.client_id, event.peer, _reason(event))
    elif isinstance(event, ClientRefused):
        logger.info("client %r at %s refused: %s %s", event.client_id, event.peer, event.reason_code.name, event.reason)
    elif isinstance(event, SessionTakenOver):
        logger.info("client %r at %s is taken over by %s", event.client_id, event.old_peer, event.new_peer)
    elif logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", event)


def _reason(event: ClientDisconnected) -> str:
    if event.by_client:
        return "DISCONNECT by the client"
    name = f"{event.reason_code.name} " if event.reason_code is not None else ""
    return f"{name}{event.reason}".strip() or "the network connection ended"
