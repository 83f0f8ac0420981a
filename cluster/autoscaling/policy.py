"""Policies by name, and how to write your own.

A policy says how many replicas each pool needs at this moment; nothing else. Minimum, maximum, the GPU budget, dead
band, delays, scheduled floors and forecast are applied to whatever it says (`autoscaling.py`), so it may be simple
and nervous. It is built once with the `autoscaling` section and asked every `interval_s`; it may remember, and it does
no I/O: all that it may know is in FleetSignals, `now` included. Put the class where Python finds it and name it:

    autoscaling: {policy: "my_fleet.policies:PerRequest", policy_options: {requests_per_prefill: 4}}

A whole one, in `my_fleet/policies.py`, one prefill replica for every few waiting requests and half-full decode batches:

>>> from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand
>>> from core.autoscaling_config import AutoscalingConfig
>>> class PerRequest:
...     def __init__(self, config: AutoscalingConfig) -> None:
...         self.requests_per_prefill = config.policy_options["requests_per_prefill"]
...
...     def demand(self, signals: FleetSignals) -> Demand:
...         waiting, running = signals.prefill.num_waiting, signals.decode.num_running
...         half_batch = max(1, signals.decode.max_num_seqs / 2)
...         return Demand(
...             prefill=PoolDemand(waiting / self.requests_per_prefill, f"{waiting} requests wait"),
...             decode=PoolDemand(running / half_batch, f"{running} requests run"),
...         )

Demands are fractions on purpose: 2.05 replicas need no third one, 2.6 do.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand
from cluster.autoscaling.slo import SloPolicy
from core.autoscaling_config import AutoscalingConfig
from core.errors import ConfigurationError

FIELD = "autoscaling.policy"


class Policy(Protocol):
    """What the load asks for."""

    def demand(self, signals: FleetSignals) -> Demand:
        """Replicas that both pools need now."""
        ...


class FixedPolicy:
    """Asks for nothing: pools stay at min_replicas, but for scheduled floors and forecast."""

    def __init__(self, config: AutoscalingConfig) -> None:
        del config

    def demand(self, signals: FleetSignals) -> Demand:
        """See Policy."""
        del signals
        nothing = PoolDemand(0.0, "min_replicas")
        return Demand(nothing, nothing)


BUILT_IN: dict[str, Callable[[AutoscalingConfig], Policy]] = {"fixed": FixedPolicy, "slo": SloPolicy}


def make_policy(config: AutoscalingConfig) -> Policy:
    """The policy that `config.policy` names. Raises ConfigurationError naming the field."""
    make = BUILT_IN.get(config.policy) or _load(config.policy)
    return make(config)


def _load(name: str) -> Callable[[AutoscalingConfig], Policy]:
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ConfigurationError(
            f'{FIELD}: {name!r} is neither one of {", ".join(BUILT_IN)} nor of the form "module:Class"', field=FIELD
        )
    try:
        found = vars(import_module(module_name)).get(class_name)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{FIELD}: {module_name!r} cannot be imported: {error}", field=FIELD) from error
    if not isinstance(found, type) or "demand" not in dir(found):
        raise ConfigurationError(f"{FIELD}: {name!r} is no class with a method `demand`", field=FIELD)
    return found
