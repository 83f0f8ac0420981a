"""What `/metrics` says of the fleet: where cached blocks are found, and what moves between tiers."""

from cluster.ingress.fleet_metrics import fleet_exposition
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import FleetStatus, ReplicaState, ReplicaStatus, TierStatus

TIERS = (TierStatus("device", 64, 60, 200, 50, 7000, 9000), TierStatus("host", 500, 300, 150, 120, 9000, 7000))


def state(name: str, tiers: tuple[TierStatus, ...]) -> ReplicaState:
    layout, same = KVLayout(2, 2, 8, 16, "float32", 1), Compatibility("m", "r", "float32", 16, "h")
    info = ReplicaInfo(name, Role.DECODE, 1, (f"{name}:1",), layout, same, 64, 8, 64, 128)
    return ReplicaState(info, ReplicaStatus(0, 0, 0, 64, 0, False, 0.0, 0.0, 0, tiers=tiers), 0.0)


def test_hit_rates_and_bytes_of_every_tier():
    lines = fleet_exposition(FleetStatus("s", (state("d0", TIERS), state("d1", ())), 0, 0)).decode().splitlines()
    said = dict(line.rsplit(" ", 1) for line in lines if line.startswith("baton_tier_"))

    def of(tier: str) -> dict[str, float]:
        labels = f'{{pool="decode",replica="d0",tier="{tier}"}}'
        return {
            name.removeprefix("baton_tier_").removesuffix(labels): float(value)
            for name, value in said.items()
            if name.endswith(labels)
        }

    assert of("device") == {
        "slots": 64, "cached_blocks": 60, "wanted_blocks": 200, "found_blocks": 50, "bytes_in": 7000,
        "bytes_out": 9000, "hit_ratio": 0.25,
    }  # fmt: skip
    assert of("host")["hit_ratio"] == 0.8 and of("host")["bytes_in"] == 9000
    assert not [name for name in said if "d1" in name], "a replica that has told nothing of tiers has no series"
