"""`mqtt-trio` whose commits end in their transaction by what the file DYING_STORE names, while it is there:

DYING_STORE=FILE python tests/interop/dying_store.py serve ...
"""

from __future__ import annotations

import builtins
import os
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Final

from mqtt_trio.__main__ import main
from mqtt_trio.broker.store import Batch
from mqtt_trio.server.store_writer import Writer

HANG: Final = "hang"
FILE: Final = Path(os.environ["DYING_STORE"])
real_write: Final = Writer.write


def write(self: Writer, db: sqlite3.Connection, batch: Batch) -> None:
    """Write everything, then do not come back."""
    real_write(self, db, batch)
    if not FILE.exists():
        return
    what = FILE.read_text()
    if what == HANG:
        threading.Event().wait()
    raise getattr(builtins, what)("planned")


if __name__ == "__main__":
    Writer.write = write  # type: ignore[method-assign]
    sys.exit(main())
