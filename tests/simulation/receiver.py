"""The receiving half of a simulated client: QoS flows, de-duplication, and what no broker may do on the wire."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs

from tests.simulation.codec import PUBACK, PUBCOMP, PUBREC, Arrived, ack, read_publish, two_bytes
from tests.simulation.history import Delivery

if TYPE_CHECKING:
    from tests.simulation.client import Client, Talk
    from tests.simulation.network import Connection


@attrs.define
class Written:
    """What the broker last wrote under a Packet Identifier, whether it came or was lost."""

    payload: bytes
    order: int
    connection: Connection
    """The one on which it was written last."""
    released: bool = False
    """PUBREL was written, too."""
    finished: bool = False
    """We sent PUBACK or PUBCOMP: the identifier may be used again."""
    qos: int = 1
    kills: int = 0
    """How often the broker had been killed when it was last written."""
    unsure: bool = False
    """It may be another copy of the same message: when it was written first is not known."""


class Receiver:
    """What one client is sent, over all its connections."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.unreleased: dict[int, Arrived] = {}
        """QoS 2 messages whose PUBREL has not come, by Packet Identifier; outlives connections."""
        self._written: dict[int, Written] = {}
        self._order = 0
        self._aliases: dict[int, str] = {}
        self._acks: list[tuple[int, int]] = []
        """Acknowledgements that wait, in the order of what they answer [MQTT5-4.6.0-2] to [MQTT5-4.6.0-4]."""
        self._acknowledging = False
        self._open: set[int] = set()
        """Packet Identifiers that take of our Receive Maximum on this connection."""
        self._pubrecs: deque[int] = deque()
        """Sent on this connection, their PUBREL has not come."""
        self._repeated: dict[int, tuple[Connection, int]] = {}
        """By QoS, if one may overtake another (else 0): a connection, and `Written.order` of the last message that was
        sent again on it."""

    def session_ended(self) -> None:
        """Nothing of it counts any more."""
        self.unreleased.clear()
        self._written.clear()

    def disconnected(self) -> None:
        """Forget what belongs to the connection."""
        self._aliases.clear()
        self._acks.clear()
        self._open.clear()
        self._pubrecs.clear()
        self._acknowledging = False

    def publish(self, talk: Talk, first: int, body: bytes) -> None:
        """A PUBLISH came."""
        client = self.client
        arrived = read_publish(first, body, client.habits.v5, self._aliases)
        packet_id = arrived.packet_id
        dup = " DUP" if arrived.dup else ""
        client.note(f"PUBLISH {packet_id}{dup} came:", arrived.payload)
        self._look(arrived, talk.connection)
        if arrived.qos == 0:
            self._deliver(arrived)
            return
        self._open.add(packet_id)
        maximum = talk.receive_maximum
        if maximum is not None and len(self._open) > maximum:
            client.complain(f"{len(self._open)} messages without acknowledgement, Receive Maximum {maximum}")
        if arrived.qos == 1:
            self._deliver(arrived)
            self._acks.append((PUBACK, packet_id))
            return
        if packet_id not in self.unreleased:
            self.unreleased[packet_id] = arrived
            if not client.habits.delivers_at_pubrel:
                self._deliver(arrived)
        self._acks.append((PUBREC, packet_id))

    def pubrel(self, talk: Talk, first: int, body: bytes) -> None:
        """A PUBREL came."""
        client, packet_id = self.client, two_bytes(body)
        arrived = self.unreleased.pop(packet_id, None)
        client.note(f"PUBREL {packet_id} came:", arrived.payload if arrived else None)
        written = self._written.get(packet_id)
        if written is None:
            if not client.world.holds:
                client.complain(f"PUBREL {packet_id} for nothing")
        else:
            written.released = True
        if packet_id in self._pubrecs:
            if self._pubrecs[0] != packet_id:
                client.complain(f"PUBREL {packet_id} in front of {self._pubrecs[0]}, whose PUBREC was sent before it")
            self._pubrecs.remove(packet_id)
        else:
            client.history.counts["PUBREL again"] += 1
        if arrived is not None and client.habits.delivers_at_pubrel:
            self._deliver(arrived)
        self._acks.append((PUBCOMP, packet_id))

    def acknowledge(self, talk: Talk) -> None:
        """Answer what was read, or do so a little later."""
        if not self._acks or self._acknowledging:
            return
        delay = self.client.habits.acknowledge_after
        if not delay:
            self._send_acks(talk)
            return
        self._acknowledging = True
        self.client.later(delay, self._acknowledge_late, talk)

    def _acknowledge_late(self, talk: Talk) -> None:
        self._acknowledging = False
        self._send_acks(talk)
        self.client.write(talk)

    def _send_acks(self, talk: Talk) -> None:
        for kind, packet_id in self._acks:
            talk.writing.append(ack(kind, packet_id))
            if kind == PUBREC:
                self._pubrecs.append(packet_id)
            else:
                self._open.discard(packet_id)
                if (written := self._written.get(packet_id)) is not None:
                    written.finished = True
        self._acks.clear()

    def missed(self, connection: Connection, packets: list[tuple[int, bytes]]) -> None:
        """Learn what the broker wrote that never came."""
        aliases = dict(self._aliases)
        for first, body in packets:
            if first >> 4 == 3:
                arrived = read_publish(first, body, self.client.habits.v5, aliases)
                self.client.note(f"PUBLISH {arrived.packet_id} lost:", arrived.payload)
                self._look(arrived, connection)
            elif first >> 4 == 6 and (written := self._written.get(two_bytes(body))) is not None:
                written.released = True

    def _look(self, arrived: Arrived, connection: Connection) -> None:
        """Complain about a PUBLISH that may not be written now, whatever becomes of it."""
        client, packet_id = self.client, arrived.packet_id
        name = f"PUBLISH {packet_id} {arrived.payload[:40]!r}"
        if not arrived.dup and not arrived.retain:
            client.subscriber.interest.first_sent[arrived.payload] += 1
        if arrived.qos == 0:
            if arrived.dup:
                client.complain(f"{name} with DUP at QoS 0")
            return
        if not packet_id:
            client.complain(f"{name} at QoS {arrived.qos}")
        written = self._known(packet_id, connection)
        if not arrived.dup:
            if written is not None and not written.finished:
                client.complain(f"{name} without DUP, the identifier is that of {written.payload!r}")
            self._order += 1
            self._written[packet_id] = self._new(arrived, connection)
            return
        self._look_at_repeat(arrived, written, connection)

    def _look_at_repeat(self, arrived: Arrived, written: Written | None, connection: Connection) -> None:
        """Complain about a PUBLISH with DUP that may not be written now."""
        client, packet_id = self.client, arrived.packet_id
        name = f"PUBLISH {packet_id} {arrived.payload[:40]!r}"
        client.history.counts["DUP"] += 1
        other = written is None or written.payload != arrived.payload
        if written is not None and not other and written.finished and (arrived.retain or not arrived.payload):
            # What is retained comes again for each SUBSCRIBE, perhaps under the same identifier, and so may another
            # removal: nobody can tell which copy this is.
            self._written[packet_id] = self._new(arrived, connection)
            self._written[packet_id].unsure = True
            return
        known = written is not None and not other and written.kills == connection.kills
        if not known and (not other or self._may_be_unknown(written)):
            self._order += 1
            new = self._new(arrived, connection)
            if written is not None and not other:
                new.released = written.released
                if written.released:
                    client.complain(f"{name} was sent again after its PUBREL")
            self._written[packet_id] = new
            return
        if written is None or written.payload != arrived.payload:
            client.complain(f"{name} with DUP was not sent before under its identifier")
            return
        if written.connection is connection:
            client.complain(f"{name} was sent twice on one connection")
        if written.released:
            client.complain(f"{name} was sent again after its PUBREL")
        kind = arrived.qos if client.world.holds or client.subscriber.interest.shared else 0
        before = self._repeated.get(kind)
        if not written.unsure:
            if before is not None and before[0] is connection and written.order < before[1]:
                client.complain(f"{name} was sent again behind one that had been sent later")
            self._repeated[kind] = connection, written.order
        written.connection = connection
        written.finished = False

    def _known(self, packet_id: int, connection: Connection) -> Written | None:
        """Return what the broker must know that it wrote under an identifier. At QoS 2 a message stays with its client,
        and is sent once the store has it; at QoS 1 another member of a share group may have it now, and a broker that
        was killed may not know it."""
        written = self._written.get(packet_id)
        if written is None or written.qos == 2 or written.connection is connection:
            return written
        shared = self.client.subscriber.interest.shared
        return None if shared or written.kills < connection.kills else written

    def _new(self, arrived: Arrived, connection: Connection) -> Written:
        return Written(arrived.payload, self._order, connection, qos=arrived.qos, kills=connection.kills)

    def _may_be_unknown(self, written: Written | None) -> bool:
        """Whether the broker may have meant to write what we never saw."""
        world = self.client.world
        if not world.sees_all or self.client.subscriber.interest.shared:
            return True
        return world.holds and (written is None or written.finished or written.qos == 1)

    def _deliver(self, arrived: Arrived) -> None:
        """Hand a message to the application."""
        world = self.client.world
        delivery = Delivery(
            arrived.topic_name,
            arrived.payload,
            arrived.qos,
            arrived.user_properties,
            world.now,
            arrived.retain,
            world.life,
        )
        self.client.subscriber.interest.deliveries.append(delivery)
