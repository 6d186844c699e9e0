"""Options of the Kafka gateway: section [Kafka] of the configuration."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
from attrs.validators import ge, gt, in_, le, matches_re, optional

from gateways.kafka.groups import COMPAT_MESSAGES_GROUP, MESSAGES_GROUP

TOPIC_NAME = r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}"
DEFAULT_SERVERS = "localhost:9092"


def names_of(servers: str | list[str] | None) -> list[str]:
    """Return the `host:port` names of a list, or of a string that separates them by commas."""
    if servers is None:
        return []
    parts = servers.split(",") if isinstance(servers, str) else servers
    return [name for part in parts if (name := part.strip())]


def check_servers(_instance: object, attribute: attrs.Attribute[Any], value: str | list[str] | None) -> None:
    """Validate `host`, `host:port` and `[ipv6]:port`."""
    if value is None:
        return
    if not (names := names_of(value)):
        raise ValueError("expected at least one host:port")
    for name in names:
        host, colon, port = name.rpartition(":")
        if "/" in name or any(character.isspace() for character in name):  # a URL, or names without a comma
            raise ValueError(f"expected host:port, got {name!r}")
        if not colon or name.endswith("]"):
            continue
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ValueError(f"expected host:port, got {name!r}")


@attrs.frozen(kw_only=True)
class BusOptions:
    """[Kafka.Bus]: the nodes of a cluster, joined by one topic."""

    enabled: bool = False
    topic: str = attrs.field(default="monster", validator=matches_re(TOPIC_NAME))
    linger: float = attrs.field(default=0.003, validator=[ge(0), le(1)])
    """Seconds that messages wait to share a record."""
    ack: str = attrs.field(default="none", validator=in_(("none", "store")))
    """`store`: QoS 1 and 2 are acknowledged when Kafka has the message, or, while it is away, when it is on disk here;
    `none`: at once."""
    on_outage: str = attrs.field(default="spool", validator=in_(("spool", "reject", "drop")))
    """What becomes of QoS 1 and 2 messages while Kafka is away. `spool`: they are kept on disk, in order, and reach the
    other nodes when it is back; `reject`: they are refused with 0x97 (a 3.x client is disconnected); `drop`: they are
    acknowledged, and other nodes never get them. QoS 0 waits in the window and is dropped beyond it."""
    spool_bytes: int = attrs.field(default=1024 * 1024 * 1024, validator=ge(16 * 1024 * 1024))
    """Bytes that the spool takes on disk at most. Outcome, of a full disk as well: the window fills, and its outcome
    follows."""
    ack_timeout: float = attrs.field(default=30.0, validator=[gt(0), le(3600)])
    """Seconds that an acknowledgement waits for Kafka (`ack = "store"`) while nobody knows that it is away. Outcome:
    what is on disk here is acknowledged, the rest goes to the spool; without one, or where it takes nothing, a 5.0
    client gets reason code 0x83 and a 3.x client is disconnected. The other nodes may get the message nevertheless."""
    window_messages: int = attrs.field(default=200_000, validator=[ge(1000), le(10_000_000)])
    """Messages that the bus may hold before Kafka has confirmed them: so many at QoS 0, and so many at QoS 1 and 2.
    Outcome: QoS 1 and 2 publishers wait, QoS 0 messages are dropped."""
    window_bytes: int = attrs.field(default=32 * 1024 * 1024, validator=[ge(1024 * 1024), le(4 * 1024**3)])
    """Bytes that the bus may hold before Kafka has confirmed them, of either kind. Outcome as above."""
    checkpoint_age: float = attrs.field(default=3600.0, validator=[ge(0), le(30 * 24 * 3600)])
    """Seconds for which this node may have been away and still brings its persistent sessions what other nodes
    published at QoS 1 and 2 meanwhile; the retention of the bus topic bounds it, too. 0: never."""


def check_endpoint(_instance: object, _attribute: attrs.Attribute[Any], value: str | None) -> None:
    """Validate the URL of a token endpoint."""
    if value is None:
        return
    parts = urllib.parse.urlsplit(value)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError("expected an https:// URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds credentials; they belong into SaslOauthClientId and SaslOauthClientSecret")


SECRET: Final = {"secret": True}


@attrs.frozen(kw_only=True)
class DlqOptions:
    """[Kafka.Dlq]: dead letters. `[Kafka.Topics.Dlq] Enabled = false` turns them off."""

    payloads: bool = True
    """Letters hold the whole record where it fits; false: never more than facts, size and SHA-256."""
    window_records: int = attrs.field(default=1000, validator=[ge(1), le(100_000)])
    """Letters that Kafka has not confirmed. Outcome: further ones are counted and logged only."""
    window_bytes: int = attrs.field(default=8 * 1024 * 1024, validator=[ge(64 * 1024), le(1024**3)])
    """Bytes of letters that Kafka has not confirmed. Outcome as above."""


@attrs.frozen(kw_only=True)
class SecurityOptions:
    """[Kafka.Security]: how the clients log in. `gateways.kafka.security` checks what needs several keys at once."""

    protocol: str = attrs.field(default="PLAINTEXT", validator=in_(("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")))
    sasl_mechanism: str | None = attrs.field(
        default=None,
        validator=optional(in_(("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "GSSAPI"))),
    )
    sasl_username: str | None = None
    sasl_password: str | None = attrs.field(default=None, repr=False, metadata=SECRET)
    sasl_oauth_token: str | None = attrs.field(default=None, repr=False, metadata=SECRET)
    """OAUTHBEARER: a token that never changes."""
    sasl_oauth_token_file: str | None = None
    """OAUTHBEARER: a file with a token that somebody renews; it is read at each login."""
    sasl_oauth_token_endpoint_url: str | None = attrs.field(default=None, validator=check_endpoint)
    """OAUTHBEARER: where tokens are asked for with the client's own credentials (OAuth 2.0 client credentials)."""
    sasl_oauth_client_id: str | None = None
    sasl_oauth_client_secret: str | None = attrs.field(default=None, repr=False, metadata=SECRET)
    sasl_oauth_scope: str | None = None
    sasl_kerberos_service_name: str = "kafka"
    """GSSAPI: the first part of the servers' principal."""


@attrs.frozen(kw_only=True)
class SslOptions:
    """[Kafka.SSL]: stores in JKS, PKCS12 or PEM; their content decides."""

    truststore_location: str | None = None
    """Authorities that server certificates are checked against. None: those of the operating system."""
    truststore_password: str | None = attrs.field(default=None, repr=False, metadata=SECRET)
    keystore_location: str | None = None
    """Private key and certificates that the clients show to servers."""
    keystore_password: str | None = attrs.field(default=None, repr=False, metadata=SECRET)
    key_password: str | None = attrs.field(default=None, repr=False, metadata=SECRET)
    """Opens the private key where that is not the password of the store."""
    endpoint_identification_algorithm: str = attrs.field(default="https", validator=in_(("https", "")))
    """`https`: a server's certificate must name the host that was connected to. Empty: any host will do, its authority
    is checked nevertheless."""


STRATEGIES: Final = ("TopicNameStrategy", "RecordNameStrategy", "TopicRecordNameStrategy")


def check_registry(_instance: object, _attribute: attrs.Attribute[Any], value: str | None) -> None:
    """Validate the URL of a schema registry."""
    if value is None:
        return
    try:
        parts = urllib.parse.urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise ValueError(f"expected an https:// or http:// URL: {exc}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds credentials; they belong into Username and Password")
    if parts.scheme not in ("https", "http") or not host or parts.query or parts.fragment or not value.isprintable():
        raise ValueError(f"expected an https:// or http:// URL without a query, got {value!r}")


@attrs.frozen(kw_only=True)
class SchemaRegistryOptions:
    """[Kafka.SchemaRegistry]: where the schema of AVRO records is; without `url` they name none."""

    url: str | None = attrs.field(default=None, validator=check_registry)
    """The base of the registry's API, as Confluent's clients know it."""
    username: str | None = None
    password: str | None = attrs.field(default=None, repr=False, metadata=SECRET)
    auto_register: bool = True
    """Register our schema where it is not; false: somebody else does, and it is only looked up."""
    subject_name_strategy: str = attrs.field(default="TopicNameStrategy", validator=in_(STRATEGIES))
    """What the subject is called: `TOPIC-value`, the record's full name, or `TOPIC-` and that name."""
    timeout: float = attrs.field(default=5.0, validator=[ge(0.1), le(60)])
    """Seconds that one request may take. Outcome: the registry is away, and it is tried again."""
    ssl: SslOptions = SslOptions()
    """For https://, as [Kafka.SSL] for Kafka."""

    def __attrs_post_init__(self) -> None:
        needs_url = (self.username, self.password) != (None, None) or self.ssl != SslOptions()
        if self.url is None and needs_url:
            raise ValueError("Url is missing; without it there is no schema registry")
        if ":" in (self.username or ""):
            raise ValueError("Username: a colon cannot stand in it (basic authentication)")
        if (self.username is None) != (self.password is None):
            raise ValueError("Username and Password belong together; set both or neither")


@attrs.frozen(kw_only=True)
class TopicOptions:
    """[Kafka.Topics.*]: what differs from the defaults of that topic (`topics.DEFAULTS`)."""

    name: str | None = attrs.field(default=None, validator=optional(matches_re(TOPIC_NAME)))
    partitions: int | None = attrs.field(default=None, validator=optional([ge(1), le(10_000)]))
    replication_factor: int | None = attrs.field(default=None, validator=optional([ge(1), le(100)]))
    """None: 3, or as many as there are brokers if these are fewer."""
    enabled: bool | None = None
    """Whether to create the topic and to look after it; of events and the stream of messages, whether to use it at all.
    None: as its feature is on, which the stream of messages is by itself."""
    config: dict[str, Any] = attrs.field(factory=dict)
    """Any topic property of Kafka, such as `retention.ms`."""


def as_filters(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """One filter stands for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value)


def check_filters(_instance: object, _attribute: attrs.Attribute[Any], filters: tuple[str, ...]) -> None:
    """Validate Topic Filters of a stream."""
    from mqtt_trio.errors import MqttTrioError
    from mqtt_trio.gateway import is_system_topic, validate_topic_filter

    for topic_filter in filters:
        try:
            validate_topic_filter(topic_filter)
        except MqttTrioError as exc:
            raise ValueError(f"{topic_filter!r} is not a Topic Filter: {exc}") from None
        if topic_filter.startswith("$share/"):
            raise ValueError(f"{topic_filter!r}: the stream shares with nobody, give the filter without $share")
        if is_system_topic(topic_filter):
            raise ValueError(f"{topic_filter!r}: $SYS topics are never in the stream")


@attrs.frozen(kw_only=True)
class MessagesOptions(TopicOptions):
    """[Kafka.Topics.Messages]: the public stream of messages, both ways; on unless `enabled` is false [K11]."""

    write: bool = True
    """What clients publish is written to it, as far as `filter` goes."""
    read: bool = True
    """What others put into it is published, whatever its topic, but never to $SYS."""
    filter: tuple[str, ...] = attrs.field(default=("#",), converter=as_filters, validator=check_filters)
    """Topic Filters of what is written to the stream; a plain string is one filter, an empty list writes nothing."""
    group: str | None = attrs.field(default=None, validator=optional(matches_re(r"[\x21-\x7e]{1,255}")))
    """The consumer group in which the nodes share the work of reading it; two deployments on one Kafka need two. None:
    `monstermq-cluster`, or what `Profile` says (`KafkaOptions.messages_group`)."""


@attrs.frozen(kw_only=True)
class TopicsOptions:
    """[Kafka.Topics]"""

    messages: MessagesOptions = MessagesOptions()
    archive: TopicOptions = TopicOptions()
    events: TopicOptions = TopicOptions()
    metrics: TopicOptions = TopicOptions()
    dlq: TopicOptions = TopicOptions()
    bus: TopicOptions = TopicOptions()
    retained: TopicOptions = TopicOptions()
    sessions: TopicOptions = TopicOptions()


MESSAGES_KEY: Final = "Topics.Messages"
WITHOUT_STREAM: Final = "; without the stream of messages: [Kafka.Topics.Messages] Enabled = false"
WITHOUT_READING: Final = "; without what others put into the stream: [Kafka.Topics.Messages] Read = false"
"""These end what is said of the topic of a stream that nobody may have asked for."""
REPORTERS: Final = ("kafka", "prometheus", "log")
JAVA_CLASS: Final = re.compile(r"[A-Za-z_$][\w$]*(\.[A-Za-z_$][\w$]*)+")


def names_of_reporters(value: object) -> object:
    """Return reporters as names: of a Java reporter its class, without its `config`, which may hold secrets."""
    if not isinstance(value, list | tuple):
        return value
    return [entry.get("class", entry) if isinstance(entry, Mapping) else entry for entry in value]


def check_reporters(_instance: object, _attribute: attrs.Attribute[Any], value: list[Any]) -> None:
    """Validate names of ours, and names of Java classes."""
    for number, name in enumerate(value):
        if not isinstance(name, str) or (name not in REPORTERS and not JAVA_CLASS.fullmatch(name)):
            got = "a table without `class`" if isinstance(name, Mapping) else repr(name)
            raise ValueError(f"reporter {number}: expected one of {', '.join(REPORTERS)}, got {got}")


@attrs.frozen(kw_only=True)
class MetricsOptions:
    """[Kafka.Metrics]"""

    enabled: bool = False
    interval: float = attrs.field(default=10.0, validator=[ge(1), le(86_400)])
    """Seconds between two reports."""
    reporters: list[Any] = attrs.field(factory=list, converter=names_of_reporters, validator=check_reporters)
    """Any of `kafka` (records on mqtt.metrics), `prometheus` (/metrics of [Http], which does not need it), `log` (a
    line about the clients of Kafka). Java classes, as text or tables with a `class`, are accepted and mean nothing."""
    jmx_enabled: bool = False
    """Accepted for old configurations; means nothing."""


@attrs.frozen(kw_only=True)
class KafkaOptions:
    """[Kafka]"""

    servers: str | list[str] | None = attrs.field(default=None, validator=check_servers)
    """`host:port` of some brokers, as a list or separated by commas."""
    bootstrap_servers: str | list[str] | None = attrs.field(default=None, validator=check_servers)
    """The same under its Kafka name."""
    bus: BusOptions = BusOptions()
    dlq: DlqOptions = DlqOptions()
    security: SecurityOptions = SecurityOptions()
    ssl: SslOptions = SslOptions()
    schema_registry: SchemaRegistryOptions = SchemaRegistryOptions()
    topics: TopicsOptions = TopicsOptions()
    producer: dict[str, Any] = attrs.field(factory=dict)
    """Options of kafka-python's KafkaProducer, in its spelling or with dots."""
    consumer: dict[str, Any] = attrs.field(factory=dict)
    """Options of kafka-python's KafkaConsumer, in its spelling or with dots."""
    profile: str = attrs.field(default="safe", validator=in_(("safe", "compat")))
    """`compat`: acks=1 without idempotence, on everything but the bus; the stream of messages is read in the group
    `Monster` with automatic commits."""
    metrics: MetricsOptions = MetricsOptions()
    window_messages: int = attrs.field(default=20_000, validator=[ge(100), le(1_000_000)])
    """Records that the archive producer, and that of the stream of messages, may hold each before Kafka has confirmed
    them. Outcome: QoS 1 and 2 publishers wait, QoS 0 messages are dropped; for the stream see `stream_out`."""
    window_bytes: int = attrs.field(default=32 * 1024 * 1024, validator=[ge(1024 * 1024), le(4 * 1024**3)])
    """Bytes that each of them may hold before Kafka has confirmed them. Outcome as above."""
    delivery_timeout: float = attrs.field(default=60.0, validator=[ge(5), le(3600)])
    """Seconds that a record may stay unconfirmed before its producer is thrown away and it is sent by a new one. Where
    its topic is missing or forbidden for so long although Kafka answers, it becomes a dead letter, unless a spool has
    it or its publisher waits for it."""

    def __attrs_post_init__(self) -> None:
        ours, theirs = names_of(self.servers), names_of(self.bootstrap_servers)
        if ours and theirs and ours != theirs:
            raise ValueError("Servers and BootstrapServers name different servers; keep one of them")
        bus = self.topics.bus.name
        if bus is not None and bus != self.bus.topic and self.bus.topic != "monster":
            raise ValueError("Bus.Topic and Topics.Bus.Name name different topics; keep one of them")
        taken: dict[str, str] = {}
        named = {"Topics.Archive": self.archive_topic, **self._topics_beside_stream, **self.own_topics}
        for key, name in named.items():
            if name in taken:
                mend = f"each needs one of its own{WITHOUT_STREAM if key == MESSAGES_KEY else ''}"
                raise ValueError(f"{key} and {taken[name]} are the same topic, {name}; {mend}")
            taken[name] = key

    def advice(self, acknowledging: Sequence[str] = ()) -> Sequence[str]:
        """Return what could be better, a line each, without a look at Kafka [K20]. `acknowledging`: names of the
        archive groups in Kafka that PUBACK waits for (`Ack = "store"`)."""
        from gateways.kafka.advice import advice

        return [f"{one.about}: {one.text}; better: {one.mend}" for one in advice(self, acknowledging)]

    def effective(self) -> Mapping[str, tuple[object, str]]:
        """Return what clients are set up with, below [Kafka], and where each value comes from [K16]."""
        from gateways.kafka.client_settings import effective

        return dict(effective(self))

    @property
    def server_names(self) -> list[str]:
        """`host:port` of each server to begin with."""
        return names_of(self.servers) or names_of(self.bootstrap_servers) or [DEFAULT_SERVERS]

    @property
    def writes_stream(self) -> bool:
        """What clients publish is written to mqtt.messages."""
        messages = self.topics.messages
        return messages.enabled is not False and messages.write and bool(messages.filter)

    @property
    def reads_stream(self) -> bool:
        """What others put into mqtt.messages is published."""
        messages = self.topics.messages
        return messages.enabled is not False and messages.read

    @property
    def has_stream(self) -> bool:
        """mqtt.messages is written or read: wherever Kafka is configured, unless that is turned off [K11]."""
        return self.writes_stream or self.reads_stream

    @property
    def writes_metrics(self) -> bool:
        """mqtt.metrics is written; `[Kafka.Topics.Metrics] Enabled = false` turns it off, too."""
        wanted = self.metrics.enabled and "kafka" in self.metrics.reporters
        return wanted and self.topics.metrics.enabled is not False

    @property
    def messages_topic(self) -> str:
        """Name of the public stream of messages."""
        return self.topics.messages.name or "mqtt.messages"

    @property
    def bus_topic(self) -> str:
        """Name of the bus topic."""
        return self.topics.bus.name or self.bus.topic

    @property
    def _topics_of_bus(self) -> dict[str, str]:
        return {"Bus.Topic": self.bus_topic, "Topics.Retained": self.topics.retained.name or "mqtt.retained"}

    @property
    def _topics_beside_stream(self) -> dict[str, str]:
        """Topics that the stream of messages cannot have, whether or not this node is on the bus: others may be."""
        return self._topics_of_bus if self.has_stream else {}

    @property
    def own_topics(self) -> dict[str, str]:
        """Topics that hold one thing alone: by the key below [Kafka] that names each, where its feature is on."""
        topics, found = self.topics, dict[str, str]()
        if self.bus.enabled:
            found |= self._topics_of_bus
        if topics.dlq.enabled is not False:
            found["Topics.Dlq"] = topics.dlq.name or "mqtt.dlq"
        if self.has_stream:
            found[MESSAGES_KEY] = self.messages_topic
        if topics.events.enabled:
            found["Topics.Events"] = topics.events.name or "mqtt.events"
        if self.writes_metrics:
            found["Topics.Metrics"] = topics.metrics.name or "mqtt.metrics"
        return found

    @property
    def archive_topic(self) -> str:
        """Topic of archive groups that name none."""
        return self.topics.archive.name or "mqtt.archive"

    @property
    def messages_group(self) -> str:
        """The group in which the nodes share the work of reading the stream of messages [K11, K16]."""
        by_profile = COMPAT_MESSAGES_GROUP if self.profile == "compat" else MESSAGES_GROUP
        return self.topics.messages.group or by_profile

    @property
    def effective_delivery_timeout(self) -> float:
        """`delivery_timeout`, or what [Kafka.Producer] says about it in Kafka's own words."""
        milliseconds = self.producer.get("delivery_timeout_ms", self.producer.get("delivery.timeout.ms"))
        return self.delivery_timeout if milliseconds is None else float(milliseconds) / 1000
