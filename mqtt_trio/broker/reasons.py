"""Reason Strings of what the broker refuses: the bound or the mistake that a client's developer can see to.

They never say which access rule said no. Whether they go out is the connection's business: 3.x has none, and a 5.0
client may have asked for none [MQTT5-3.1.2-29] or have no room for them [MQTT5-3.4.2-2].
"""

from __future__ import annotations

from collections.abc import Iterable

from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ReasonCode

NO_SUCH_IDENTIFIER = "no message that is under way has this Packet Identifier"


def why_not_published(code: ReasonCode, limits: Limits) -> str | None:
    """The Reason String of a PUBACK or PUBREC, or None where the code says all."""
    if code is ReasonCode.NOT_AUTHORIZED:
        return "this client may not publish to this Topic Name"
    if code is ReasonCode.TOPIC_NAME_INVALID:
        return f"a Topic Name has {limits.topic_levels} levels at most"
    if code is ReasonCode.QUOTA_EXCEEDED:
        return "there is no room for the message at present"
    return None


def why_not_subscribed(codes: Iterable[ReasonCode], limits: Limits) -> str | None:
    """The Reason String of a SUBACK: what its distinct refusals mean, in the order of the filters."""
    meanings = {
        ReasonCode.NOT_AUTHORIZED: "this client may not subscribe to this Topic Filter",
        ReasonCode.TOPIC_FILTER_INVALID: f"a Topic Filter has {limits.topic_levels} levels at most",
        ReasonCode.QUOTA_EXCEEDED: (
            f"a client has {limits.subscriptions_per_client} subscriptions at most, the server {limits.subscriptions}"
        ),
    }
    return "; ".join(dict.fromkeys(meanings[code] for code in codes if code in meanings)) or None
