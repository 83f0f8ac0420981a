"""From a file and command-line flags to the configuration that is served."""

from importlib.resources import files
from pathlib import Path

from core.config import BatonConfig, load_config
from core.errors import ConfigurationError

DEMO_MODEL_NAME = "baton-demo"


def laptop_config_path() -> Path:
    """The configuration of `baton serve` without a file."""
    return Path(str(files("ray_configs"))) / "laptop_cpu.yaml"


def demo_model_path() -> Path:
    """The bundled checkpoint."""
    return Path(str(files("models"))) / "demo"


def resolve_config(path: Path | None, model: Path | None = None, port: int | None = None) -> BatonConfig:
    """Loads `path` (None: the laptop's), applies flags, fills in the bundled model. Raises ConfigurationError."""
    config = load_config(path or laptop_config_path())
    if port is not None:
        config = config.model_copy(update={"ingress": config.ingress.model_copy(update={"port": port})})
    changes: dict[str, str] = {}
    chosen = str(model) if model is not None else config.model.path
    if chosen:
        changes["path"] = str(Path(chosen).expanduser().resolve())
        if not (Path(changes["path"]) / "config.json").is_file():
            raise ConfigurationError(
                f"{chosen} is no Hugging Face checkpoint folder: config.json is missing", field="model"
            )
        changes["name"] = config.model.name or Path(changes["path"]).name
    else:
        changes["path"] = str(demo_model_path())
        changes["name"] = config.model.name or DEMO_MODEL_NAME
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})
