"""Links whose larger transfers came by chance faster: no byte seems to cost anything."""

from core.messages.fleet import Role
from core.messages.to_scheduler import LinkStatus
from tests.cluster.scheduler_world import World


def test_a_link_without_a_cost_per_byte_is_fast_and_not_infinitely_so():
    world = World()
    world.add("p", Role.PREFILL)
    world.add("d", Role.DECODE)
    shrinking = [("p", num_bytes, 0.001 - num_bytes * 1e-9) for num_bytes in (10, 1000, 100_000, 1000, 10)] * 8
    links = (LinkStatus("p", 1e6, 1000, 40),)
    for _ in range(3):
        world.report("d", transfers=shrinking, links=links)
    cost = world.admission.policy.learned.links.cost(world.admission.fleet.get("p"), world.admission.fleet.get("d"))
    assert cost.byte_s == 1e-13
    assert world.admission.policy.learned.links.fastest.byte_s == 1e-13
