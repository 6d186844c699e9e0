"""The gateway as the broker sees it: topics, the archive producer and the bus under one roof."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from gateways.kafka import workers
from gateways.kafka.advice import JAVA, advice
from gateways.kafka.archive import KafkaArchiveStore
from gateways.kafka.bridge import ConsumerBridge, ProducerBridge
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.cluster import Cluster
from gateways.kafka.cluster_watch import follow, trouble_of
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.events_out import EventsOut
from gateways.kafka.exposed import figures_of, worst_of
from gateways.kafka.groups import bus_group
from gateways.kafka.mapping import JsonMapper, RawMapper, RecordMapper
from gateways.kafka.meanings import MEANINGS
from gateways.kafka.metrics_out import MetricsOut
from gateways.kafka.options import MESSAGES_KEY, WITHOUT_STREAM, KafkaOptions
from gateways.kafka.poller import Assignment
from gateways.kafka.precheck import probe
from gateways.kafka.presence import watch_presence
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.stream import Stream
from gateways.kafka.topic_plan import DEFAULTS, plan_topics
from gateways.kafka.topics import TopicManager
from mqtt_trio.errors import ConfigError
from mqtt_trio.gateway import ArchiveStore, Figure, GatewayHost

if TYPE_CHECKING:
    from gateways.kafka.bus import Bus
    from gateways.kafka.schema_ids import SchemaId, SchemaIds

log = logging.getLogger("gateways.kafka")

REPORTERS: Final = frozenset(("dlq", "events", "metrics"))
"""Producers that no client relies on."""

START_PATIENCE: Final = 5.0
"""Seconds that a node without the bus waits for a first answer about the topics before its listeners open."""


class KafkaGateway:
    """Section [Kafka] at work.

    Kafka being away, now or at the start, never ends it: everything goes on when Kafka is back.
    """

    def __init__(self, options: KafkaOptions) -> None:
        self.options = options
        self.cluster = Cluster(
            options.server_names, probe(options), probe(options, log_in=False), probe(options, certain=True)
        )
        self._dlq = self._make_dlq()
        topic = options.topics.dlq.name or DEFAULTS["dlq"].name
        contents = options.dlq.payloads
        self.dead_letters = DeadLetters(self._dlq, topic, self.cluster.facts, contents=contents)
        self._archive: ProducerBridge | None = None
        self._mappers: list[RecordMapper] = []
        self._stores: list[KafkaArchiveStore] = []
        self._schema_ids: SchemaIds | None = None
        self._bus: Bus | None = None
        self._stream: Stream | None = None
        self._events: EventsOut | None = None
        self._metrics: MetricsOut | None = None
        self._topics: TopicManager | None = None

    def archive_store(
        self, topic: str | None, name: str, *, form: str = "JSON", timestamps: str = "iso", spooled: bool = False
    ) -> ArchiveStore:
        """Make the store of archive group `name`, before `run`; `topic`: its own, None for the archive topic;
        `spooled`: the group has a spool.

        Raises:
          ConfigError: something is missing that the format needs, or the topic holds something else: readers of that
            would meet archive records, and what is archived to the stream of messages would be published again.
        """
        if (key := {name: key for key, name in self.options.own_topics.items()}.get(topic or "")) is not None:
            mend = f"name another{WITHOUT_STREAM if key == MESSAGES_KEY else ''}"
            text = f"archive group {name}: KafkaTopic = {topic} is the topic of Kafka.{key}; {mend}"
            raise ConfigError([text])
        if self._archive is None:
            self._archive = ProducerBridge(
                self.options,
                self.cluster,
                name="archive",
                compression="gzip",
                window_records=self.options.window_messages,
                window_bytes=self.options.window_bytes,
            )
            self._archive.on_refused = partial(self.dead_letters.refused, Stage.ARCHIVE)
        registered = self.options.schema_registry.url is not None
        mapper = make_mapper(topic or self.options.archive_topic, form, timestamps, registered=registered)
        self._mappers.append(mapper)
        preparation = self._preparation_of(mapper)
        store = KafkaArchiveStore(self._archive, mapper, self.dead_letters, preparation, spooled=spooled)
        self._stores.append(store)
        return store

    def _preparation_of(self, mapper: RecordMapper) -> SchemaId | None:
        """Return what asks the schema registry on behalf of a mapper that needs one."""
        if mapper.is_ready:
            return None
        from gateways.kafka.avro import AvroMapper
        from gateways.kafka.schema_ids import SchemaId, SchemaIds
        from gateways.kafka.schema_registry import SchemaRegistry

        assert isinstance(mapper, AvroMapper)
        if self._schema_ids is None:
            self._schema_ids = SchemaIds(SchemaRegistry(self.options))
        return SchemaId(self._schema_ids, mapper)

    def _make_dlq(self) -> ProducerBridge | None:
        options = self.options
        if options.topics.dlq.enabled is False:
            return None
        return ProducerBridge(
            options,
            self.cluster,
            name="dlq",
            compression=None,
            window_records=options.dlq.window_records,
            window_bytes=options.dlq.window_bytes,
            lazy=True,
        )

    async def run(self, host: GatewayHost, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started()` when topics, positions and retained messages are known, or Kafka is away.

        Raises:
          StartError: a live node has this `Node.Id` already.
        """
        workers.quiet_loggers()
        for one in advice(self.options):
            if one.about == JAVA:
                log.warning("%s: %s; %s", one.about, one.text, one.mend)
        self.dead_letters.broker_id = host.node_id
        for mapper in self._mappers:
            mapper.broker_id = host.node_id
        plans = plan_topics(self.options, [mapper.topic for mapper in self._mappers])
        self._topics = TopicManager(self.options, self.cluster, plans)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._topics.run)
            if self.options.metrics.enabled and "log" in self.options.metrics.reporters:
                nursery.start_soon(self._log_figures)
            if self._dlq is not None:
                await nursery.start(self._dlq.run)
            await self._start_archive(nursery, host)
            await self._start_reports(nursery, host)
            if self._archive or self._events or self._metrics or self.options.has_stream:
                # Beside a bus as well: that one knows of its own clients only, and a group that nobody published to
                # would take the first messages that meet an outage, however long the node has known of it.
                nursery.start_soon(watch_presence, self.cluster)
            if self.options.bus.enabled:
                await self._start_bus(nursery, host)
            else:
                with trio.move_on_after(START_PATIENCE):
                    await self._topics.looked.wait()
            if self.options.has_stream:
                self._stream = Stream(self.options, self.cluster, host, self.dead_letters)
                await nursery.start(self._stream.run)
            with trio.move_on_after(START_PATIENCE):  # a registry that is away is an outage from the first message on
                for store in self._stores:
                    await store.tried.wait()
            task_status.started()
            await trio.sleep_forever()

    async def _log_figures(self) -> None:
        while True:
            await trio.sleep(self.options.metrics.interval)
            log.info("figures %s", json.dumps(worst_of(self.cluster.clients.values())))

    async def _start_reports(self, nursery: trio.Nursery, host: GatewayHost) -> None:
        if self.options.topics.events.enabled:
            self._events = EventsOut(self.options, self.cluster, host)
            await nursery.start(self._events.run)
        if self.options.writes_metrics:
            self._metrics = MetricsOut(self.options, self.cluster, host)
            await nursery.start(self._metrics.run)

    async def _start_archive(self, nursery: trio.Nursery, host: GatewayHost) -> None:
        if self._archive is not None:
            self._archive.after_drain = host.flush
            await nursery.start(self._archive.run)
        for store in self._stores:
            nursery.start_soon(store.prepare)

    async def _start_bus(self, nursery: trio.Nursery, host: GatewayHost) -> None:
        self._bus = self._make_bus(host)
        if self._events is not None:
            self._bus.nodes.silent = self._events.node_silent
        nursery.start_soon(follow, self.cluster, self._bus.outbox.look)
        await nursery.start(self._bus.run)

    def _make_bus(self, host: GatewayHost) -> Bus:
        from gateways.kafka.bus import Bus

        options = self.options
        settings = BusSettings(
            topic=options.bus_topic,
            retained_topic=options.topics.retained.name or DEFAULTS["retained"].name,
            linger=options.bus.linger,
            partitions=options.topics.bus.partitions or DEFAULTS["bus"].partitions,
            window_messages=options.bus.window_messages,
            window_bytes=options.bus.window_bytes,
            ack=options.bus.ack,
            ack_timeout=options.bus.ack_timeout,
            on_outage=options.bus.on_outage,
            spool_bytes=options.bus.spool_bytes,
            checkpoint_age=options.bus.checkpoint_age,
        )
        producer = ProducerBridge(
            options,
            self.cluster,
            name="bus",
            compression="lz4",
            window_records=settings.window_messages,
            window_bytes=settings.window_bytes,
            linger_ms=0,
        )
        producer.on_refused = self.dead_letters.refused_on_bus
        bus = Bus(settings, host, producer, partial(self._make_consumer, settings, host.node_id),
                  self.cluster.facts, self.dead_letters)  # fmt: skip
        bus.outbox.trouble = partial(trouble_of, self.cluster, "bus", settings.topic)
        bus.refusal = self.cluster.refusal
        return bus

    def _make_consumer(
        self,
        settings: BusSettings,
        node_id: str,
        on_records: Callable[[list[ConsumedRecord]], None],
        offsets: Mapping[int, int],
    ) -> ConsumerBridge:
        assignments: list[Assignment] = [(settings.topic, offsets), (settings.retained_topic, "beginning")]
        group = bus_group(node_id)
        return ConsumerBridge(self.options, self.cluster, assignments, on_records, name="bus-reader", group=group)

    def unready(self) -> Sequence[str]:
        """Say what of Kafka is missing that clients of this node rely on: nothing does while neither the bus nor an
        archive group nor the stream of messages uses it."""
        topics = dict.fromkeys(mapper.topic for mapper in self._mappers)
        if self.options.bus.enabled:
            topics[self.options.bus_topic] = None
            topics[self.options.topics.retained.name or DEFAULTS["retained"].name] = None
        if self.options.has_stream and self.options.topics.messages.enabled:
            # A node that did not ask for it stays in service when the topic is closed to it.
            topics[self.options.messages_topic] = None
        if not topics and not self.options.has_stream:
            return []
        if (reason := self.cluster.reason_but_for(REPORTERS)) is not None:
            return [f"Kafka at {', '.join(self.cluster.servers)} is away: {reason}"]
        reasons = list(dict.fromkeys(text for store in self._stores if (text := store.unprepared) is not None))
        for topic in topics:
            if (trouble := self.cluster.trouble(topic)) is not None:
                reasons.append(trouble.text)
            elif self.cluster.facts(topic) is None:
                reasons.append(f"Kafka topic {topic} is missing or without a leader")
        if self._bus is not None and not self._bus.ready:
            reasons.append("this node has not joined the bus yet")
        return reasons

    async def stop_intake(self) -> None:
        """Publish nothing more of mqtt.messages, leave its group. Bounded by the caller's cancel scope."""
        if self._stream is not None:
            await self._stream.stop_intake()

    async def stop(self) -> None:
        """Ship what is held, close. Bounded by the caller's cancel scope: cancelled, everything closes by force."""
        try:
            async with trio.open_nursery() as nursery:
                if self._bus is not None:
                    nursery.start_soon(self._bus.stop)
                if self._archive is not None:
                    nursery.start_soon(self._stop_archive, self._archive)
                if self._stream is not None:
                    nursery.start_soon(self._stream.stop)
                if self._events is not None:
                    nursery.start_soon(self._events.stop)
                if self._metrics is not None:
                    nursery.start_soon(self._metrics.stop)
        finally:
            if self._dlq is not None:  # last: the others may end with letters
                await self._dlq.stop()

    async def _stop_archive(self, archive: ProducerBridge) -> None:
        with trio.CancelScope() as scope:
            if archive.outstanding_records and all(store.is_over for store in self._stores):
                scope.cancel()  # the groups' spools have it all
            await archive.stop()

    def describe(self) -> Sequence[str]:
        """Return lines for the start-up summary."""
        servers = ", ".join(self.cluster.servers)
        if self.cluster.is_away:
            state = "away, trying until it answers"
        elif self._topics is not None and self._topics.complete.is_set():
            state = "connected"
        else:
            state = "topics are being looked for"
        lines = [f"Kafka {servers}: {state}"]
        if self._bus is not None:
            lines.extend(self._bus.describe())
        else:
            lines.append("bus: off; turn it on with [Kafka.Bus] Enabled = true")
        if self._stream is not None:
            lines.append(self._stream.describe())
        else:
            lines.append("stream of messages: off; Enabled, Read or Write of [Kafka.Topics.Messages] turn it on")
        return lines

    def counters(self) -> dict[str, int]:
        """Return counters by name."""
        counters = {"outages": self.cluster.outages}
        if self._archive is not None:
            counters |= {f"archive_{name}": value for name, value in self._archive.counters().items()}
        if self._schema_ids is not None:
            counters["schema_registry_failures"] = self._schema_ids.failures
        if self._bus is not None:
            counters |= self._bus.counters()
        if self._stream is not None:
            counters |= self._stream.counters()
        if self._events is not None:
            counters |= self._events.counters()
        if self._metrics is not None:
            counters |= self._metrics.counters()
        return counters | self.dead_letters.counters()

    def figures(self) -> Iterator[Figure]:
        """Yield figures with labels: of Kafka as a whole, and of each client."""
        text = "How long Kafka has been away for some part of the node; 0: it is not."
        yield Figure("away_seconds", text, self.cluster.away_seconds)
        if self._bus is not None and (spool := self._bus.outbox.spool) is not None:
            text = "What the spool of the bus may take on disk."
            yield Figure("bus_spool_limit_bytes", text, spool.disk.max_bytes)
        yield from figures_of(self.cluster.clients.values())

    def meanings(self) -> Mapping[str, str]:
        """Return what each counter counts."""
        return MEANINGS


def make_mapper(topic: str, form: str, timestamps: str, *, registered: bool) -> RecordMapper:
    """Return what makes records of a group's `Format`; `registered`: AVRO values name the id of their schema.

    Raises:
      ConfigError: a library is not installed.
    """
    if form == "JSON":
        return JsonMapper(topic, timestamps="epoch_ms" if timestamps == "epoch_ms" else "iso")
    if form == "RAW":
        return RawMapper(topic)
    try:
        from gateways.kafka.avro import AvroMapper
    except ImportError as exc:
        text = f"Format AVRO: {exc.name} is not installed: pip install 'mqtt-trio[kafka]' brings it"
        raise ConfigError([text]) from None
    return AvroMapper(topic, registered=registered)
