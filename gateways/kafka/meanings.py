"""What each counter of the gateway counts, for metrics; those that also fall begin with `Gauge: `."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gateways.kafka.records import Reason
from gateways.kafka.thread_counters import OF_THREADS

_PRODUCER: Final = {
    "records_sent": "Records that Kafka has confirmed.",
    "messages_sent": "Messages in the records that Kafka has confirmed.",
    "records_failed": "Records that Kafka will never have.",
    "records_resent": "Records that were sent again by a new producer because they had no outcome.",
    "rebuilds": "Producers that were replaced.",
    "threads_left": "Gauge: threads that hang and have a successor, or did not end with their producer.",
    "threads_hung": "Times that a thread did not come back from a call of the client library.",
}

_CONSUMER: Final = {
    "rebuilds": "Consumers that were replaced.",
    "threads_left": "Gauge: threads that hang and have a successor.",
    "threads_hung": _PRODUCER["threads_hung"],
}

_BUS: Final = {
    "messages_sent": "Messages for other nodes that Kafka has confirmed.",
    "records_sent": "Records for other nodes that Kafka has confirmed.",
    "messages_waiting": "Gauge: messages for other nodes that Kafka has not confirmed.",
    "bytes_waiting": "Gauge: what these messages take in memory.",
    "messages_dropped": "QoS 0 messages that did not go to the other nodes because the window was full.",
    "messages_held": "Messages whose acknowledgement had to wait because the window was full.",
    "messages_refused": "Messages that got a negative answer because of the bus.",
    "messages_failed": "Messages that the other nodes will never get.",
    "messages_rejected": "QoS 1 and 2 messages that were refused because Kafka was away (OnOutage = reject); with "
    "Ack = store those that were on their way are among them, and are sent nevertheless.",
    "messages_timed_out": "Messages that were refused because neither Kafka nor a disk had them within AckTimeout.",
    "messages_turned_away": "QoS 1 and 2 messages that other nodes do not get: Kafka was away (OnOutage = drop).",
    "messages_spooled": "Messages that went over the spool of the bus.",
    "messages_resumed": "Messages that the process before this one had taken, and that this one sends.",
    "spool_messages": "Gauge: messages in the spool of the bus that Kafka has not confirmed.",
    "spool_bytes": "Gauge: what the spool of the bus takes on disk.",
    "spool_lost": "Messages that the spool of the bus could not give back because of damage.",
    "spool_failures": "Attempts to write to the spool of the bus that failed, such as on a full disk.",
    "publishers_stopped": "Times that all publishers of QoS 1 and 2 had to wait for the bus.",
    "nodes": "Gauge: other nodes on the bus.",
    "records_received": "Records that were read from the bus topic.",
    "records_own": "Those of them that this node had written.",
    "messages_received": "Messages of other nodes that were delivered to clients of this one.",
    "messages_of_backlog": "Messages that were published while this node was away, and went to sessions that it keeps.",
    "records_doubled": "Records that a repeated attempt to write them had doubled; left out.",
    "records_missing": "Records of other nodes that never came.",
    "records_malformed": "Records that cannot be read; left out.",
    "records_unknown_version": "Records in a version that this node does not know; left out.",
    "clients_announced": "Clients whose connection was told to the other nodes.",
    "clients_taken_over": "Clients and sessions that ended because their client is on another node now.",
    "clients_forgotten": "Clients that were not told to the other nodes because too many waited for that.",
    "groups": "Gauge: share groups of the cluster that this node knows.",
    "groups_left_out": "Times that a share group had no room in the table of the cluster.",
    "groups_undecided": "Gauge: messages that wait for this node's own word about a share group to come back.",
    "groups_decided_early": "Messages that were served without waiting for that, because too many waited.",
    "groups_passed_on": "Messages that went on to members of a share group on another node.",
    "groups_homeless": "Messages for which a share group had no members anywhere any more.",
    "bodies_lost": "Bodies over several records that gave way to others, because too many had begun.",
    "records_undelivered": "Records that could not be delivered by an error of this node.",
}

_RETAINED: Final = {
    "records_sent": "Retained messages that Kafka has confirmed.",
    "records_received": "Retained messages that were read from Kafka.",
    "records_failed": "Retained messages that Kafka will never have.",
    "messages_resumed": "Retained messages that the process before this one owed Kafka, and that this one sends.",
    "messages_restored": "Newer retained messages of other nodes that were written again behind one of this node.",
    "messages_dropped": "Retained QoS 0 messages that did not go to Kafka because the window was full.",
    "messages_too_large": "Retained messages that do not fit a record.",
    "records_malformed": "Records of retained messages that cannot be read; left out.",
    "records_unknown_version": "Records of retained messages in a version that this node does not know; left out.",
}

_STREAM: Final = {
    "records_own": "Records of the stream of messages that a node of this deployment had written; left out.",
    "messages_published": "Messages that others had put into the stream, and that were published.",
    "records_malformed": "Records of the stream that are no message; dead letters.",
    "records_repeated": "Records of the stream that came again to a node that had published them; left out.",
    "records_left": "Records of the stream that were left to the node which has their partition now.",
    "records_undelivered": "Records of the stream that something did not keep, or that met an error; dead letters.",
    "messages_written": "Messages of clients of this node that Kafka has in the stream.",
    "messages_left_out": "Messages that are not in the stream because its window was full, or the topic is closed.",
    "messages_failed": "Messages that Kafka does not take for the stream; dead letters.",
    "messages_held": "Messages whose acknowledgement had to wait because the window of the stream was full.",
    "messages_waiting": "Gauge: messages for the stream that Kafka has not confirmed.",
    "publishers_stopped": "Times that all publishers of QoS 1 and 2 had to wait for the stream.",
    "records_waiting": "Gauge: records of the stream that are published and not kept yet.",
    "partitions": "Gauge: partitions of the stream that this node reads.",
}

_DLQ: Final = {
    "letters": "Dead letters, written or not.",
    "letters_written": "Dead letters that Kafka has confirmed.",
    "letters_lost": "Dead letters that Kafka will never have.",
    "letters_bare": "Dead letters that hold facts only, because the rest did not fit or may not be written.",
    "left_out": "What was counted instead of becoming a dead letter, because too many of its like came.",
}

MEANINGS: Final[Mapping[str, str]] = {
    "outages": "Times that Kafka went away.",
    "schema_registry_failures": "Attempts to learn the id of a schema that failed.",
    **{f"archive_{name}": f"{meaning[:-1]}, of archive groups." for name, meaning in _PRODUCER.items()},
    **{f"bus_{name}": meaning for name, meaning in _BUS.items()},
    **{f"bus_producer_{name}": f"{_PRODUCER[name][:-1]}, of the bus." for name in sorted(OF_THREADS)},
    **{f"bus_consumer_{name}": f"{meaning[:-1]}, of the bus." for name, meaning in _CONSUMER.items()},
    **{f"retained_{name}": meaning for name, meaning in _RETAINED.items()},
    **{f"stream_{name}": meaning for name, meaning in _STREAM.items()},
    **{f"stream_producer_{name}": f"{_PRODUCER[name][:-1]}, of the stream." for name in sorted(OF_THREADS)},
    **{f"stream_consumer_{name}": f"{meaning[:-1]}, of the stream." for name, meaning in _CONSUMER.items()},
    "events_written": "Events that Kafka has confirmed.",
    "events_dropped": "Events that Kafka will not get: too many waited for it, or it does not take them.",
    **{f"events_producer_{name}": f"{_PRODUCER[name][:-1]}, of events." for name in sorted(OF_THREADS)},
    "metrics_written": "Records of all figures that Kafka has confirmed.",
    "metrics_left_out": "Records of all figures that Kafka will not get: a newer one took its place, or it failed.",
    **{f"metrics_producer_{name}": f"{_PRODUCER[name][:-1]}, of metrics." for name in sorted(OF_THREADS)},
    **{f"dlq_{name}": meaning for name, meaning in _DLQ.items()},
    **{f"dlq_{reason}": f"Dead letters because of {reason}." for reason in Reason},
}
