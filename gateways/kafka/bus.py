"""The bus: nodes joined by one Kafka topic [K4, K21]. What the clients of one node publish reaches those of all others.

The tap puts runs and messages into one slot per partition; a linger later, or when a slot is full, each slot leaves as
one record (`bus_sender`). Every node reads all partitions from the end of the log, skips what it wrote itself, drops
what a retried produce doubled and hands the rest to its local client (`bus_inbox`). mqtt.retained is read beside it
from the beginning (`retained`). Partitions that the topics get later are read from their beginning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import trio

from gateways.kafka.bus_clients import BusClients
from gateways.kafka.bus_inbox import BusInbox
from gateways.kafka.bus_outbox import BusOutbox
from gateways.kafka.bus_positions import Positions
from gateways.kafka.bus_records import Kind
from gateways.kafka.bus_sender import LEAST_PART, PART_SLACK, BusSender
from gateways.kafka.bus_settings import BusSettings, Consumer, MakeConsumer, Producer, TopicSize
from gateways.kafka.bus_shares import BusShares
from gateways.kafka.bus_slots import Slot
from gateways.kafka.bus_window import BusWindow
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.node_facts import NodeFacts, encode_facts, facts_of_process
from gateways.kafka.nodes import Nodes
from gateways.kafka.records import ConsumedRecord, Reason
from gateways.kafka.retained import Retained
from gateways.kafka.thread_counters import thread_counters
from mqtt_trio.errors import StartError
from mqtt_trio.gateway import GatewayHost, Hold, Message, Rank, TapRoute, wait_for_room, wait_until_kept

log = logging.getLogger("gateways.kafka.bus")

START_TIMEOUT: Final = 10.0
"""Seconds without any progress after which a node starts without Kafka."""
REFUSAL_TIMEOUT: Final = 1.0
"""The same while it is certain that Kafka lets nobody in: nothing listens, or no server has such a name."""
START_LOOK: Final = 0.1
"""Seconds between two looks at that."""
FACTS_TIMEOUT: Final = 5.0
"""Seconds to wait for what Kafka says about the topics, once they can be read; then the configured numbers count."""
NOTE_INTERVAL: Final = 1.0
"""Seconds between two looks whether positions are to be committed although nothing else is."""
NOTE_RECORDS: Final = 100
IDLE_NOTE_INTERVAL: Final = 5.0
"""They are when so many records have come, or some within this time."""
CONFLICT_GRACE: Final = 3.0
"""Seconds that a node which has to give way takes to ship what it holds."""


class Bus:
    """One node's end of the bus; a Tap. Trio thread only."""

    rank = Rank.SHIPS
    """What an archive group refuses must not be on its way to the subscribers of other nodes by then."""

    def __init__(
        self,
        settings: BusSettings,
        host: GatewayHost,
        producer: Producer,
        make_consumer: MakeConsumer,
        facts: Callable[[str], TopicSize | None],
        dead_letters: DeadLetters | None = None,
        *,
        utc: Callable[[], float] = time.time,
    ) -> None:
        """`producer` and the consumer are run by the bus and by nobody else; `facts` is `Cluster.facts`; what can be
        neither written nor read goes to `dead_letters`, None: it is counted; `utc`: seconds since the epoch."""
        self.settings = settings
        self.host = host
        self.dead_letters = letters = dead_letters or DeadLetters()
        self.window = self._make_window()
        """Of messages at QoS 1 and 2, and of what is retained."""
        self.window_qos0 = self._make_window()
        """Apart, because QoS 0 waits in it for a whole outage: nobody at QoS 1 and 2 is to wait behind that."""
        self._producer, self._facts = producer, facts
        self._local = local = host.local_client("bus")
        self.positions = Positions(settings.topic, host.instance_id, host.marks, age=settings.checkpoint_age, utc=utc)
        self._consumer = self._prepared(make_consumer(self.on_records, self.positions.offsets))
        self.refusal: Callable[[], str | None] = lambda: None
        """Says why Kafka lets nobody in, where that is certain."""
        self._started = self._began = False
        self._has_retained = trio.Event()
        """mqtt.retained is read, and what of it is outdated is known."""
        self._told: set[type[Exception]] = set()
        self.outbox = BusOutbox(settings, host, local, producer.offer, self.window)
        self.sender = BusSender(settings, host, producer.offer, self.window_qos0, self.outbox, dead_letters=letters)
        self.nodes = Nodes(host.node_id, host.instance_id, facts_of_process(utc()), self._send_facts)
        self.inbox = BusInbox(host, local, self.nodes, self.positions, letters, utc=utc)
        self.retained = Retained(
            settings.retained_topic, host, producer.offer, local=local, window=self.window, dead_letters=letters
        )
        self.clients = BusClients(host, self.sender.tell, self.sender.arm)
        self.shares = BusShares(host, local, self.outbox, self._slot, self.sender.tell, self.sender.arm)
        self._join_parts()

    def _make_window(self) -> BusWindow:
        settings, host = self.settings, self.host
        stop, resume = partial(host.stop_publishers, self), partial(host.resume_publishers, self)
        return BusWindow(settings.window_messages, settings.window_bytes, stop=stop, resume=resume)

    def _prepared(self, consumer: Consumer) -> Consumer:
        """Return the consumer, told what this node knows of the topic."""
        consumer.on_another = self._begin_another
        if self.positions.offsets and self.positions.identity is not None:
            consumer.expect(self.settings.topic, self.positions.identity)
        consumer.room = partial(wait_for_room, self._local)  # Kafka keeps it for longer than this node has memory for
        return consumer

    def _join_parts(self) -> None:
        """Tell the parts of each other."""
        self._producer.after_drain = self.host.flush
        self.sender.retain = self._retain
        self.sender.after_ship = self._ship_others
        self.retained.arm = self.sender.arm
        self.inbox.clients, self.inbox.shares = self.clients, self.shares
        self.nodes.changed = self.shares.node_changed
        self.nodes.deaf = lambda: self.outbox.trouble() is not None

    # --- tap

    def route(self, topic_name: str) -> TapRoute | None:
        """Where messages of `topic_name` wait: $SYS is each node's own."""
        if topic_name.startswith("$SYS/") or topic_name == "$SYS":
            return None
        return self.shares.route(topic_name, self._slot(topic_name))

    def _slot(self, topic_name: str) -> Slot:
        return self.sender.slot(topic_name, self._facts(self.settings.topic))

    def _retain(self, message: Message, waited_for: bool) -> Hold | None:
        """Write a message with RETAIN 1 to mqtt.retained as well; see `Retained.take`."""
        full = self.window.full or self.window_qos0.full
        if message.qos == 0 and full and not self.retained.waits(message.topic_name):
            self.retained.dropped += 1
            return None
        return self.retained.take(message, waited_for=waited_for)

    # --- out

    def _ship_others(self) -> None:
        self.clients.ship()
        self.shares.ship()
        self.retained.ship()

    def _send_facts(self, kind: Kind, facts: NodeFacts, settled: Callable[[], None]) -> None:
        def done(failure: Exception | None) -> None:
            if failure is not None and not self.sender.ending:
                log.warning("the other nodes do not hear of this one: %s", failure)
            settled()

        self.sender.tell(kind, encode_facts(facts), done)

    # --- in

    def on_records(self, records: list[ConsumedRecord]) -> None:
        """Take records of both topics, each partition in its order."""
        self._begin_reading()  # nobody else may have been told yet
        topic, receive, retained = self.settings.topic, self.inbox.receive, self.retained
        for record in records:
            try:
                if record.topic == topic:
                    receive(record)
                else:
                    retained.receive(record)
            except Exception as exc:  # whatever is in it: a record never stops those behind it
                self.inbox.undelivered += 1
                if type(exc) not in self._told:  # a flood of them has one traceback, and the letters tell the rest
                    self._told.add(type(exc))
                    log.exception("%s-%d@%d could not be delivered", record.topic, record.partition, record.offset)
                self.dead_letters.unreadable(
                    record, Reason.UNDELIVERED, f"{type(exc).__name__}: {exc}", type(exc).__name__
                )

    # --- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started()` when every position is known, this node's id is its own and the retained
        messages are read, or when Kafka has not answered for START_TIMEOUT, or has certainly been away for
        REFUSAL_TIMEOUT: then the bus joins in when it answers.

        Raises:
          StartError: another live node has this `Node.Id` and was first. Also later, when Kafka was away at the start.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self.outbox.run)
            self.host.add_tap(self)
            self.host.note(self.positions.marks)
            self.host.note(self.shares.table.marks)
            await nursery.start(self._producer.run)
            await nursery.start(self._consumer.run)
            nursery.start_soon(self.sender.run)
            nursery.start_soon(self._join)
            nursery.start_soon(self._note_positions)
            nursery.start_soon(self._start, task_status)
            await self.nodes.conflict.wait()
            if self._started:
                with trio.move_on_after(CONFLICT_GRACE):
                    await self.stop()
            nursery.cancel_scope.cancel()
        raise StartError(self.nodes.conflict_text)

    async def _join(self) -> None:
        await self._consumer.positions_known.wait()
        self._begin_reading()
        await self._begin_noting()
        topics = self.settings.topic, self.settings.retained_topic
        with trio.move_on_after(FACTS_TIMEOUT):  # the consumer may be quicker than who asks for the topics' properties
            while any(self._facts(topic) is None for topic in topics):  # noqa: ASYNC110  once, at the start
                await trio.sleep(0.02)
        self.sender.begin(self._facts(self.settings.topic))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.nodes.run)
            nursery.start_soon(self._tell_groups)
            await self._consumer.caught_up.wait()
            self._begin_retaining()

    async def _tell_groups(self) -> None:
        await self.nodes.joined.wait()  # a node that has to give way tells nobody of its groups
        self.shares.joined = True
        self.shares.tell_all()

    def _begin_reading(self) -> None:
        if not self._began:
            self._began = True
            began = self._consumer.began.items()
            self.positions.identity = self._consumer.identity(self.settings.topic)
            self.positions.begin({number: at for (topic, number), at in began if topic == self.settings.topic})

    def _begin_another(self, topic: str, identity: str | None) -> None:
        if topic == self.settings.topic:
            self.positions.begin_another(identity)

    async def _begin_noting(self) -> None:
        """Note this life's id before it writes anything: the next one must know what this one wrote. A store that takes
        nothing is waited for as long as Kafka would be."""
        self.host.commit()
        with trio.move_on_after(START_TIMEOUT):
            await wait_until_kept(self._local)

    async def _note_positions(self) -> None:
        """Have the store commit now and then, so that little has to be read again, and tell Kafka behind it."""
        received, at = 0, trio.current_time()
        while True:
            await trio.sleep(NOTE_INTERVAL)
            self.shares.look_again()
            came, now = self.inbox.received - received, trio.current_time()
            if not came or (came < NOTE_RECORDS and now - at < IDLE_NOTE_INTERVAL):
                continue
            received, at = self.inbox.received, now
            offsets = self.positions.commits()
            self.host.commit()
            await wait_until_kept(self._local)
            self._consumer.commit({(self.settings.topic, number): offset for number, offset in offsets.items()})

    def _begin_retaining(self) -> None:
        """All retained messages are read, and so is how they are spread over partitions, if anybody wrote before."""
        kept = self._facts(self.settings.retained_topic)
        if kept is not None:
            self.retained.maximum_size = max(kept.max_message_bytes - PART_SLACK, LEAST_PART)
        self.retained.begin(kept.partitions if kept is not None else self.settings.retained_partitions)
        self._has_retained.set()

    async def _start(self, task_status: trio.TaskStatus[None]) -> None:
        events = (self._consumer.positions_known, self.nodes.joined, self._has_retained)
        for event in events:
            if not await self._progress(event):
                # No second warning: that Kafka is away has been said, and whoever says it names the server.
                log.info("Kafka does not answer: this node starts without the bus and joins it when Kafka is back")
                break
        self._started = True
        task_status.started()

    async def _progress(self, event: trio.Event) -> bool:
        """Wait for `event` as long as records come in; False when nothing happened for START_TIMEOUT, or when Kafka has
        let nobody in for REFUSAL_TIMEOUT."""
        received = 0
        moved_at = let_in_at = trio.current_time()
        while True:
            now, before, received = trio.current_time(), received, self.inbox.received + self.retained.received
            if received != before:
                moved_at = now
            if self.refusal() is None:
                let_in_at = now
            give_up_at = min(moved_at + START_TIMEOUT, let_in_at + REFUSAL_TIMEOUT)
            if now >= give_up_at:
                return False
            with trio.move_on_at(min(now + START_LOOK, give_up_at)):
                await event.wait()
                return True

    @property
    def ready(self) -> bool:
        """This node misses nothing that others publish, and has all retained messages."""
        return self.nodes.joined.is_set() and self._has_retained.is_set()

    async def stop(self) -> None:
        """Ship what waits, say goodbye, close the producer. Bounded by the caller's cancel scope. Idempotent."""
        try:
            self.sender.ship_all()
            await self.outbox.finish(lambda: self.sender.has_sure)
            await self.retained.settle()
            if self.sender.is_open:
                self.retained.ship(everything=True)
                self.nodes.goodbye()
        finally:
            self.sender.ending = True
            try:
                with trio.CancelScope() as scope:
                    if self.outbox.trouble() is not None and self.outbox.is_safe and self.retained.is_safe:
                        scope.cancel()  # the next process sends it: nobody waits for Kafka
                    await self._producer.stop()
                await self.outbox.stop()
            finally:
                self.host.commit()  # the last positions, and what Kafka has
                self.window.release_all()
                self.host.flush()
                self._tell_unconfirmed()

    def _tell_unconfirmed(self) -> None:
        """Say how much of what is on no disk Kafka had not confirmed: it may have some of it."""
        unconfirmed = {
            "messages": self.sender.unconfirmed + self.outbox.unconfirmed + self.outbox.give_up(),
            "retained messages": self.retained.unconfirmed,
        }
        self.sender.unconfirmed = self.outbox.unconfirmed = self.retained.unconfirmed = 0
        if any(unconfirmed.values()):
            text = " and ".join(f"{count} {what}" for what, count in unconfirmed.items() if count)
            log.error("stopped before Kafka confirmed %s: other nodes may miss them", text)

    def describe(self) -> Sequence[str]:
        """Lines for the start-up summary."""
        settings, others = self.settings, len(self.nodes.known)
        state = f"{others} other node{'' if others == 1 else 's'}" if self.ready else "waiting for Kafka"
        linger = settings.linger * 1000
        return [
            f"bus: topic {settings.topic}, {self.sender.partitions} partitions, linger {linger:g} ms, {state}",
            f"retained messages of the cluster: topic {settings.retained_topic}",
        ]

    def counters(self) -> dict[str, int]:
        """Counters by name; what waits or is on its way is a gauge."""
        window, qos0, sender, outbox, inbox = self.window, self.window_qos0, self.sender, self.outbox, self.inbox
        return {
            "bus_messages_sent": sender.sent_messages + outbox.sent_messages,
            "bus_records_sent": sender.sent_records + outbox.sent_records,
            "bus_messages_waiting": window.messages + qos0.messages,
            "bus_bytes_waiting": window.size + qos0.size,
            "bus_messages_dropped": qos0.dropped,
            "bus_messages_held": window.held,
            "bus_messages_refused": window.refused,
            "bus_messages_failed": sender.failed_messages + outbox.failed_messages,
            "bus_publishers_stopped": window.stops,
            "bus_nodes": len(self.nodes.known),
            **outbox.counters(),
            **self.clients.counters(),
            **self.shares.counters(),
            **inbox.counters(),
            **self.retained.counters(),
            **thread_counters("bus_producer", self._producer.counters()),
            **thread_counters("bus_consumer", self._consumer.counters()),
        }
