"""Network ports as Linux describes them, in folders like those of /sys/class."""

from pathlib import Path

import pytest

from worker.port_speed import port_bytes_per_s


def ethernet(classes: Path, name: str, speed: str, *, is_device: bool = True) -> None:
    port = classes / "net" / name
    port.mkdir(parents=True)
    (port / "speed").write_text(speed + "\n")
    if is_device:
        (port / "device").mkdir()


def fabric(classes: Path, name: str, rate: str, state: str = "4: ACTIVE") -> None:
    port = classes / "infiniband" / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text(rate + "\n")
    (port / "state").write_text(state + "\n")


def test_each_rank_has_a_port_of_the_fabric_as_long_as_there_are_some(tmp_path):
    for number in range(4):
        fabric(tmp_path, f"mlx5_{number}", "400 Gb/sec (4X NDR)")
    fabric(tmp_path, "mlx5_9", "25 Gb/sec (1X EDR)")
    fabric(tmp_path, "mlx5_down", "400 Gb/sec (4X NDR)", "1: DOWN")
    ethernet(tmp_path, "eth0", "100000")
    assert port_bytes_per_s("cuda", 1, tmp_path) == pytest.approx(50e9)
    assert port_bytes_per_s("cuda", 4, tmp_path) == pytest.approx(200e9)
    assert port_bytes_per_s("cuda", 8, tmp_path) == pytest.approx(200e9 + 25e9 / 8)
    assert port_bytes_per_s("cpu", 4, tmp_path) == pytest.approx(12.5e9), "gloo and TCP go over Ethernet"


def test_the_fastest_ethernet_port_that_is_a_device_counts(tmp_path):
    ethernet(tmp_path, "eth0", "10000")
    ethernet(tmp_path, "eth1", "25000")
    ethernet(tmp_path, "eth2", "-1")
    ethernet(tmp_path, "eth3", "4294967295")
    fabric(tmp_path, "mlx5_0", "unknown")
    fabric(tmp_path, "mlx5_1", "400 Gb/sec (4X NDR)", "5: ACTIVE_DEFER")
    ethernet(tmp_path, "docker0", "400000", is_device=False)
    assert port_bytes_per_s("cuda", 8, tmp_path) == pytest.approx(25e9 / 8)


def test_nothing_is_known_where_nothing_tells(tmp_path):
    assert port_bytes_per_s("cuda", 1, tmp_path) == 0.0
    ethernet(tmp_path, "eth0", "-1")
    (tmp_path / "net" / "lo").mkdir()
    assert port_bytes_per_s("cpu", 1, tmp_path) == 0.0
