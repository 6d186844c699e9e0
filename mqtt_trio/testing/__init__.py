"""The testing kit: a whole broker in memory, on a fake clock where the test has one.

    pytest_plugins = ["mqtt_trio.testing"]

    async def test_will(memory_broker):
        device = await memory_broker.connect("device", will=Will(topic_name="gone", payload=b"!"))
        watcher = await memory_broker.connect("watcher")
        await watcher.subscribe("gone")
        await device.cut()
        assert (await watcher.next_message()).payload == b"!"

With pytest-trio's `autojump_clock` among the test's own arguments, hours of keep alive and expiry pass in no time, to
the second. docs/testing.md is the guide.

Nothing in this module asserts, so a conftest.py may import it beside `pytest_plugins`: PYTEST_DONT_REWRITE.
"""

from mqtt_trio.broker.store import MemoryStore as MemoryStore
from mqtt_trio.testing.broker import EPOCH as EPOCH
from mqtt_trio.testing.broker import MemoryBroker as MemoryBroker
from mqtt_trio.testing.broker import memory_broker as memory_broker
from mqtt_trio.testing.broker import open_memory_broker as open_memory_broker
from mqtt_trio.testing.client import PATIENCE as PATIENCE
from mqtt_trio.testing.client import ConnectionEndedError as ConnectionEndedError
from mqtt_trio.testing.client import NothingCameError as NothingCameError
from mqtt_trio.testing.client import TestClient as TestClient
from mqtt_trio.testing.gateway import FakeGateway as FakeGateway
from mqtt_trio.testing.pipe import CAPACITY as CAPACITY
from mqtt_trio.testing.pipe import Direction as Direction
from mqtt_trio.testing.pipe import Pipe as Pipe
from mqtt_trio.testing.pipe import PipeOptions as PipeOptions
from mqtt_trio.testing.pipe import PipeStream as PipeStream
from mqtt_trio.testing.stores import Fault as Fault
from mqtt_trio.testing.stores import FaultyStore as FaultyStore
from mqtt_trio.testing.stores import check_store as check_store
from mqtt_trio.testing.websocket import UpgradeRefusedError as UpgradeRefusedError
from mqtt_trio.testing.websocket import WebSocketStream as WebSocketStream
