"""`mqtt-trio topics plan|apply` [K3, F3]: the topics in Kafka beside the plan, and what may be done where they differ.

`apply` creates what is missing and adds partitions, other properties only with `--configs`. It never takes partitions
away, deletes nothing and leaves topics alone that the configuration does not speak of.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from gateways.kafka.command_arguments import EXIT_FAILURE, add_common, options_of, sets_of_servers, table
from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import (
    DENIED,
    Difference,
    KafkaTools,
    Remedy,
    TopicPlan,
    TopicState,
    differences,
    plan_topics,
)
from gateways.kafka.topics import AdminLike, denied_text
from mqtt_trio.errors import WrongUsageError

if TYPE_CHECKING:
    from mqtt_trio.gateway import CommandContext, Console

EXIT_DIFFERS: Final = 3
SETTLE_TIMEOUT: Final = 15.0
"""Seconds until all brokers have heard of what was done."""
SETTLE_INTERVAL: Final = 0.2
PLAN_EPILOG: Final = f"""\
exit codes:
  0  every topic is as planned
  1  failure, or there is something that this user may not see
  2  wrong usage
  {EXIT_DIFFERS}  something differs; `mqtt-trio topics apply` mends what can be mended
  78 configuration that cannot be used"""
APPLY_EPILOG: Final = """\
Never takes partitions away, deletes nothing, moves no replicas. More partitions move MQTT topics to other ones: for a
while consumers may meet newer messages of a topic before older ones; a compacted topic is not grown for that reason.
Changes of existing topics are confirmed on the terminal, elsewhere by --yes.

exit codes: 0 done, 1 failure or not confirmed, 2 wrong usage, 78 configuration that cannot be used"""


class Administrator(AdminLike, Protocol):
    """What is needed of `admin.Admin`."""

    def grow(self, name: str, partitions: int) -> str | None: ...
    def configure(self, name: str, config: Mapping[str, str]) -> str | None: ...


@attrs.frozen
class Finding:
    """One topic beside its plan."""

    plan: TopicPlan
    state: TopicState | None
    hidden: bool
    differences: Sequence[Difference]

    @property
    def is_missing(self) -> bool:
        return self.state is None and not self.hidden

    @property
    def blind_spot(self) -> str | None:
        """What this user may not see; a plan that knows too little is no plan."""
        if self.hidden:
            return "may not be seen: this user lacks Describe, or there is no such topic"
        if self.state is not None and not self.state.config:
            return "its properties may not be seen: this user lacks DescribeConfigs"
        return None

    def of(self, remedy: Remedy) -> list[Difference]:
        return [one for one in self.differences if one.remedy is remedy]

    @property
    def config(self) -> dict[str, str]:
        """The properties that differ, as they should be."""
        return {one.key: one.wanted for one in self.of(Remedy.CONFIG)}

    def as_json(self, brokers: int) -> dict[str, Any]:
        """Return what `plan --json` says."""
        factor = self.plan.factor(brokers)
        action = "create" if self.is_missing else "change" if self.differences else "none"
        return {
            "topic": self.plan.name,
            "exists": None if self.hidden else self.state is not None,
            "action": "unknown" if self.blind_spot else action,
            "planned": {
                "partitions": self.plan.partitions,
                "replicationFactor": factor,
                "config": self.plan.properties(factor),
            },
            "differences": [
                {"key": d.key, "actual": d.actual, "planned": d.wanted, "remedy": d.remedy.value, "note": d.note}
                for d in self.differences
            ],
        }


@attrs.frozen
class Look:
    """All topics of the plan as they are."""

    findings: Sequence[Finding]
    brokers: int

    @property
    def differs(self) -> bool:
        return any(one.is_missing or one.differences for one in self.findings)

    @property
    def is_blind(self) -> bool:
        return any(one.blind_spot for one in self.findings)


def look(admin: AdminLike, plans: Sequence[TopicPlan]) -> Look:
    """Compare the plan with the cluster; change nothing."""
    brokers = admin.broker_count()
    states = admin.describe([plan.name for plan in plans])
    findings = []
    for plan in plans:
        state = states.get(plan.name)
        found = differences(plan, state, brokers) if state is not None else []
        findings.append(Finding(plan, state, plan.name in states and state is None, found))
    return Look(findings, brokers)


class TopicsCommand:
    """See the module."""

    def add_arguments(self, parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
        """Describe `plan` and `apply`."""
        actions = parser.add_subparsers(dest="action", metavar="plan|apply", required=True)
        raw = argparse.RawDescriptionHelpFormatter
        plan = actions.add_parser(
            "plan", parents=[shared], formatter_class=raw, epilog=PLAN_EPILOG, help="show what differs, change nothing"
        )
        apply = actions.add_parser(
            "apply", parents=[shared], formatter_class=raw, epilog=APPLY_EPILOG, help="create topics, add partitions"
        )
        for one in (plan, apply):
            add_common(one, json=one is plan)
            one.add_argument(
                "--topic", action="append", default=[], metavar="NAME", help="only this topic of the plan; repeatable"
            )
        apply.add_argument(
            "--configs", action="store_true", help="also set properties of existing topics, such as retention.ms"
        )
        apply.add_argument("--yes", action="store_true", help="do not ask")

    def run(self, arguments: argparse.Namespace, context: CommandContext) -> int:
        """Run `plan` or `apply`."""
        options = options_of(context.options)
        plans = _chosen(plan_topics(options, context.archive_topics), arguments.topic)
        with open_admin(options) as admin:
            seen = look(admin, plans)
            if arguments.action == "plan":
                return _plan(seen, options, context.console, arguments)
            return Applier(admin, seen, options, context.console).run(configs=arguments.configs, sure=arguments.yes)


COMMAND: Final = TopicsCommand()


def open_admin(options: KafkaOptions) -> AbstractContextManager[Administrator]:
    """Connect; tests put a fake in the place of this."""
    from gateways.kafka.admin import administration

    return administration(options)


def _chosen(plans: list[TopicPlan], names: Sequence[str]) -> list[TopicPlan]:
    known = {plan.name for plan in plans}
    if unknown := [name for name in names if name not in known]:
        raise WrongUsageError(f"--topic {unknown[0]}: not in the plan, which has {', '.join(sorted(known))}")
    return [plan for plan in plans if plan.name in names] if names else plans


# --- showing


def _plan(seen: Look, options: KafkaOptions, console: Console, arguments: argparse.Namespace) -> int:
    if arguments.json:
        console.show("\n".join(json.dumps(one.as_json(seen.brokers)) for one in seen.findings))
    else:
        brokers = f"{seen.brokers} broker{'s' if seen.brokers != 1 else ''}"
        console.show(f"Kafka at {', '.join(options.server_names)}, {brokers}\n")
        console.show("\n".join(line for one in seen.findings for line in _lines(one, seen.brokers)))
        console.show(f"\n{_summary(seen, arguments)}")
    if seen.is_blind:
        return EXIT_FAILURE
    return EXIT_DIFFERS if seen.differs else 0


def _lines(finding: Finding, brokers: int) -> Iterator[str]:
    plan = finding.plan
    if finding.hidden:
        yield f"? {plan.name} {finding.blind_spot}"
    elif finding.is_missing:
        factor = plan.factor(brokers)
        yield f"+ {plan.name} is missing"
        rows = [("partitions", str(plan.partitions)), ("replication factor", str(factor))]
        yield from (f"    {line}" for line in table([*rows, *plan.properties(factor).items()]))
    elif finding.differences:
        mendable = any(one.remedy is not Remedy.NONE for one in finding.differences)
        yield f"{'~' if mendable else '!'} {plan.name}"
        changes = [(one.key, f"{one.actual} -> {one.wanted}", _hint(one)) for one in finding.differences]
        yield from (f"    {line}" for line in table(changes))
        if finding.blind_spot:
            yield f"    {finding.blind_spot}"
    elif finding.blind_spot:
        yield f"? {plan.name}: {finding.blind_spot}"
    else:
        yield f"= {plan.name}"


def _hint(difference: Difference) -> str:
    how = {Remedy.GROW: "", Remedy.CONFIG: "only with --configs", Remedy.NONE: "not by `apply`"}[difference.remedy]
    return ": ".join(part for part in (how, difference.note) if part)


def _summary(seen: Look, arguments: argparse.Namespace) -> str:
    findings = seen.findings
    counts = (
        (sum(one.is_missing for one in findings), "to create"),
        (sum(bool(one.of(Remedy.GROW)) for one in findings), "to grow"),
        (sum(bool(one.of(Remedy.CONFIG)) for one in findings), "with other properties"),
        (sum(bool(one.of(Remedy.NONE)) for one in findings), "with differences that `topics apply` leaves alone"),
        (sum(bool(one.blind_spot) for one in findings), "not fully visible"),
    )
    told = [f"{count} {text}" for count, text in counts if count]
    total = f"{len(findings)} topic{'s' if len(findings) != 1 else ''}"
    if not told:
        return f"{total}, as planned."
    mend = ""
    if any(count for count, _ in counts[:3]):
        mend = f" To do it: {_apply_command(arguments, configs=bool(counts[2][0]))}"
    return f"{total}: {', '.join(told)}.{mend}"


def _apply_command(arguments: argparse.Namespace, *, configs: bool) -> str:
    """Return the command that does what `plan` shows. What `--set` was given may be a secret: it is not repeated."""
    given = ["--config", str(arguments.config)] if arguments.config is not None else []
    if arguments.bootstrap_server is not None:
        given += ["--bootstrap-server", arguments.bootstrap_server]
    for name in arguments.topic:
        given += ["--topic", name]
    command = shlex.join(["mqtt-trio", "topics", "apply", *given, *(["--configs"] if configs else [])])
    sets = [one for one in arguments.sets if one not in sets_of_servers(arguments.bootstrap_server)]
    return f"{command}, with the same --set" if sets else command


# --- doing


class Applier:
    """Does what the plan says, as far as that is allowed."""

    def __init__(self, admin: Administrator, seen: Look, options: KafkaOptions, console: Console) -> None:
        self.failures: list[str] = []
        self._admin = admin
        self._seen = seen
        self._console = console
        self._tools = KafkaTools.of(options)

    def run(self, *, configs: bool, sure: bool) -> int:
        """Ask where that is due, do it, wait until the brokers agree; return the exit code.

        Raises:
          WrongUsageError: there is nobody to ask.
        """
        console = self._console
        findings = [one for one in self._seen.findings if one.is_missing or one.hidden or one.differences]
        for line in (line for one in findings for line in _lines(one, self._seen.brokers)):
            console.show(line)
        for one in self._seen.findings:
            if one.blind_spot and one not in findings:
                console.say(f"Topic {one.plan.name}: {one.blind_spot}")
        work = list(self._work(findings, configs=configs))
        if not work:
            console.show(_nothing(findings))
            return 0
        changes = [one.plan.name for kind, one in work if kind is not None]
        if changes and not sure and not self._confirmed(changes):
            return EXIT_FAILURE
        with console.progress("topics", len(work), "change") as done:
            for kind, one in work:
                self._do(kind, one)
                done(1)
        if not self.failures:
            self._settle(work)
        for failure in self.failures:
            console.say(failure)
        return EXIT_FAILURE if self.failures else 0

    def _work(self, findings: Sequence[Finding], *, configs: bool) -> Iterator[tuple[Remedy | None, Finding]]:
        """Yield what to do; None: create."""
        for one in findings:
            if one.is_missing or one.hidden:
                yield None, one
            if one.of(Remedy.GROW):
                yield Remedy.GROW, one
            if configs and one.of(Remedy.CONFIG):
                yield Remedy.CONFIG, one

    def _confirmed(self, changes: Sequence[str]) -> bool:
        names = ", ".join(dict.fromkeys(changes))
        if not self._console.interactive:
            raise WrongUsageError(f"this changes {names}, and there is no terminal to ask on: say --yes")
        if self._console.ask(f"Change {names}?"):
            return True
        self._console.say("Nothing was changed.")
        return False

    def _do(self, kind: Remedy | None, finding: Finding) -> None:
        plan, admin, tools = finding.plan, self._admin, self._tools
        if kind is None:
            factor = plan.factor(self._seen.brokers)
            reason = admin.create(plan.name, plan.partitions, factor, plan.properties(factor))
            if reason == DENIED:
                self.failures.append(denied_text(plan, tools, self._seen.brokers, hidden=finding.hidden))
                return
            done, command = f"Created topic {plan.name}.", ""
        elif kind is Remedy.GROW:
            reason = admin.grow(plan.name, plan.partitions)
            done = f"Topic {plan.name} has {plan.partitions} partitions."
            command = tools.grow(plan.name, plan.partitions)
        else:
            reason = admin.configure(plan.name, finding.config)
            done = f"Set {', '.join(f'{key}={value}' for key, value in finding.config.items())} on topic {plan.name}."
            command = tools.configure(plan.name, finding.config)
        if reason is None:
            self._console.show(done)
        elif reason == DENIED:
            self.failures.append(f"Topic {plan.name}: this user may not alter it; somebody who may: {command}")
        else:
            self.failures.append(f"Topic {plan.name}: {reason}")

    def _settle(self, work: Sequence[tuple[Remedy | None, Finding]]) -> None:
        """Wait until what was done is seen. Whoever sees it is one broker; the others follow within moments."""
        plans = [one.plan for _, one in work if not one.hidden]
        done = {kind for kind, _ in work}
        until = time.monotonic() + SETTLE_TIMEOUT
        while waiting := [one for one in look(self._admin, plans).findings if _is_pending(one, done)]:
            if time.monotonic() > until:
                names = ", ".join(one.plan.name for one in waiting)
                self.failures.append(f"Kafka took the changes, but does not show them yet on {names}: look again later")
                return
            time.sleep(SETTLE_INTERVAL)


def _nothing(findings: Sequence[Finding]) -> str:
    if not findings:
        return "Nothing to do."
    if any(one.of(Remedy.CONFIG) for one in findings):
        return "Nothing to do without --configs."
    return "Nothing of this can be done by `topics apply`."


def _is_pending(finding: Finding, done: set[Remedy | None]) -> bool:
    state = finding.state
    return state is None or not state.leaders or any(one.remedy in done for one in finding.differences)
