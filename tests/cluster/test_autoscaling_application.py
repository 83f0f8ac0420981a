"""Autoscaling on Ray Serve, over real HTTP: pools grow under load, shrink after it to nothing, and come back, and no
stream notices.
"""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.cluster.autoscaling_story import grow_shrink_and_come_back

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_pools_follow_the_load_to_and_from_zero_and_every_token_is_right(tmp_path):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(grow_shrink_and_come_back, str(tmp_path)).result()
    log = (tmp_path / "autoscaler-v1.log").read_text()
    decode = [int(size) for size in re.findall(r"decode pool from \d to (\d) replicas: ", log)]
    prefill = [int(size) for size in re.findall(r"prefill pool from \d to (\d) replicas: ", log)]
    assert 0 in decode[decode.index(2) :] and decode[-1] > 0
    assert 0 in prefill and max(prefill) == 1
