"""From a file and command-line flags to the configuration that is served."""

from importlib.resources import files
from pathlib import Path

from core.config import BatonConfig, load_config
from core.errors import ConfigurationError

DEMO_MODEL_NAME = "baton-demo"


def laptop_config_path() -> Path:
    """The configuration of `baton serve` without a file."""
    return Path(str(files("ray_configs"))) / "serve" / "laptop_cpu.yaml"


def demo_model_path() -> Path:
    """The bundled checkpoint."""
    return Path(str(files("models"))) / "demo"


def resolve_config(path: Path | None, model: Path | None = None, port: int | None = None) -> BatonConfig:
    """Loads `path` (None: the laptop's), applies flags, fills in the bundled model. Raises ConfigurationError."""
    config = load_config(path or laptop_config_path())
    if port is not None:
        config = config.model_copy(update={"ingress": config.ingress.model_copy(update={"port": port})})
    return with_model(config, str(model) if model is not None else config.model.path)


def with_model(config: BatonConfig, chosen: str) -> BatonConfig:
    """The configuration with the checkpoint folder `chosen` (empty: the bundled model) and a name for it.

    Raises ConfigurationError when the folder holds no checkpoint.
    """
    if chosen:
        path = Path(chosen).expanduser().resolve()
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"{chosen} is no Hugging Face checkpoint folder: config.json is missing", field="model"
            )
        name = path.name
    else:
        path, name = demo_model_path(), DEMO_MODEL_NAME
    changes = {"path": str(path), "name": config.model.name or name}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})
