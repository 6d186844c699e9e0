"""The configuration: sources and their order, mistakes with their paths, secrets, the shipped file [C, F4, F5]."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from gateways.kafka.options import KafkaOptions
from mqtt_trio.config import LoadedConfig, Overrides, load_config
from mqtt_trio.config_show import show
from mqtt_trio.config_sources import flatten, split_path
from mqtt_trio.errors import ConfigError

SECTIONS: Mapping[str, type] = {"Kafka": KafkaOptions}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Load a text as the file; keyword arguments are those of Overrides."""

    def load(text: str = "", environ: Mapping[str, str] | None = None, **overrides: Any) -> LoadedConfig:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return load_config(path, environ or {}, Overrides(**overrides), SECTIONS)

    return load


def problems(load: Any, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return list(caught.value.problems)


def kafka(loaded: LoadedConfig) -> KafkaOptions:
    options = loaded.gateways["Kafka"]
    assert isinstance(options, KafkaOptions)
    return options


def test_defaults_need_no_file() -> None:
    loaded = load_config(None, {})
    assert [(one.type, one.host, one.port) for one in loaded.options.listeners] == [
        ("tcp", "127.0.0.1", 1883),
        ("websocket", "127.0.0.1", 8083),
    ]
    assert loaded.options.archive_groups == ()
    assert loaded.options.node.id == socket.gethostname()
    assert loaded.options.shutdown.timeout == 10
    assert loaded.options.persistence.store == "SQLITE"
    assert loaded.gateways == {}


def test_the_example_of_the_requirements(load: Any) -> None:
    loaded = load("""
        [Node]
        Id = "broker-1"
        [[Listeners]]
        Type = "tcp"
        Port = 1883
        [[Listeners]]
        Type = "websocket"
        Port = 8083
        [Kafka]
        Servers = "localhost:9092"
        [Kafka.Bus]
        Enabled = false
        Topic = "monster"
        [[ArchiveGroups]]
        Name = "Default"
        Filter = "#"
        Enabled = true
        Store = "SQLITE"
        [[ArchiveGroups]]
        Name = "Sensors"
        Filter = "sensors/+"
        Enabled = false
        Store = "KAFKA"
        KafkaTopic = "mqtt.sensors"
    """)
    default, sensors = loaded.options.archive_groups
    assert (default.filter, default.store, default.enabled) == (("#",), "SQLITE", True)
    assert (sensors.filter, sensors.kafka_topic, sensors.enabled) == (("sensors/+",), "mqtt.sensors", False)
    assert kafka(loaded).server_names == ["localhost:9092"]
    assert loaded.inactive == ()


def test_a_group_in_kafka_brings_kafka_with_its_defaults(load: Any) -> None:
    loaded = load('[[ArchiveGroups]]\nName = "a"\nStore = "KAFKA"')
    assert kafka(loaded).server_names == ["localhost:9092"]


# Precedence and how text is read


def test_command_line_over_environment_over_file_over_default(load: Any) -> None:
    text = "[Limits]\nQueueMessages = 1\nSessions = 11\nReceiveMaximum = 111"
    environ = {"MQTT_TRIO__LIMITS__QUEUEMESSAGES": "2", "MQTT_TRIO__limits__Sessions": "22"}
    loaded = load(text, environ, sets=["Limits.QueueMessages=3"])
    limits = loaded.options.limits
    assert (limits.queue_messages, limits.sessions, limits.receive_maximum) == (3, 22, 111)
    origins = [
        loaded.origin(("Limits", name)).text
        for name in ("QueueMessages", "Sessions", "ReceiveMaximum", "InflightMessages")
    ]
    assert origins == [
        "command line",
        "environment MQTT_TRIO__limits__Sessions",
        "config.toml:Limits.ReceiveMaximum",
        "default",
    ]


@pytest.mark.parametrize(
    "path", ["Listeners[1].Port", "listeners.1.port", 'Listeners."1".PORT'], ids=["brackets", "dots", "quotes"]
)
def test_list_items_by_index_without_regard_to_case(load: Any, path: str) -> None:
    assert load(sets=[f"{path}=4711"]).options.listeners[1].port == 4711


def test_environment_extends_a_list_by_one(load: Any) -> None:
    environ = {
        "MQTT_TRIO__LISTENERS__2__TYPE": "tcp",
        "MQTT_TRIO__LISTENERS__2__PORT": "1884",
        "MQTT_TRIO__ARCHIVEGROUPS__0__NAME": "env",
        "MQTT_TRIO__ARCHIVEGROUPS__0__FILTER": '["a/#", "b"]',
        "MQTT_TRIO__ARCHIVEGROUPS__0__RETENTION": "12h",
    }
    loaded = load("", environ)
    assert [one.port for one in loaded.options.listeners] == [1883, 8083, 1884]
    assert loaded.options.archive_groups[0].filter == ("a/#", "b")
    assert loaded.options.archive_groups[0].retention == 12 * 3600


def test_the_key_decides_how_text_is_read(load: Any) -> None:
    environ = {
        "MQTT_TRIO__NODE__ID": "007",
        "MQTT_TRIO__KAFKA__BUS__ENABLED": "true",
        "MQTT_TRIO__KAFKA__SERVERS": "a:9092,b:9092",
        "MQTT_TRIO__KAFKA__PRODUCER__LINGER_MS": "5",
        "MQTT_TRIO__KAFKA__PRODUCER__SASL_PLAIN_PASSWORD": "12345",
        "MQTT_TRIO__LISTENERS__1__ALLOWEDORIGINS": '["https://a"]',
    }
    loaded = load("", environ)
    assert loaded.options.node.id == "007"
    assert kafka(loaded).bus.enabled is True
    assert kafka(loaded).server_names == ["a:9092", "b:9092"]
    assert kafka(loaded).producer == {"linger_ms": 5, "sasl_plain_password": "12345"}
    assert loaded.options.listeners[1].allowed_origins == ("https://a",)


def test_flags_name_the_first_listener_of_each_type(load: Any) -> None:
    text = '[[Listeners]]\nType = "websocket"\nPort = 1\n[[Listeners]]\nType = "websocket"\nPort = 2'
    loaded = load(text, port=1884, ws_port=0, host="::1", data="/var/lib/mqtt")
    assert [(one.type, one.host, one.port) for one in loaded.options.listeners] == [
        ("websocket", "::1", 0),
        ("websocket", "127.0.0.1", 2),
        ("tcp", "::1", 1884),
    ]
    assert loaded.options.persistence.path == Path("/var/lib/mqtt")


# ${NAME}


def test_references_to_the_environment(load: Any) -> None:
    text = """
        [Node]
        Id = "${HOST}-${ZONE:-west}-$${literal}"
        [[Listeners]]
        Port = "${PORT:-1999}"
        [[ArchiveGroups]]
        Name = "a"
        Filter = ["${ROOT}/#", "b"]
        [Kafka]
        Servers = "${A}:1"
    """
    loaded = load(text, {"HOST": "h", "ROOT": "r", "A": "k", "ZONE": ""})
    assert loaded.options.node.id == "h-west-${literal}"
    assert loaded.options.listeners[0].port == 1999
    assert loaded.options.archive_groups[0].filter == ("r/#", "b")
    assert kafka(loaded).server_names == ["k:1"]


def test_an_undefined_reference_names_its_key(load: Any) -> None:
    text = '[Kafka.Security]\nSaslUsername = "${KAFKA_USERNAME}"\n[[Listeners]]\nPort = "${}"'
    first, second = problems(load, text)
    assert first == (
        "Kafka.Security.SaslUsername: the environment variable KAFKA_USERNAME is not set "
        "(${KAFKA_USERNAME:-default} gives a default)"
    )
    assert second.startswith("Listeners[0].Port: ${} is no reference")


# Mistakes


def test_every_mistake_at_once_with_its_path(load: Any) -> None:
    text = """
        [Nod]
        [[Listeners]]
        Prot = 1
        Port = "1883"
        [[Listeners]]
        Type = "websockt"
        Port = 70000
        ConnectTimeout = true
        [[ArchiveGroups]]
        Filter = "a/#"
        [[ArchiveGroups]]
        Name = "two"
        Filter = 5
        Enabled = "yes"
        MaxSize = 1.5
        [Limits]
        Sessions = 1.0
        QueueOverflow = "drop-newest"
        [Kafka.Bus]
        Enabled = 1
        [Kafka.Topics.Bus]
        Partitions = 0
        [Logging]
        Format = ["text"]
    """
    assert problems(load, text) == [
        'Nod: unknown section, did you mean "Node"?',
        'Listeners[0].Port: expected a whole number, got "1883"',
        'Listeners[0].Prot: unknown key, did you mean "Port"?',
        'Listeners[1].Type: expected one of "tcp", "websocket", got "websockt", did you mean "websocket"?',
        "Listeners[1].Port: expected a value <= 65535, got 70000",
        'Listeners[1].ConnectTimeout: expected seconds as a number or a time such as "7d", "12h", "30s", got true',
        "ArchiveGroups[0].Name: is missing",
        "ArchiveGroups[1].Filter: expected a string or a list of strings, got 5",
        'ArchiveGroups[1].Enabled: expected true or false, got "yes"',
        'ArchiveGroups[1].MaxSize: expected bytes as a number or a size such as "1GiB", "500MB", got 1.5',
        'Limits.QueueOverflow: expected one of "drop-new", "drop-oldest", got "drop-newest", did you mean "drop-new"?',
        "Limits.Sessions: expected a whole number, got 1.0",
        "Logging.Format: expected a string, got a list",
        "Kafka.Bus.Enabled: expected true or false, got 1",
        "Kafka.Topics.Bus.Partitions: expected a value >= 1, got 0",
    ]


@pytest.mark.parametrize(
    "arguments,problem",
    [
        ({"sets": ["Limits.Sesions=1"]}, 'command line: Limits has no key "Sesions", did you mean "Sessions"?'),
        ({"sets": ["Limits"]}, "--set Limits: expected Section.Key=VALUE"),
        ({"sets": ["Listeners.x.Port=1"]}, 'command line: Listeners is a list: expected an index, got "x"'),
        ({"sets": ["Listeners[5].Port=1"]}, "command line: Listeners[5]: the list has 2 items"),
        ({"sets": ["Node.Id.x=1"]}, "command line: Node.Id has no keys of its own, got x"),
        ({"sets": ["Limits.Sessions=many"]}, 'Limits.Sessions: expected a whole number, got "many" (command line)'),
        (
            {"environ": {"MQTT_TRIO__LIMITS__SESSIONS": "yes"}},
            'Limits.Sessions: expected a whole number, got "yes" (environment MQTT_TRIO__LIMITS__SESSIONS)',
        ),
        (
            {"environ": {"MQTT_TRIO__LIMIT__SESSIONS": "1"}},
            'environment MQTT_TRIO__LIMIT__SESSIONS: there is no section "LIMIT", did you mean "Limits"?',
        ),
    ],
)
def test_mistakes_outside_the_file(load: Any, arguments: dict[str, Any], problem: str) -> None:
    assert problems(load, "", **arguments) == [problem]


def test_mistakes_across_sections(load: Any) -> None:
    text = """
        [[Listeners]]
        Port = 5
        [[Listeners]]
        Type = "websocket"
        Port = 5
        [[ArchiveGroups]]
        Name = "a"
        [[ArchiveGroups]]
        Name = "a"
    """
    assert problems(load, text) == [
        "ArchiveGroups[1].Name: another group is called 'a'",
        "Listeners[1].Port: Listeners[0] has 127.0.0.1:5 already",
    ]


def test_a_dotted_key_stands_there_once(load: Any) -> None:
    assert problems(load, '[Kafka.Producer]\nlinger.ms = 5\n"linger.ms" = 6') == [
        'Kafka.Producer."linger.ms": given twice, bare and quoted; keep one'
    ]


def test_a_dotted_key_below_another_one_takes_quotes(load: Any) -> None:
    (problem,) = problems(load, '[Logging.Loggers]\na.b = "INFO"\na.b.c = "DEBUG"')
    assert problem.endswith('of names with dots, put the longer one in quotes, "a.b.c"')
    loggers = load('[Logging.Loggers]\na.b = "INFO"\n"a.b.c" = "DEBUG"').options.logging.loggers
    assert loggers == {"a.b": "INFO", "a.b.c": "DEBUG"}


def test_servers_and_their_alias_must_agree(load: Any) -> None:
    assert kafka(load('[Kafka]\nBootstrapServers = "k:1"')).server_names == ["k:1"]
    assert problems(load, '[Kafka]\nServers = "a:1"\nBootstrapServers = "b:1"') == [
        "Kafka: Servers and BootstrapServers name different servers; keep one of them"
    ]


@pytest.mark.parametrize("text", ["[Node", "Node = 5", "a = 1\na = 2"])
def test_what_is_no_toml_or_no_table(load: Any, text: str) -> None:
    (problem,) = problems(load, text)
    assert re.match(r".*config\.toml: .*\(at|Node: expected a table, got 5", problem)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.toml", {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path, {})
    (tmp_path / "latin.toml").write_bytes(b"[Node]\nId = '\xe4'\n")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path / "latin.toml", {})


# Units, free tables


@pytest.mark.parametrize(
    "text,seconds", [("'7d'", 604_800), ("'1.5h'", 5400), ("'90 s'", 90), ("'250ms'", 0.25), ("12", 12), ("0.5", 0.5)]
)
def test_times(load: Any, text: str, seconds: float) -> None:
    assert load(f"[Shutdown]\nTimeout = {text}" if seconds < 3600 else "").options.shutdown.timeout == (
        seconds if seconds < 3600 else 10
    )
    assert load(f"[[ArchiveGroups]]\nName = 'a'\nRetention = {text}").options.archive_groups[0].retention == seconds


@pytest.mark.parametrize(
    "text,size", [("'1GiB'", 2**30), ("'500MB'", 500_000_000), ("'2 mib'", 2**21), ("2000000", 2_000_000)]
)
def test_sizes(load: Any, text: str, size: int) -> None:
    assert load(f"[[ArchiveGroups]]\nName = 'a'\nMaxSize = {text}").options.archive_groups[0].max_size == size


def test_bare_dotted_keys_are_one_key(load: Any) -> None:
    loaded = load("""
        [Kafka.Topics.Archive.Config]
        retention.ms = 1
        "segment.ms" = 2
        [Kafka.Producer]
        linger.ms = 3
        [Logging.Loggers]
        org.apache.kafka = "WARN"
    """)
    assert kafka(loaded).topics.archive.config == {"retention.ms": 1, "segment.ms": 2}
    assert kafka(loaded).producer == {"linger.ms": 3}
    assert loaded.options.logging.loggers == {"org.apache.kafka": "WARN"}
    assert load(sets=["Kafka.Topics.Bus.Config.retention.ms=9"]).gateways["Kafka"].topics.bus.config == {
        "retention.ms": 9
    }


def test_paths_and_tables_are_taken_apart() -> None:
    assert split_path('A[0].B."c.d".e') == ["A", "0", "B", "c.d", "e"]
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


# Secrets


@attrs.frozen(kw_only=True)
class VaultOptions:
    """A gateway section that has nothing but a secret."""

    password: str | None = attrs.field(default=None, repr=False, metadata={"secret": True})


def load_vault(path: Path | None, environ: Mapping[str, str], *sets: str) -> LoadedConfig:
    return load_config(path, environ, Overrides(sets=sets), {"Vault": VaultOptions})


def test_secrets_from_files_follow_links(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("0 geheim \n")
    (tmp_path / "link").symlink_to("real")
    loaded = load_vault(None, {"MQTT_TRIO__VAULT__PASSWORDFILE": str(tmp_path / "link")})
    assert loaded.gateways["Vault"] == VaultOptions(password="0 geheim ")
    assert "geheim" not in "\n".join([*show(loaded), repr(loaded)])
    assert any('Password = "********"' in line and "environment" in line for line in show(loaded))


def test_a_secret_and_its_file(tmp_path: Path) -> None:
    secret, config = tmp_path / "secret", tmp_path / "config.toml"
    secret.write_text("file")
    config.write_text(f"[Vault]\nPassword = 'plain'\nPasswordFile = '{secret}'")
    with pytest.raises(ConfigError) as caught:
        load_vault(config, {})
    assert caught.value.problems == ("Vault.Password: both Password and PasswordFile are given; keep one",)
    config.write_text(f"[Vault]\nPasswordFile = '{secret}'")
    assert load_vault(config, {}).gateways["Vault"] == VaultOptions(password="file")
    assert load_vault(config, {}, "Vault.Password=123").gateways["Vault"] == VaultOptions(password="123")
    secret.unlink()
    with pytest.raises(ConfigError, match=r"^Vault\.PasswordFile: cannot read .*secret: No such file or directory$"):
        load_vault(config, {})


@pytest.mark.parametrize(
    "text", ["[Vault]\nPassword = 271828", "[Vault]\nPassword = ['271828']", "[Vault]\nPasword = '271828'"]
)
def test_errors_show_no_secret(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_vault(path, {})
    assert "271828" not in str(caught.value)


def test_secrets_of_pass_through_tables_are_hidden(load: Any) -> None:
    loaded = load('[Kafka.Producer]\nssl_password = "geheim"\nssl_cafile = "ca.pem"')
    lines = "\n".join(show(loaded))
    assert "geheim" not in lines
    assert 'ssl_password = "********"' in lines
    assert 'ssl_cafile = "ca.pem"' in lines


# HTTP


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.1", "broker.example"])
def test_http_that_others_can_reach_needs_a_token(load: Any, tmp_path: Path, host: str) -> None:
    text = f'[Http]\nHost = "{host}"\n'
    (problem,) = problems(load, f"{text}Port = 8080")
    assert problem.startswith(f'Http.TokenFile: needed, because others can reach Http.Host "{host}"')
    assert load(text).options.http.port is None, "it is off"
    (tmp_path / "token").write_text("t0ken\n")
    http = load(f'{text}Port = 8080\nTokenFile = "{tmp_path / "token"}"').options.http
    assert (http.host, http.port, http.token) == (host, 8080, "t0ken")


def test_an_empty_token_file_protects_nothing(load: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    (problem,) = problems(load, f'[Http]\nPort = 8080\nTokenFile = "{tmp_path / "token"}"')
    assert problem == "Http.Token: expected 1 to 4096 printable ASCII characters without spaces"


def test_http_has_a_port_of_its_own(load: Any) -> None:
    (problem,) = problems(load, "[Http]\nPort = 8083")
    assert problem == "Http.Port: Listeners[1] has 127.0.0.1:8083 already"


def test_a_spool_has_room_for_the_largest_message(load: Any) -> None:
    group = '[[ArchiveGroups]]\nName = "a"\nStore = "KAFKA"\nSpoolBytes = "2MiB"\n'
    (problem,) = problems(load, group)
    assert problem == (
        "ArchiveGroups[0].SpoolBytes: 2097152 bytes have no room for a message of Limits.MaximumPacketSize, 2097152; "
        "at least 3145728 are needed"
    )
    assert (
        load(f'{group}OnOutage = "reject"\nAck = "store"\nAckTimeout = "5s"').options.archive_groups[0].ack_timeout == 5
    )
    assert load(f"{group}[Limits]\nMaximumPacketSize = 1048576").options.archive_groups[0].outage_policy == "spool"


def test_groups_that_share_a_topic_by_its_name_are_one(load: Any) -> None:
    """Also where one of them names what is the default of [Kafka.Topics.Archive]."""
    groups = '[[ArchiveGroups]]\nName = "a"\nStore = "KAFKA"\n[[ArchiveGroups]]\nName = "b"\nStore = "KAFKA"\n'
    text = f'{groups}KafkaTopic = "mine"\nAck = "store"\n[Kafka.Topics.Archive]\nName = "mine"'
    (problem,) = problems(load, text)
    assert problem.startswith("ArchiveGroups[1].Ack: 'store', but group 'a' writes to the same Kafka topic 'mine'")


# Not built yet


def test_keys_of_later_features_are_accepted_and_named(load: Any) -> None:
    loaded = load('[Kafka.Metrics]\nReporters = ["kafka"]\n[Kafka.Topics.Sessions]\nName = "mine"')
    assert loaded.inactive == ("Kafka.Topics.Sessions.Name",)
    assert load('[Kafka.Security]\nProtocol = "PLAINTEXT"\n[Persistence]\nStore = "MEMORY"').inactive == ()
