"""A fleet as a file describes it, guarded by pydantic at this edge alone. Pure.

Replicas of the prefill and the decode pool; without the first, decode computes prompts by itself, chunk by chunk.
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from core.autoscaling_config import AutoscalingConfig
from core.config import SchedulerConfig, TransferConfig, read_yaml
from core.errors import ConfigurationError
from core.kv_groups import group_layers
from core.kv_layout import KVLayout
from core.messages.fleet import Role
from core.section import Section, problems_in
from simulator.cost.cost_model import Link
from simulator.cost.gpu_spec import LINKS, LinkKind, gpu_spec
from simulator.cost.gpus import kv_layout, num_kv_blocks
from simulator.cost.models import served_model
from simulator.fault_spec import Fault

MOST_REPLICAS = 100_000  # of a pool


class KVSection(Section):
    """The KV of a model that the cost tables do not know; `windows` by layer, null where there is none."""

    num_layers: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    max_model_len: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn"] = "bfloat16"
    latent: bool = False
    windows: tuple[int | None, ...] = ()


class LinkSection(Section):
    """Every replica's port: of a kind, or measured."""

    kind: LinkKind | None = None
    bytes_per_s: float = Field(default=0.0, ge=0)
    latency_s: float = Field(default=20e-6, ge=0)

    @model_validator(mode="after")
    def _says_one(self) -> "LinkSection":
        if (self.kind is None) == (self.bytes_per_s == 0):
            raise ValueError("say either kind or bytes_per_s")
        return self

    @property
    def port(self) -> Link:
        """One direction of it."""
        return LINKS[self.kind] if self.kind is not None else Link(self.bytes_per_s, self.latency_s)


class PoolSection(Section):
    """Equal replicas, but for those with a speed of their own. With autoscaling `replicas` is the pool's first size."""

    replicas: int = Field(default=1, ge=0, le=MOST_REPLICAS)
    min_replicas: int = Field(default=1, ge=0, le=MOST_REPLICAS)
    max_replicas: int = Field(default=0, ge=0, le=MOST_REPLICAS)  # 0: as many as `replicas`
    tensor_parallel: int = Field(default=1, ge=1)
    num_blocks: int | None = Field(default=None, ge=2)  # None: as many as fit beside the weights on this GPU
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    queue_limit: int = Field(default=64, ge=1)
    step_gap_s: float = Field(default=0.0, ge=0)  # from a step's end until its tokens leave and the next one begins
    drain_timeout_s: float = Field(default=20.0, ge=0)  # a replica that goes hands over what has not ended by then
    speeds: dict[int, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict
    )  # of single replicas, by number; 0.5 takes twice the time


class SloSection(Section):
    """What a good answer is: first token, and mean time of each further one."""

    ttft_s: float = Field(default=2.0, gt=0)
    tpot_s: float = Field(default=0.05, gt=0)


class ReportSection(Section):
    """How often replicas report; the defaults are those of worker/reporter.py, coarser ones are quicker to simulate."""

    interval_s: float = Field(default=0.05, ge=0.001)
    quiet_interval_s: float = Field(default=0.5, ge=0.001)  # when nothing changed


class ClientSection(Section):
    """What those who ask want."""

    timeout_s: float = Field(default=600.0, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)  # asked for; None: as many as the trace's answer has


class DeviceFacts(NamedTuple):
    """See core.messages.fleet.ReplicaInfo; 0: unknown."""

    flop_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    port_bytes_per_s: float = 0.0
    num_active_parameters: int = 0
    parameter_bytes: int = 0


class FleetSpec(Section):
    """The whole fleet, its clients, and what befalls it."""

    model: str = "llama-3.1-8b"
    gpu: str = "h100"
    kv: KVSection | None = None
    device: DeviceFacts = DeviceFacts()  # that replicas tell of, with a `kv` section
    block_size: int = Field(default=64, ge=1, le=256)
    prefill: PoolSection | None = None
    decode: PoolSection
    link: LinkSection = LinkSection(kind=LinkKind.INFINIBAND)
    layers_per_group: int | None = Field(default=None, ge=1)  # announced together; None: half of them
    control_latency_s: float = Field(default=0.001, ge=0)
    scheduler: SchedulerConfig = SchedulerConfig()
    transfer: TransferConfig = TransferConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    num_ingresses: int = Field(default=1, ge=1, le=MOST_REPLICAS)
    max_attempts: int = Field(default=5, ge=1)
    report: ReportSection = ReportSection()
    slo: SloSection = SloSection()
    clients: ClientSection = ClientSection()
    sample_s: float = Field(default=5.0, ge=0.1)  # between the points of time series
    faults: tuple[Fault, ...] = ()

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence. Raises ConfigurationError for an unknown model."""
        return self.kv.max_model_len if self.kv is not None else served_model(self.model).geometry.max_model_len

    def layout(self, pool: PoolSection) -> KVLayout:
        """Of a pool's replicas. Raises ConfigurationError for an unknown model, or one that cannot be split so."""
        kv, size = self.kv, self.block_size
        if kv is None:
            return kv_layout(self.model, pool.tensor_parallel, size)
        groups = group_layers(kv.windows) if kv.windows else ()
        heads, tp = kv.num_kv_heads, pool.tensor_parallel
        return KVLayout(kv.num_layers, heads, kv.head_dim, size, kv.dtype, tp, kv.latent, groups)

    def device_facts(self, pool: PoolSection) -> DeviceFacts:
        """Of a replica, as it tells the scheduler of itself: what tables know, else what the file says."""
        if self.kv is not None:
            return self.device
        gpu, geometry = gpu_spec(self.gpu), served_model(self.model).geometry
        idle = 0
        if (experts := geometry.experts) is not None:
            num_idle = experts.num_experts - served_model(self.model).experts_per_token
            of_one = 3 * geometry.hidden_size * experts.intermediate_size
            idle = (geometry.num_layers - experts.num_dense_layers) * num_idle * of_one
        tp, num_parameters = pool.tensor_parallel, geometry.num_parameters
        read_bytes_per_s = gpu.memory_bytes_per_s * tp
        return DeviceFacts(
            gpu.matmul_flops * tp,
            read_bytes_per_s,
            self.link.port.bytes_per_s,
            num_parameters - idle,
            2 * num_parameters,
        )

    def num_blocks(self, pool: PoolSection) -> int:
        """Of a replica. Raises ConfigurationError when that is neither said nor known."""
        if pool.num_blocks is not None:
            return pool.num_blocks
        return num_kv_blocks(self.gpu, self.model, pool.tensor_parallel, self.block_size)

    def pool(self, role: Role) -> PoolSection | None:
        """Of a role, if there is one."""
        return self.prefill if role is Role.PREFILL else self.decode


def load_fleet(path: Path) -> FleetSpec:
    """Reads a YAML file. Raises ConfigurationError naming every wrong field."""
    try:
        return FleetSpec.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigurationError(f"invalid fleet {path}: {problems_in(error, 'fleet')}") from error


def with_report_interval(spec: FleetSpec, interval_s: float) -> FleetSpec:
    """The same fleet, whose replicas report so often. Raises ConfigurationError."""
    try:
        report = ReportSection.model_validate({**spec.report.model_dump(), "interval_s": interval_s})
    except ValidationError as error:
        raise ConfigurationError(f"--report-interval: {problems_in(error, 'report')}") from error
    return spec.model_copy(update={"report": report})
