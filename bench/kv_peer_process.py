"""Another transfer engine, which pulls bytes from a second process; see kv_peer.py."""

from pathlib import Path

from bench.kv_pair import Case
from bench.peer_process import PeerProcess

SCRIPT = Path(__file__).with_name("kv_peer.py")


class KvPeer:
    """One engine under the interpreter that has it."""

    def __init__(self, python: Path, engine: str, pool_bytes: int) -> None:
        """Raises RuntimeError when the engine does not start under that interpreter."""
        self._process = PeerProcess(engine, (str(python), str(SCRIPT), engine, str(pool_bytes)))

    def move(self, case: Case) -> float:
        """Seconds to pull a case's bytes: each run of blocks as one piece, scattered as the case's are."""
        offsets = [block for slab in case.slabs for block in slab.source.blocks]
        is_contiguous = offsets == list(range(len(offsets)))
        pieces = [0] if is_contiguous else sorted(set(offsets), key=offsets.index)
        return self._process.ask([case.num_bytes // len(pieces), pieces])

    def close(self) -> None:
        """Ends both processes."""
        self._process.close()
