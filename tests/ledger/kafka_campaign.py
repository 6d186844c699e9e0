"""One ledger that ends in Kafka: publishers at work, nodes, brokers and the network failing, the verdict.

`archive`: one node, one archive group. `bus`: two nodes, subscribers on both, a share group with a member on each, and
retained messages, which a third node that starts at the end has as well. `outage`: one node while Kafka is away.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, TypeVar

import attrs

from tests.ledger.campaign import BOUNDS, CannotMeasure
from tests.ledger.crew import all_ready
from tests.ledger.kafka_stage import Stage
from tests.ledger.nodes import Node
from tests.ledger.proxy import FAIR, Weather
from tests.ledger.stream_crew import StreamCrew, StreamOptions
from tests.ledger.stream_verdict import Duplicates, Found, count_acknowledged, judge_group, judge_stream
from tests.ledger.verdict import judge_retained, repeated
from tests.simulation import oracle
from tests.simulation.history import NEVER
from tests.simulation.oracle import Violation

T = TypeVar("T")
Mode = Literal["archive", "bus", "outage"]
TOPIC: Final = "ledger"
FAULTS: Final = ("broker", "leader", "freeze", "cut", "silence", "slow", "term")
"""SIGKILL of one of our nodes; SIGKILL of a Kafka node that leads a partition; SIGSTOP of one; the network resets
everything; carries nothing; is slow; SIGTERM of one of our nodes."""
PROGRESS: Final = 20
"""Acknowledgements that have to come after a fault."""
PROGRESS_LIMIT: Final = 120.0
CALM_LIMIT: Final = 240.0
COMMAND_LIMIT: Final = 120.0
SHUTDOWN_TIMEOUT: Final = 10
STOP_LIMIT: Final = SHUTDOWN_TIMEOUT + 8.0
"""Seconds from SIGTERM to the end of the process, on a busy machine."""
REQUIRED: Final = ("lost", "retained", "duplicate", "order")
RETAINED: Final = 8
"""Topics of each publisher with retained messages, on the bus."""


@attrs.frozen(kw_only=True)
class KafkaOptions:
    mode: Mode
    kills: int
    """Faults: all of them count."""
    seed: int
    command: Sequence[str]
    """Starts our node, up to `serve`."""
    brokers: int = 1
    seconds: float = 180.0
    """Of the outage."""
    faults: Sequence[str] = FAULTS
    ack: str = "store"
    on_outage: str = "spool"
    patience: float = 90.0
    """Seconds without a further record, or delivery, after which what is missing counts as lost."""
    crew: StreamOptions = attrs.Factory(StreamOptions)
    arguments: Sequence[str] = ()
    """For `serve`."""


@attrs.define
class StreamReport:
    """The figures of a ledger."""

    faults: Counter[str]
    messages: int
    acknowledged: int
    refused: int
    dropped: int
    """Acknowledged and not there, as `OnOutage = "drop"` says."""
    records: int
    """In the topic, or deliveries."""
    retained: int
    """Topics with a retained message, in the end."""
    sent_again: int
    again_qos1: int
    again_qos2: int
    longest_silence: float
    """Seconds without any acknowledgement while clients published."""
    longest_recovery: float
    seconds: float
    violations: list[Violation]

    def count(self, *kinds: str) -> int:
        return sum(violation.kind in kinds for violation in self.violations)


class KafkaCampaign:
    """Plays one ledger."""

    def __init__(
        self, options: KafkaOptions, directory: Path, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        self.options, self.progress, self.directory = options, progress, directory
        self.rng = random.Random(options.seed)
        self.stage = Stage(directory, options.brokers)
        self.nodes = self._make_nodes()
        self.world = self.nodes[0].world
        crew_options = attrs.evolve(
            options.crew,
            refuses=options.ack == "store" or options.on_outage == "reject",
            retained=RETAINED if options.mode == "bus" else 0,
        )
        self.crew = StreamCrew(crew_options, random.Random(options.seed + 1), self._noticed)
        self.faults: Counter[str] = Counter()
        self.trouble: list[Violation] = []
        self.found: list[Found] = []
        self.retained_found: dict[str, dict[str, bytes]] = {}
        """By node and topic."""
        self.longest_silence = 0.0
        self.dropped = 0
        self.answers = 0
        self._answered_at = 0.0
        self._worker = ThreadPoolExecutor(1)

    def _make_nodes(self) -> list[Node]:
        first = self._make_node("a", None)
        return [first, self._make_node("b", first)] if self.options.mode == "bus" else [first]

    def _make_node(self, name: str, first: Node | None) -> Node:
        file = self.directory / f"{name}.toml"
        file.write_text(self._config(name))
        arguments = ["--config", str(file), *BOUNDS, *self.options.arguments]
        return Node(self.directory / name, self.options.command, arguments, first)

    def _config(self, name: str) -> str:
        options = self.options
        keys = "" if options.ack == "none" else f'Ack = "{options.ack}"\n'
        keys += "" if options.on_outage == "none" else f'OnOutage = "{options.on_outage}"\n'
        table = (
            f"[Kafka.Bus]\nEnabled = true\n{keys}"
            if options.mode == "bus"
            else f'[[ArchiveGroups]]\nName = "Ledger"\nFilter = "t/#"\nStore = "KAFKA"\nKafkaTopic = "{TOPIC}"\n{keys}'
        )
        listeners = '[[Listeners]]\nType = "tcp"\nPort = 1\n[[Listeners]]\nType = "websocket"\nPort = 2\n'
        head = f'[Node]\nId = "{name}"\n{listeners}[Shutdown]\nTimeout = {SHUTDOWN_TIMEOUT}\n'
        # The account is of one way to Kafka; mqtt.messages, which promises nothing, would only make it slower.
        no_stream = "[Kafka.Topics.Messages]\nEnabled = false\n"
        return f'{head}[Kafka]\nServers = "{self.stage.servers}"\n{no_stream}{table}'

    def run(self) -> StreamReport:
        """Play it to its end.

        Raises:
          CannotMeasure: Kafka or our nodes do not start, or end by themselves.
        """
        try:
            self._set_up()
            if self.options.mode == "outage":
                self._outage()
            else:
                self._rounds()
            self._calm()
            self._end()
            return self._report()
        finally:
            self._close()

    def _close(self) -> None:
        self._worker.shutdown(wait=True)
        for node in reversed(self.nodes):
            node.world.close()
            node.server.kill()
        self.stage.close()

    # Time

    def _noticed(self, _kind: int) -> None:
        """A publisher read an answer."""
        self.answers += 1
        now = self.world.now
        if self.crew.publishes:
            self.longest_silence = max(self.longest_silence, now - self._answered_at)
        self._answered_at = now

    def _do(self, action: Callable[..., T], *arguments: object) -> T:
        """Run what blocks beside the clients.

        Raises:
          CannotMeasure: it does not end; or whatever it raises.
        """
        future: Future[T] = self._worker.submit(action, *arguments)
        if not self.world.run(future.done, COMMAND_LIMIT):
            raise CannotMeasure(f"{action} takes more than {COMMAND_LIMIT:.0f} s")
        return future.result()

    def _pause(self, least: float, most: float) -> None:
        self.world.pause(self.rng.uniform(least, most))

    def _wait(self, condition: Callable[[], bool], otherwise: str, limit: float = PROGRESS_LIMIT) -> None:
        if not self.world.run(condition, limit):
            words = self.nodes[0].server.last_words()
            raise CannotMeasure(f"{otherwise} within {limit:.0f} s; the last words of a node:\n{words}")

    def _wait_for_progress(self, what: str) -> None:
        """See that publishers are answered again."""
        goal = self.answers + PROGRESS
        before = self.world.now
        if not self.world.run(lambda: self.answers >= goal, PROGRESS_LIMIT):
            text = f"nothing is acknowledged for {self.world.now - before:.0f} s after: {what}"
            self.trouble.append(Violation("stuck", "publishers", text))

    # Before, meanwhile

    def _set_up(self) -> None:
        try:
            self.stage.start()
        except (RuntimeError, OSError) as exc:
            raise CannotMeasure(f"Kafka does not start: {exc}") from exc
        crew = self.crew
        for node in self.nodes:
            node.start(timed=False)  # topics are being made
            crew.add_publishers(node.world)
            if self.options.mode == "bus":
                crew.add_subscribers(node.world)
        for node in self.nodes:
            node.wait()
        self._wait(
            lambda: all(client.is_ready for client in (*crew.subscribers, *crew.publishers)), "not all are ready"
        )
        self._answered_at = self.world.now
        crew.publish_on()
        self._wait_for_progress("the start")
        if self.trouble:
            raise CannotMeasure(f"{self.trouble[0].text}; its last words:\n{self.nodes[0].server.last_words()}")

    def _rounds(self) -> None:
        while self.faults.total() < self.options.kills:
            self._pause(0.1, 1.5)
            kind = self.rng.choice(self.options.faults)
            getattr(self, f"_fault_{kind}")()
            self.faults[kind] += 1
            self._wait_for_progress(kind)
            done = f"{self.faults.total()} of {self.options.kills} faults"
            self.progress(f"{done}, {len(self.crew.messages)} messages, last: {kind}")

    def _perhaps_more(self) -> None:
        """A misfortune seldom comes alone."""
        kind = self.rng.choice(("broker", "term", "", "", ""))
        if kind in self.options.faults:
            getattr(self, f"_fault_{kind}")(wait=False)
            self.faults[f"{kind} meanwhile"] += 1

    def _fault_broker(self, *, wait: bool = True) -> None:
        node = self.rng.choice(self.nodes)
        node.kill(lose=self.rng.random() < 0.5)
        self._pause(0.0, 0.3)
        node.start(timed=wait)
        if wait:
            node.wait()

    def _fault_term(self, *, wait: bool = True) -> None:
        node = self.rng.choice(self.nodes)
        self._stop(node)
        node.start(timed=wait)
        if wait:
            node.wait()

    def _stop(self, node: Node) -> None:
        """End a node in order, whatever its Kafka does [K18]."""
        began = self.world.now
        if code := node.stop(self.world.run, STOP_LIMIT):
            text = f"ended with {code} {self.world.now - began:.0f} s after SIGTERM"
            self.trouble.append(Violation("broker", node.name, text))

    def _fault_leader(self) -> None:
        leader = self._do(self.stage.leader, "monster" if self.options.mode == "bus" else TOPIC, self.rng.randrange(12))
        self._do(self.stage.cluster.kill, leader)
        self._pause(0.0, 2.0)
        self._perhaps_more()
        self._do(self.stage.cluster.start, leader)

    def _fault_freeze(self) -> None:
        number = self.rng.randint(1, self.options.brokers)
        self._do(self.stage.cluster.pause, number)
        self._pause(0.5, 6.0)
        self._perhaps_more()
        self._do(self.stage.cluster.resume, number)

    def _fault_cut(self) -> None:
        self._weather(Weather(cut=True), 0.0, 4.0)

    def _fault_silence(self) -> None:
        self._weather(Weather(frozen=True), 0.5, 6.0)

    def _fault_slow(self) -> None:
        delay, rate = self.rng.choice(((0.3, 0.0), (0.0, 30_000.0), (0.1, 100_000.0)))
        self._weather(Weather(delay=delay, rate=rate), 2.0, 5.0)

    def _weather(self, weather: Weather, least: float, most: float) -> None:
        index = self.rng.choice((None, self.rng.randrange(self.options.brokers)))
        self.stage.network.set(weather, index)
        self._pause(least, most)
        self._perhaps_more()
        self.stage.network.set(FAIR)

    def _outage(self) -> None:
        """Kafka ends; our node is killed twice before it comes back, unless its counters are to be exact."""
        seconds, kills = self.options.seconds, 0 if self.options.on_outage in ("drop", "reject") else 2
        self._pause(1.0, 2.0)
        self._do(self.stage.cluster.kill)
        self.faults["outage"] += 1
        began = self.world.now
        for at in sorted(self.rng.uniform(0.1, 0.9) * seconds for _ in range(kills)):
            self.world.run(lambda at=at: self.world.now > began + at, seconds)  # type: ignore[misc]
            self._fault_broker()
            self.faults["broker"] += 1
            if self.options.on_outage == "spool":
                self._wait_for_progress("a kill of the broker while Kafka is away")
            self.progress(f"{self.world.now - began:.0f} s of {seconds:.0f} s, {len(self.crew.messages)} messages")
        self.world.run(lambda: self.world.now > began + seconds, seconds)
        self._do(self.stage.cluster.start)
        self._wait_for_progress("the return of Kafka")

    # The end

    def _calm(self) -> None:
        """Let everybody finish, with nodes and a network that are left alone."""
        crew = self.crew
        crew.publishes = False
        self.stage.network.set(FAIR)
        for node in self.nodes:
            node.wait()
        if not self.world.run(lambda: not crew.busy(), CALM_LIMIT):
            self.trouble += [Violation("unfinished", name, "has exchanges that came to no end") for name in crew.busy()]

    def _end(self) -> None:
        """Wait for what is promised to arrive, end the nodes, read the topic."""
        if self.options.mode == "bus":
            self._wait_for_deliveries()
            self._read_retained()
        else:
            self._wait_for_records()
        for node in self.nodes:
            self._stop(node)
        if self.options.mode != "bus":
            self.found = self._do(self.stage.read, TOPIC)

    def _wait_for_records(self) -> None:
        promised = {message.payload for message in self.crew.messages if message.taken_at < NEVER}
        before, since = -1, time.monotonic()
        while True:
            found = {record.payload for record in self._do(self.stage.read, TOPIC)}
            if promised <= found:
                return
            if len(found) > before:
                before, since = len(found), time.monotonic()
            if time.monotonic() - since > self.options.patience:
                return
            self._pause(1.0, 1.0)

    def _wait_for_deliveries(self) -> None:
        before, since = -1, time.monotonic()
        while any(violation.kind == "lost" for violation in self._judge_deliveries()):
            got = sum(len(interest.deliveries) for interest in self.crew.history.interests.values())
            if got > before:
                before, since = got, time.monotonic()
            if time.monotonic() - since > self.options.patience:
                return
            self._pause(1.0, 1.0)

    def _judge_deliveries(self) -> list[Violation]:
        return [*oracle.judge(attrs.evolve(self.crew.history)), *judge_group(self.crew.history)]

    def _read_retained(self) -> None:
        """Ask every node for all retained messages, a new one included; again until they are as they should be."""
        late = self._make_node("c", self.nodes[0])
        self.nodes.append(late)
        late.start()
        since = time.monotonic()
        while True:
            readers = {node.name: self.crew.reader_of_retained(node.world) for node in self.nodes}
            self._wait(lambda readers=readers: all_ready(readers.values()), "not all can subscribe")  # type: ignore[misc]
            self._pause(2.0, 2.0)
            for name, reader in readers.items():
                came = reader.subscriber.interest.deliveries
                self.retained_found[name] = {delivery.topic_name: delivery.payload for delivery in came}
                reader.leave()
            if not self._judge_retained() or time.monotonic() - since > self.options.patience:
                return

    def _judge_retained(self) -> list[Violation]:
        violations: list[Violation] = []
        for name, found in self.retained_found.items():
            judged = judge_retained(self.crew.retained, found)
            violations += [attrs.evolve(each, text=f"node {name}: {each.text}") for each in judged]
        return violations

    def _by_policy(self, violations: list[Violation]) -> list[Violation]:
        """Compare what is missing, or was refused, with the counters of a node that is to drop or to reject [K10]."""
        policy, messages = self.options.on_outage, self.crew.messages
        if policy not in ("drop", "reject"):
            return violations
        counters = self.nodes[0].server.counters()
        if policy == "drop":
            self.dropped = sum(violation.kind == "lost" for violation in violations)
            counted = counters.get("archive.Ledger.dropped", 0)
            violations = [violation for violation in violations if violation.kind != "lost"]
            wrong = self.dropped != counted
            text = f"counted {counted} dropped messages, {self.dropped} are missing"
        else:
            refused = sum(message.refused_at < NEVER for message in messages)
            refused += self.crew.history.counts["disconnected instead of refused"]
            counted = counters.get("archive.Ledger.rejected", 0)
            wrong = counted != refused if self.options.crew.version == "5" else counted < refused
            text = f"counted {counted} refused messages, publishers know of {refused}"
        return [*violations, Violation("counter", self.nodes[0].name, text)] if wrong else violations

    def _report(self) -> StreamReport:
        crew, history = self.crew, self.crew.history
        violations = [Violation("wire", client, text) for client, text in history.complaints]
        if self.options.mode == "bus":
            history.kills, history.restless = sum(node.world.kills for node in self.nodes), True
            violations = self._judge_deliveries() + self._judge_retained()
            deliveries = [interest.deliveries for interest in history.interests.values()]
            records = sum(map(len, deliveries))
            again = Duplicates(sum(repeated(each, 1) for each in deliveries))
        else:
            last = self.nodes[0].life if self.options.on_outage == "spool" else None
            judged, again = judge_stream(crew.messages, self.found, last_life=last)
            violations += judged
            records = len(self.found)
        violations = self._by_policy(violations) + self.trouble
        for node in self.nodes:
            violations += [Violation("broker", node.name, line) for line in node.server.worries()]
        violations.sort(key=lambda violation: violation.kind not in REQUIRED)
        return StreamReport(
            faults=self.faults,
            messages=len(crew.messages),
            acknowledged=count_acknowledged(crew.messages),
            refused=sum(message.refused_at < NEVER for message in crew.messages),
            dropped=self.dropped,
            records=records,
            retained=len(self.retained_found.get("a", ())),
            sent_again=history.counts["publisher's DUP"],
            again_qos1=again.qos1,
            again_qos2=again.qos2,
            longest_silence=self.longest_silence,
            longest_recovery=max(node.longest_recovery for node in self.nodes),
            seconds=self.world.now,
            violations=violations,
        )
