"""A client that connects to one node is disconnected from every other one [K23]."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from gateways.kafka.bus_clients import CLOCKS, MAX_PENDING, decode_newcomers, encode_newcomer
from gateways.kafka.bus_records import BusRecordError, Kind, decode_header, encode_header
from mqtt_trio.gateway import Newcomer, ReasonCode
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import Disconnect, Will
from tests.gateways.memory_bus import MemoryKafka, Node, start_node
from tests.gateways.whole_nodes import SOON, WholeCluster, open_cluster

TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)
NEWCOMERS = st.builds(Newcomer, TEXTS.filter(bool), st.none() | TEXTS, st.booleans(), st.floats(0, 4e9))
AT = 1_790_000_000.0


@pytest.fixture
async def cluster() -> AsyncIterator[WholeCluster]:
    async with open_cluster() as cluster:
        yield cluster


def clients_records(kafka: MemoryKafka) -> list[list[Newcomer]]:
    """What nodes have announced, by record."""
    found = []
    for record in kafka.log("monster", 0):
        header = decode_header(record.value or b"")
        if header.kind is Kind.CLIENTS:
            found.append(decode_newcomers((record.value or b"")[header.body_start :]))
    return found


@given(st.lists(NEWCOMERS, max_size=5))
def test_what_is_written_is_read(newcomers: list[Newcomer]) -> None:
    body = b"".join(map(encode_newcomer, newcomers))
    assert decode_newcomers(body) == newcomers
    for cut in range(1, len(body)):
        try:
            assert decode_newcomers(body[:cut]) == newcomers[: len(decode_newcomers(body[:cut]))]
        except BusRecordError:
            pass


@given(st.binary(max_size=200))
def test_garbage_is_read_or_refused(body: bytes) -> None:
    try:
        decode_newcomers(body)
    except BusRecordError:
        pass


async def test_the_client_moves_with_its_id(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two, three = [await cluster.start(name) for name in ("one", "two", "three")]
    old = await one.connect("device", session_expiry_interval=100)
    older = await three.connect("other")
    await trio.sleep(SOON)  # within a linger, the log might have them the other way round
    new = await two.connect("device", "t", clean_start=False)
    assert await old.closed() == Disconnect(ReasonCode.SESSION_TAKEN_OVER)
    await trio.sleep(60)
    assert await new.nothing_waits()
    assert await older.nothing_waits()
    third = await three.connect("device", version=ProtocolVersion.MQTT_3_1_1, clean_start=False)
    left = await new.closed()
    assert isinstance(left, Disconnect)
    assert left.reason_code is ReasonCode.SESSION_TAKEN_OVER
    back = await one.connect("device", clean_start=False, session_expiry_interval=100)
    assert back.connack is not None
    assert back.connack.session_present, "the session has stayed where it was"
    assert await third.closed() is None
    assert one.counters()["bus_clients_taken_over"] == 1
    assert two.counters()["bus_clients_announced"] == 1
    assert one.memory.broker.metrics.sessions_taken_over == 1


async def test_a_clean_start_ends_the_session_everywhere(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two, three = [await cluster.start(name) for name in ("one", "two", "three")]
    old = await one.connect("device", "t", session_expiry_interval=1000, clean_start=False)
    await old.disconnect()
    other = await three.connect("device", "t", session_expiry_interval=1000, clean_start=False)
    await trio.sleep(SOON)
    assert "device" in one.memory.broker.connections.sessions, "it does not move"
    await trio.sleep(SOON)
    await two.connect("device", clean_start=True)
    await trio.sleep(SOON)
    for node in (one, three):
        assert "device" not in node.memory.broker.connections.sessions
        assert not node.memory.broker.metrics.subscriptions
    left = await other.closed()
    assert isinstance(left, Disconnect)
    assert left.reason_code is ReasonCode.SESSION_TAKEN_OVER


@pytest.mark.parametrize("clean_start", [False, True])
async def test_a_will_that_is_not_due_goes_by_the_session(
    autojump_clock: MockClock, cluster: WholeCluster, clean_start: bool
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    watcher = await two.connect("watcher", "gone")
    will = Will(topic_name="gone", payload=b"!", will_delay_interval=50)
    await one.connect("device", will=will, session_expiry_interval=100)
    await trio.sleep(1)
    await two.connect("device", clean_start=clean_start)
    await trio.sleep(200)
    wills = [message.payload for message in await watcher.waiting_messages()]
    assert wills == ([b"!"] if clean_start else [])


async def test_nobody_takes_over_another_users_client(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    from mqtt_trio.broker.access import Credentials, Granted, Principal

    class ByName:
        def authenticate(self, credentials: Credentials) -> Granted:
            return Granted(Principal(credentials.client_id, credentials.user_name))

    one = await cluster.start("one", authenticator=ByName())
    two = await cluster.start("two", authenticator=ByName())
    mine = await one.connect("device", user_name="anna", session_expiry_interval=1000)
    await two.connect("device", user_name="eve", clean_start=True)
    await trio.sleep(SOON)
    assert await mine.nothing_waits()
    assert one.counters()["bus_clients_taken_over"] == 0
    await trio.sleep(SOON)
    later = await cluster.start("three", authenticator=ByName())
    await later.connect("device", user_name="anna", clean_start=False)
    assert isinstance(await mine.closed(), Disconnect)


async def test_ids_that_a_node_has_made_are_not_announced(autojump_clock: MockClock, cluster: WholeCluster) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    clients = [await one.connect(), await two.connect()]
    await trio.sleep(SOON)
    assert [client.client_id for client in clients] == ["auto-1", "auto-1"]
    for client in clients:
        assert await client.nothing_waits()
    assert clients_records(cluster.kafka) == []


# --- races


class Race:
    """Two nodes on the bus, without brokers."""

    def __init__(self, one: Node, two: Node, kafka: MemoryKafka) -> None:
        self.one, self.two, self.kafka = one, two, kafka


@pytest.fixture
async def race() -> AsyncIterator[Race]:
    kafka = MemoryKafka()
    async with trio.open_nursery() as nursery:
        yield Race(await start_node(nursery, kafka, "one"), await start_node(nursery, kafka, "two"), kafka)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("gap", [0.0, 0.0005, 0.001, 0.002, 0.004, 0.01])
@pytest.mark.parametrize("skew", [-3.0, 0.0, 3.0])
async def test_of_two_at_once_one_stays(autojump_clock: MockClock, race: Race, gap: float, skew: float) -> None:
    race.one.connect("device", AT)
    await trio.sleep(gap)
    race.two.connect("device", AT + skew)
    await trio.sleep(60)
    holders = [node for node in (race.one, race.two) if "device" in node.host.clients]
    assert len(holders) == 1
    last = clients_records(race.kafka)[-1]
    assert [newcomer.connected_at for newcomer in last] == [holders[0].host.clients["device"]]
    assert len(race.one.host.taken) + len(race.two.host.taken) == 1, "nobody is sent to and fro"


@pytest.mark.parametrize("slow", ["one", "two"])
async def test_a_node_that_reads_late_comes_to_the_same_end(autojump_clock: MockClock, race: Race, slow: str) -> None:
    late = race.one if slow == "one" else race.two
    late.consumer.gate = trio.Event()
    race.one.connect("device", AT)
    await trio.sleep(0.05)
    race.two.connect("device", AT + 1)
    await trio.sleep(5)
    late.consumer.gate.set()
    await trio.sleep(5)
    assert "device" not in race.one.host.clients
    assert "device" in race.two.host.clients


@pytest.mark.parametrize("twice", [False, True])
async def test_announcements_of_an_outage_go_by_the_clock(autojump_clock: MockClock, race: Race, twice: bool) -> None:
    """The log has them in any order: the client is where it connected last."""
    race.kafka.twice = twice
    race.kafka.go_away()
    race.two.connect("device", AT)
    race.one.connect("other", AT)
    await trio.sleep(CLOCKS + 50)
    race.one.connect("device", AT + CLOCKS + 50)
    race.two.connect("other", AT + CLOCKS + 50)
    race.kafka.come_back()
    await trio.sleep(5)
    assert race.one.host.clients.keys() == {"device"}
    assert race.two.host.clients.keys() == {"other"}


async def test_a_client_that_has_gone_on_is_not_missed(autojump_clock: MockClock, race: Race) -> None:
    """It went from two to one and from there to nowhere: what two announced later in the log concerns nobody at one."""
    race.one.consumer.gate = trio.Event()
    race.two.connect("device", AT)
    await trio.sleep(SOON)
    race.one.connect("device", AT + 1)
    del race.one.host.clients["device"]
    race.one.consumer.gate.set()
    await trio.sleep(SOON)
    assert race.one.host.taken == []
    assert "device" not in race.two.host.clients


async def test_an_announcement_that_kafka_refuses_holds_nothing_back(autojump_clock: MockClock, race: Race) -> None:
    race.kafka.refuse = lambda record: (record.value or b"\0\0")[1] == Kind.CLIENTS
    race.one.connect("device", AT)
    await trio.sleep(SOON)
    race.kafka.refuse = lambda record: False
    race.two.connect("device", AT + 1)
    await trio.sleep(SOON)
    assert "device" not in race.one.host.clients


async def test_many_clients_share_records(autojump_clock: MockClock, race: Race) -> None:
    for number in range(5000):
        race.one.connect(f"client {number}", AT)
        race.two.connect(f"client {number}", AT - 1)
    await trio.sleep(SOON)
    records = clients_records(race.kafka)
    assert sum(map(len, records)) == 10_000
    assert len(records) < 10
    assert len(race.one.host.clients) + len(race.two.host.clients) == 5000


async def test_announcements_that_wait_are_bounded(
    autojump_clock: MockClock, race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateways.kafka.bus_clients.MAX_PENDING", 10)
    assert MAX_PENDING > 10
    race.one.bus.sender._open = False
    for number in range(25):
        race.one.connect(f"client {number}", AT)
    assert race.one.bus.counters()["bus_clients_forgotten"] == 15
    race.one.bus.sender.begin(None)
    await trio.sleep(SOON)
    assert [newcomer.client_id for newcomer in clients_records(race.kafka)[0]] == [f"client {n}" for n in range(15, 25)]


async def test_garbage_about_clients_is_counted(autojump_clock: MockClock, race: Race) -> None:
    race.one.connect("device", AT)
    good = encode_newcomer(Newcomer("device", None, True, AT + 100))
    for number, body in enumerate((good[:-1], good + b"\xff", b"\xff" + good[1:], b"\0" + bytes(8) + b"\0\1\0\0\xff")):
        value = encode_header(Kind.CLIENTS, b"x" * 16, "foreign", number + 1) + body
        race.kafka.append("monster", 0, None, value)
    await trio.sleep(SOON)
    assert race.one.bus.counters()["bus_records_malformed"] == 4
    assert race.one.host.taken == []
    race.kafka.append("monster", 0, None, encode_header(Kind.CLIENTS, b"x" * 16, "foreign", 9) + good)
    await trio.sleep(SOON)
    assert [node for _, node in race.one.host.taken] == ["foreign"]
