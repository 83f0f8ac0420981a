"""The configuration tree: one frozen pydantic model, one YAML, from a laptop to a fleet.

A component receives only its own section. Environment variables are read nowhere but here, in `config_with_secrets`:
`BATON_API_KEY` and `BATON_CLUSTER_SECRET` fill their fields when the file leaves them empty. The fleet's secret is
`cluster.secret`, else what `cluster.secret_file` holds, else `BATON_CLUSTER_SECRET`.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from core.autoscaling_config import AutoscalingConfig
from core.channel_kinds import ChannelKind, Device
from core.engine_config import EngineConfig
from core.errors import ConfigurationError
from core.section import Section, problems_in
from core.security import Security, TlsConfig, read_private
from core.serve_file import application_args
from core.slo_config import SloConfig

Dtype = Literal["float32", "bfloat16", "float16"]
ZoneAffinity = Literal["ignore", "prefer", "require"]


class ModelConfig(Section):
    """Which checkpoint is served, under which name, in which precision."""

    path: str = ""  # Hugging Face checkpoint folder; empty means the bundled demo model
    name: str = ""  # the `model` of API requests; empty means the folder's name
    dtype: Dtype | None = None  # None takes the checkpoint's own
    max_model_len: int | None = Field(default=None, ge=1)  # prompt + output tokens; None takes the checkpoint's limit

    @property
    def served_name(self) -> str:
        """What API requests call it."""
        return self.name or Path(self.path).name


class RankResources(Section):
    """What Ray reserves for each rank of a replica."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    custom: dict[str, float] = Field(default_factory=dict)
    accelerator_type: str | None = None
    num_threads: int = Field(default=1, ge=1)  # compute threads inside the rank


class TiersConfig(Section):
    """Where cached blocks go that lose their place on the device; nowhere by default. Sizes are per rank."""

    host_mib: float = Field(default=0.0, ge=0)
    disk_mib: float = Field(default=0.0, ge=0)
    disk_dir: str = ""  # of a local file without a name, which goes with the rank
    disk_ttl_s: float = Field(default=3600.0, gt=0)  # there and unused for longer, a block is forgotten

    @model_validator(mode="after")
    def _placed(self) -> "TiersConfig":
        if self.disk_mib > 0 and not self.disk_dir:
            raise ValueError("disk_mib needs a disk_dir")
        return self


class PoolConfig(Section):
    """One pool of equal replicas; prefill and decode each have their own."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)  # ranks that share every layer of a stage
    pipeline_parallel: int = Field(default=1, ge=1)  # stages of a replica, each with layers of its own
    whole_experts: bool = False  # ranks share experts out, instead of splitting each: expert parallel
    dtype: Dtype | None = None  # None takes the model section's; pools that hand KV over must agree
    device: Device = "cpu"
    num_blocks: int | None = Field(default=None, ge=2)  # None derives it from memory_fraction or, on CPU, kv_cache_mib
    memory_fraction: float = Field(default=0.9, gt=0, le=1)  # of GPU memory, for weights and KV together
    kv_cache_mib: int = Field(default=256, ge=1)  # per rank, on CPU
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=512, ge=1)
    steps_in_flight: int = Field(default=1, ge=1)  # launched at a time: 1, 2, or up to one for each stage
    tiers: TiersConfig = TiersConfig()
    queue_limit: int = Field(default=64, ge=1)  # requests accepted beyond those that run
    cache_floors: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict
    )  # of its blocks, by tenant
    engine: EngineConfig = EngineConfig()
    resources_per_rank: RankResources = RankResources()
    drain_timeout_s: float = Field(default=20.0, ge=0)
    zone: str = ""  # rack or zone of all its replicas; empty takes each node's label cluster.zone_label

    @model_validator(mode="after")
    def _ordered(self) -> "PoolConfig":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if sum(self.cache_floors.values()) > 1:
            raise ValueError(f"cache_floors add up to {sum(self.cache_floors.values()):g} of the cache")
        most_steps = max(2, self.pipeline_parallel)
        if self.steps_in_flight > most_steps:
            raise ValueError(f"steps_in_flight {self.steps_in_flight} is above {most_steps}: 2, or one for each stage")
        if self.steps_in_flight > 1 and self.device == "cuda" and self.engine.attention != "torch":
            raise ValueError("steps_in_flight above 1 needs engine.attention torch: FlashInfer has one plan at a time")
        return self

    @property
    def num_at_once(self) -> int:
        """Tokens of one sequence at most that steps in flight compute: so long is nothing of it behind a window."""
        return self.steps_in_flight * self.max_num_batched_tokens

    @property
    def num_ranks(self) -> int:
        """Of one replica."""
        return self.pipeline_parallel * self.tensor_parallel

    @property
    def replica_cost(self) -> float:
        """GPUs of one replica; without GPUs a rank counts as one, so that budgets can be tried on CPUs."""
        return self.num_ranks * (self.resources_per_rank.num_gpus or 1.0)


class TransferConfig(Section):
    """How KV blocks travel."""

    channel: ChannelKind = "auto"  # the best by rule for each pair of ranks; "measured": the fastest in a trial
    trial_mib: float = Field(default=64.0, gt=0)  # of real slabs that "measured" moves over each transport to a host
    weights_from: Literal["fastest", "disk"] = "fastest"  # a replica that starts reads disk or a living replica
    weights_trial_mib: float = Field(default=64.0, gt=0)  # read at a time from the one that is faster at present
    wire_dtype: Literal["", "float8_e4m3fn"] = ""  # what two-sided channels convert KV to; empty: as it is stored
    slab_mib: float = Field(default=16.0, gt=0)  # a piece on the wire: what it costs to begin one is a few percent
    layers_per_group: int = Field(default=4, ge=1)  # layers announced together while later ones compute
    last_layers_per_group: int = Field(default=1, ge=1)  # a prompt's last group is halved to this: nothing hides it
    pair_window_mib: float = Field(default=64.0, gt=0)  # asked for ahead by a rank from one peer
    rank_window_mib: float = Field(default=128.0, gt=0)  # from all its peers together
    pairs_mib: float = Field(default=2048.0, gt=0)  # of one rank's memory for channels; idle ones make room
    pair_idle_timeout_s: float = Field(default=300.0, gt=0)  # longer idle, a channel is closed when another is made
    ttft_slo_s: float = Field(default=2.0, gt=0)  # requests are due this long after they came; the first due go first
    digest_share: float = Field(default=0.02, ge=0, le=1)  # of the fetches whose bytes are compared with the sender's
    connect_timeout_s: float = Field(default=10.0, gt=0)
    data_timeout_s: float = Field(default=10.0, gt=0)
    control_timeout_s: float = Field(default=2.0, gt=0)
    lease_ttl_s: float = Field(default=15.0, ge=0.1)  # unrenewed leases end after this time
    reattach_grace_s: float = Field(default=2.0, ge=0)  # a lost token stream may come back within this time

    @property
    def rest_timeout_s(self) -> float:
        """Seconds after its last announcement by which a handoff is complete or over, and both sides know it."""
        return self.data_timeout_s + 2 * self.control_timeout_s


class SchedulerConfig(Section):
    """The global scheduler's bounds and costs."""

    queue_limit: int = Field(default=1024, ge=1)
    queue_timeout_s: float = Field(default=30.0, gt=0)
    reservation_ttl_s: float = Field(default=30.0, gt=0)
    pull_min_tokens: int = Field(default=128, ge=1)  # prefixes cached elsewhere are fetched when they save this much
    # While prefill has room, decode prefills uncached suffixes up to this alone; None leaves it to predicted times.
    local_prefill_max_tokens: int | None = Field(default=None, ge=0)
    itl_slo_s: float = Field(default=0.1, gt=0)  # decode batches grow, and prompts prefill beside them, within this
    slo: SloConfig = SloConfig()
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)  # 1 for all others
    settle_s: float = Field(default=2.0, ge=0)  # from its first report on, a new scheduler has heard of all replicas
    standby: bool = False  # a second scheduler hears all reports, and plans while the first one does not answer
    record_dir: str = ""  # where a file of all that is heard and decided goes, for `baton replay`; empty: nowhere
    record_mib: float = Field(default=1024.0, gt=0)  # its size at most
    decisions_kept: int = Field(default=4096, ge=1)  # that `baton why` can explain
    max_batch_kv_usage: float = Field(default=0.8, gt=0, le=1)  # of decode, beyond which it gets no batch work
    max_decode_kv_usage: float = Field(default=0.95, gt=0, le=1)
    replica_timeout_s: float = Field(default=3.0, gt=0)  # a silent replica is left out of plans after this time
    no_replica_timeout_s: float = Field(default=5.0, gt=0)  # requests wait this long while no decode replica is ready
    zone_affinity: ZoneAffinity = "prefer"  # of pairs; "require" has decode prefill by itself rather than cross zones


class IngressConfig(Section):
    """The HTTP edge."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1)
    api_key: str = Field(default="", repr=False)
    tenant_keys: dict[str, str] = Field(default_factory=dict, repr=False)  # name of a tenant -> its API key
    tenants_share_prefixes: bool = False  # else what one tenant has had computed is nothing that another can find
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_attempts: int = Field(default=5, ge=1)  # plans that may fail for one request before its next token
    max_buffered_tokens: int = Field(default=4096, ge=16)  # per stream, for slow clients
    max_body_mib: float = Field(default=16.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)  # from a request's head to the end of its body
    drain_timeout_s: float = Field(default=10.0, ge=0)  # a replica that goes gives its streams this long to end


class ClusterConfig(Section):
    """The Ray cluster: its own on this machine, or the one that `address` names."""

    address: str = "local"
    object_store_mib: int = Field(default=200, ge=80)
    num_cpus: int | None = Field(default=None, ge=1)  # logical CPUs of a local cluster; None counts what pools ask for
    secret: str = Field(default="", repr=False)  # shared by all processes; control calls without it are refused
    secret_file: str = ""  # holds the secret when `secret` is empty; for its owner alone
    tls: TlsConfig = TlsConfig()
    log_dir: str = ""
    zone_label: str = "ray.io/availability-zone"  # key of the Ray node label that names a node's rack or zone

    @property
    def security(self) -> Security:
        """What protects the control plane."""
        return Security(self.secret, self.tls)


class BatonConfig(Section):
    """The whole tree."""

    model: ModelConfig = ModelConfig()
    prefill: PoolConfig = PoolConfig(max_num_seqs=16)
    decode: PoolConfig = PoolConfig()
    transfer: TransferConfig = TransferConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    ingress: IngressConfig = IngressConfig()
    cluster: ClusterConfig = ClusterConfig()
    generation: str = Field(default="v1", pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")  # pools of another name live beside
    block_size: int = Field(default=16, ge=1, le=256)  # tokens per hash block, a constant of the fleet
    tenant_salt: str = ""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _floors_have_tenants(self) -> "BatonConfig":
        floors = self.prefill.cache_floors | self.decode.cache_floors
        if floors and self.ingress.tenants_share_prefixes:
            raise ValueError("cache_floors need tenants with prefixes of their own: ingress.tenants_share_prefixes")
        return self

    @model_validator(mode="after")
    def _affordable(self) -> "BatonConfig":
        least = sum(pool.min_replicas * pool.replica_cost for pool in (self.prefill, self.decode))
        if 0 < self.autoscaling.max_gpus < least:
            raise ValueError(
                f"autoscaling.max_gpus {self.autoscaling.max_gpus:g} is below the {least:g} of min_replicas"
            )
        for i, floor in enumerate(self.autoscaling.schedule):
            for name, num, pool in (("prefill", floor.prefill, self.prefill), ("decode", floor.decode, self.decode)):
                if num > pool.max_replicas:
                    raise ValueError(
                        f"autoscaling.schedule.{i}.{name} {num} is above max_replicas {pool.max_replicas} of the pool"
                    )
        return self


def parse_config(tree: dict[str, Any]) -> BatonConfig:
    """Validates a parsed YAML tree. Raises ConfigurationError naming every wrong field."""
    try:
        return BatonConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError(f"invalid configuration: {problems_in(error, 'config')}") from error


def load_config(path: Path | None) -> BatonConfig:
    """Reads a YAML file (None: all defaults) and the secrets of the environment.

    The file holds the tree itself, or a Ray Serve config whose application has it as `args`. Raises ConfigurationError.
    """
    tree = read_yaml(path) if path is not None else {}
    return config_with_secrets(application_args(tree) if "applications" in tree else tree)


def parse_yaml(text: str) -> Any:
    """Its value. Raises ValueError whose text is one line."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigurationError."""
    try:
        tree = parse_yaml(path.read_text()) or {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path} must hold a mapping at its top level")
    return tree


def config_with_secrets(tree: dict[str, Any]) -> BatonConfig:
    """Validates a parsed YAML tree after filling in the secrets of files and environment. Raises ConfigurationError."""
    tree = _filled(tree, "ingress", "api_key", os.environ.get("BATON_API_KEY"))
    config = parse_config(tree)
    if config.cluster.secret_file and not config.cluster.secret:
        tree = _filled(tree, "cluster", "secret", _secret_in(config.cluster.secret_file))
    tree = _filled(tree, "cluster", "secret", os.environ.get("BATON_CLUSTER_SECRET"))
    return parse_config(tree)


def _secret_in(path: str) -> str:
    """Raises ConfigurationError for a file that cannot be read, that others may read, or that holds no secret."""
    name = "cluster.secret_file"
    try:
        secret = read_private(path, name).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name} {path} holds bytes that are not ASCII", field=name) from error
    if not secret.isprintable() or not secret:
        raise ConfigurationError(f"{name} {path} holds no secret: one line of printable ASCII is asked", field=name)
    return secret


def _filled(tree: dict[str, Any], section: str, field: str, value: str | None) -> dict[str, Any]:
    """A copy of `tree` with `value` where the field is empty; a section that is no mapping is left to the validator."""
    fields = tree.get(section) or {}
    if not value or not isinstance(fields, dict) or fields.get(field):
        return tree
    return {**tree, section: {**fields, field: value}}
