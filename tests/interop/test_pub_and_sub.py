"""`mqtt-trio pub` and `sub` as processes, beside mosquitto's clients and with mosquitto's broker [F3]."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop import mosquitto
from tests.interop.broker_process import ROOT, BrokerProcess
from tests.lines import LIMIT, LineProcess, require_tool

pytestmark = pytest.mark.interop
OURS = [sys.executable, "-m", "mqtt_trio"]
PROPERTIES = [
    *("-D", "publish", "payload-format-indicator", "1"),
    *("-D", "publish", "content-type", "text/plain"),
    *("-D", "publish", "response-topic", "r/t"),
    *("-D", "publish", "correlation-data", "cd"),
    *("-D", "publish", "user-property", "k", "v"),
    *("-D", "publish", "user-property", "k", "w x"),
]
"""In the order of their numbers, in which our JSON has them; mosquitto's has them as they came."""
FORMATS = [
    "%t %p %q %r %l %m",
    "%10p|%-10p|%3p|%010p|%x|%X",
    "%.3t|%60t|%-60t|%5.1t",
    "%C|%20C|%-20C|%D|%P|%R|%20R|%E|%05E|%F|%3F|%03F|%A|%S|%3S",
    r"\\ \t \e[1m @@ %% \a\v\0",
    "@Y-@m-@d",
    "%j",
]
JSON_PAYLOADS = ['{"a": 1.0, "b":[1,2e3,null,"x/y"], "ü": "\\u00e9\\n"}', "[]", "27", '"x"', "true"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a mosquitto broker."""
    with mosquitto.broker(tmp_path_factory.mktemp("mosquitto")) as port:
        yield port


@pytest.fixture(params=["ours", "mosquitto"])
def port(request: pytest.FixtureRequest, broker: BrokerProcess) -> int:
    """Port of either broker."""
    return broker.port if request.param == "ours" else int(request.getfixturevalue("foreign"))


def ours(command: str, port: int, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run pub or sub to its end."""
    line = [*OURS, command, "-h", "127.0.0.1", "-p", str(port), *arguments]
    return subprocess.run(line, input=data, capture_output=True, timeout=LIMIT, check=False, cwd=ROOT)


class OurSubscriber(LineProcess):
    """A `mqtt-trio sub` that has its SUBACK when the constructor returns."""

    def __init__(self, port: int, *arguments: str) -> None:
        super().__init__([*OURS, "sub", "-d", "-h", "127.0.0.1", "-p", str(port), *arguments], cwd=ROOT)
        self.wait_for(r"^Subscribed \(mid: 1\)")


class Collected:
    """What a subscriber prints to its end, byte for byte."""

    def __init__(self, command: list[str], port: int, *arguments: str) -> None:
        line = [*command, "-h", "127.0.0.1", "-p", str(port), "-d", *arguments]
        ours = command[0] == sys.executable
        # Debug lines of ours go to stderr; those of mosquitto_sub come between the messages and are cut out below.
        self._process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        stream = self._process.stderr if ours else self._process.stdout
        assert stream is not None
        while b"Subscribed (mid" not in (text := stream.readline()):
            assert text, f"{line} ended without a subscription"

    def all(self) -> bytes:
        out, _ = self._process.communicate(timeout=LIMIT)
        assert self._process.returncode == 0
        return re.sub(rb"(?m)^Client \S+ (sending|received) .*\n", b"", out)


@pytest.mark.parametrize("text", FORMATS)
def test_formats_are_those_of_mosquitto_sub(port: int, topic: str, text: str) -> None:
    arguments = ["-V", "mqttv5", "-t", topic, "-q", "1", "-C", "1", "-F", text]
    mine = Collected([*OURS, "sub"], port, *arguments)
    theirs = Collected([require_tool("stdbuf"), "-oL", require_tool("mosquitto_sub")], port, *arguments)
    mosquitto.publish(port, topic, "hello", version="mqttv5", qos=1, options=PROPERTIES)
    printed, expected = mine.all(), theirs.all()
    if text == "%j":  # two processes, two times
        printed, expected = (re.sub(rb'"tst":"[^"]*"', b'"tst":""', each) for each in (printed, expected))
    assert printed == expected


@pytest.mark.parametrize("pretty", [False, True])
def test_json_payloads_are_printed_as_mosquitto_sub_does(foreign: int, topic: str, pretty: bool) -> None:
    arguments = ["-t", topic, "-C", str(len(JSON_PAYLOADS)), "-F", "%J", *(["--pretty"] if pretty else [])]
    mine = Collected([*OURS, "sub"], foreign, *arguments)
    theirs = Collected([require_tool("stdbuf"), "-oL", require_tool("mosquitto_sub")], foreign, *arguments)
    for payload in JSON_PAYLOADS:
        mosquitto.publish(foreign, topic, payload, version="mqttv311")
    printed, expected = (re.sub(rb'"tst":(\t?)"[^"]*"', rb'"tst":\1""', each.all()) for each in (mine, theirs))
    assert printed == expected


@pytest.mark.parametrize("version", ["mqttv31", "mqttv311", "mqttv5"])
@pytest.mark.parametrize("qos", ["0", "1", "2"])
def test_both_ways(port: int, topic: str, version: str, qos: str) -> None:
    with (
        mosquitto.Subscriber(port, topic, version=version) as theirs,
        OurSubscriber(port, "-V", version, "-q", "2", "-t", topic, "-F", "got %p %q", "-C", "2") as mine,
    ):
        done = ours("pub", port, "-V", version, "-q", qos, "-t", topic, "-m", "from us")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        mosquitto.publish(port, topic, "from them", version=version, qos=int(qos))
        assert [message.payload for message in theirs.received(2)] == [b"from us", b"from them"]
        assert mine.wait() == 0
        assert [found[1] for found in mine.matches("^got (.*)")] == [f"from us {qos}", f"from them {qos}"]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_many_lines_in_order(port: int, topic: str, qos: int) -> None:
    lines = [f"line {number}" for number in range(2000)]
    with OurSubscriber(port, "-V", "5", "-q", "2", "-t", topic, "-F", "got %p", "-C", "2000") as mine:
        data = "\n".join(lines).encode()
        done = ours("pub", port, "-V", "5", "-q", str(qos), "-t", topic, "-l", data=data)
        assert (done.returncode, done.stderr) == (0, b"")
        assert mine.wait() == 0
        assert [found[1] for found in mine.matches("^got (.*)")] == lines


def test_a_file_over_websocket(broker: BrokerProcess, topic: str, tmp_path: Path) -> None:
    file = tmp_path / "payload"
    file.write_bytes(bytes(range(256)) * 1000)
    with mosquitto.Subscriber(broker.port, topic, version="mqttv5") as theirs:
        done = ours("pub", broker.ws_port, "--ws", "-t", topic, "-q", "1", "-f", str(file))
        assert (done.returncode, done.stderr) == (0, b"")
        assert theirs.received(1)[0].payload == file.read_bytes()


def test_refused_by_mosquitto(tmp_path: Path) -> None:
    """The same words and the same exit code as its own clients."""
    with mosquitto.broker(tmp_path, "allow_anonymous false\n") as port:
        for version in ("mqttv31", "mqttv311", "mqttv5"):
            arguments = ["-V", version, "-t", "a", "-m", "b"]
            command = [require_tool("mosquitto_pub"), "-h", "127.0.0.1", "-p", str(port), *arguments]
            theirs = subprocess.run(command, capture_output=True, timeout=LIMIT, check=False)
            mine = ours("pub", port, *arguments)
            assert mine.returncode == theirs.returncode
            assert mine.stderr.splitlines()[0] == theirs.stderr.splitlines()[0]
            assert b"Traceback" not in mine.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_sub(port: int, topic: str, number: signal.Signals) -> None:
    with OurSubscriber(port, "-V", "5", "-t", topic) as mine:
        mine.process.send_signal(number)
        assert mine.wait() == 0
        assert "sending DISCONNECT" in mine.text
        assert "Traceback" not in mine.text


def test_a_signal_ends_pub_at_a_terminal(broker: BrokerProcess, topic: str) -> None:
    command = [*OURS, "pub", "-h", "127.0.0.1", "-p", str(broker.port), "-t", topic, "-q", "1", "-l"]
    with mosquitto.Subscriber(broker.port, topic, version="mqttv5") as theirs:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        assert process.stdin is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert theirs.received(1)[0].payload == b"one"
        process.send_signal(signal.SIGINT)  # its read of standard input goes on in a thread
        assert process.wait(LIMIT) == 0
        assert process.communicate()[1] == b""


def test_a_closed_pipe_ends_sub_quietly(broker: BrokerProcess, topic: str) -> None:
    command = [*OURS, "sub", "-d", "-h", "127.0.0.1", "-p", str(broker.port), "-t", topic]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    while b"Subscribed (mid" not in (text := process.stderr.readline()):
        assert text
    mosquitto.publish(broker.port, topic, "one", version="mqttv311")
    assert process.stdout.readline() == b"one\n"  # given at once, though it goes into a pipe
    process.stdout.close()
    mosquitto.publish(broker.port, topic, "two", version="mqttv311")
    assert process.wait(LIMIT) == 0
    rest = process.stderr.read()
    process.stderr.close()
    assert b"Broken" not in rest
    assert b"Error" not in rest


def test_sub_outlives_a_broker(topic: str, tmp_path: Path) -> None:
    """mosquitto goes and comes back at the same port."""
    with mosquitto.broker(tmp_path) as port:
        mine = OurSubscriber(port, "-t", topic, "-F", "got %p", "-C", "1")
    with mine:
        mine.wait_for("The connection was lost. Connecting again")
        config = (tmp_path / "mosquitto.conf").as_posix()
        with LineProcess([require_tool("mosquitto"), "-c", config]):
            mine.wait_for(r"^Subscribed \(mid", count=2)
            mosquitto.publish(port, topic, "back", version="mqttv311")
            assert mine.wait() == 0
    assert mine.matches("^got back")
