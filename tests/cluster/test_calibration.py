"""Costs find their true values through noise and outliers, follow a change, and tell a slow replica apart."""

import random
from dataclasses import replace

import pytest

from cluster.scheduler.class_fit import ClassFit
from cluster.scheduler.cost_book import CostBook
from cluster.scheduler.link_book import HOPE, LinkBook
from cluster.scheduler.link_end import GUESSED
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.robust_fit import RobustFit
from cluster.scheduler.step_costs import num_pairs, roofline
from core.messages.fleet import Role
from core.messages.to_scheduler import LinkStatus
from tests.cluster.scheduler_world import info, status

MiB = 2**20
TRUE = (0.012, 80e-6, 10e-9)
PRIOR = (0.03, 200e-6, 4e-9)


def features(tokens: int, before: int) -> tuple[float, ...]:
    return 1, tokens, num_pairs(tokens, before)


def seconds(at: tuple[float, ...], coefficients=TRUE) -> float:
    return sum(c * x for c, x in zip(coefficients, at, strict=True))


def load(rng: random.Random) -> tuple[float, ...]:
    return features(rng.choice((64, 256, 512, 2048)), rng.randrange(16_000))


def worst_error(predict, coefficients=TRUE) -> float:
    """Over the loads that come."""
    at = [features(tokens, before) for tokens in (64, 512, 2048) for before in (0, 4000, 16_000)]
    return max(abs(predict(x) / seconds(x, coefficients) - 1) for x in at)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_outliers_do_not_hide_the_coefficients(seed):
    """5 % noise, and every twentieth step takes ten times as long."""
    rng, fit = random.Random(seed), RobustFit(PRIOR)
    assert worst_error(fit.predict) > 0.5, "the prior is far off"
    for _ in range(1000):
        x = load(rng)
        fit.add(x, seconds(x) * rng.gauss(1, 0.05) * (10 if rng.random() < 0.05 else 1))
    assert worst_error(fit.predict) < 0.08


def test_least_squares_without_clipping_would_be_off_by_a_third():
    """The outliers of above are harmful: what they do to the mean is what bounding their pull prevents."""
    rng = random.Random(0)
    x = features(512, 0)
    samples = [seconds(x) * (10 if rng.random() < 0.05 else 1) for _ in range(1000)]
    assert sum(samples) / len(samples) > 1.33 * seconds(x)
    fit = RobustFit(PRIOR)
    for sample in samples:
        fit.add(x, sample)
    assert fit.predict(x) == pytest.approx(seconds(x), rel=0.05)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_change_of_speed_is_followed_within_a_hundred_steps(factor):
    rng, fit = random.Random(1), RobustFit(PRIOR)
    for _ in range(500):
        x = load(rng)
        fit.add(x, seconds(x) * rng.gauss(1, 0.05))
    changed = tuple(factor * c for c in TRUE)
    assert worst_error(fit.predict, changed) > 0.4
    for _ in range(100):
        x = load(rng)
        fit.add(x, seconds(x, changed) * rng.gauss(1, 0.05))
    assert worst_error(fit.predict, changed) < 0.2
    for _ in range(400):
        x = load(rng)
        fit.add(x, seconds(x, changed) * rng.gauss(1, 0.05))
    assert worst_error(fit.predict, changed) < 0.1


def test_a_load_that_never_changes_leaves_the_rest_to_the_prior():
    """No direction drifts off: with one kind of step alone, others stay in the prior's proportions."""
    rng, fit = random.Random(2), RobustFit(PRIOR)
    x = features(512, 0)
    for _ in range(20_000):
        fit.add(x, seconds(x) * rng.gauss(1, 0.05))
    assert fit.predict(x) == pytest.approx(seconds(x), rel=0.03)
    assert fit.predict(features(2048, 8000)) == pytest.approx(
        seconds(features(2048, 8000), PRIOR) * seconds(x) / seconds(x, PRIOR), rel=0.35
    )


def test_coefficients_are_never_negative():
    """Steps that get shorter with context: nonsense that a line would take for a negative cost."""
    fit = RobustFit(PRIOR)
    for tokens in (64, 2048) * 50:
        for before in (0, 8000):
            fit.add(features(tokens, before), 0.05 if before else 0.1)
    assert all(c >= 0 for c in fit.coefficients)


def test_a_replica_at_half_speed_is_told_apart_from_its_class():
    rng, fit = random.Random(3), ClassFit(PRIOR)
    for _ in range(1500):
        member, x = rng.choice("abcd"), load(rng)
        fit.add(member, x, seconds(x) * rng.gauss(1, 0.05) * (2 if member == "d" else 1))
    for member in "abc":
        assert worst_error(lambda x, m=member: fit.predict(m, x)) < 0.1
        assert fit.factor("d") / fit.factor(member) == pytest.approx(2, rel=0.05)
    assert worst_error(lambda x: fit.predict("d", x), tuple(2 * c for c in TRUE)) < 0.1


def test_a_replica_that_comes_later_is_predicted_by_its_class_at_once():
    rng, fit = random.Random(4), ClassFit(PRIOR)
    for _ in range(500):
        x = load(rng)
        fit.add("old", x, seconds(x) * rng.gauss(1, 0.05))
    assert worst_error(lambda x: fit.predict("new", x)) < 0.1


def test_the_first_decision_goes_by_the_roofline():
    """8B parameters in bfloat16 on an H100: 1,000 tokens take some 30 ms, a step of decode some 8 ms."""
    machine = info(
        "d", Role.DECODE, flop_per_s=989e12, read_bytes_per_s=3.35e12,
        num_active_parameters=8_000_000_000, parameter_bytes=16_000_000_000,
    )  # fmt: skip
    costs = roofline(machine)
    assert 0.025 < costs.prefill_s(1000, 0, 2048) < 0.06
    assert 0.005 < costs.decode_step_s(1, 1000) < 0.012
    assert costs.decode_step_s(64, 64_000) > costs.decode_step_s(1, 1000)
    assert costs.prefill_s(1000, 30_000, 2048) > 1.1 * costs.prefill_s(1000, 0, 2048)


def test_reports_of_steps_move_a_replicas_costs_and_its_error_is_kept():
    book = CostBook()
    view = ReplicaView(info("d", Role.DECODE), status(), 0.0)
    first = book.of(view).decode_step_s(32, 32_000)
    for _ in range(100):
        book.heard(view, [(0, 0, batch, 1000 * batch, 0.01 + 1e-4 * batch) for batch in (4, 16, 64)])
    found = book.of(view).decode_step_s(32, 32_000)
    assert abs(first / 0.0132 - 1) > 0.3
    assert found == pytest.approx(0.0132, rel=0.03)
    error = book.itl_accuracy.summary()
    assert error.num_samples == 300 and error.median < 0.03


def test_a_link_is_latency_and_bytes_of_each_pair():
    """20 GB/s and 1 ms; the pair with d1 at half of that."""
    rng, book = random.Random(5), LinkBook()
    views = {
        name: ReplicaView(info(name, role), status(), 0.0)
        for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE), ("d2", Role.DECODE))
    }
    assert book.cost(views["p0"], views["d0"]) == GUESSED
    book.heard(views["p0"], [])
    for _ in range(300):
        for name, slow in (("d0", 1), ("d1", 2)):
            num_bytes = rng.choice((1e5, 1e6, 1e7, 1e8))
            taken = (0.001 + slow * num_bytes / 20e9) * rng.gauss(1, 0.1)
            book.heard(views[name], [("p0", int(num_bytes), taken)])

    def taken_s(name: str, num_bytes: float) -> float:
        latency_s, byte_s = book.cost(views["p0"], views[name])
        return latency_s + num_bytes * byte_s

    for num_bytes in (1e5, 1e8):
        assert taken_s("d0", num_bytes) == pytest.approx(0.001 + num_bytes / 20e9, rel=0.1)
        assert taken_s("d1", num_bytes) == pytest.approx(0.001 + 2 * num_bytes / 20e9, rel=0.1)
    assert taken_s("d0", 1e8) < taken_s("d2", 1e8) < taken_s("d1", 1e8), "one that is not measured: the class"
    book.lost("d1")
    assert taken_s("d1", 1e8) == taken_s("d2", 1e8)


def test_a_link_that_nothing_moved_over_is_guessed_by_the_ports_at_its_ends():
    """0.8 of the slower one's peak; through memory within a host; 1.5 GB/s where nobody says."""
    speeds = {"f": 50e9, "s": 10e9, "u": 0.0}
    fast, slow, unknown = (info(name, Role.DECODE, port_bytes_per_s=speed) for name, speed in speeds.items())
    beside = replace(slow, replica_id="b")
    views = {one.replica_id: ReplicaView(one, status(), 0.0) for one in (fast, slow, unknown, beside)}
    book = LinkBook()

    def bytes_per_s(source: str, destination: str) -> float:
        return 1 / book.cost(views[source], views[destination]).byte_s

    assert bytes_per_s("f", "s") == bytes_per_s("s", "f") == pytest.approx(8e9)
    assert bytes_per_s("f", "u") == pytest.approx(1.5e9)
    assert bytes_per_s("s", "b") == pytest.approx(5e9)
    for view in views.values():
        book.heard(view, [])
    assert 1 / book.fastest.byte_s == pytest.approx(40e9)
    for num_bytes in (MiB, 64 * MiB, 256 * MiB):
        book.heard(views["f"], [("s", num_bytes, 0.001 + num_bytes / 4e9)] * 20)
    hoped = 0.75e9 / HOPE
    assert bytes_per_s("u", "s") == pytest.approx(hoped, rel=0.1), "half of its guess, as others took of theirs"
    assert bytes_per_s("b", "s") == pytest.approx(5e9), "within hosts nothing moved yet"


def test_an_older_workers_link_speed_is_believed():
    link = LinkStatus("p0", 10e9, 1, 1)
    old = ReplicaView(info("d0", Role.DECODE), status(links=(link,)), 0.0)
    source = ReplicaView(info("p0", Role.PREFILL), status(), 0.0)
    assert LinkBook().cost(source, old).byte_s == pytest.approx(1e-10)


def test_a_link_that_takes_equally_long_for_all_sizes_still_costs_something_per_byte():
    """Small transfers on a slow machine: bytes are lost in the noise."""
    book = LinkBook()
    source, destination = (
        ReplicaView(info(name, role), status(links=(LinkStatus("p0", 1e6, 1, 1),)), 0.0)
        for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE))
    )
    book.heard(source, [])
    for num_bytes in (1000, 4000, 16_000) * 20:
        book.heard(destination, [("p0", num_bytes, 0.01 - num_bytes * 1e-8)])
    latency_s, byte_s = book.cost(source, destination)
    assert latency_s == pytest.approx(0.01, rel=0.05)
    assert 0 < byte_s < 1e-7 and book.fastest.byte_s > 0
