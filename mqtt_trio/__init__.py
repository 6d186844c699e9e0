"""mqtt_trio: an MQTT broker on Trio. The command line is `mqtt_trio.__main__`, the test kit `mqtt_trio.testing`."""

from mqtt_trio.errors import ConfigError as ConfigError
from mqtt_trio.errors import GatewayError as GatewayError
from mqtt_trio.errors import MqttTrioError as MqttTrioError
from mqtt_trio.errors import RemoteProtocolError as RemoteProtocolError
from mqtt_trio.errors import StartError as StartError
from mqtt_trio.errors import StoreError as StoreError

__version__ = "0.1.0"
