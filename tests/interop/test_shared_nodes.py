"""A share group with members on three nodes that a real Kafka joins: each message once [K23]."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Final

import pytest

from tests.interop.broker_process import Brokers
from tests.interop.cluster import Cluster
from tests.interop.paho_support import V5, V31, V311, PahoClient
from tests.kafka_support import KafkaNode
from tests.lines import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.kafka]

COUNT: Final = 200
"""Messages of one publisher in one burst."""


def came(members: list[PahoClient]) -> Counter[tuple[bytes, int]]:
    """How often each message has come to members of the group, by payload and QoS."""
    return Counter((message.payload, message.qos) for member in members for message in member.heard_so_far())


def test_each_message_goes_to_one_member(kafka: KafkaNode, brokers: Brokers, topic: str) -> None:
    """From the first moment on, though some nodes have not heard of the group yet."""
    cluster = Cluster(kafka)
    nodes = [brokers.start(cluster.config(), name=f"node-{letter}") for letter in "abc"]
    with ExitStack() as stack:
        members = [
            stack.enter_context(PahoClient(nodes[0], version=V5)),
            stack.enter_context(PahoClient(nodes[1], version=V311, transport="websockets")),
            stack.enter_context(PahoClient(nodes[2], version=V31)),
        ]
        plain = stack.enter_context(PahoClient(nodes[2]))
        plain.subscribe(f"{topic}/#")
        for member in members:
            member.subscribe(f"$share/group/{topic}/#")
        publishers = [stack.enter_context(PahoClient(node)) for node in nodes]
        sent = Counter[tuple[bytes, int]]()
        for first in (0, COUNT):
            before = [len(member.heard_so_far()) for member in members]
            for number in range(first, first + COUNT):
                for name, publisher in zip("abc", publishers, strict=True):
                    payload, qos = f"{name}{number}".encode(), number % 3
                    publisher.client.publish(f"{topic}/{number % 5}", payload, qos)
                    sent[payload, qos] = 1
            wait_until(lambda: sum(came(members).values()) >= len(sent), "all messages at the group")
        work = [len(member.messages) - count for member, count in zip(members, before, strict=True)]
        assert min(work) > COUNT / 2, "all know of all by now, and share the work"
        for name, publisher in zip("abc", publishers, strict=True):  # behind each other in one partition
            publisher.publish(f"{topic}/0", f"end {name}", qos=2)
            sent[f"end {name}".encode(), 2] = 1
        wait_until(lambda: sum(came(members).values()) >= len(sent), "the last ones")
        assert came(members) == sent
        assert Counter((message.payload, message.qos) for message in plain.received(len(sent))) == sent
    for node in nodes:
        node.stop()
        counters = node.counters()
        assert not {"kafka.bus_groups_homeless", "kafka.bus_records_undelivered"} & counters.keys()


@pytest.mark.parametrize("qos", [1, 2])
def test_what_a_killed_node_was_chosen_for_waits(kafka: KafkaNode, brokers: Brokers, topic: str, qos: int) -> None:
    cluster = Cluster(kafka)
    config = cluster.config(bus='Ack = "store"')
    one, two, three = (brokers.start(config, name=f"node-{letter}") for letter in "abc")
    group = f"$share/group/{topic}/#"
    with PahoClient(one) as publisher, PahoClient(three) as staying:
        with PahoClient(two, client_id="kept", clean=False, session_expiry_interval=1000) as kept:
            kept.subscribe(group)
            staying.subscribe(group)
            count = 0
            while not kept.heard_so_far() or not staying.heard_so_far():  # until the publisher's node knows of both
                publisher.publish(f"{topic}/t", f"{count}", qos=qos)
                count += 1
            wait_until(lambda: sum(came([kept, staying]).values()) == count, "what came before the kill")
            two.kill()
            for number in range(count, count + 40):
                publisher.publish(f"{topic}/t", f"{number}", qos=qos)
            first = list(kept.heard_so_far())
        wait_until(lambda: len(came([staying])) >= 20, "what the other node was chosen for")
        assert sum(came([staying]).values()) + len(first) < count + 40, "some wait"
        back = brokers.start(config, name="node-b")
        with PahoClient(back, client_id="kept", clean=False, session_expiry_interval=1000) as kept:
            kept.messages[:] = first
            wait_until(lambda: len(came([kept, staying])) == count + 40, "what waited for the node")
            publisher.publish(f"{topic}/t", "end", qos=qos)
            wait_until(lambda: (b"end", qos) in came([kept, staying]), "the last one")
            got = came([kept, staying])
            assert set(got) == {(f"{number}".encode(), qos) for number in range(count + 40)} | {(b"end", qos)}
            if qos == 2:
                assert max(got.values()) == 1
