"""Python imports this at its start where this folder is in PYTHONPATH, as it is in whatever a test starts."""

import importlib.util
import os
import sys
from pathlib import Path

if os.environ.get("MQTT_TRIO_RECORD_CHECK"):
    name = "mqtt_trio_record_watch"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "watch.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    sys.modules[name].watch("process")
