"""How many layers' weights stay on a device that cannot hold them all. Pure arithmetic."""

from collections.abc import Sequence

from core.errors import ConfigurationError

FIELD = "engine.device_weights_mib"


def num_resident_layers(layer_bytes: Sequence[int], other_bytes: int, budget_bytes: int | None) -> int:
    """Layers from the first on that stay, those beyond them passing through two slots as large as the largest of them.

    `other_bytes`: of weights that always stay. `budget_bytes` None: all do. Raises ConfigurationError when even two
    slots and the others do not fit.
    """
    total = len(layer_bytes)
    if budget_bytes is None or other_bytes + sum(layer_bytes) <= budget_bytes:
        return total
    needed_bytes = {
        resident: other_bytes + sum(layer_bytes[:resident]) + 2 * max(layer_bytes[resident:])
        for resident in range(total - 1)
    }
    fitting = [resident for resident, needed in needed_bytes.items() if needed <= budget_bytes]
    if fitting:
        return fitting[-1]
    least = min(needed_bytes.values(), default=other_bytes + sum(layer_bytes))
    raise ConfigurationError(
        f"{FIELD} {budget_bytes >> 20} is below {-(-least // (1 << 20))}, "
        "what embedding, head and the layers on their way take",
        field=FIELD,
    )
