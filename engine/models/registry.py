"""The supported architectures."""

from engine.models import llama, qwen2, qwen3
from engine.models.family import Family

FAMILIES: dict[str, Family] = {family.architecture: family for family in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)}
