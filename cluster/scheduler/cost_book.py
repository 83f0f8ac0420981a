"""What steps take on each replica, learned from the steps that it reports. Pure.

Replicas of one class (role, model, layout, device) share a fit of steps with prompts in them and one of steps that only
decode; a factor per replica says how much slower it is. Who reports no steps is believed its rates, else its roofline.
"""

from collections.abc import Sequence
from math import inf

from cluster.scheduler.accuracy import Accuracy
from cluster.scheduler.class_fit import ClassFit
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.step_costs import StepCosts, roofline
from core.messages.fleet import ReplicaInfo
from core.messages.to_scheduler import StepSample

LEAST_SAMPLES = 4  # of a class, before its fit is believed more than what a replica says of itself
CLASS_SAMPLES = 64  # per class and round of reports: of many replicas, fewer samples each are taken in


class _Class:
    """Machines that are alike."""

    def __init__(self, prior: StepCosts) -> None:
        self.chunks = ClassFit(prior.of_chunks)
        self.decodes = ClassFit(prior.of_decodes)


class CostBook:
    """Costs are ready when asked for: they change with reports."""

    def __init__(self) -> None:
        self.itl_accuracy = Accuracy("itl")
        self._classes: dict[tuple[object, ...], _Class] = {}
        self._of: dict[str, tuple[ReplicaInfo, _Class]] = {}
        self._costs: dict[str, StepCosts] = {}

    def of(self, replica: ReplicaView) -> StepCosts:
        """The replica's present costs."""
        costs = self._costs.get(replica.info.replica_id)
        return costs if costs is not None else self._refresh(replica)

    def heard(self, replica: ReplicaView, steps: Sequence[StepSample]) -> None:
        """Takes the steps of a report in; a time that none can take says nothing."""
        replica_id, alike = replica.info.replica_id, self._class_of(replica.info)
        num_alike = max(len(alike.chunks), len(alike.decodes), 1)
        for num_tokens, num_pairs, num_decoding, num_kv_tokens, seconds in steps[-max(1, CLASS_SAMPLES // num_alike) :]:
            if not 0 < seconds < inf:
                continue
            if num_tokens:
                features = (1, num_tokens + num_decoding, num_pairs, num_kv_tokens)
                alike.chunks.add(replica_id, features, seconds)
            elif num_decoding:
                batch = (1, num_decoding, num_kv_tokens)
                self.itl_accuracy.add(self.of(replica).decode_step_s(num_decoding, num_kv_tokens), seconds)
                alike.decodes.add(replica_id, batch, seconds)
        self._refresh(replica)

    def lost(self, replica_id: str) -> None:
        """The replica is gone; what its class learned stays while others are of it."""
        self._costs.pop(replica_id, None)
        known = self._of.pop(replica_id, None)
        if known is not None:
            known[1].chunks.remove(replica_id)
            known[1].decodes.remove(replica_id)

    def _class_of(self, info: ReplicaInfo) -> _Class:
        known = self._of.get(info.replica_id)
        if known is not None and known[0] is info:
            return known[1]
        machine = info.flop_per_s, info.read_bytes_per_s, info.num_active_parameters, info.parameter_bytes
        key = (info.role, info.generation, info.compatibility, info.layout, *machine)
        alike = self._classes.get(key)
        if alike is None:
            alike = self._classes[key] = _Class(roofline(info))
        self._of[info.replica_id] = info, alike
        return alike

    def _refresh(self, replica: ReplicaView) -> StepCosts:
        info, status, alike = replica.info, replica.status, self._class_of(replica.info)
        first = roofline(info)
        prompt: tuple[float, ...] = first.of_chunks
        decode: tuple[float, ...] = first.of_decodes
        if alike.chunks.fit.num_samples >= LEAST_SAMPLES:
            factor = alike.chunks.factor(info.replica_id)
            prompt = tuple(factor * c for c in alike.chunks.fit.coefficients)
        elif status.prefill_tokens_per_s > 0:
            prompt = (0.0, 1 / status.prefill_tokens_per_s, 0.0, 0.0)
        if alike.decodes.fit.num_samples >= LEAST_SAMPLES:
            factor = alike.decodes.factor(info.replica_id)
            decode = tuple(factor * c for c in alike.decodes.fit.coefficients)
        elif status.decode_step_s > 0:
            decode = (status.decode_step_s, 0.0, 0.0)
        costs = self._costs[info.replica_id] = StepCosts(*prompt, *decode)
        return costs
