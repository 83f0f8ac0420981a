"""A rank whose steps take a device's time: `python -m bench.paced_rank SPEC.json PACE`, PACE of `paced_costs`.

The model is computed as ever; then each group of layers is told of, and the step is over, when a device of that pace
would be so far. In between the core is idle, as beside a GPU, so that ranks that share few cores, with each other and
with strangers, hardly slow each other down.
"""

import sys
import time
from collections.abc import Sequence

import worker.load
from cluster.scheduler.step_costs import StepCosts
from core.messages.fleet import Role
from decode_worker.service import DecodeService
from engine.batch import StepBatch
from engine.runner import InFlightStep, ModelRunner
from engine.stage_reports import OnLayers
from prefill_worker.service import PrefillService
from worker.process import main, read_spec
from worker.samples import step_sample

UNIT = StepCosts(0.020, 4e-4, 1e-7, 1e-6, 0.016, 1e-3, 2e-6)  # of pace 1: above what the demo model takes on one core


def paced_costs(pace: float) -> StepCosts:
    """So many times the seconds of `UNIT`."""
    return StepCosts(*(pace * seconds for seconds in UNIT.of_chunks + UNIT.of_decodes))


def device_s(costs: StepCosts, batch: StepBatch) -> float:
    """Of one step."""
    num_tokens, num_pairs, num_decoding, num_kv_tokens, _ = step_sample(batch, 0.0)
    if not num_tokens:
        return costs.decode_step_s(num_decoding, num_kv_tokens)
    features = 1, num_tokens + num_decoding, num_pairs, num_kv_tokens
    return sum(c * x for c, x in zip(costs.of_chunks, features, strict=True))


class PacedRunner(ModelRunner):
    """Of one rank, on CPU."""

    def launch(
        self, batch: StepBatch, on_layers: OnLayers | None = None, layer_groups: Sequence[int] = ()
    ) -> InFlightStep:
        """See ModelRunner."""
        began, seconds = time.monotonic(), device_s(paced_costs(float(sys.argv[2])), batch)

        def wait_until(share: float) -> None:
            time.sleep(max(0.0, began + share * seconds - time.monotonic()))

        def paced(first_layer: int, num_layers: int) -> None:
            wait_until((first_layer + num_layers) / self.layout.num_layers)
            assert on_layers is not None
            on_layers(first_layer, num_layers)

        step = super().launch(batch, paced if on_layers is not None else None, layer_groups)
        wait_until(1.0)
        return step


if __name__ == "__main__":
    worker.load.ModelRunner = PacedRunner  # type: ignore[attr-defined]
    main(PrefillService if read_spec().role is Role.PREFILL else DecodeService)
