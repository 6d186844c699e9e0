"""One ledger: a crew at work, a broker that is killed again and again, the verdict."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import attrs

from tests.ledger.crew import Crew, CrewOptions, all_ready
from tests.ledger.server import Server
from tests.ledger.sockets import SocketWorld
from tests.ledger.verdict import judge_all, repeated
from tests.simulation.history import NEVER
from tests.simulation.oracle import Violation

START_LIMIT: Final = 60.0
CALM_LIMIT: Final = 180.0
GIVE_UP: Final = 10.0
"""Seconds without a byte after which nothing more is expected."""
REQUIRED: Final = ("lost", "retained", "duplicate", "order")
"""Kinds of violations that are told first."""
TRIGGERS: Final = {"PUBACK": 4, "PUBREC": 5, "PUBCOMP": 7, "SUBACK": 9, "UNSUBACK": 11}
KINDS: Final = ("under load",) * 3 + ("at start", "while starting", "burst", "burst", *TRIGGERS)
"""When the broker is killed: at any time, as soon as it serves, before, within a burst, when an answer of it came."""
BOUNDS: Final = ("--set", "Limits.QueueMessages=1000000", "--set", "Limits.QueueBytes=1GiB")
"""What waits for those that are away stays below the bounds: a message that a bound drops is no loss by a crash."""


class CannotMeasure(Exception):
    """The broker does not serve; one message for the user."""


@attrs.frozen(kw_only=True)
class CampaignOptions:
    kills: int
    seed: int
    crew: CrewOptions
    command: Sequence[str]
    """Starts the broker, up to `serve`."""
    arguments: Sequence[str] = ()
    """For `serve`."""
    stops: float = 0.08
    """Restarts by SIGTERM among all."""


@attrs.define
class Report:
    """The figures of a ledger."""

    kills: Counter[str]
    stops: int
    starts: int
    messages: int
    acknowledged: int
    deliveries: int
    sent_again: int
    """PUBLISH packets with DUP of the publishers."""
    delivered_again: int
    """Deliveries at QoS 1 beyond the first, which QoS 1 allows."""
    wills: int
    retained: int
    expired: int
    """Sessions that were found gone when their time was over."""
    longest_recovery: float
    """Seconds from the start of the process to the first CONNACK."""
    seconds: float
    violations: list[Violation]

    def count(self, *kinds: str) -> int:
        return sum(violation.kind in kinds for violation in self.violations)


class Campaign:
    """Kills the broker while its clients work."""

    def __init__(
        self, options: CampaignOptions, directory: Path, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        self.options, self.progress = options, progress
        self.rng = random.Random(options.seed)  # of its own: how much the crew publishes is not the same each time
        self.server = Server(directory, options.command, [*BOUNDS, *options.arguments])
        self.world = SocketWorld(self.server.port)
        self.crew = Crew(self.world, options.crew, random.Random(options.seed + 1), self._noticed)
        self.kills: Counter[str] = Counter()
        self.stops = self.starts = 0
        self.longest_recovery = 0.0
        self.trouble: list[Violation] = []
        self._armed = 0
        """Kind of packet whose arrival kills the broker, 0: none."""
        self._started_at = 0.0

    def run(self) -> Report:
        """Play it to its end.

        Raises:
          CannotMeasure: the broker does not start, or ends by itself.
        """
        try:
            self._set_up()
            while self.kills.total() < self.options.kills:
                self._round()
                self.progress(f"{self.kills.total()} of {self.options.kills} kills, {self._messages} messages")
            self._calm()
            return self._report()
        finally:
            self.world.close()
            self.server.kill()

    # The broker

    def _start(self) -> None:
        world = self.world
        world.generation += 1
        world.is_ending = world.is_served = False
        self.starts += 1
        self._started_at = world.now
        try:
            self.server.start()
        except OSError as exc:
            raise CannotMeasure(f"{self.server.command[0]} cannot be run: {exc.strerror}") from exc

    def _wait_for_service(self) -> None:
        def serves() -> bool:
            if self.server.ended_by_itself:
                raise CannotMeasure(f"the broker ended by itself; its last words:\n{self.server.last_words()}")
            return self.world.is_served

        if not self.world.run(serves, START_LIMIT):
            raise CannotMeasure(f"the broker does not serve; its last words:\n{self.server.last_words()}")
        self.longest_recovery = max(self.longest_recovery, self.world.now - self._started_at)

    def _kill(self, kind: str) -> None:
        self._armed = 0
        self.world.is_ending = True
        self.server.kill()
        self.kills[kind] += 1
        self.world.kills += 1

    def _noticed(self, kind: int) -> None:
        """A client read an answer."""
        if kind == self._armed:
            self._kill(next(name for name, number in TRIGGERS.items() if number == kind))

    # Rounds

    def _set_up(self) -> None:
        self._start()
        self._wait_for_service()
        crew = self.crew
        self._wait(lambda: all_ready(crew.steady) and all_ready(crew.publishers), "not everybody could subscribe")
        crew.publish_on()
        self._wait(lambda: all(publisher.is_sure for publisher in crew.publishers), "nothing is acknowledged")

    def _wait(self, condition: Callable[[], bool], otherwise: str, limit: float = START_LIMIT) -> None:
        if not self.world.run(condition, limit):
            raise CannotMeasure(f"{otherwise}; the broker's last words:\n{self.server.last_words()}")

    def _round(self) -> None:
        """Let the crew work with a broker, then end it and start the next one."""
        rng, world, crew = self.rng, self.world, self.crew
        kind = "SIGTERM" if rng.random() < self.options.stops else rng.choice(KINDS)
        if kind != "while starting":
            self._wait_for_service()
        crew.dismiss()
        self._let_sleep()
        if kind not in ("while starting", "at start"):
            crew.add_mortal()
            world.pause(rng.uniform(0, 0.8))
            crew.change()
        self._end(kind)
        crew.broker_died()
        world.pause(rng.uniform(0, 0.15))
        self._start()

    def _let_sleep(self) -> None:
        """Have somebody leave, or come back after some rounds."""
        for client in (*self.crew.sleepers, *self.crew.members[1:]):
            if client.is_away:
                if self.rng.random() < 0.3:
                    client.come_back()
            elif client.is_sure and self.rng.random() < 0.3:
                client.leave()
        for lodger in self.crew.lodgers:
            if not lodger.is_away and lodger.is_sure and self.rng.random() < 0.2:
                lodger.leave()

    def _end(self, kind: str) -> None:
        """End the broker in one of many ways."""
        rng, world, crew = self.rng, self.world, self.crew
        if kind == "SIGTERM":
            self._stop()
            return
        if kind in TRIGGERS:
            self._armed = TRIGGERS[kind]
            if kind == "SUBACK":
                crew.add_novice() if rng.random() < 0.3 else crew.change(wanted=True)
            elif kind == "UNSUBACK":
                crew.change(wanted=False)
            before = self.kills.total()
            if world.run(lambda: self.kills.total() > before, 5.0):
                self._lose_some()
                return
        elif kind == "burst":
            crew.burst()
            world.pause(rng.uniform(0, 0.08))
        else:
            world.pause(rng.uniform(0, {"at start": 0.06, "while starting": 0.5}.get(kind, 0.5)))
        if rng.random() < 0.5:
            world.is_deaf = True
            world.pause(rng.uniform(0, 0.03))
        self._kill(kind if kind not in TRIGGERS else "under load")
        self._lose_some()

    def _lose_some(self) -> None:
        """What the broker had sent at last arrives, or is lost with the connections."""
        if self.world.is_deaf or self.rng.random() < 0.3:
            self.world.lose_connections()

    def _stop(self) -> None:
        self.world.is_ending = True
        self.server.ask_to_stop()
        while not self.server.ended_by_itself:
            self.world.pause(0.02)
        if code := self.server.wait_for_end():
            self.trouble.append(Violation("broker", "broker", f"ended with {code} after SIGTERM"))
        self.stops += 1

    # The end

    def _calm(self) -> None:
        """Let everybody finish, with a broker that is left alone."""
        world, crew = self.world, self.crew
        self._wait_for_service()
        crew.publishes = False
        for client in (*crew.sleepers, *crew.members):
            if client.is_away:
                client.come_back()
        everybody = [*crew.steady, *crew.publishers]

        def busy() -> list[str]:
            return [client.name for client in everybody if not (client.idle and client.is_ready)]

        world.heard_at = world.now
        world.run(lambda: not busy() or self._quiet_for() > GIVE_UP, CALM_LIMIT)
        self.trouble += [Violation("unfinished", name, "has exchanges that came to no end") for name in busy()]
        for lodger in crew.lodgers:
            lodger.leave()
        world.pause(3.0)  # Wills are due, lodgers' sessions are over
        for lodger in crew.lodgers:
            lodger.is_expired = True
            lodger.come_back()
        reader = crew.reader_of_retained()
        self._wait(lambda: all_ready([reader, *crew.lodgers]), "the last clients could not subscribe")
        self._wait_for_quiet(1.0)
        case = crew.conclude()
        case.retained_found = {d.topic_name: d.payload for d in reader.subscriber.interest.deliveries}
        if any(violation.kind in ("lost", "retained") for violation in judge_all(case)):
            self._wait_for_quiet(5.0)  # a slow machine loses nothing

    def _wait_for_quiet(self, seconds: float) -> None:
        self.world.heard_at = self.world.now
        self.world.run(lambda: self._quiet_for() > seconds, CALM_LIMIT)

    def _quiet_for(self) -> float:
        return self.world.now - self.world.heard_at

    def _report(self) -> Report:
        crew = self.crew
        case = crew.conclude()
        violations = judge_all(case) + self.trouble
        violations += [Violation("broker", "broker", line) for line in self.server.worries()]
        violations.sort(key=lambda violation: violation.kind not in REQUIRED)
        published = [*case.history.messages, *case.group.messages, *case.retained_messages]
        judged = [interest.deliveries for interest in case.history.interests.values()]
        judged.append([d for interest in case.group.interests.values() for d in interest.deliveries])
        return Report(
            kills=self.kills,
            stops=self.stops,
            starts=self.starts,
            messages=len(published),
            acknowledged=sum(message.taken_at < NEVER for message in published),
            deliveries=sum(map(len, judged)) + len(case.will_deliveries),
            sent_again=case.history.counts["publisher's DUP"],
            delivered_again=sum(repeated(deliveries, 1) for deliveries in judged),
            wills=len(case.will_deliveries),
            retained=len(case.retained_found or ()),
            expired=case.history.counts["sessions that had to be gone"],
            longest_recovery=self.longest_recovery,
            seconds=self.world.now,
            violations=violations,
        )

    @property
    def _messages(self) -> int:
        case = self.crew.case
        return len(case.history.messages) + len(case.group.messages) + len(case.retained_messages)
