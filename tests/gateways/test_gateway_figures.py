"""What a gateway that has not seen Kafka yet shows [K17], and what it shows of clients that others make."""

from __future__ import annotations

from gateways.kafka.bridge import ConsumerBridge, ProducerBridge
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import KafkaOptions


def test_every_client_of_the_cluster_is_shown() -> None:
    gateway = KafkaGateway(KafkaOptions(servers="127.0.0.1:1"))
    gateway.archive_store(None, "Default")
    ConsumerBridge(gateway.options, gateway.cluster, [("t", "end")], lambda records: None, name="somebody-s")
    ProducerBridge(gateway.options, gateway.cluster, name="else", compression=None, window_records=1, window_bytes=1)
    figures = list(gateway.figures())
    shown = {(figure.name, figure.labels.get("client")) for figure in figures}
    for client in ("archive", "dlq", "else"):
        assert ("produce_throttle_time_seconds", client) in shown
        assert ("network_io_rate_bytes", client) in shown
    assert ("failed_fetches_total", "somebody-s") in shown
    assert ("fetch_throttle_time_seconds", "somebody-s") in shown
    assert {figure.value for figure in figures} == {0.0}


def test_being_away_has_a_duration() -> None:
    gateway = KafkaGateway(KafkaOptions(servers="127.0.0.1:1"))

    def away() -> float:
        (figure,) = (figure for figure in gateway.figures() if figure.name == "away_seconds")
        return figure.value

    assert away() == 0
    gateway.cluster.away("bus", "nobody answers")
    assert 0 < away() < 60
    gateway.cluster.away("archive", "nobody answers")
    gateway.cluster.back("bus")
    assert away() > 0
    gateway.cluster.back("archive")
    assert away() == 0
