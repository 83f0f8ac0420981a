"""bench.reality from start to end, on a real fleet, with a handful of requests."""

import asyncio

from bench.reality import RealityBench, parse


def test_a_few_requests_end_alike_in_both_worlds(tmp_path):
    few = ("--rates", "12", "--rounds", "1", "--requests", "8", "--calibration-requests", "24", "--pace", "0")
    (rounds,) = asyncio.run(RealityBench(parse(few)).run(tmp_path)).values()
    (one,) = rounds
    assert one.real["completed"] == one.foretold["completed"] == one.retold["completed"] == 8
    assert one.real.keys() == one.foretold.keys() == one.retold.keys()
    assert 0 < one.real["ITL p50 ms"] <= one.real["ITL p99 ms"]
    assert 0 < one.retold["TTFT p50 ms"] < 60
