"""What a start would find wrong after half a minute, found before it: reads the checkpoint's small files."""

from collections.abc import Iterator
from pathlib import Path

from cluster.check.agreement import disagreements
from cluster.check.checkpoint_size import count_parameters
from cluster.check.plan import split_model
from core.config import BatonConfig
from core.errors import ConfigurationError
from core.model_geometry import read_geometry


def require_startable(config: BatonConfig) -> None:
    """Raises ConfigurationError that names every problem. Whether all fits into memory is not asked: see plan.py."""
    problems = [f"{problem.field}: {problem.message}" for problem in _problems(config)]
    if problems:
        raise ConfigurationError("; ".join(problems))


def _problems(config: BatonConfig) -> Iterator[ConfigurationError]:
    folder = Path(config.model.path)
    geometry = read_geometry(folder)
    if count_parameters(folder) is None:
        raise ConfigurationError(f"{folder} holds no weights (*.safetensors)", field="model")
    if not (folder / "tokenizer.json").is_file():
        raise ConfigurationError(f"{folder} has no fast tokenizer (tokenizer.json)", field="model")
    yield from disagreements(config, geometry)
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        try:
            split_model(name, pool, config, geometry)
        except ConfigurationError as error:
            yield error
