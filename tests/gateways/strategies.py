"""Random MQTT messages for tests of records."""

from __future__ import annotations

from hypothesis import strategies as st

from mqtt_trio.gateway import MessageProperties

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
TOPICS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0#+"), min_size=1).filter(
    lambda topic: not topic.startswith("$SYS")  # never in a record
)
PROPERTIES = st.builds(
    MessageProperties,
    content_type=st.none() | TEXT,
    correlation_data=st.none() | st.binary(max_size=20),
    user_properties=st.lists(st.tuples(TEXT, TEXT), max_size=4).map(tuple),
    response_topic=st.none() | TOPICS,
    payload_format_indicator=st.none() | st.integers(0, 1),
    message_expiry_interval=st.none() | st.integers(0, 2**32 - 1),
)
