"""What a gateway implements and what it receives. Gateways import this module, `archive.store` and `errors` only."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, Protocol

import attrs
import trio

from mqtt_trio.archive.spool import Spool as Spool
from mqtt_trio.archive.spool import SpoolRecord as SpoolRecord
from mqtt_trio.archive.spool import spool_path as spool_path
from mqtt_trio.archive.store import ArchiveStore as ArchiveStore
from mqtt_trio.archive.store import Entry as Entry
from mqtt_trio.archive.store import NotEmptyError as NotEmptyError
from mqtt_trio.archive.store import Outcome as Outcome
from mqtt_trio.archive.store import Progress as Progress
from mqtt_trio.archive.store import RebuildTarget as RebuildTarget
from mqtt_trio.broker.connections import Newcomer as Newcomer
from mqtt_trio.broker.events import ClientConnected as ClientConnected
from mqtt_trio.broker.events import ClientDisconnected as ClientDisconnected
from mqtt_trio.broker.events import Event as Event
from mqtt_trio.broker.events import EventSink as EventSink
from mqtt_trio.broker.events import NodeDown as NodeDown
from mqtt_trio.broker.events import NodeUp as NodeUp
from mqtt_trio.broker.events import OutageBegan as OutageBegan
from mqtt_trio.broker.events import OutageEnded as OutageEnded
from mqtt_trio.broker.events import SessionTakenOver as SessionTakenOver
from mqtt_trio.broker.events import Subscribed as Subscribed
from mqtt_trio.broker.events import Unsubscribed as Unsubscribed
from mqtt_trio.broker.local import Parcel as Parcel
from mqtt_trio.broker.message import Message as Message
from mqtt_trio.broker.router import Router as Router
from mqtt_trio.broker.router import SubscriptionOptions as SubscriptionOptions
from mqtt_trio.broker.spread import Spread as Spread
from mqtt_trio.broker.tap import Answer as Answer
from mqtt_trio.broker.tap import FrameRun as FrameRun
from mqtt_trio.broker.tap import Hold as Hold
from mqtt_trio.broker.tap import Rank as Rank
from mqtt_trio.broker.tap import Refused as Refused
from mqtt_trio.broker.tap import Tap as Tap
from mqtt_trio.broker.tap import TapRoute as TapRoute
from mqtt_trio.broker.tap import frames_size as frames_size
from mqtt_trio.broker.tap import read_run as read_run
from mqtt_trio.protocol.codes import ProtocolVersion as ProtocolVersion
from mqtt_trio.protocol.codes import ReasonCode as ReasonCode
from mqtt_trio.protocol.packets import NO_PROPERTIES as NO_PROPERTIES
from mqtt_trio.protocol.packets import MessageProperties as MessageProperties
from mqtt_trio.protocol.topics import is_system_topic as is_system_topic
from mqtt_trio.protocol.topics import split_shared as split_shared
from mqtt_trio.protocol.topics import topic_matches as topic_matches
from mqtt_trio.protocol.topics import validate_topic_filter as validate_topic_filter
from mqtt_trio.protocol.topics import validate_topic_name as validate_topic_name


class LocalClient(Protocol):
    """A publisher inside the process: what it publishes came from outside the node. Trio thread only.

    Each call is one hot stretch: it routes, enqueues and flushes the touched clients before it returns. Nothing that is
    published is refused, so whoever publishes looks at `has_room` between calls, or waits (`wait_for_room`): what
    waits for the store is bounded by `[Persistence] JournalBytes` and what one call brings.
    """

    def publish(self, messages: Iterable[Message], *, tapped: bool = False) -> None:
        """Deliver `messages` to the subscribers of this node. `tapped`: show them to the taps as well.

        RETAIN is handled as delivery to existing subscriptions demands; the retained store is not changed.
        """

    def bring(self, parcels: Sequence[Parcel]) -> int:
        """Publish, in order, messages that must not be lost, and say how many of `parcels` were: each is shown to the
        taps and then, once all of them have taken it, retained where it says so and delivered. The first one that a tap
        refuses stops it: bring that one again later, and only the taps that have not taken it see it again. What is to
        be waited for stands in the parcel. A message that no client may publish must not be brought; see `objection`.
        """

    def objection(self, topic_name: str) -> str | None:
        """Why no client may publish to this valid Topic Name, whoever it is; None: one may."""

    def publish_runs(self, runs: Iterable[FrameRun]) -> None:
        """Deliver runs of frames to the subscribers of this node, as if each run had just been received; no tap sees
        them. Frames that no broker of this version writes raise `RemoteProtocolError`; runs before them count."""

    def publish_missed(self, messages: Iterable[Message]) -> None:
        """Deliver what was published elsewhere while this node was away: at QoS 1 and 2, to sessions that the store had
        when it started. Everybody else is not told old things as new ones."""

    def publish_to_groups(self, messages: Iterable[Message], names: Collection[str]) -> None:
        """Deliver to share groups of this node, by their whole names, and to nobody else; `Spread` is not asked."""

    def set_retained(self, message: Message) -> None:
        """Replace the retained message of its topic (an empty payload removes it); nobody is told."""

    def has_room(self, *, tapped: bool = False) -> bool:
        """Say whether more may be published now. False: `JournalBytes` wait to be committed, while the store fails
        with what it has not taken; `tapped`: or a tap has stopped the QoS 1 and 2 publishers. Without a store, only
        taps count."""

    def when_room(self, callback: Callable[[], None], *, tapped: bool = False) -> None:
        """Call `callback` once, as soon as `has_room`: at once when it is so now. It must not raise."""

    def when_kept(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, as soon as the store has all that kept sessions are owed of what was published up to
        now, and the retained messages that were set: at once where it has that, or there is no store. It must not
        raise.

        While the store fails it is not called, so wait for one before asking for the next. Callbacks come in their
        order.
        """


async def wait_for_room(local: LocalClient, *, tapped: bool = False) -> None:
    """Wait until `local` has room; back at once, without a checkpoint, when it has. Cancellation loses nothing."""
    while not local.has_room(tapped=tapped):
        await _called(partial(local.when_room, tapped=tapped))


async def wait_until_kept(local: LocalClient) -> None:
    """Wait until the store has what was published up to now: what came from elsewhere may be acknowledged there.

    Cancelled, it says nothing about what the store has.
    """
    await _called(local.when_kept)


async def _called(ask: Callable[[Callable[[], None]], None]) -> None:
    event = trio.Event()
    ask(event.set)
    await event.wait()


class GatewayHost(Protocol):
    """The broker as a gateway sees it."""

    node_id: str
    """`Node.Id`."""
    instance_id: bytes
    """16 random bytes of this process."""
    complete: trio.Event
    """Set once everything that shall see publishes does: what comes from outside and is to be shown to the taps waits
    for it."""

    def add_tap(self, tap: Tap) -> None:
        """Show every accepted publish to `tap`, in the order of `Rank`. Before `started()`."""

    def local_client(self, name: str) -> LocalClient:
        """Make a publisher; `name` stands in logs."""

    @property
    def marks(self) -> Mapping[str, bytes] | None:
        """What gateways had noted in the node's store when it started, by name; None when the node has no store."""

    def note(self, source: Callable[[], Mapping[str, bytes | None]]) -> None:
        """Ask `source`, at each commit of the store, for marks that are new or have changed (None removes one).

        They are committed together with whatever was published, subscribed or acknowledged before, all of it or
        nothing: a mark says how far a gateway had come when everything else was so. Begin the names with the gateway's
        own. `source` runs on the Trio thread, is quick and does not raise; a commit that failed comes again with what
        `source` says then on top. Without a store nothing happens."""

    def commit(self) -> None:
        """Have the store commit soon, though nothing but marks may have changed."""

    def make_spool(self, name: str, max_bytes: int) -> Spool:
        """Make a spool of this name among the node's data. Whoever asks runs and stops it."""

    def watch_events(self, sink: EventSink) -> None:
        """Tell `sink` of rare facts about the broker (`mqtt_trio.broker.events`). It runs inside the hot stretch, is
        quick and does not raise."""

    def figures(self) -> Iterable[Figure]:
        """All figures of the node as of now, this gateway's included, under the whole names that /metrics shows. It
        costs what a look at that page costs: every few seconds, not per message."""

    def watch_clients(self, watcher: Callable[[Newcomer], None]) -> None:
        """Tell `watcher` of each client that has connected with a Client Identifier of its own, behind its CONNACK.
        It runs inside the hot stretch, is quick and does not raise."""

    def connected_at(self, client_id: str) -> float | None:
        """Return the UTC seconds at which a client that is connected now did so, None when it is not."""

    def taken_elsewhere(self, newcomer: Newcomer, node: str) -> bool:
        """A client has connected to another node: end its connection here with Session taken over, and its session
        when it starts clean. False: nothing ended, and what is another user's never does."""

    def spread_groups(self, spread: Spread) -> None:
        """Ask `spread` from now on which messages are for the members of this node's share groups, and tell it of all
        groups. One for the node."""

    def take_waiting(self, name: str, *, ends: bool = False) -> list[Message]:
        """Take what waits for a share group of which no member is connected, and what its members have not
        acknowledged at QoS 1: it is in nobody's hands then, and gone from the store with its next commit, so note it
        before that (`note`). `ends`: from inside `Spread.ended`, also what the store does not have yet."""

    def reroute(self) -> None:
        """Ask each tap anew where messages go: for some topics it is another place now."""

    def flush(self) -> None:
        """Send what is waiting in the outboxes of touched clients; call it after releasing Holds."""

    def stop_publishers(self, owner: object) -> None:
        """A hard bound is reached: no client's QoS 1 or 2 PUBLISH is handled until `owner` lets go. Idempotent."""

    def resume_publishers(self, owner: object) -> None:
        """Undo `stop_publishers` of `owner`."""


class Gateway(Protocol):
    """A bridge to another system, supervised by `app`."""

    async def run(self, host: GatewayHost, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled; `started()` when listeners may open (everything known that clients rely on, or the
        other system is away and the policy says to go on).

        Raises:
          StartError: the broker must not run (it ends with exit code 1); later errors are handled inside.
        """

    async def stop_intake(self) -> None:
        """Bring nothing more from outside that the taps are to see: they stop next. Bounded by the caller's cancel
        scope."""

    async def stop(self) -> None:
        """Ship what is held, close. After the last publish; bounded by the caller's cancel scope."""

    def archive_store(
        self, topic: str | None, name: str, *, form: str = "JSON", timestamps: str = "iso", spooled: bool = False
    ) -> ArchiveStore:
        """Make the store of archive group `name`; `topic`: its own destination, None for the gateway's default; `form`
        and `timestamps`: `Format` and `TimestampFormat` of the group; `spooled`: a spool has what the store has in hand
        while it is away, so it must not give that up.

        Raises:
          ConfigError: something is missing that the format needs.
        """

    def unready(self) -> Sequence[str]:
        """Why clients should not be sent to this node at the moment, a line each; empty: nothing that they rely on is
        missing. Of the other system being away only when something needs it [K1]. Called often: it must be quick."""

    def describe(self) -> Sequence[str]:
        """Lines for the start-up summary."""

    def counters(self) -> dict[str, int]:
        """Counters by name, for metrics and the line that is logged at the end."""

    def figures(self) -> Iterable[Figure]:
        """Figures with labels, for metrics. Called for each look at them: it must be quick."""

    def meanings(self) -> Mapping[str, str]:
        """What each name of `counters` counts, for metrics; those that also fall begin with `Gauge: `."""


@attrs.frozen
class Figure:
    """A figure of a gateway with labels, as metrics show it."""

    name: str
    """Behind `mqtt_trio_` and the gateway's section; ends in its unit, where it has one, or in `_total`."""
    meaning: str
    """One sentence; the same for all figures of a name."""
    value: float
    labels: Mapping[str, str] = {}
    """How many values each takes is bounded."""
    kind: Literal["counter", "gauge"] = "gauge"


class Verdict(enum.Enum):
    """What a check of `mqtt-trio doctor` comes to; the value is what people read."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing, nothing is wrong with it."""
    PROBLEM = "PROBLEM"


@attrs.frozen
class Finding:
    """One line of `mqtt-trio doctor`."""

    verdict: Verdict
    about: str
    """What was looked at, such as `Kafka localhost:9092`."""
    text: str
    mend: str = ""
    """What to do about it."""


class Console(Protocol):
    """Where a command meets the person, or the script, that runs it."""

    @property
    def interactive(self) -> bool:
        """Somebody is there to answer `ask`."""

    def show(self, text: str) -> None:
        """Print what was asked for, a line or several, on standard output."""

    def say(self, text: str) -> None:
        """Print what is said beside it on standard error."""

    def ask(self, question: str) -> bool:
        """Put a question; True for yes. Nobody there, or the end of the input, is a no."""

    def progress(self, what: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Show a bar on a terminal while the body runs; call what it gives with how much more is done."""


@attrs.frozen(kw_only=True)
class CommandContext:
    """What a command of a gateway is given."""

    options: object
    """Of the gateway's section."""
    node_id: str
    """`Node.Id`."""
    archive_topics: Sequence[str | None] = ()
    """Destinations of the enabled archive groups whose store the gateway is; None: its default one."""
    archive_formats: Mapping[str | None, str] = attrs.field(factory=dict)
    """Their `Format`, by destination."""
    rebuild_targets: Sequence[RebuildTarget] = ()
    """The embedded stores of this configuration, not opened."""
    console: Console


class GatewayCommand(Protocol):
    """A command of the command line that a gateway brings, such as `topics`. It runs alone, without a broker, and may
    block."""

    def add_arguments(self, parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
        """Describe the arguments. `shared` holds those that say which configuration: a parent of each parser that may
        end a command line."""

    def run(self, arguments: argparse.Namespace, context: CommandContext) -> int:
        """Do it; return the exit code.

        Raises:
          ConfigError: exit code 78. Any other MqttTrioError: 1.
        """
