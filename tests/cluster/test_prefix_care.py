"""Busy prefixes are copied before their holders are what everybody waits for; quiet ones are left alone."""

import pytest

from cluster.scheduler.admission import Admission
from cluster.scheduler.prefix_care import REST_S, PrefixCare
from core.block_hash import hash_blocks
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress
from tests.cluster.test_scheduler import BLOCK, replica, report, reserve

SHARED = tuple(range(1024))
HASHES = hash_blocks(SHARED, BLOCK)


class Fleet:
    """Prefill replicas p0 to p3 of 1000 tokens/s, one of which has the shared prefix, and one decode replica."""

    def __init__(self, num_prefill: int = 4) -> None:
        self.admission = Admission(SchedulerConfig(local_prefill_max_tokens=0))
        self.holders = {"p0"}
        self.names = [f"p{i}" for i in range(num_prefill)]
        self.report(0.0, snapshot=True)
        self.copies: list[tuple[float, str, str]] = []

    def report(self, now: float, snapshot: bool = False) -> None:
        for name in self.names:
            stored = HASHES if name in self.holders else ()
            self.admission.report(report(replica(name, Role.PREFILL), stored, snapshot=snapshot), now)
        decode = replica("d0", Role.DECODE, num_blocks=100_000)
        self.admission.report(report(decode, num_free_blocks=100_000, snapshot=snapshot), now)

    def serve(self, per_s: float, seconds: float, num_own: int = 200, start: float = 0.0) -> None:
        """Requests that share a prefix, each with so many tokens of its own; copies are carried out at once."""
        for number in range(int(per_s * seconds)):
            now = start + number / per_s
            self.report(now)
            name = f"r{start}-{number}"
            own = tuple(range(5000 + 300 * number, 5000 + 300 * number + num_own))
            self.admission.reserve(reserve(name, SHARED + own), now)
            assert len(self.admission.dispatch(now)) == 1
            self.admission.progress(Progress(name), now)
            self.admission.finish(name, 0, now, 4)
            for copy in self.admission.take_copies():
                assert copy.block_hashes == HASHES
                self.copies.append((now, copy.source.replica_id, copy.taker.replica_id))
                self.holders.add(copy.taker.replica_id)


def test_a_quiet_prefix_stays_where_it_is():
    fleet = Fleet()
    fleet.serve(per_s=1.0, seconds=60)  # 0.2 s of work a second
    assert fleet.copies == []


def test_a_busy_prefix_is_copied_until_each_holder_has_half_its_time():
    fleet = Fleet()
    fleet.serve(per_s=6.0, seconds=60)  # 1.2 s of work a second: three holders at 0.4 each
    assert fleet.copies[0][1] == "p0"
    assert len(fleet.holders) == 3
    first, second = (now for now, _, _ in fleet.copies)
    assert first < 20 and second - first >= REST_S


def test_short_prefixes_are_computed():
    care = PrefixCare(least_tokens=512)
    assert not any(care.used(b"k", 511, 1.0, number / 10) for number in range(100))
    assert any(care.used(b"k", 512, 1.0, number / 10) for number in range(100))


def test_requests_that_share_nothing_make_no_copies():
    fleet = Fleet()
    for number in range(200):
        now = number / 20
        fleet.report(now)
        fleet.admission.reserve(reserve(f"r{number}", tuple(range(7000 + number * 2000, 8024 + number * 2000))), now)
        fleet.admission.dispatch(now)
        fleet.admission.finish(f"r{number}", 0, now, 4)
        assert fleet.admission.take_copies() == []


def test_without_another_replica_nothing_is_copied():
    fleet = Fleet(num_prefill=1)
    fleet.serve(per_s=6.0, seconds=30)
    assert fleet.copies == []


def test_a_prefix_that_calmed_down_makes_no_more_copies():
    fleet = Fleet()
    fleet.serve(per_s=3.0, seconds=40)  # 0.6 a second: two holders
    assert len(fleet.holders) == 2
    fleet.serve(per_s=0.5, seconds=120, start=100.0)
    assert len(fleet.holders) == 2


def test_what_is_watched_is_bounded():
    care = PrefixCare(least_tokens=1)
    for number in range(3000):
        care.used(number.to_bytes(4, "big"), 100, 1.0, 0.0)
    assert len(care._prefixes) == pytest.approx(1024, abs=1)
