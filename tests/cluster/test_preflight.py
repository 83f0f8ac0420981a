"""What cannot start is refused before anything is started, and what a rank refuses is told in its sentence."""

import json

import pytest

from cluster.check.preflight import require_startable
from cluster.readiness import sentence_of
from cluster.settings import resolve_config
from core.config import BatonConfig
from core.errors import ConfigurationError
from tests.checkpoints import make_checkpoint

SERVES_ERROR = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica.initialize() (pid=1)
  File "worker/rank.py", line 7, in start
    raise ConfigurationError(message)
core.errors.ConfigurationError: cannot read model.safetensors: incomplete

The above exception was the direct cause of the following exception:

RuntimeError: Traceback (most recent call last):
core.errors.ConfigurationError: rank 0 of d0 ended: cannot read
model.safetensors"""


@pytest.fixture
def folder(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    (path / "tokenizer.json").write_text("{}")
    return path


def served(folder, **sections) -> BatonConfig:
    config = resolve_config(None, folder)
    pools = {name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    return config.model_copy(update=pools)


def test_what_can_start_is_let_through(folder):
    require_startable(served(folder))
    require_startable(resolve_config(None))


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut, "model.safetensors: it is cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no fast tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read"),
        (lambda folder: (folder / "config.json").write_text(json.dumps({"hidden_size": 8})), "names no num_hidden"),
    ],
)
def test_a_checkpoint_that_no_rank_could_load_is_refused(folder, harm, says):
    harm(folder)
    with pytest.raises(ConfigurationError, match=says):
        require_startable(served(folder))


def test_every_degree_that_does_not_divide_is_named(folder):
    with pytest.raises(ConfigurationError) as refusal:
        require_startable(served(folder, prefill={"tensor_parallel": 3}, decode={"pipeline_parallel": 4}))
    first, second = refusal.value.message.split("; ")
    assert first == "prefill.tensor_parallel: tensor_parallel 3 must divide 4 attention heads"
    assert second == "decode.pipeline_parallel: pipeline_parallel 4 is above the 3 layers of the model"


def test_of_serves_tracebacks_the_last_sentence_of_ours_is_told():
    assert sentence_of(SERVES_ERROR) == "rank 0 of d0 ended: cannot read\nmodel.safetensors"
    assert sentence_of("no node has 1 GPU") == "no node has 1 GPU"
