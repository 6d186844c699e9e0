"""Flags of pub and sub [F3]: what they mean, and what wrong ones are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from mqtt_trio import __main__ as command_line
from mqtt_trio.commands import pub, sub
from mqtt_trio.commands.arguments import NEVER_EXPIRES, Connection, Parser, add_connection_flags, read_connection
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import Connect, Disconnect, MessageProperties, Will
from tests.command_support import pid_free


def read(*arguments: str, command: str = "sub") -> Connection:
    parser = Parser(command, "", "")
    add_connection_flags(parser)
    return read_connection(parser.read(arguments), command)


def test_defaults_are_those_of_mosquitto() -> None:
    connection = read()
    assert str(connection.endpoint) == "localhost port 1883"
    assert connection.connect == Connect(protocol_version=ProtocolVersion.MQTT_3_1_1, keep_alive=60)
    assert connection.disconnect == Disconnect()


@pytest.mark.parametrize(
    "text, version",
    [("31", 3), ("mqttv31", 3), ("311", 4), ("mqttv311", 4), ("5", 5), ("mqttv5", 5)],
)
def test_versions(text: str, version: int) -> None:
    assert read("-V", text).connect.protocol_version == version


def test_a_3_1_client_has_an_identifier() -> None:
    assert pid_free(read("-V", "31").connect.client_id).startswith("mqtt-trio-sub-")
    assert len(read("-V", "31").connect.client_id) <= 23


def test_everything_of_a_connect() -> None:
    connection = read(
        *("-V", "5", "-i", "me", "-u", "bob", "-P", "-secret", "-k", "7", "-c", "-x", "60"),
        *("--will-topic", "gone", "--will-payload", "-x", "--will-qos", "1", "--will-retain"),
        *("-D", "will", "will-delay-interval", "5", "-D", "will", "content-type", "t"),
        *("-D", "connect", "receive-maximum", "9", "-D", "connect", "user-property", "-a", "b"),
        *("-D", "connect", "user-property", "-a", "c", "-D", "disconnect", "session-expiry-interval", "1"),
    )
    assert connection.connect == Connect(
        client_id="me",
        clean_start=False,
        keep_alive=7,
        user_name="bob",
        password=b"-secret",
        session_expiry_interval=60,
        receive_maximum=9,
        user_properties=(("-a", "b"), ("-a", "c")),
        will=Will(
            topic_name="gone",
            payload=b"-x",
            qos=QoS.AT_LEAST_ONCE,
            retain=True,
            will_delay_interval=5,
            properties=MessageProperties(content_type="t"),
        ),
    )
    assert connection.disconnect == Disconnect(ReasonCode.NORMAL_DISCONNECTION, session_expiry_interval=1)


@pytest.mark.parametrize(
    "arguments, expiry",
    [(["-x", "-1", "-i", "a"], NEVER_EXPIRES), (["-x", "∞", "-i", "a"], NEVER_EXPIRES), (["-x", "0"], 0), ([], None),
     (["-V", "5", "-c", "-i", "a"], NEVER_EXPIRES), (["-c", "-i", "a"], None)],
)  # fmt: skip
def test_session_expiry(arguments: list[str], expiry: int | None) -> None:
    assert read(*arguments).connect.session_expiry_interval == expiry


@pytest.mark.parametrize(
    "url, host, port, tls, path",
    [
        ("mqtt://h/t", "h", 1883, False, None),
        ("MQTTS://h/t", "h", 8883, True, None),
        ("ws://h/t", "h", 8083, False, "/mqtt"),
        ("wss://h/t", "h", 8084, True, "/mqtt"),
        ("mqtt://u:p%40@[::1]:7/t", "::1", 7, False, None),
    ],
)
def test_urls(url: str, host: str, port: int, tls: bool, path: str | None) -> None:
    endpoint = read("-L", url).endpoint
    assert (endpoint.host, endpoint.port, endpoint.tls is not None, endpoint.websocket_path) == (host, port, tls, path)


def test_parts_of_a_url() -> None:
    connection = read("-L", "mqtt://u:p%40@h/a/%23/#", "-p", "99")
    assert connection.topic == "a/%23/#"
    assert (connection.connect.user_name, connection.connect.password) == ("u", b"p@")
    assert connection.endpoint.port == 99


@pytest.mark.parametrize("flags", [["--insecure"], ["--tls-use-os-certs"], ["--tls-alpn", "mqtt"]])
def test_tls_flags_switch_tls_and_its_port_on(flags: list[str]) -> None:
    endpoint = read(*flags).endpoint
    assert endpoint.tls is not None
    assert endpoint.port == 8883
    assert endpoint.tls.check_hostname is (flags != ["--insecure"])
    assert read(*flags, "--ws").endpoint.port == 8084


PUB = ("pub", "-t", "a", "-m", "b")
SUB = ("sub", "-t", "a")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("pub",), "one of -m, -f, -l, -n and -s"),
        (("pub", "-t", "a"), "found none"),
        ((*PUB, "-n"), "found -m and -n"),
        (("pub", "-m", "b"), "the topic is missing"),
        (("pub", "-t", "a/#", "-m", "b"), "'a/#' is no topic to publish to"),
        (("pub", "-t", "", "-m", "b"), "is no topic to publish to"),
        (("pub", "-t", "\udcff", "-m", "b"), "expected UTF-8"),
        ((*PUB, "-q", "3"), "argument -q/--qos: expected a number from 0 to 2, got '3'"),
        ((*PUB, "-q"), "argument -q/--qos: expected one argument"),
        ((*PUB, "-p", "0"), "1 to 65535"),
        ((*PUB, "-M", "0"), "1 to 65535"),
        ((*PUB, "-k", "x"), "0 to 65535, got 'x'"),
        ((*PUB, "-V", "4"), "argument -V: expected one of mqttv31"),
        ((*PUB, "--nonsense"), "unrecognized arguments: --nonsense"),
        ((*PUB, "extra"), "unrecognized arguments: extra"),
        ((*PUB, "--repeat-delay", "-1"), "seconds from 0 on"),
        (("pub", "-t", "a", "-l", "--repeat", "2"), "--repeat is for"),
        ((*PUB, "-P", "x"), "-P needs -u"),
        ((*PUB, "-i", "a", "-I", "b"), "-i and -I"),
        ((*PUB, "-c"), "-i ID"),
        ((*PUB, "-x", "-1"), "-i ID"),
        ((*PUB, "-x", "5", "-V", "311"), "-x is for MQTT 5.0"),
        ((*PUB, "-D", "publish", "content-type", "x", "-V", "31"), "-D is for MQTT 5.0"),
        ((*PUB, "-D", "publish", "content-type"), "expected COMMAND NAME VALUE"),
        ((*PUB, "-D", "publish", "user-property", "a"), "expected COMMAND NAME VALUE"),
        ((*PUB, "-D", "puback", "reason-string", "x"), "the command is one of connect, publish"),
        ((*PUB, "-D", "publish", "nonsense", "x"), "no property 'nonsense'"),
        ((*PUB, "-D", "publish", "receive-maximum", "1"), "receive-maximum is none of its properties, which are"),
        ((*PUB, "-D", "publish", "subscription-identifier", "1"), "is none of its properties"),
        ((*PUB, "-D", "publish", "topic-alias", "x"), "topic-alias is a number"),
        ((*PUB, "-D", "publish", "topic-alias", "0"), "topic-alias must not be 0"),
        ((*PUB, "-D", "publish", "topic-alias", "65536"), "topic-alias: 65536 does not fit"),
        ((*PUB, *("-D", "publish", "content-type", "x") * 2), "given twice"),
        ((*PUB, "-D", "subscribe", "user-property", "a", "b"), "-D subscribe: no such packet"),
        ((*PUB, "-x", "1", "-D", "connect", "session-expiry-interval", "1"), "say the same"),
        ((*PUB, "--will-payload", "x"), "a Will needs --will-topic"),
        ((*PUB, "--will-retain"), "a Will needs --will-topic"),
        ((*PUB, "--cert", "x"), "--cert and --key"),
        ((*PUB, "--ws-path", "x"), "a path starts with /"),
        (("pub", "-L", "http://h/t", "-m", "b"), "expected mqtt://"),
        (("pub", "-L", "mqtt://h", "-m", "b"), "the topic is missing"),
        (("pub", "-L", "mqtt://:1/t", "-m", "b"), "expected HOST"),
        (("pub", "-L", "mqtt://h:x/t", "-m", "b"), "expected HOST"),
        (("sub",), "the topic is missing"),
        (("sub", "-t", "a/#/b"), "is no topic to subscribe to"),
        ((*SUB, "-T", "#a"), "is no topic to subscribe to"),
        ((*SUB, "-F", "%"), "-F: % at the end"),
        ((*SUB, "-C", "0"), "expected a number from 1"),
        ((*SUB, "-W", "0"), "expected a number from 1"),
        ((*SUB, "-R", "--retained-only"), "would print nothing"),
        ((*SUB, "--retain-as-published"), "say -V 5"),
        ((*SUB, "-V", "5", "--retain-handling", "x"), "--retain-handling"),
        ((*SUB, "--random-filter", "0"), "0.1 to 100"),
        ((*SUB, "-D", "publish", "content-type", "x"), "-D publish: no such packet"),
    ],
)
def test_wrong_usage_says_what_and_is_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.startswith(f"mqtt-trio {arguments[0]}: ")
    assert captured.err.endswith(f"\n\nUse 'mqtt-trio {arguments[0]} --help' to see usage.\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((*PUB, "--cafile", "/nowhere"), "--cafile /nowhere: No such file"),
        ((*PUB, "--cafile", "EMPTY"), "EMPTY: no certificate"),
        ((*PUB, "--cert", "EMPTY", "--key", "EMPTY"), "--cert EMPTY with --key EMPTY"),
        (("pub", "-t", "a", "-f", "/nowhere"), "-f /nowhere: No such file"),
        (("pub", "-t", "a", "-f", "/"), "-f /: Is a directory"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    assert command_line.main([each.replace("EMPTY", str(empty)) for each in arguments]) == 1
    assert words in capsys.readouterr().err.replace(str(empty), "EMPTY")


@pytest.mark.parametrize("command", ["pub", "sub"])
def test_help_is_not_h(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mqtt-trio {command} ")
    assert "-h HOST" in text


def test_the_main_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    text = capsys.readouterr().out
    assert "mosquitto_pub" in text
    assert "mosquitto_sub" in text


def options_of(module: Any, *arguments: str) -> dict[str, Any]:
    parsed = module._make_parser().read(arguments)
    options = module._read_options(parsed, read_connection(parsed, "x"))
    return {field.name: getattr(options, field.name) for field in attrs.fields(type(options))}


def test_what_pub_publishes() -> None:
    options = options_of(
        pub, *("-t", "a", "-m", "-5 °C", "-r", "-q", "2", "-M", "3", "--repeat", "4", "--repeat-delay", "0.5"),
        *("-D", "publish", "topic-alias", "2", "-D", "publish", "correlation-data", "x"),
    )  # fmt: skip
    assert options["payload"] == "-5 °C".encode()
    assert options["properties"] == MessageProperties(correlation_data=b"x")
    assert [options[name] for name in ("retain", "qos", "max_inflight", "repeat", "repeat_delay", "topic_alias")] == [
        True, 2, 3, 4, 0.5, 2,
    ]  # fmt: skip
    assert options_of(pub, "-L", "mqtt://h/a/b", "-n")["topic_name"] == "a/b"
    assert options_of(pub, "-t", "a", "-m", "\udcff")["payload"] == b"\xff"


def test_what_sub_subscribes_to() -> None:
    options = options_of(
        sub, *("-t", "a", "-t", "b/#", "-L", "mqtt://h/c", "-q", "1", "-V", "5", "-R", "--retain-as-published"),
        *("-T", "b/c", "-U", "d", "-D", "subscribe", "subscription-identifier", "4"),
    )  # fmt: skip
    subscriptions = options["subscriptions"]
    assert [each.topic_filter for each in subscriptions] == ["a", "b/#", "c"]
    assert {(each.qos, each.retain_as_published, each.retain_handling) for each in subscriptions} == {(1, True, 2)}
    assert options["unsubscriptions"] == ("d",)
    assert options["subscribe"] == {"subscription_identifier": 4}
