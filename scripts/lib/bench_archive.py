"""scripts/bench --archive: an archive group in Kafka beside a bare loop on kafka-python [P3]."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol

BARE_LOOP: Final = Path(__file__).parent / "bare_kafka.py"
TOPIC: Final = "mqtt.bench"
PAYLOAD: Final = 64
"""Bytes."""
LEAST_SHARE: Final = 0.8
"""Of the rate of the bare loop, at least."""
MOST_P99_MS: Final = 5.0
"""Of another client's messages, while the archive takes half of its own rate."""
LOADS: Final = {
    "none": "Ack = none, QoS 1, 20 publishers, window 1000",
    "store": "Ack = store, QoS 1, 20 publishers, window 1000",
}
PUBLISHERS: Final = ("--mode", "ack", "--qos", "1", "--pubs", "20", "--window", "1000", "--size", str(PAYLOAD))
OTHER_CLIENT: Final = ("--mode", "p2p", "--pubs", "1", "--rate", "200", "--size", "16", "--prefix", "other")


class Node(Protocol):
    """A running broker."""

    pid: int
    port: int


Broker = Callable[..., AbstractContextManager[Node]]


class ArchiveBench:
    """Measures, with the load generator `program`; `python` runs the bare loop, `broker` starts a broker with settings
    behind a folder, `scratch` makes one."""

    def __init__(self, program: str, python: Path, seconds: float, scratch: Callable[[], Path], broker: Broker) -> None:
        self._program = program
        self._python = python
        self._seconds = seconds
        self._scratch = scratch
        self._broker = broker

    def run(self, servers: str, ack: str) -> dict[str, float]:
        """Measure once: the archive, the bare loop right behind it, then another client at half of the archive's
        rate."""
        group = {"Name": "Bench", "Filter": "bench/#", "Store": "KAFKA", "KafkaTopic": TOPIC, "Ack": ack}
        settings = [f"ArchiveGroups.0.{key}={value}" for key, value in group.items()]
        settings += [f"Kafka.Servers={servers}", "Kafka.Topics.Messages.Enabled=false"]
        with self._broker(self._scratch(), *settings) as node:
            ours = self._load(node, *PUBLISHERS)
            bare = self._bare(servers)
            half = ours["delivered_per_s"] / 2
            with ThreadPoolExecutor(2) as pool:
                calm = pool.submit(self._load, node, *OTHER_CLIENT)
                busy = pool.submit(self._load, node, *PUBLISHERS, "--rate", f"{half:.0f}")
                at_half, other = busy.result(), calm.result()
        return {
            "records_per_s": ours["delivered_per_s"],
            "cpu_us": ours["broker_cpu_us_per_delivery"],
            "ack_p99_ms": ours["p99_us"] / 1000,
            "bare_records_per_s": bare["records_per_s"],
            "bare_cpu_us": bare["cpu_us_per_record"],
            "half_rate": at_half["delivered_per_s"],
            "other_p50_ms": other["p50_us"] / 1000,
            "other_p99_ms": other["p99_us"] / 1000,
        }

    def _load(self, node: Node, *arguments: str) -> dict[str, float]:
        command = [self._program, "--port", str(node.port), "--pid", str(node.pid), *arguments]
        command += ["--seconds", str(self._seconds), "--warm", str(min(1.0, self._seconds / 2))]
        return _output_of(command)

    def _bare(self, servers: str) -> dict[str, float]:
        return _output_of(
            [str(self._python), str(BARE_LOOP), servers, TOPIC, str(self._seconds), str(PAYLOAD)],
            PYTHONPATH=str(BARE_LOOP.parent.parent.parent),
        )


def _output_of(command: Sequence[str], **environment: str) -> dict[str, float]:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr.strip()[-1500:] or 'nothing was delivered'}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def entry_of(ack: str, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Put the runs of one row together: medians, the median of the shares of single runs, what was missed."""
    figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    share = statistics.median(run["records_per_s"] / run["bare_records_per_s"] for run in runs)
    required = ack == "store"
    missed = required and (share < LEAST_SHARE or figures["other_p99_ms"] >= MOST_P99_MS)
    return {"row": LOADS[ack], "figures": figures, "share": round(share, 2), "required": required, "missed": missed}


def archive_table(entries: Sequence[dict[str, Any]]) -> str:
    """Write the entries as a Markdown table."""
    lines = [["row", "archive msg/s", "bare loop msg/s", "share", "required", "CPU a message", "of the bare loop"]]
    lines[0] += ["ack p99", "another client's p50, p99 at half the rate", "required"]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for entry in entries:
        f = entry["figures"]
        lines.append(
            [
                entry["row"] + (" (missed)" if entry["missed"] else ""),
                f"{f['records_per_s']:,.0f}",
                f"{f['bare_records_per_s']:,.0f}",
                f"{entry['share']:.2f}",
                f">= {LEAST_SHARE}" if entry["required"] else "",
                f"{f['cpu_us']:.1f} µs",
                f"{f['bare_cpu_us']:.1f} µs",
                f"{f['ack_p99_ms']:.0f} ms",
                f"{f['other_p50_ms']:.2f} ms, {f['other_p99_ms']:.2f} ms",
                f"< {MOST_P99_MS:g} ms" if entry["required"] else "",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
