"""Kafka topics as they should be [K3], and in what those that exist differ from that. Pure: no I/O.

What differs is put to the reader in the words of the configuration, with what it means and who can mend it.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs

from gateways.kafka.options import WITHOUT_STREAM, KafkaOptions, TopicOptions

SECOND_MS: Final = 1000
DAY_MS: Final = 24 * 3600 * SECOND_MS
LARGEST_REPLICATION: Final = 3
LARGE_MESSAGES: Final = str(4 * 1024 * 1024)
"""max.message.bytes where MQTT payloads go: the largest packet of the default limits, in base64, fits."""
MIN_ISR: Final = "min.insync.replicas"
CLEANUP: Final = "cleanup.policy"
READ: Final = ("bus", "retained")
"""Topics that a node always reads as well."""
DENIED: Final = "denied"
"""Why Kafka did not do something, when it is for a right that our user lacks."""


@attrs.frozen(kw_only=True)
class TopicPlan:
    """A topic as it should be."""

    name: str
    partitions: int
    replication_factor: int | None = None
    """None: 3, or as many as there are brokers if these are fewer."""
    config: Mapping[str, str] = attrs.field(factory=dict)
    section: str = ""
    """Where the configuration speaks of it, such as `Kafka.Topics.Bus`."""
    written: bool = True
    """A node writes to it."""
    read: bool = False
    """A node reads it."""
    spare: str = ""
    """Ends what is said of a right that is missing: how to do without the topic, which nobody may have asked for."""

    def factor(self, brokers: int) -> int:
        """Return the replication factor in a cluster of so many brokers."""
        return self.replication_factor or max(1, min(LARGEST_REPLICATION, brokers))

    def properties(self, factor: int) -> dict[str, str]:
        """Return the topic properties to create it with at this replication factor.

        An acknowledged record is on two brokers at least where there are three replicas; with fewer, the loss of one
        broker must not stop all writing.
        """
        return {**self.config, MIN_ISR: self.config.get(MIN_ISR, least_in_sync(factor))}


@attrs.frozen(kw_only=True)
class TopicState:
    """A topic as it stands in the cluster."""

    partitions: int
    replication_factor: int
    leaders: bool
    """Each partition has a leader."""
    out_of_sync: int = attrs.field(default=0, kw_only=True)
    """Partitions of which some replica is behind, or on a broker that is down."""
    config: Mapping[str, str]
    """Effective properties; empty when we may not see them."""
    writable: bool = True
    """Our user may write to it, as far as Kafka says."""
    readable: bool = True
    """Our user may read it, as far as Kafka says."""

    @property
    def is_compacted(self) -> bool:
        """Only the last record of a key stays, and each record needs one."""
        return "compact" in self.config.get(CLEANUP, "")


def least_in_sync(factor: int) -> str:
    """Return the min.insync.replicas that fits a replication factor."""
    return str(min(2, max(1, factor - 1)))


def kept(days: int, compression: str | None = None, *, large: bool = False) -> dict[str, str]:
    """Return topic properties: retention, and codec and record size where they are given."""
    config = {CLEANUP: "delete", "retention.ms": str(days * DAY_MS)}
    if compression is not None:
        config["compression.type"] = compression
    if large:
        config["max.message.bytes"] = LARGE_MESSAGES
    return config


DEFAULTS: Final[Mapping[str, TopicPlan]] = {
    "messages": TopicPlan(name="mqtt.messages", partitions=12, config=kept(7, "lz4", large=True)),
    "archive": TopicPlan(name="mqtt.archive", partitions=12, config=kept(30, "gzip", large=True)),
    "events": TopicPlan(name="mqtt.events", partitions=3, config=kept(7)),
    "metrics": TopicPlan(name="mqtt.metrics", partitions=3, config=kept(1)),
    "dlq": TopicPlan(name="mqtt.dlq", partitions=3, config=kept(30)),
    "bus": TopicPlan(name="monster", partitions=12, config=kept(1, "lz4", large=True)),
    "retained": TopicPlan(
        name="mqtt.retained",
        partitions=12,
        config={CLEANUP: "compact", "max.message.bytes": LARGE_MESSAGES},
    ),
}


def text_of(value: object) -> str:
    """Return a topic property as Kafka writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_used(purpose: str, options: KafkaOptions) -> bool:
    """Tell whether the feature that needs a topic is on; `[Kafka.Topics.*] Enabled` overrides this."""
    if purpose in ("bus", "retained"):
        return options.bus.enabled
    if purpose == "metrics":
        return options.writes_metrics
    if purpose == "messages":
        return options.has_stream
    return purpose == "dlq"  # archive topics come with their groups


def plan_for(purpose: str, options: TopicOptions, name: str | None = None) -> TopicPlan:
    """Return the default of `purpose` with what the configuration says about it."""
    default = DEFAULTS[purpose]
    return TopicPlan(
        name=name or options.name or default.name,
        partitions=options.partitions or default.partitions,
        replication_factor=options.replication_factor,
        config={**default.config, **{key: text_of(value) for key, value in options.config.items()}},
        section=f"Kafka.Topics.{purpose.capitalize()}",
    )


def with_use(plan: TopicPlan, purpose: str, options: KafkaOptions) -> TopicPlan:
    """Return the plan with what a node does with the topic."""
    if purpose == "messages":
        return attrs.evolve(plan, written=options.writes_stream, read=options.reads_stream, spare=WITHOUT_STREAM)
    return attrs.evolve(plan, read=purpose in READ)


def plan_topics(options: KafkaOptions, archive_topics: Iterable[str | None] = ()) -> list[TopicPlan]:
    """Return the topics that this configuration uses.

    `archive_topics`: of the archive groups in Kafka, None: the archive topic. A group's own topic is made like that.
    """
    plans: dict[str, TopicPlan] = {}
    for purpose in DEFAULTS:
        topic: TopicOptions = getattr(options.topics, purpose)
        if is_used(purpose, options) if topic.enabled is None else topic.enabled:
            plan = plan_for(purpose, topic, options.bus_topic if purpose == "bus" else None)
            plans.setdefault(plan.name, with_use(plan, purpose, options))
    for name in archive_topics:
        plan = plan_for("archive", options.topics.archive, name)
        plans.setdefault(plan.name, plan)
    return list(plans.values())


# --- differences


class Remedy(enum.Enum):
    """What `topics apply` can do about a difference."""

    GROW = "grow"
    """Add partitions."""
    CONFIG = "config"
    """Set a property, when it is asked to (`--configs`)."""
    NONE = "none"
    """Nothing; the note says what somebody can do."""


@attrs.frozen
class Difference:
    """One thing in which a topic is not as planned."""

    key: str
    """A topic property, `partitions` or `replication factor`."""
    actual: str
    wanted: str
    remedy: Remedy
    note: str = ""
    """What follows from it, or what can be done; empty when that is plain."""
    is_harmful: bool = False
    """The topic forgets what it must keep, keeps what nobody can read, or takes nothing; the rest is of taste."""

    def __str__(self) -> str:
        return f"{self.key} {self.actual} instead of {self.wanted}"


def differences(plan: TopicPlan, state: TopicState, brokers: int) -> list[Difference]:
    """Return in what `state` differs from `plan` in a cluster of so many brokers; what may not be seen is left out.

    Without a `ReplicationFactor` of its own a topic may have more replicas than the default, never fewer.
    """
    found = list(_partitions(plan, state))
    factor = plan.factor(brokers)
    if state.replication_factor < factor or plan.replication_factor not in (None, state.replication_factor):
        note = "kafka-reassign-partitions.sh moves a topic to other replicas"
        found.append(
            Difference("replication factor", str(state.replication_factor), str(factor), Remedy.NONE, note),
        )
    if state.config:
        found.extend(_properties(plan, state))
    return found


def _partitions(plan: TopicPlan, state: TopicState) -> Iterable[Difference]:
    if state.partitions == plan.partitions:
        return
    keep = f"keep them: [{plan.section}] Partitions = {state.partitions}" if plan.section else "keep them"
    remedy = Remedy.NONE
    if state.partitions > plan.partitions:
        note = f"Kafka cannot take partitions away; {keep}"
    elif is_compacted(plan.config) or is_compacted(state.config):
        note = (
            "a compacted topic must not grow: the newest record of a key would lie in another partition than the older "
            f"ones; {keep}, or use a new topic"
        )
    else:
        remedy = Remedy.GROW
        note = "MQTT topics move to other partitions: consumers may meet newer messages of a topic before older ones"
    yield Difference("partitions", str(state.partitions), str(plan.partitions), remedy, note)


def _properties(plan: TopicPlan, state: TopicState) -> Iterable[Difference]:
    for key, wanted in plan.config.items():
        actual = state.config.get(key)
        if actual is None:
            yield Difference(key, "unknown", wanted, Remedy.NONE, "this Kafka has no such topic property")
        elif not is_same(key, actual, wanted):
            note = _consequence(key, actual, wanted)
            yield Difference(key, actual, wanted, Remedy.CONFIG, note, is_harmful=key == CLEANUP)
    if MIN_ISR in plan.config:
        return
    actual, wanted = state.config.get(MIN_ISR, ""), least_in_sync(state.replication_factor)
    if actual.isdigit() and int(actual) > state.replication_factor:
        note = "there are fewer replicas than that: Kafka refuses every write"
        yield Difference(MIN_ISR, actual, wanted, Remedy.CONFIG, note, is_harmful=True)
    elif actual.isdigit() and int(actual) < int(wanted):
        note = "what Kafka acknowledged may be on one broker alone, and lost with it"
        yield Difference(MIN_ISR, actual, wanted, Remedy.CONFIG, note)


def is_compacted(config: Mapping[str, str]) -> bool:
    """Tell whether records give way to newer ones with the same key."""
    return "compact" in _policies(config.get(CLEANUP, ""))


def _policies(text: str) -> set[str]:
    return {part.strip() for part in text.split(",")} - {""}


def is_same(key: str, actual: str, wanted: str) -> bool:
    """Compare two values of a topic property: numbers as numbers, lists without regard to their order."""
    if actual == wanted:
        return True
    if key == CLEANUP:
        return _policies(actual) == _policies(wanted)
    try:
        return float(actual) == float(wanted)
    except ValueError:
        return False


def _consequence(key: str, actual: str, wanted: str) -> str:
    if key == CLEANUP:
        if "compact" in _policies(actual) - _policies(wanted):
            return "Kafka keeps the last record of each key only"
        if "delete" in _policies(actual) - _policies(wanted):
            return "Kafka deletes records by age: what must stay is lost"
    if key == "retention.ms":
        text = f"kept for {duration(actual)} instead of {duration(wanted)}"
        try:
            shorter = int(wanted) >= 0 and (int(actual) < 0 or int(wanted) < int(actual))
        except ValueError:
            return text
        return f"{text}; setting it deletes what is older" if shorter else text
    return ""


def duration(milliseconds: str) -> str:
    """Return `7 days` for `604800000`."""
    try:
        value = int(milliseconds)
    except ValueError:
        return milliseconds
    if value < 0:
        return "ever"
    for size, unit in ((DAY_MS, "day"), (3600 * SECOND_MS, "hour"), (60 * SECOND_MS, "minute"), (SECOND_MS, "second")):
        if value and value % size == 0:
            return f"{value // size} {unit}{'s' if value != size else ''}"
    return f"{value} ms"


# --- commands for somebody who may


@attrs.frozen
class KafkaTools:
    """Writes commands of Kafka's own tools, for people whose user may do what ours may not."""

    servers: Sequence[str]
    secured: bool = False
    """The connection needs more than the name of the servers."""
    user: str = "NAME"
    """Ours, where the configuration names it."""

    @classmethod
    def of(cls, options: KafkaOptions, servers: Sequence[str] = ()) -> KafkaTools:
        """Make one for these options; `servers` instead of theirs."""
        security = options.security
        return cls(servers or options.server_names, security.protocol != "PLAINTEXT", security.sasl_username or "NAME")

    def _command(self, tool: str, *arguments: str) -> str:
        secured = ("--command-config", "client.properties") if self.secured else ()
        return shlex.join((f"{tool}.sh", "--bootstrap-server", ",".join(self.servers), *secured, *arguments))

    def create(self, plan: TopicPlan, brokers: int) -> str:
        """Create a topic."""
        factor = plan.factor(brokers)
        config = [part for key, value in plan.properties(factor).items() for part in ("--config", f"{key}={value}")]
        return self._command(
            "kafka-topics", "--create", "--topic", plan.name, "--partitions", str(plan.partitions),
            "--replication-factor", str(factor), *config,
        )  # fmt: skip

    def grow(self, topic: str, partitions: int) -> str:
        """Add partitions."""
        return self._command("kafka-topics", "--alter", "--topic", topic, "--partitions", str(partitions))

    def configure(self, topic: str, config: Mapping[str, str]) -> str:
        """Set topic properties; values with commas stand in brackets."""
        pairs = ",".join(f"{key}=[{value}]" if "," in value else f"{key}={value}" for key, value in config.items())
        return self._command(
            "kafka-configs", "--alter", "--entity-type", "topics", "--entity-name", topic, "--add-config", pairs
        )

    def allow(self, topic: str, *operations: str) -> str:
        """Give this node's user rights on a topic."""
        return self._allow(operations, "--topic", topic)

    def allow_group(self, group: str) -> str:
        """Let this node's user be a member of a consumer group."""
        return self._allow(("Read",), "--group", group)

    def _allow(self, operations: Sequence[str], kind: str, name: str) -> str:
        wanted = [part for operation in operations for part in ("--operation", operation)]
        return self._command("kafka-acls", "--add", "--allow-principal", f"User:{self.user}", *wanted, kind, name)
