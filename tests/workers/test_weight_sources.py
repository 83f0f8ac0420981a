"""Where parameters are read, when disk and peer are as fast as told, and when the peer is lost."""

from dataclasses import dataclass

import pytest
import torch

from core.errors import ConfigurationError, PeerLost
from engine.parameters import Parameter
from worker.weight_image import Piece, WeightImage
from worker.weight_sources import WeightSources

PARAMETERS = tuple(Parameter(f"p{number}", (25,), ()) for number in range(12))  # 100 bytes each
STRETCH_BYTES = 200


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Source:
    """Yields its own name's mark for each parameter, after as many seconds as told."""

    mark: float
    clock: Clock
    seconds: list[float]
    fails_at: str = ""
    error: type[Exception] = PeerLost

    def read(self, parameters):
        for parameter in parameters:
            if parameter.name == self.fails_at:
                raise self.error("gone")
            self.clock.now += self.seconds[int(parameter.name[1:])]
            yield torch.full((25,), self.mark)


def read(disk_s, peer_s, **of_peer) -> tuple[str, str]:
    clock = Clock()
    disk, peer = Source(0.0, clock, disk_s), Source(1.0, clock, peer_s, **of_peer)
    sources = WeightSources(disk.read, peer.read, "float32", STRETCH_BYTES, clock)
    came = "".join("dp"[int(tensor[0])] for tensor in sources.read(PARAMETERS))
    assert len(came) == len(PARAMETERS)
    return came, sources.summary()


def test_after_one_stretch_of_each_the_faster_goes_on():
    assert read([1.0] * 12, [0.5] * 12)[0] == "dd" + "p" * 10
    assert read([0.5] * 12, [1.0] * 12)[0] == "ddpp" + "d" * 8


def test_a_source_that_slows_down_is_left():
    assert read([1.0] * 12, [0.1] * 6 + [2.0] * 6)[0] == "dd" + "p" * 6 + "dddd"


def test_weights_of_one_stretch_never_ask_a_peer():
    clock = Clock()
    disk, peer = Source(0.0, clock, [1.0] * 12), Source(1.0, clock, [0.1] * 12, fails_at="p0")
    sources = WeightSources(disk.read, peer.read, "float32", 1200, clock)
    assert [int(tensor[0]) for tensor in sources.read(PARAMETERS)] == [0] * 12
    assert sources.summary() == "0 MB from disk"


def test_a_lost_peer_is_given_up_and_no_parameter_is_lost_or_read_twice():
    came, summary = read([1.0] * 12, [0.1] * 12, fails_at="p5")
    assert came == "ddppp" + "d" * 7
    assert "PeerLost: gone" in summary


def test_what_the_disk_lacks_is_an_error():
    clock = Clock()
    disk = Source(0.0, clock, [1.0] * 12, fails_at="p1", error=ConfigurationError)
    sources = WeightSources(disk.read, Source(1.0, clock, [1.0] * 12).read, "float32", STRETCH_BYTES, clock)
    with pytest.raises(ConfigurationError, match="gone"):
        list(sources.read(PARAMETERS))


def test_an_image_is_its_parameters_one_after_another():
    image = WeightImage((Parameter("a", (2, 3), ()), Parameter("b", (4,), ()), Parameter("c", (1,), ())), "bfloat16")
    assert image.num_bytes == 22
    assert WeightImage((Parameter("a", (2, 3), (), "float32"), Parameter("b", (4,), ())), "bfloat16").num_bytes == 32
    assert image.place((Parameter("b", (4,), ()), Parameter("c", (1,), ()))) == (12, 22)
    assert list(image.pieces(10, 11)) == [Piece(0, 10, 12), Piece(1, 0, 8), Piece(2, 0, 1)]
    assert list(image.pieces(20, 100)) == [Piece(2, 0, 2)]
