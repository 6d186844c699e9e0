"""Which seeds are played."""

from __future__ import annotations

import os
from typing import Final

BLOCK: Final = 100


def seeds(default: str = "0-999") -> list[range]:
    """Return blocks of the default seeds, or what the environment variable SEED says."""
    first, _, last = os.environ.get("SEED", default).partition("-")
    whole = range(int(first), int(last or first) + 1)
    return [whole[at : at + BLOCK] for at in range(0, len(whole), BLOCK)]
