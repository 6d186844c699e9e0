"""How a simulated client asks for its subscriptions, and asks again where no answer came."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs

from tests.simulation.codec import read_number, two_bytes
from tests.simulation.history import NEVER, Interest, Span
from tests.wire import subscribe, unsubscribe

if TYPE_CHECKING:
    from tests.simulation.client import Client, Talk


@attrs.define
class Request:
    """A SUBSCRIBE or UNSUBSCRIBE that is to be made."""

    wanted: bool
    filters: list[str]
    packet_id: int = 0
    """Once it is sent on this connection."""


class Subscriber:
    """Makes one request at a time, in order."""

    def __init__(self, client: Client) -> None:
        self.client = client
        plan = client.plan
        self.interest = Interest({**plan.filters, **plan.late_filters}, plan.habits.v5, plan.habits.lasts)
        client.history.interests[client.name] = self.interest
        self.requests: deque[Request] = deque()
        if plan.filters:
            self.requests.append(Request(True, list(plan.filters)))
        self._packet_id = 100
        self._subscribed: dict[str, None] = {}
        """What was confirmed last, in order."""
        self._early: list[tuple[Request, int]] = []
        """Answered although the store took nothing, and how many batches it had taken by then."""

    def change(self, wanted: bool, topic_filter: str) -> None:
        """Subscribe to a filter or leave it, once what was asked before is answered."""
        self.requests.append(Request(wanted, [topic_filter]))

    def connected(self, talk: Talk) -> None:
        """What was not answered is asked again."""
        for request in self.requests:
            request.packet_id = 0

    def ask(self, talk: Talk) -> None:
        """Send the next request if the last one is answered."""
        if not talk.accepted or not self.requests or self.requests[0].packet_id:
            return
        request, client = self.requests[0], self.client
        self._packet_id += 1
        request.packet_id = self._packet_id
        now = client.world.now
        for topic_filter in request.filters:
            spans = self.interest.spans[topic_filter]
            if request.wanted:
                if not spans or spans[-1].may_until <= now:
                    spans.append(Span(now))
            elif spans:
                spans[-1].must_until = min(spans[-1].must_until, now)
        if request.wanted:
            client.note(f"SUBSCRIBE {' '.join(request.filters)}")
            self.interest.asked.update(request.filters)
            filters = [(f, self.interest.filters[f]) for f in request.filters]
            talk.writing.append(subscribe(client.version, request.packet_id, *filters))
        else:
            client.note(f"UNSUBSCRIBE {' '.join(request.filters)}")
            self.interest.left = True
            talk.writing.append(unsubscribe(client.version, request.packet_id, *request.filters))

    def disconnected(self) -> None:
        """The connection is gone, or about to be: of a session that goes with it nothing is owed that did not come."""
        if not self.interest.lasts:
            for spans in self.interest.spans.values():
                for span in spans:
                    span.must_from = NEVER

    def ends(self) -> None:
        """The session is about to end: nothing is owed from here on."""
        for spans in self.interest.spans.values():
            for span in spans:
                span.must_until = min(span.must_until, self.client.world.now)

    def ended(self) -> None:
        """The session has ended, with all subscriptions: make them again."""
        if self.interest.spans:
            self.interest.sessions_ended += 1
        for spans in self.interest.spans.values():
            for span in spans:
                span.may_until = min(span.may_until, self.client.world.now)
        if self._subscribed:
            self.requests.appendleft(Request(True, list(self._subscribed)))
            self._subscribed.clear()

    def killed(self) -> None:
        """What the broker confirmed while its store took nothing is gone if it was killed before the store had it: it
        is asked for again."""
        now, world = self.client.world.now, self.client.world
        if not self.interest.lasts:
            self._early.clear()  # all of it ended with the connection
        again = [request for request, commits in self._early if world.commits < commits + 2]
        self._early.clear()
        for request in again:
            for topic_filter in request.filters:
                spans = self.interest.spans[topic_filter]
                if request.wanted:
                    spans[-1].must_until = min(spans[-1].must_until, now)
                    spans.append(Span(now))
                else:
                    spans[-1].may_until = NEVER
        self.requests.extendleft(reversed(again))

    def answered(self, talk: Talk, first: int, body: bytes) -> None:
        """SUBACK or UNSUBACK came."""
        request, client = self.requests[0] if self.requests else None, self.client
        if talk.connection.kills < client.world.kills and client.world.outages_before_kill:
            return  # told by a broker that is no more, perhaps while its store took nothing: as good as lost
        if request is None or two_bytes(body) != request.packet_id or (first == 0x90) is not request.wanted:
            client.complain(f"packet {first:#x} {two_bytes(body)} answers nothing")
            return
        client.note("SUBACK" if request.wanted else "UNSUBACK")
        self.requests.popleft()
        if client.world.outages:
            self._early.append((request, client.world.commits))
        else:
            client.is_sure = True
        for topic_filter in request.filters:
            self._subscribed.pop(topic_filter, None)
            if request.wanted:
                self._subscribed[topic_filter] = None
        at = 2
        if client.habits.v5:
            size, at = read_number(body, at)
            at += size
        granted = list(body[at:])
        if request.wanted and granted != [self.interest.filters[f] for f in request.filters]:
            client.complain(f"SUBACK with {granted}")
        for topic_filter in request.filters:
            spans = self.interest.spans[topic_filter]
            if request.wanted:
                if client.habits.lasts or not self.interest.shared:  # else nobody but the broker knows how long
                    spans[-1].must_from = min(spans[-1].must_from, client.world.now)
            elif spans:
                spans[-1].may_until = min(spans[-1].may_until, client.world.now)
