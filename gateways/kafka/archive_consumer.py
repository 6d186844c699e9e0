"""Reading an archive topic from Python programs of one's own, at least once [K14]."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal

import attrs
import trio
from attrs.validators import ge, in_, le, matches_re, optional

from gateways.kafka.archived import FORMATS, ArchivedMessage, archived_message
from gateways.kafka.cluster import Cluster
from gateways.kafka.handover import TrioThread
from gateways.kafka.lag import Behind
from gateways.kafka.member import Member, MemberConsumerLike, Refusals
from gateways.kafka.member_progress import Taken
from gateways.kafka.options import TOPIC_NAME, KafkaOptions
from gateways.kafka.reading import Find, reader_of
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import GatewayError

log = logging.getLogger("gateways.kafka")

CLOSE_GRACE: Final = 1.0
"""Seconds that leaving a cancelled block still waits for the thread."""
LOG_LIMIT: Final = 10
"""Malformed records that are logged one by one; beyond them every thousandth."""

Malformed = Callable[[ConsumedRecord, GatewayError], Awaitable[None]]


def topics_of(topics: str | Sequence[str] | None) -> list[str] | None:
    """Return names as a list."""
    return None if topics is None else [topics] if isinstance(topics, str) else list(topics)


def check_topics(_instance: object, _attribute: attrs.Attribute[Any], value: list[str] | None) -> None:
    """Validate names of topics."""
    if value is not None and not value:
        raise ValueError("topics: expected at least one")
    for name in value or ():
        matches_re(TOPIC_NAME)(_instance, _attribute, name)


@attrs.define(kw_only=True, eq=False)
class ArchiveConsumer:
    """An at-least-once consumer of archived MQTT messages, a member of a consumer group; for use on Trio.

    ```python
    async with ArchiveConsumer(options=options, group="billing") as consumer:
        async for message in consumer:
            await bill(message.topic_name, message.payload)
    ```

    A message counts as processed when the next one is asked for, or the block is left in order; then the offset behind
    it is stored in the group, and only then the next message comes. Left by an exception or by cancellation, the
    message in hand is not processed: whoever has its partition next gets it again. `batches` gives many at a time, and
    stores offsets once for all of them.

    Members of one group share the partitions. When a partition goes to another member, what was processed of it is
    stored first; messages of it that wait here are not given out any more. The one in hand may come to both.

    Kafka being away is waited for, as topics are that do not exist: `trouble` and the log say so; use a timeout where
    that is not wanted. Entering the block does not wait for Kafka. Leaving it stores what was processed and leaves the
    group, within `close_timeout`; cancelled, within CLOSE_GRACE. One task at a time may use a consumer, once.

    Attributes:
      malformed: records that were skipped, each of them told to `on_malformed`.
      outdated: messages that were not given out because their partition had gone to another member.

    Raises:
      ValueError, TypeError: an option is none.
      ConfigError: on entering: a store or key that the security options name cannot be used.
      GatewayError: while iterating: Kafka refuses this user the topic or the group.
    """

    options: KafkaOptions = attrs.field(factory=KafkaOptions)
    """Section [Kafka]: servers, security, client options."""
    group: str = attrs.field(validator=matches_re(r"[^\0]{1,249}"))
    """Group id: who shares the work, and where offsets are stored."""
    topics: list[str] | None = attrs.field(default=None, converter=topics_of, validator=check_topics)
    """None: the archive topic of `options`."""
    start: Literal["earliest", "latest"] = attrs.field(default="earliest", validator=in_(("earliest", "latest")))
    """Where a group begins that has no offsets of the topics yet."""
    commit_interval: float = attrs.field(default=0.0, validator=[ge(0), le(3600)])
    """Seconds between two commits, at most. 0: after each message, or each batch, and the next one waits for it.
    Otherwise nothing waits, and after a crash what was processed since the last commit comes again."""
    on_malformed: Malformed | None = None
    """Told of each record that holds no message, before what lies behind it; None: they are logged. What it raises
    leaves the loop, and the record is not processed."""
    format: Literal["JSON", "AVRO", "RAW"] = attrs.field(default="JSON", validator=in_(FORMATS))
    """`Format` of the archive group that writes the topics."""
    find_schema: Find | None = None
    """AVRO: returns the text of a schema by its id in a registry, called in the consumer's thread. None: that of
    [Kafka.SchemaRegistry], where `options` name one."""
    close_timeout: float = attrs.field(default=10.0, validator=[ge(0), le(3600)])
    """Seconds that leaving the block may take."""
    open_consumer: Callable[[Member], MemberConsumerLike] | None = None
    refusals: Refusals | None = None
    """These two are for tests."""
    client_id: str | None = attrs.field(default=None, validator=optional(matches_re(r"[ -~]{1,100}")))
    """What the group's members are called in Kafka's tools, behind `mqtt-trio-`; None: the group."""

    malformed: int = attrs.field(default=0, init=False)
    outdated: int = attrs.field(default=0, init=False)
    _member: Member | None = attrs.field(default=None, init=False)
    _cluster: Cluster | None = attrs.field(default=None, init=False)
    _waiting: deque[Taken] = attrs.field(factory=deque, init=False)
    _in_hand: list[Taken] = attrs.field(factory=list, init=False)
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)
    _ended: trio.Event = attrs.field(factory=trio.Event, init=False)
    _trio_thread: TrioThread = attrs.field(factory=TrioThread, init=False)

    async def __aenter__(self) -> ArchiveConsumer:
        if self._member is not None:
            raise RuntimeError("an ArchiveConsumer is used once")
        self._trio_thread.enter()
        member = self._member = self._make_member()
        member.on_records, member.on_stored = self._take, self._tell
        member.read = reader_of(self.format, self._schemas()).read
        trio.lowlevel.start_thread_soon(member.run, self._thread_ended, f"Kafka consumer {member.name}")
        await trio.lowlevel.checkpoint()
        return self

    def _schemas(self) -> Find | None:
        if self.find_schema is not None or self.format != "AVRO" or self.options.schema_registry.url is None:
            return self.find_schema
        from gateways.kafka.schema_registry import SchemaRegistry

        return SchemaRegistry(self.options).schema

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._member is not None
        if error is None and self._in_hand:
            self._member.report(self._in_hand)
        self._in_hand = []
        limit = self.close_timeout if error is None else min(CLOSE_GRACE, self.close_timeout)
        self._member.finish(limit)
        try:
            if error is None:
                with trio.move_on_after(limit):
                    await self._ended.wait()
        finally:
            if not self._ended.is_set():
                self._member.finish(CLOSE_GRACE)
                with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_GRACE):
                    await self._ended.wait()
            if not self._ended.is_set():
                log.warning("Kafka consumer %s does not end yet; its thread is left behind", self._member.name)

    def _make_member(self) -> Member:
        open_consumer, refusals, options = self.open_consumer, self.refusals, self.options
        name = self.client_id or self.group
        topics = self.topics or [options.archive_topic]
        if open_consumer is None or refusals is None:
            from gateways.kafka import check, member_consumer
            from gateways.kafka.precheck import probe
            from gateways.kafka.workers import quiet_loggers

            check(options)
            quiet_loggers()
            cluster = Cluster(
                options.server_names, probe(options), probe(options, log_in=False), probe(options, certain=True)
            )
            refusals = member_consumer

            def open_consumer(member: Member) -> MemberConsumerLike:
                make = partial(member_consumer.MemberConsumer, options, name, self.group, topics, member)
                return cluster.when_let_in(make)

        else:
            cluster = Cluster(options.server_names)
        self._cluster = cluster
        return Member(
            name,
            open_consumer,
            refusals,
            cluster,
            from_end=self.start == "latest",
            commit_interval=self.commit_interval,
        )

    # --- the thread's side

    def _take(self, records: list[Taken]) -> None:
        self._waiting.extend(records)
        self._tell()

    def _tell(self) -> None:
        self._trio_thread.soon(self._wake)  # where Trio has ended, the thread was left behind

    def _thread_ended(self, outcome: Any) -> None:
        self._trio_thread.soon(partial(self._note_end, outcome))

    def _note_end(self, outcome: Any) -> None:
        try:
            outcome.unwrap()
        except Exception as exc:
            member = self._member_now()
            log.exception("Kafka consumer %s: error in its thread", member.name)
            member.error = GatewayError(f"the Kafka consumer's thread failed: {exc}", retriable=False)
        self._ended.set()
        self._wake()

    def _wake(self) -> None:
        self._news.set()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self._ended.is_set():
            self._news = trio.Event()
            if not condition() and not self._ended.is_set():
                await self._news.wait()

    # --- the program's side

    @property
    def trouble(self) -> str | None:
        """Why Kafka cannot be read at the moment; None: it can, as far as is known."""
        return None if self._cluster is None else self._cluster.reason

    def lag(self) -> dict[tuple[str, int], Behind]:
        """Return how far this member is behind, in records and in seconds, by topic and partition of those that it has;
        as of the last second, and growing while no message is asked for [K17]."""
        return {} if self._member is None else self._member.lag()

    @property
    def failed_fetch_rate(self) -> float:
        """Fetches per second that Kafka did not answer, or not for all partitions, over five minutes."""
        return 0.0 if self._member is None else self._member.figures.failures.rate(time.monotonic())

    def __aiter__(self) -> ArchiveConsumer:
        return self

    async def __anext__(self) -> ArchivedMessage:
        """Return the next message; the one before it is processed. Cancelled, no message is lost: the same one comes
        when it is asked for again."""
        (message,) = await self._next(1)
        return message

    def batches(self, most: int = 500) -> Batches:
        """Iterate over lists of as many messages as there are, `most` at most and never none; those of a list are
        processed when the next one is asked for."""
        if most < 1:
            raise ValueError("most: expected 1 or more")
        return Batches(self, most)

    async def _next(self, most: int) -> list[ArchivedMessage]:
        await trio.lowlevel.checkpoint()
        messages: list[ArchivedMessage] = []
        # From the first message on nothing is awaited: what is in hand was given out.
        while not messages:
            await self._store()
            await self._wait_until(lambda: bool(self._waiting))
            self._raise_end()
            while self._waiting and len(messages) < most:
                taken = self._waiting[0]
                if not self._member_now().owns(taken):
                    self.outdated += 1
                    self._member_now().give_up(1)
                else:
                    if not isinstance(taken.archived, GatewayError):
                        messages.append(archived_message(taken.archived, taken.record))
                    elif messages:
                        break
                    else:
                        await self._skip(taken.record, taken.archived)
                    self._in_hand.append(taken)
                self._waiting.popleft()
        return messages

    async def _store(self) -> None:
        """What is in hand is processed: have that stored."""
        member = self._member_now()
        if not self._in_hand:
            return
        number = member.report(self._in_hand)
        self._in_hand = []
        if not self.commit_interval:
            await self._wait_until(lambda: member.stored_up_to >= number)
            self._raise_end()

    async def _skip(self, record: ConsumedRecord, exc: GatewayError) -> None:
        """Say that there is no message in `record`."""
        if self.on_malformed is not None:
            await self.on_malformed(record, exc)
        elif self.malformed < LOG_LIMIT or self.malformed % 1000 == 0:
            where = f"{record.topic}-{record.partition}@{record.offset}"
            log.warning("Kafka record %s holds no MQTT message and is skipped: %s", where, exc)
        self.malformed += 1

    def _member_now(self) -> Member:
        if self._member is None:
            raise RuntimeError("use `async with` around the loop")
        return self._member

    def _raise_end(self) -> None:
        if self._ended.is_set():
            raise self._member_now().error or GatewayError("the Kafka consumer is closed", retriable=False)


class Batches:
    """What `ArchiveConsumer.batches` gives."""

    def __init__(self, consumer: ArchiveConsumer, most: int) -> None:
        self._consumer = consumer
        self._most = most

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> list[ArchivedMessage]:
        """Return the next list; cancelled, no message is lost."""
        return await self._consumer._next(self._most)
