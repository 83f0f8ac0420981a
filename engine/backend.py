"""What a model is computed with on one rank, chosen from configuration, model, device and what is installed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.engine_config import EngineConfig, Library
from core.errors import ConfigurationError
from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from engine.arithmetic import arithmetic_dtype
from engine.attention import AttentionBackend, TorchAttention
from engine.cpu_attention import CACHED_DTYPES, CpuAttention
from engine.cpu_kernels import CpuKernels
from engine.cpu_library import load_cpu_library
from engine.flashinfer_attention import FlashInferAttention
from engine.flashinfer_kernels import FlashInferKernels
from engine.flashinfer_latents import FlashInferLatentAttention
from engine.flashinfer_library import find_flashinfer, why_no_attention, why_no_kernels
from engine.kernels import Kernels, TorchKernels
from engine.latent_attention import LatentAttention
from engine.model_spec import ModelSpec
from engine.recording import CudaRecorder, Record
from engine.weights import TORCH_DTYPES

_CPU = torch.device("cpu")

logger = logging.getLogger(__name__)

NOT_INSTALLED = "it is not installed (extra cuda)"


@dataclass(frozen=True)
class Backend:
    """`graph_sizes` of decode steps are recorded by `record`; without it none are."""

    kernels: Kernels
    attention: Callable[[Tensor, Sequence[KVGroup]], AttentionBackend]  # of the KV cache
    graph_sizes: tuple[int, ...] = ()
    record: Record | None = None
    device_weight_bytes: int | None = None  # None: all weights stay on the device

    def describe(self) -> str:
        """For the log."""
        sizes = f"graphs of {', '.join(map(str, self.graph_sizes))}" if self.record is not None else "no graphs"
        return f"{type(self.kernels).__name__}, {sizes}"


def torch_backend(layout: KVLayout, device: torch.device = _CPU, *, may_compile: bool = True) -> Backend:
    """Runs everywhere. On a CPU that computes in float32 it takes compiled kernels, where there is a compiler."""
    dtype = TORCH_DTYPES[layout.dtype]
    wants_library = may_compile and device.type == "cpu" and arithmetic_dtype(device, dtype) == torch.float32
    library = load_cpu_library() if wants_library else None
    kernels: Kernels = TorchKernels() if library is None else CpuKernels(library)
    if layout.latent:
        return Backend(kernels, LatentAttention)
    if library is None or dtype not in CACHED_DTYPES:
        return Backend(kernels, TorchAttention)
    return Backend(kernels, partial(CpuAttention, library))


def choose_backend(
    config: EngineConfig, spec: ModelSpec, layout: KVLayout, device: torch.device, max_num_seqs: int
) -> Backend:
    """Raises ConfigurationError when FlashInfer is asked for and cannot do it."""
    library = find_flashinfer() if device.type == "cuda" or "flashinfer" in (config.attention, config.kernels) else None
    absent = "" if library else NOT_INSTALLED
    plain = torch_backend(layout, device, may_compile=config.device_weights_mib is None)
    kernels, attention = plain.kernels, plain.attention
    if _takes(config.kernels, "kernels", absent or why_no_kernels(spec, device)):
        kernels = FlashInferKernels(library)
    takes_attention = _takes(config.attention, "attention", absent or why_no_attention(spec, layout, device))
    if takes_attention:
        attention = partial(FlashInferLatentAttention if layout.latent else FlashInferAttention, library)
    sizes = config.graph_ladder(max_num_seqs)
    reason = _why_no_graphs(takes_attention, config, layout)
    if sizes and reason:
        logger.info("decode steps are launched kernel by kernel: %s", reason)
    record = CudaRecorder() if sizes and not reason else None
    return Backend(kernels, attention, sizes if record else (), record, config.device_weight_bytes)


def _why_no_graphs(has_flashinfer: bool, config: EngineConfig, layout: KVLayout) -> str:
    if not has_flashinfer:
        return "graphs need attention by FlashInfer, which reads the cache in place"
    if layout.pipeline_parallel > 1:
        return "a stage of a pipeline waits for the one before"
    return "weights stream in from the host" if config.device_weights_mib is not None else ""


def _takes(asked: Library, field: str, reason: str) -> bool:
    """Whether FlashInfer it is, given why it cannot be, or an empty reason."""
    if asked == "flashinfer" and reason:
        raise ConfigurationError(f"engine.{field} flashinfer: {reason}", field=f"engine.{field}")
    if asked == "auto" and reason:
        logger.info("%s by torch, not FlashInfer: %s", field, reason)
    return asked != "torch" and not reason
