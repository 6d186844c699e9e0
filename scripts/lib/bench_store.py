"""scripts/bench --store: the table of kept sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def store_table(entries: Sequence[dict[str, Any]]) -> str:
    """Write the entries of kept sessions as a Markdown table."""
    lines = [["row", "kept msg/s", "not kept msg/s", "share", "required", "messages a commit", "rows a commit"]]
    lines[0] += ["bare loop msg/s", "share"]
    lines.append(["---"] + ["---:"] * 8)
    for entry in entries:
        kept, plain, bare = (entry["brokers"][name] for name in ("kept", "not kept", "bare loop"))
        lines.append(
            [
                entry["row"] + (" (missed)" if entry["missed"] else ""),
                f"{kept['delivered_per_s']:,.0f}",
                f"{plain['delivered_per_s']:,.0f}",
                f"{entry['of our own rate']:.2f}",
                f">= {entry['least']}" if entry["least"] else "",
                f"{kept['messages_per_commit']:,.0f}",
                f"{kept['rows_per_commit']:,.0f}",
                f"{bare['delivered_per_s']:,.0f}",
                f"{entry['of the bare loop']:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
