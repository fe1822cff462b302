"""The embedded broker: one node, or three that replicate their streams, each with a store of its own."""

import secrets
import shutil
from pathlib import Path

from deploy.claims import NodePorts
from deploy.settings import LOOPBACK
from deploy.supervised import Program, health
from shared.errors import Misconfigured

# With less than this a store that begins anew would soon be full again.
ROOM_BYTES = 16 * 1024 * 1024


def programs(nodes: tuple[NodePorts, ...], data: Path) -> list[Program]:
    """`broker`, or `broker-1` to `broker-3`. Raises Misconfigured where the data folder has the other kind's stores.

    Its databases go with the stream that is in there: with another, they would not agree.
    """
    if not nodes:
        return []
    alone, cluster = data / "nats", [data / f"nats-{number}" for number in (1, 2, 3)]
    if len(nodes) == 1:
        if any(store.exists() for store in cluster):
            raise _of_another_kind(data, "three nodes", "run-cluster")
        return [_node("broker", "-c deploy/nats/nats.conf", nodes[0], alone)]
    if alone.exists():
        raise _of_another_kind(data, "one node", "run")
    return [
        _node(f"broker-{number}", f"-c deploy/nats/cluster.conf -n broker-{number}", ports, store)
        for number, (ports, store) in enumerate(zip(nodes, cluster, strict=True), start=1)
    ]


def is_frozen(node: Program) -> bool:
    """Its disk was full, and since then its store takes nothing, room or not, until it is started again.

    Nobody but the node itself knows: it answers everything else as if all were well.
    """
    return node.ready_url is not None and "write error" in health(node.ready_url)[1]


def has_room(data: Path) -> bool:
    return shutil.disk_usage(data).free >= ROOM_BYTES


def environment(nodes: tuple[NodePorts, ...]) -> dict[str, str]:
    """What deploy/nats/cluster.conf asks for. The nodes of another stack do not have this run's password."""
    if len(nodes) < 2:
        return {}
    password = f"run-{secrets.token_hex(16)}"
    routes = ", ".join(f'"nats://node:{password}@{LOOPBACK}:{node.routes}"' for node in nodes)
    return {
        "CHATRAIL_ROUTES": f"[{routes}]",
        "CHATRAIL_ROUTE_PASSWORD": password,
        "CHATRAIL_STREAM_REPLICAS": str(len(nodes)),
    }


def _node(name: str, config: str, ports: NodePorts, store: Path) -> Program:
    listen = f"-a {LOOPBACK} -p {ports.clients} -m {ports.monitoring}"
    return Program(
        name,
        f'env CHATRAIL_ROUTE_PORT={ports.routes} nats-server {config} {listen} -sd "$CHATRAIL_DATA/{store.name}"',
        f"http://{LOOPBACK}:{ports.monitoring}/healthz",
    )


def _of_another_kind(data: Path, kind: str, target: str) -> Misconfigured:
    return Misconfigured(
        f"The data folder {data} belongs to a broker of {kind}: go on with make {target}, "
        "or choose another: CHATRAIL_DATA=/another/folder"
    )
