"""What tests on hosts share: which of them can run, and what a right answer is."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.settings import demo_model_path
from tests.hosts.testbed import (
    NUM_HOSTS,
    TWO_OF_EACH,
    Fleet,
    fleet_from,
    missing_programs,
    running_hosts,
    write_cluster_file,
    write_serve_file,
)

PROMPTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "KING RICHARD II:\nMy lord, what news from the north, and what of the Duke of Lancaster? " * 4,
    "The sun was setting when we came to the house, and nobody was there to open the door. " * 8,
    "Shall I compare thee to a summer's day? " * 30 + "And then",
]
NUM_TOKENS = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs hosts."""
    missing = missing_programs()
    for item in items:
        if "tests/hosts" in item.path.as_posix():
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.timeout(900))
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Host 0 is the head, 1 and 2 have the prefill pool, 3 and 4 the decode pool, two replicas each."""
    with running_hosts(NUM_HOSTS) as hosts:
        cluster_file = write_cluster_file(hosts, NUM_HOSTS, prefill_hosts=(1, 2))
        with fleet_from(hosts, cluster_file, write_serve_file(hosts, TWO_OF_EACH)) as fleet:
            yield fleet
        left = {host: hosts.processes(host) for host in range(NUM_HOSTS)}
        assert left == {host: [] for host in range(NUM_HOSTS)}, "`baton down` leaves no process"


@pytest.fixture(scope="session")
def expected() -> dict[str, list[int]]:
    """Greedy tokens of transformers in fp32, by prompt."""
    return answers_to(PROMPTS)


def answers_to(prompts: list[str]) -> dict[str, list[int]]:
    """Greedy tokens of transformers in fp32, by prompt."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    answers = {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS,
            do_sample=False, eos_token_id=None, pad_token_id=0, temperature=None, top_p=None,
        )  # fmt: skip
        answers[prompt] = out[0, ids.shape[1] :].tolist()
    return answers
