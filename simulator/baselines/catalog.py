"""Policies by name. Pure."""

from collections.abc import Callable

from cluster.scheduler.decision import DecisionMaker
from cluster.scheduler.policy import Policy
from core.errors import ConfigurationError
from simulator.baselines.dynamo import Dynamo
from simulator.baselines.least_outstanding import LeastOutstanding
from simulator.baselines.llm_d import LlmD
from simulator.baselines.mooncake import Mooncake
from simulator.baselines.power_of_two import PowerOfTwo
from simulator.baselines.preble import Preble
from simulator.baselines.ray_prefix import RayPrefix
from simulator.baselines.round_robin import RoundRobin
from simulator.baselines.session_stick import SessionStick
from simulator.baselines.sglang_gateway import SGLangGateway
from simulator.baselines.staged import Rule, Staged
from simulator.fleet_spec import FleetSpec

MakePolicy = Callable[[FleetSpec, int], Policy]  # of a fleet and a seed


def _staged(prefill: Callable[[int], Rule], decode: Callable[[int], Rule]) -> MakePolicy:
    """Rules are made from seeds of their own."""

    def make(spec: FleetSpec, seed: int) -> Policy:
        return Staged(prefill(seed), decode(seed + 1), spec.scheduler.max_decode_kv_usage)

    return make


def _llm_d(spec: FleetSpec, seed: int) -> Policy:
    """Its 200 ms, or what a fleet's reports allow: an idle replica that keeps quiet is not saturated."""
    del seed
    return LlmD(spec.scheduler.max_decode_kv_usage, stale_s=max(0.2, 2 * spec.report.quiet_interval_s))


def _fewest(seed: int) -> Rule:
    del seed
    return LeastOutstanding()


POLICIES: dict[str, MakePolicy] = {
    "baton": lambda spec, seed: DecisionMaker(spec.scheduler),
    "round-robin": _staged(lambda seed: RoundRobin(), lambda seed: RoundRobin()),
    "least-outstanding": _staged(_fewest, _fewest),
    "power-of-two": _staged(PowerOfTwo, PowerOfTwo),
    "session-stick": _staged(lambda seed: SessionStick(), lambda seed: SessionStick()),
    "dynamo": lambda spec, seed: Dynamo(spec.scheduler.max_decode_kv_usage),
    "mooncake": lambda spec, seed: Mooncake(spec.scheduler.max_decode_kv_usage, spec.link.port.bytes_per_s),
    "llm-d": _llm_d,
    "preble": _staged(lambda seed: Preble(), _fewest),
    "sglang-gateway": _staged(lambda seed: SGLangGateway(), _fewest),
    "ray-prefix": _staged(RayPrefix, _fewest),
}


def find_policy(name: str) -> MakePolicy:
    """Raises ConfigurationError for a name that is not known."""
    if name not in POLICIES:
        raise ConfigurationError(f"policy {name!r} is none of {', '.join(POLICIES)}", field="policy")
    return POLICIES[name]
