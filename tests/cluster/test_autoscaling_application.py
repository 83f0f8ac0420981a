"""Autoscaling on Ray Serve, over real HTTP: decode grows under load and shrinks after it, and no stream notices."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.cluster.autoscaling_story import grow_and_shrink

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def test_decode_grows_and_shrinks_with_the_load_and_every_token_is_right(tmp_path):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        sizes = process.submit(grow_and_shrink, str(tmp_path)).result()
    decode = [num for _, num in sizes]
    assert decode[0] == decode[-1] == 1 and max(decode) == 2
    assert decode.count(2) <= 2, f"it flapped: {sizes}"
    assert "decode pool from 1 to 2 replicas: " in (tmp_path / "scheduler.log").read_text()
