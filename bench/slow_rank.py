"""A rank as a plain process whose wires have a given speed: `python -m bench.slow_rank SPEC.json SPEED`.

SPEED is a file that bench.slow_link.write_speed wrote; it may change while the rank runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bench.slow_link import SlowConnector, speed_in
from core.config import TransferConfig
from core.messages.fleet import Role
from decode_worker.service import DecodeService
from kv_transfer.channels.protocol import Connector
from kv_transfer.channels.select import make_connectors
from prefill_worker.service import PrefillService
from worker.process import main, read_spec


def connect(config: TransferConfig, host: str, pool: Tensor, path: Path | None) -> Sequence[Connector]:
    """What the configuration names, behind wires."""
    speed = speed_in(Path(sys.argv[2]))
    return tuple(SlowConnector(inner, pool, speed) for inner in make_connectors(config, host, pool, path))


if __name__ == "__main__":
    main(PrefillService if read_spec().role is Role.PREFILL else DecodeService, connect)
