"""MQTT 3.1, 3.1.1 and 5.0 without I/O: bytes in, packets out, and back."""
