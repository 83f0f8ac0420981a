"""OpenVINO GenAI or vLLM on CPU with one model; runs under their interpreter, without this package.

engine_peer.py ENGINE MODEL THREADS reads lines [prompts, number of tokens] and answers with the seconds from prompts to
their last token. MODEL: a checkpoint's folder for vLLM; a file .gguf in F16, or a folder of its own, for OpenVINO.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], None]
CONTEXT = 4096


def openvino(model: str, num_threads: int) -> Generate:
    """Continuous batching over paged attention, greedy."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.max_num_batched_tokens = CONTEXT
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    has_bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if has_bfloat16 else "f32"  # other precisions of its cache are refused there
    pipeline = openvino_genai.LLMPipeline(
        model,
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_PRECISION_HINT=precision,
        KV_CACHE_PRECISION=precision,
        INFERENCE_NUM_THREADS=num_threads,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        ids = np.array(prompts, dtype=np.int64)
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = settings.min_new_tokens = num_tokens
        settings.ignore_eos = True
        settings.do_sample = False
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        made = pipeline.generate(inputs, settings).tokens
        assert [len(tokens) for tokens in made] == [num_tokens] * len(prompts)

    return generate


def vllm(model: str, num_threads: int) -> Generate:  # noqa: ARG001
    """Its offline engine, greedy; threads are bound by VLLM_CPU_OMP_THREADS_BIND."""
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        model=model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=CONTEXT,
        max_num_seqs=64,
        max_num_batched_tokens=CONTEXT,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        settings = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in made] == [num_tokens] * len(prompts)

    return generate


ENGINES = {"openvino": openvino, "vllm": vllm}


def main() -> None:
    """One order per line."""
    name, model, num_threads = sys.argv[1:]
    generate = ENGINES[name](model, int(num_threads))
    generate([[1] * 32], 2)
    tell("ready")
    for order in sys.stdin:
        prompts, num_tokens = json.loads(order)
        begun_at = time.perf_counter()
        generate(prompts, num_tokens)
        tell(time.perf_counter() - begun_at)


def tell(answer: object) -> None:
    """One line to whoever started this process."""
    print("BENCH", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
