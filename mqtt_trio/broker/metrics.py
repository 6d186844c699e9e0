"""Counters of the node: plain int attributes that the hot path increments and everybody else reads."""

from __future__ import annotations

import attrs


@attrs.define
class Metrics:
    """What happened since the start. Gauges, which also fall, say so; everything else only grows.

    Messages are Application Messages; a message to 50 subscribers is received once and sent 50 times.
    """

    connections_opened: int = 0
    """Network Connections accepted by any listener."""
    connections_closed: int = 0
    """Network Connections that are gone."""
    connections_accepted: int = 0
    """CONNECTs answered with success."""
    connections_refused: int = 0
    """CONNECTs answered with a refusal."""
    connections_over_limit: int = 0
    """Network Connections closed at once because the listener has its MaxConnections."""
    connections_timed_out: int = 0
    """Network Connections closed because no CONNECT came within the listener's ConnectTimeout."""
    accept_failures: int = 0
    """Times that a listener could not accept, for want of file descriptors or memory; it tries again."""
    handshakes_failed: int = 0
    """Network Connections at TLS listeners that ended before the handshake did."""
    upgrades_refused: int = 0
    """HTTP requests at WebSocket listeners that were answered with anything but 101."""
    clients_connected: int = 0
    """Gauge: clients that have their CONNACK and are connected."""
    client_failures: int = 0
    """Connections that ended by an error of our own; each is logged with its traceback."""
    sessions: int = 0
    """Gauge: sessions, connected or not."""
    sessions_expired: int = 0
    """Sessions removed because their Session Expiry Interval passed."""
    sessions_taken_over: int = 0
    """Connections that ended because another one came with the same Client Identifier."""
    subscriptions: int = 0
    """Gauge: subscriptions of all sessions."""
    shared_subscriptions: int = 0
    """Gauge: those of them that are shared."""
    retained_messages: int = 0
    """Gauge: retained messages."""
    wills_published: int = 0
    """Will Messages published."""

    store_commits: int = 0
    """Batches of changes that the store has taken."""
    store_rows: int = 0
    """Rows of messages that they wrote, changed or removed."""
    store_failures: int = 0
    """Times that the store could not take a batch; it is offered again."""

    bytes_received: int = 0
    """Bytes read from clients, WebSocket framing included."""
    bytes_sent: int = 0
    """Bytes that the sockets of clients took, WebSocket framing included."""
    packets_received: int = 0
    """MQTT Control Packets handled."""
    packets_sent: int = 0
    """Answers and other MQTT Control Packets put into outboxes; PUBLISH is counted as `messages_sent_*`."""
    messages_received_qos0: int = 0
    messages_received_qos1: int = 0
    messages_received_qos2: int = 0
    """Messages accepted from clients, by the QoS they came with."""
    messages_sent_qos0: int = 0
    messages_sent_qos1: int = 0
    messages_sent_qos2: int = 0
    """Messages put into outboxes, by the QoS they leave with; resent ones count again."""
    messages_local: int = 0
    """Messages that gateways published on this node."""
    messages_queued: int = 0
    """Gauge: QoS 1 and 2 messages that wait in the queues of sessions."""

    dropped_outbox_full: int = 0
    """QoS 0 messages that a client did not get because its outbox was full."""
    dropped_queue_full: int = 0
    """QoS 1 and 2 messages that a session did not get, or lost again, because its queue was full."""
    dropped_expired: int = 0
    """Messages whose Message Expiry Interval passed in a queue, an outbox or the retained store."""
    dropped_too_large: int = 0
    """Messages beyond the Maximum Packet Size of their receiver [MQTT5-3.1.2-25]."""
    dropped_not_authorized: int = 0
    """Messages that the Authorizer refused, from a publisher or towards a subscriber."""
    dropped_session_ended: int = 0
    """Messages in the queue of a session that ended."""
    refused_by_store: int = 0
    """QoS 1 and 2 messages that got a negative answer, or ended their 3.x publisher: the store takes nothing."""
    dropped_by_tap: int = 0
    """Messages that a tap (archive, bus, gateway) refused, so that nobody got them."""
    retained_refused: int = 0
    """Messages delivered but not retained because the store of retained messages was full."""
    subscriptions_refused: int = 0
    """Subscriptions refused because their client, or the node, had as many as it may."""

    protocol_errors: int = 0
    """Connections ended because the client broke the specification."""
    answers_unread: int = 0
    """Connections ended because the client did not read the answers to its own packets."""
    keep_alive_timeouts: int = 0
    """Connections ended because the client was silent for 1.5 times its Keep Alive."""
    publishers_paused: int = 0
    """Times that a publisher, a client or a gateway, was not read from because an inbound bound was reached."""
    fast_lane_messages: int = 0
    """Messages that the fast lane handled, of all that were received."""

    def snapshot(self) -> dict[str, int]:
        """Return all counters by name, in the order in which they stand here."""
        return {name: getattr(self, name) for name in _NAMES}


_NAMES = tuple(field.name for field in attrs.fields(Metrics))
