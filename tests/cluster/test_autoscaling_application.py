"""Autoscaling on Ray Serve, over real HTTP: decode grows under load and shrinks after it, and no stream notices."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.cluster.autoscaling_story import grow_and_shrink

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_decode_grows_and_shrinks_with_the_load_and_every_token_is_right(tmp_path):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(grow_and_shrink, str(tmp_path)).result()
    changes = re.findall(r"decode pool from (\d) to (\d) replicas: ", (tmp_path / "autoscaler-v1.log").read_text())
    assert changes == [("1", "2"), ("2", "1")]
