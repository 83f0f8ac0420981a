"""A host ends at once, with all that runs on it: its streams go on elsewhere, and its replica comes back elsewhere."""

from tests.hosts.load import Load, until

WHOLE_AGAIN_S = 60.0


def test_a_decode_host_dies(fleet, expected):
    assert fleet.ready()["decode"] == [3, 4]
    load = Load(fleet, expected, 6)
    load.until_done(6)
    fleet.hosts.script("kill", "4")
    load.until_done(12)
    seconds = until(lambda: fleet.ready() == {"prefill": [1, 2], "decode": [3, 3]}, WHOLE_AGAIN_S, "its replica")
    load.until_done(6)
    seen = load.finish()
    print(f"\nhost dead: {seen}; whole {seconds:.1f} s after 12 more answers")
    assert (seen.errors, seen.wrong) == ([], [])
    fleet.hosts.script("revive", "4")  # so that `down` can see that nothing is left there
