"""One Kafka node or several as one cluster, below one folder."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from lib.kafka_install import install
from lib.kafka_node import KILL_TIMEOUT, Node, Place, behind_proxies, make_archive, places, secure_place
from lib.kafka_process import HOST, KafkaError, is_free, locked


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The nodes below `folder`: the folder itself is a single node's, `node-1` and so on are those of several."""

    folder: Path

    @property
    def nodes(self) -> dict[int, Node]:
        """Node id -> node; a single node that was never started counts."""
        several = {int(path.name[5:]): Node(path) for path in self.folder.glob("node-[1-9]") if path.is_dir()}
        return dict(sorted(several.items())) or {1: Node(self.folder)}

    def chosen(self, node_id: int | None) -> dict[int, Node]:
        """Return node `node_id`, None: all of them."""
        nodes = self.nodes
        if node_id is None:
            return nodes
        if node_id not in nodes:
            raise KafkaError(f"{self.folder} has no node {node_id}; its nodes: {', '.join(map(str, nodes))}")
        return {node_id: nodes[node_id]}

    def start(self, port: int, brokers: int | None, *, secure: bool, fresh: bool, proxies: Sequence[int] = ()) -> bool:
        """Start the nodes that do not run and wait until all serve. Return whether any had to be started.

        The first start chooses how many there are (`brokers`, None: one), their ports (0: any free ones), whether the
        one has secured listeners, and `proxies`: ports to which a further listener of each node sends its clients.
        """
        with locked(self.folder.parent / f".{self.folder.name}.lock"):
            if fresh:
                for node in self.nodes.values():
                    node.end(signal.SIGKILL, KILL_TIMEOUT)
                shutil.rmtree(self.folder, ignore_errors=True)
            if kept := [place for node in self.nodes.values() if (place := node.place)]:
                self._compare(kept, port, brokers, secure=secure)
            else:
                chosen = [secure_place(port)] if secure else places(brokers or 1, port)
                for place in behind_proxies(chosen, proxies) if proxies else chosen:
                    name = f"node-{place.node_id}" if len(place.voters) > 1 else ""
                    Node(self.folder / name).prepare(place)
            return self._launch(list(self.nodes.values()))

    def start_node(self, node_id: int) -> bool:
        """Start one node of a cluster that was started before, with its data. Return whether it had to be started."""
        with locked(self.folder.parent / f".{self.folder.name}.lock"):
            (node,) = self.chosen(node_id).values()
            if node.place is None:
                raise KafkaError(f"{node.folder} was never started; start the whole cluster first")
            return self._launch([node])

    def _compare(self, kept: Sequence[Place], port: int, brokers: int | None, *, secure: bool) -> None:
        """What has data stays what it is; complain when it was to be something else."""
        if brokers not in (None, len(kept)):
            many = "1 broker" if len(kept) == 1 else f"{len(kept)} brokers"
            raise KafkaError(f"{self.folder} holds the data of {many}; --fresh removes them")
        if secure and not kept[0].secured:
            raise KafkaError(f"{self.folder} holds the data of a node without secured listeners; --fresh removes them")
        if port not in (0, kept[0].port):
            raise KafkaError(f"{self.folder} holds the data of a node on port {kept[0].port}; --fresh removes them")

    def _launch(self, nodes: Sequence[Node]) -> bool:
        installation = install(make_archive)
        started = [node for node in nodes if node.process is None]
        for node in started:
            place = node.place
            assert place is not None
            for taken in (*place.listeners.values(), place.controller_port):
                if not is_free(taken):
                    raise KafkaError(f"port {taken} of {HOST} is in use by another program")
            node.prepare(place)
        try:
            for node, process in [(node, node.format(installation)) for node in started]:
                node.formatted(process)
            for node in started:
                node.launch(installation, installation.use_archive())
            ids = [place.node_id for node in nodes if (place := node.place)]
            for node in nodes:
                node.wait_answer(*ids)
        except BaseException:
            for node in started:
                node.end(signal.SIGKILL, KILL_TIMEOUT)
            raise
        return bool(started)
