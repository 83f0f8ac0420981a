"""Other engines on the same checkpoint: transformers in this process, others under interpreters of their own."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.peer_process import PeerProcess

SCRIPT = Path(__file__).with_name("engine_peer.py")
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class EnginePeer(Protocol):
    """Greedy, with prompts of one length."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Seconds from the prompts to the last of so many tokens each."""
        ...


@dataclass(frozen=True)
class PeerSettings:
    """Which there are. OpenVINO takes the model as a file of its own: .gguf in F16, or a folder."""

    transformers: bool
    openvino_python: Path | None
    openvino_model: Path | None
    vllm_python: Path | None


@contextmanager
def started_peers(
    settings: PeerSettings, checkpoint: Path, dtype: torch.dtype, device: torch.device, num_threads: int
) -> Iterator[dict[str, EnginePeer]]:
    """By name. Raises RuntimeError when one does not start."""
    peers: dict[str, EnginePeer] = {}
    with ExitStack() as stack:
        if settings.transformers:
            peers["transformers"] = TransformersPeer(checkpoint, dtype, device)
        if settings.openvino_python is not None:
            model = settings.openvino_model or checkpoint
            peer = ProcessPeer("openvino", settings.openvino_python, model, num_threads, {})
            peers["openvino"] = stack.enter_context(closing(peer))
        if settings.vllm_python is not None:
            threads = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}"}
            peer = ProcessPeer("vllm", settings.vllm_python, checkpoint, num_threads, VLLM_ENVIRONMENT | threads)
            peers["vllm"] = stack.enter_context(closing(peer))
        yield peers


class TransformersPeer:
    """Its plain generate."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=dtype)
        self._model = model.to(device).eval()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        """See EnginePeer."""
        from bench.engine_limits import seconds

        ids = torch.tensor(prompts, device=self._model.device)
        settings = {"do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0}
        attended = torch.ones_like(ids)
        return seconds(lambda: self._model.generate(ids, attention_mask=attended, **settings), self._model.device, 1)


class ProcessPeer:
    """See engine_peer.py."""

    def __init__(self, name: str, python: Path, model: Path, num_threads: int, environment: dict[str, str]) -> None:
        """Raises RuntimeError when it does not start; vLLM compiles for minutes the first time."""
        command = (str(python), "-I", str(SCRIPT), name, str(model), str(num_threads))  # -I: bench/http.py is no http
        self._process = PeerProcess(name, command, environment)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        """See EnginePeer."""
        return self._process.ask([prompts, num_tokens])

    def close(self) -> None:
        """Ends it."""
        self._process.close()
