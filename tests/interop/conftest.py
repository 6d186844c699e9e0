"""Fixtures for tests with foreign clients."""

from __future__ import annotations

import uuid

import pytest

from tests.interop.broker_process import broker as broker
from tests.interop.broker_process import brokers as brokers
from tests.interop.kept_clients import streams as streams


@pytest.fixture
def topic() -> str:
    """A Topic Name that no other test uses."""
    return f"interop/{uuid.uuid4().hex}"
