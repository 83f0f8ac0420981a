"""The supported architectures."""

from engine.models import deepseek, gemma, gpt_oss, llama, mixtral, phi3, qwen
from engine.models.family import Family

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        llama.FAMILY,
        llama.MISTRAL,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen.QWEN3_MOE,
        mixtral.FAMILY,
        gemma.GEMMA2,
        gemma.GEMMA3,
        phi3.FAMILY,
        deepseek.V2,
        deepseek.V3,
        gpt_oss.FAMILY,
    )
}
