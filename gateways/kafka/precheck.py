"""Why Kafka does not let us in: each fault with its own words and its mend [K2].

kafka-python answers any of them with a time-out. `precheck` tells them apart, for the log when Kafka is away and for
`mqtt-trio doctor`. Everything blocks, though never for longer than LIMIT seconds, whatever servers, resolvers and token
endpoints do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from gateways.kafka.greeting import Address
from gateways.kafka.options import KafkaOptions
from gateways.kafka.precheck_steps import Connection, Failed
from gateways.kafka.precheck_steps import Fault as Fault
from gateways.kafka.precheck_steps import Step as Step
from gateways.kafka.security import Security, security_of

LIMIT: Final = 1.8
"""Seconds that a check takes at most."""
HEAD_START: Final = 0.5
"""Seconds that the first server has before the others are asked, too."""
EVERYWHERE: Final = (Fault.OPTIONS, Fault.NO_TOKEN, Fault.LOGIN_REFUSED, Fault.MECHANISM)
"""Faults that other servers would find as well: they are not asked, a wrong password is tried once."""
MOST_SERVERS: Final = 8
"""Servers that are asked; others in the list are not."""
DEFAULT_PORT: Final = 9092


def precheck(options: KafkaOptions, server: str) -> list[Step]:
    """Connect to `server` (`host:port`) as a client with these options would, and return what happened, step by step.

    Blocks for LIMIT seconds at most, in any thread; raises nothing. No text holds a secret.
    """
    return _Check(security_of(options), server).finish(time.monotonic() + LIMIT)


def probe(
    options: KafkaOptions, *, log_in: bool = True, certain: bool = False
) -> Callable[[Sequence[str]], str | None]:
    """Return what tells why none of some servers lets us in, and None when one does; it blocks for LIMIT seconds.

    Without `log_in` it is content when a server speaks Kafka with us. `certain`: silence is no reason, a client has
    more patience than this.
    """

    def ask(servers: Sequence[str]) -> str | None:
        deadline = time.monotonic() + LIMIT
        security = security_of(options)
        first = _Check(security, servers[0], log_in=log_in)
        if first.ended.wait(HEAD_START):
            if first.succeeded:
                return None
            if (found := first.finish(deadline))[-1].fault in EVERYWHERE:
                return _explain(servers, [found])
        checks = [first, *(_Check(security, server, log_in=log_in) for server in servers[1:MOST_SERVERS])]
        results = [check.finish(deadline) for check in checks]
        if any(check.succeeded for check in checks) or (certain and any(r[-1].fault is Fault.SILENT for r in results)):
            return None
        return _explain(servers, results)

    return ask


def split_server(server: str) -> Address:
    """Return host and port of `host`, `host:port` or `[ipv6]:port`."""
    host, colon, port = server.rpartition(":")
    if not colon or server.endswith("]"):
        host, port = server, str(DEFAULT_PORT)
    return host.strip("[]"), int(port)


def _explain(servers: Sequence[str], results: Sequence[list[Step]]) -> str:
    """Return in one line what is wrong with each server and what helps."""
    last = [steps[-1] for steps in results]
    reasons = [f"{server} {step.text}" for server, step in zip(servers, last, strict=False)]
    mends = dict.fromkeys(step.mend for step in last if step.mend)
    return "; ".join([", ".join(reasons), *mends])


class _Check:
    """A check in a thread of its own: resolvers, and libraries that log in, take no time limit."""

    def __init__(self, security: Security, server: str, *, log_in: bool = True) -> None:
        self.ended = threading.Event()
        self._log_in = log_in
        self._steps: list[Step] = []
        self._connection = Connection(security, *split_server(server), time.monotonic() + LIMIT, self._steps)
        threading.Thread(target=self._run, name="kafka-precheck", daemon=True).start()

    @property
    def succeeded(self) -> bool:
        return self.ended.is_set() and self._steps[-1].fault is None

    def finish(self, deadline: float) -> list[Step]:
        """Wait for the end, and cut off what takes longer."""
        if self.ended.wait(max(0.0, deadline + 0.1 - time.monotonic())):
            return self._steps
        text = "does not answer, or the name service or a login takes too long"
        return [*self._steps, Step(name=self._connection.at, fault=Fault.SILENT, text=text)]

    def _run(self) -> None:
        try:
            self._connection.go(log_in=self._log_in)
        except Failed as exc:
            self._steps.append(exc.step)
        except Exception as exc:  # a bug of ours must not become an endless wait
            text = f"cannot be checked ({type(exc).__name__})"
            self._steps.append(Step(name=self._connection.at, fault=Fault.LOST, text=text))
        finally:
            self.ended.set()
