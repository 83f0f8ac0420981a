"""Mooncake over TCP, or NIXL over UCX, between two processes; runs under their interpreter, without this package.

kv_peer.py ENGINE POOL_BYTES reads lines [piece bytes, [piece numbers]] and answers with the seconds of one pull.
"""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Pull = Callable[[int, list[int]], None]


def mooncake_engine(pool: "np.ndarray[Any, Any]") -> Any:
    """One end over TCP without a metadata server."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(pool.ctypes.data, pool.nbytes) == 0
    return engine


def serve_mooncake(pool: "np.ndarray[Any, Any]") -> tuple[Any, dict[str, Any]]:
    """What must stay alive, and how the other end finds it."""
    engine = mooncake_engine(pool)
    return engine, {"peer": f"127.0.0.1:{engine.get_rpc_port()}", "address": pool.ctypes.data}


def pull_mooncake(pool: "np.ndarray[Any, Any]", card: dict[str, Any]) -> Pull:
    """Reads pieces of the other end's pool to the same places of this one."""
    engine = mooncake_engine(pool)

    def pull(size: int, pieces: list[int]) -> None:
        here = [pool.ctypes.data + size * piece for piece in pieces]
        there = [card["address"] + size * piece for piece in pieces]
        assert engine.batch_transfer_sync_read(card["peer"], here, there, [size] * len(pieces)) == 0

    return pull


def nixl_end(name: str, pool: "np.ndarray[Any, Any]") -> Any:
    """One end over UCX."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
    return agent


def serve_nixl(pool: "np.ndarray[Any, Any]") -> tuple[Any, dict[str, Any]]:
    """What must stay alive, and how the other end finds it."""
    agent = nixl_end("server", pool)
    return agent, {"peer": base64.b64encode(agent.get_agent_metadata()).decode(), "address": pool.ctypes.data}


def pull_nixl(pool: "np.ndarray[Any, Any]", card: dict[str, Any]) -> Pull:
    """Reads pieces of the other end's pool to the same places of this one."""
    agent = nixl_end("client", pool)
    peer = agent.add_remote_agent(base64.b64decode(card["peer"]))
    peer = peer.decode() if isinstance(peer, bytes) else peer
    prepared: dict[tuple[int, int], Any] = {}

    def handle(size: int, pieces: list[int]) -> Any:
        sides = [[(base + size * piece, size, 0) for piece in pieces] for base in (pool.ctypes.data, card["address"])]
        here, there = (agent.get_xfer_descs(side, "DRAM") for side in sides)
        return agent.initialize_xfer("READ", here, there, peer)

    def pull(size: int, pieces: list[int]) -> None:
        transfer = prepared.setdefault((size, len(pieces)), None) or handle(size, pieces)
        prepared[size, len(pieces)] = transfer
        state = agent.transfer(transfer)
        while state != "DONE":
            assert state != "ERR"
            state = agent.check_xfer_state(transfer)

    return pull


ENGINES = {"mooncake": (serve_mooncake, pull_mooncake), "nixl": (serve_nixl, pull_nixl)}


def main() -> None:
    """The pulling process; starts the serving one."""
    name, pool_bytes = sys.argv[1], int(sys.argv[2])
    pool = np.ones(pool_bytes, dtype=np.uint8)
    serve, connect = ENGINES[name]
    if sys.argv[3:] == ["serve"]:
        _kept, card = serve(pool)
        tell(card)
        sys.stdin.read()
        return
    command = [sys.executable, *sys.argv, "serve"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = next(line for line in server.stdout if line.startswith("BENCH "))
    pull = connect(pool, json.loads(line.removeprefix("BENCH ")))
    tell("ready")
    for order in sys.stdin:
        size, pieces = json.loads(order)
        begun_at = time.perf_counter()
        pull(size, pieces)
        tell(time.perf_counter() - begun_at)
    server.kill()


def tell(answer: object) -> None:
    """One line to whoever started this process."""
    print("BENCH", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
