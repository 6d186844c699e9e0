"""Python imports this at its start where this folder is in PYTHONPATH, as it is in whatever a test starts.

Most of these programs never write to Kafka, so nothing is imported before one is about to.
"""

import os
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3))


class FirstFinder:
    """Waits for somebody to import the producers, then has `watch` look after it."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]  # `typing` takes its time
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != "gateways.kafka.workers":
            return None
        sys.meta_path.remove(self)
        if ROOT not in sys.path:
            sys.path.append(ROOT)
        from tests.record_check.watch import watch

        return watch("process").find_spec(fullname, path, target)


if os.environ.get("MQTT_TRIO_RECORD_CHECK"):
    sys.meta_path.insert(0, FirstFinder())
