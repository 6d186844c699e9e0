"""Debian's mosquitto_pub and mosquitto_sub."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from tests.lines import LIMIT, LineProcess, require_tool

MARK: Final = "message "
FORMAT: Final = MARK + "%r %q %t %x"
"""RETAIN, QoS, Topic Name, payload in hexadecimal (nothing when it is empty)."""
END: Final = "end of test"


@attrs.frozen
class Received:
    """One message as mosquitto_sub printed it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool = False


def parse(line: str) -> Received:
    """Read a line of `FORMAT`."""
    retain, qos, topic, payload = line.split(MARK, 1)[1].split(" ", 3)
    return Received(topic, bytes.fromhex(payload), int(qos), retain == "1")


class Subscriber(LineProcess):
    """A mosquitto_sub that has its SUBACK when the constructor returns."""

    def __init__(self, port: int, *filters: str, version: str, qos: int = 2, options: Sequence[str] = ()) -> None:
        # Into a pipe, C's stdio keeps lines back; stdbuf (coreutils) makes it give each line at once, and then becomes
        # the program that it starts: the pid is mosquitto_sub's.
        command = [require_tool("stdbuf"), "-oL", require_tool("mosquitto_sub"), "-d", "-h", "127.0.0.1"]
        command += ["-p", str(port), "-V", version, "-q", str(qos)]
        command += [*([] if "-F" in options else ["-F", FORMAT]), *options]
        for topic_filter in filters:
            command += ["-t", topic_filter]
        super().__init__(command)
        self.wait_for(r"Subscribed \(mid")

    def received(self, count: int) -> list[Received]:
        """Return the first `count` messages, waiting for them."""
        self.wait_for("^" + MARK, count=count)
        return self.so_far()[:count]

    def so_far(self) -> list[Received]:
        """Return the messages so far."""
        return [parse(found.string) for found in self.matches("^" + MARK)]


def publish(
    port: int, topic: str, payload: str | bytes | None, *, version: str, qos: int = 0, options: Sequence[str] = ()
) -> None:
    """Run mosquitto_pub once; it returns when its message is acknowledged. A payload of None is an empty one."""
    command = [require_tool("mosquitto_pub"), "-h", "127.0.0.1", "-p", str(port), "-V", version, "-q", str(qos)]
    command += ["-t", topic, *(["-n"] if payload is None else ["-s"]), *options]
    data = payload.encode() if isinstance(payload, str) else payload or b""
    done = subprocess.run(command, input=data, capture_output=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)


def publish_lines(port: int, topic: str, lines: Sequence[str], *, version: str, qos: int, folder: Path) -> None:
    """Publish each line as a message, in order, over one connection (`mosquitto_pub -l`)."""
    source = folder / "lines"
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = [require_tool("mosquitto_pub"), "-h", "127.0.0.1", "-p", str(port), "-V", version, "-q", str(qos)]
    with source.open("rb") as stdin:
        done = subprocess.run(
            [*command, "-t", topic, "-l"], stdin=stdin, capture_output=True, timeout=4 * LIMIT, check=False
        )
    assert done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)


@contextmanager
def broker(folder: Path, config: str = "") -> Iterator[int]:
    """Run Debian's mosquitto on a free port of the loopback address; give the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    file = folder / "mosquitto.conf"
    file.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n{config}", encoding="utf-8")
    with LineProcess([require_tool("mosquitto"), "-c", str(file)]) as process:
        process.wait_for(r"mosquitto version .* running")
        yield port
